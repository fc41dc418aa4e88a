"""How results show themselves: as a table, in a notebook, and in one line."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import save

# Names are the files' own; these would change a page, or break a line.
NAMES = ["<b>bold</b>.weight", "a&amp;b.weight", "quoted\"'.weight", "plain.weight"]


class Page(HTMLParser):
    """Reads a page's tags, all of which it must close, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    here: Path = tmp_path_factory.mktemp("reporting")
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal((6, 5)) for name in NAMES}
    tuned = {name: weight + rng.standard_normal((6, 5)) for name, weight in base.items()}
    before, after = save(here / "b.safetensors", base), save(here / "t.safetensors", tuned)
    extraction = ft.extract(before, after, here / "a", ranks=2)
    spectra = {name: ft.hosvd_spectrum(weight) for name, weight in base.items()}
    return {
        "ExtractionReport": extraction,
        "MergeReport": ft.merge_checkpoint(before, here / "a", here / "m.safetensors"),
        "DiffReport": ft.diff_checkpoints(before, after),
        "AdapterFit": ft.round_adapter(here / "a", max_ratio=0.5),
        "RankStudy": ft.study_ranks(before, after),
        "Allocation": ft.allocate_ranks(spectra, max_ratio=0.5),
        "Frontier": spectra[NAMES[0]].frontier(),
        "Spectrum": spectra[NAMES[0]],
        "ModeSpectra": ft.mode_spectra(base[NAMES[0]]),
        "TuckerFit": ft.tucker(base[NAMES[0]], 2),
        "Checkpoint": ft.open_checkpoint(before),
        "Adapter": ft.load_adapter(here / "a"),
    }


def check_tabled(report: Any, names: list[str]) -> None:
    """Check that a report prints and shows all of its table, and nothing that a name could add to a page."""
    page = Page(report._repr_html_())
    assert page.tags == ["pre"]
    assert page.text == str(report) == report.to_table()
    assert [name for name in names if name not in page.text] == []


@pytest.mark.parametrize("kind", ["ExtractionReport", "DiffReport", "AdapterFit", "RankStudy"])
def test_a_notebook_shows_every_row_and_no_tag_of_a_name(shown: dict[str, Any], kind: str):
    check_tabled(shown[kind], NAMES)


@pytest.mark.parametrize("kind", ["ExtractionReport", "MergeReport", "DiffReport", "AdapterFit", "RankStudy"])
def test_a_report_says_in_its_json_which_version_made_it(shown: dict[str, Any], kind: str):
    assert json.loads(shown[kind].to_json())["flora_tensor_version"] == ft.__version__


def test_a_merge_shows_what_it_counted(shown: dict[str, Any]):
    check_tabled(shown["MergeReport"], ["4 tensors merged, 0 replaced, 0 copied", "m.safetensors"])


def test_an_attached_adapter_is_shown_alike():
    torch = pytest.importorskip("torch")
    import flora_torch

    model = torch.nn.Module()
    for name in ("<b>", "a&amp;b", "plain"):
        model.add_module(name, torch.nn.Linear(4, 3))
    report = flora_torch.attach(model, ranks=1)
    check_tabled(report, ["<b>.weight", "a&amp;b.weight", "plain.weight"])
    assert repr(report).startswith("AttachReport(adapter 'default'")
    assert "\n" not in repr(report)


@pytest.mark.parametrize(
    "kind",
    [
        *("ExtractionReport", "MergeReport", "DiffReport", "AdapterFit", "RankStudy", "Allocation"),
        *("Frontier", "Spectrum", "ModeSpectra", "TuckerFit", "Checkpoint", "Adapter"),
    ],
)
def test_a_repr_is_one_line_that_says_what_it_is_of_and_lists_no_weights(shown: dict[str, Any], kind: str):
    text = repr(shown[kind])
    assert text.startswith(f"{kind}(")
    assert text.endswith(")")
    assert "\n" not in text
    assert not any(name in text for name in NAMES)


def test_a_report_of_rows_is_asked_by_name(shown: dict[str, Any]):
    for kind in ("ExtractionReport", "DiffReport", "AdapterFit"):
        assert shown[kind][NAMES[0]].name == NAMES[0]
        with pytest.raises(KeyError, match="nowhere"):
            shown[kind]["nowhere"]
