"""The HTML pages: whole, safe with any name, and with the numbers of the JSON."""

import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor._checks import printable
from flora_tensor._layer_grid import layer_grids, natural_key
from flora_tensor.allocation import budget_curve
from flora_tensor.html_report import report_html, study_html
from flora_tensor.plots import plot_report, save_figure
from flora_tensor.report import ExtractionReport, TensorRow

EVIL = "</td><script>alert('1')</script>.weight"
_VOID = {"meta", "line", "circle", "polyline", "wbr"}


class Page(HTMLParser):
    """Reads a page: every tag is closed, and the tables' texts are kept by caption."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.facts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("dt", "dd"):
            self.facts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif {"dt", "dd"} & set(self.open):
            self.facts[-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def decaying(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    matrix = rng.standard_normal((shape[0], math.prod(shape[1:])))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return ((u * s * np.arange(1, len(s) + 1) ** -1.0) @ vt).reshape(shape)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    shapes = {EVIL: (12, 10), "conv&$x_1$.weight": (8, 6, 3, 3), "same.weight": (4, 4), "a\x1b[31m.weight": (9, 7)}
    base = {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"b.bias": np.zeros(3)}
    tuned = {name: w + decaying(rng, w.shape) if w.ndim > 1 else w + 1 for name, w in base.items()}
    tuned["same.weight"] = base["same.weight"]
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


def test_the_page_of_an_extraction_has_every_tensor_and_the_numbers_of_the_json(
    pair: tuple[Path, Path], tmp_path: Path
):
    report = ft.extract(*pair, tmp_path / "a", max_ratio=0.3)
    text = report_html(report, title=EVIL)
    page = Page(text)
    assert "<script>alert" not in text
    assert page.count("script") == 1
    told = json.loads(report.to_json())
    heat, tensors = page.tables
    rows = {row[0]: row for row in tensors[1:]}
    assert list(rows) == [
        printable(row["name"]) for row in sorted(told["tensors"], key=lambda r: natural_key(r["name"]))
    ]
    for row in told["tensors"]:
        shown = rows[printable(row["name"])]
        assert shown[1] == "×".join(map(str, row["shape"]))
        assert shown[5] == ("" if row["relative_error"] is None else f"{row['relative_error']:.4g}")
        assert shown[6] == ("" if row["lower_bound"] is None else f"{row['lower_bound']:.4g}")
        assert shown[4] == (f"{row['n_parameters']:,}" if row["n_parameters"] else "")
        assert row["arrangement"] in shown[2]
    totals = dict(zip(page.facts[::2], page.facts[1::2]))
    assert totals["numbers stored"] == f"{told['totals']['n_parameters']:,}"
    assert totals["relative error"] == f"{told['totals']['relative_error']:.4g}"
    kept = {row[0]: row[1:] for row in heat[1:]}
    for row in told["tensors"]:
        if row["status"] == "tucker":
            cells = [f"{rank} / {size}" for rank, size in zip(row["ranks"], row["modes"])]
            assert kept[printable(row["name"])][: len(cells)] == cells


def test_the_page_needs_nothing_else_and_can_be_used_by_all(pair: tuple[Path, Path]):
    page = Page(text := report_html(ft.extract(*pair, None, dry_run=True, max_ratio=0.3)))
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any(key in ("src", "href", "onclick") for _, attributes in page.tags for key in attributes)
    assert "http://" not in text
    assert "https://" not in text
    assert ("html", {"lang": "en"}) in page.tags
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in page.tags)
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in page.tags if tag == "meta")
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    assert page.count("caption") == page.count("table") == 2
    assert "dry run" in text


def test_the_page_of_a_study(pair: tuple[Path, Path]):
    study = ft.study_ranks(*pair, budgets=[0.1, 0.5])
    page = Page(text := study_html(study))
    assert "<script>alert" not in text
    budgets, _, weights = page.tables
    assert [row[0] for row in weights[1:]] == [printable(name) for name in sorted(study.spectra, key=natural_key)]
    assert [row[3] for row in budgets[1:]] == [f"{row.relative_error:.4g}" for row in study.budgets]
    assert json.loads(study.to_json())["curve"] == [list(point) for point in study.curve]


@given(names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
def test_any_name_makes_a_page(names):
    rows = tuple(TensorRow(n, "tucker", shape=(4, 4), arrangement="o i", ranks=(1, 1), modes=(4, 4)) for n in names)
    page = Page(report_html(ExtractionReport(rows, 16, 9, 0, 0.5, curve=((0, 1.0), (9, 0.5), (16, 0.0)))))
    assert [row[0] for row in page.tables[-1][1:]] == [printable(name) for name in sorted(names, key=natural_key)]


def test_the_curve_is_met_by_allocations(pair: tuple[Path, Path]):
    study = ft.study_ranks(*pair)
    curve = study.curve
    assert curve[0] == (0, 1.0)
    assert curve[-1][1] <= 1e-12
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    for stored, error in curve[1:]:
        allocation = ft.allocate_ranks(study.frontiers, max_parameters=stored)
        assert allocation.relative_error == pytest.approx(error, rel=1e-9, abs=1e-12)
        assert allocation.gap <= 1e-9
    thinned = budget_curve(study.frontiers, most=3)
    assert set(thinned) <= set(budget_curve(study.frontiers, most=10_000))
    assert len(thinned) <= 5
    zero = ft.hosvd_spectrum(np.zeros((3, 3))).frontier()
    assert budget_curve({"zero": [zero]}) == ()


def test_the_command_line_writes_pages_and_pictures(pair: tuple[Path, Path], tmp_path: Path):
    done = run("extract", *pair, "--dry-run", "--html", tmp_path / "e.html", "--plot", tmp_path / "e.png")
    assert done.exit_code == 0, done.output
    assert Page((tmp_path / "e.html").read_text("utf-8")).tables
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    done = run("ranks", *pair, "--html", tmp_path / "r.html", "--plot", tmp_path / "r.svg")
    assert done.exit_code == 0, done.output
    assert Page((tmp_path / "r.html").read_text("utf-8")).tables
    assert not list(tmp_path.glob(".*"))
    failed = run("extract", *pair, "-o", tmp_path / "x", "--html", tmp_path / "none" / "e.html")
    assert failed.exit_code == 2
    assert "is a directory or lies in none" in failed.stderr
    assert not (tmp_path / "x").exists()


def of_layers(count: int) -> ExtractionReport:
    """A network of layers of which every fourth keeps heads as a mode, beside one tensor that is in no layer."""
    rows = [TensorRow("patch.weight", "tucker", ranks=(2, 3), modes=(8, 3), n_parameters=30)]
    for k in range(count):
        name = f"model.layers.{k}.attn"
        ranks, modes = ((4, 2, k % 5 + 1), (4, 4, 9)) if k % 4 == 3 else ((k % 8 + 1, 9), (16, 9))
        rows.append(TensorRow(f"{name}.q.weight", "tucker", ranks=ranks, modes=modes, n_parameters=50))
        rows.append(TensorRow(f"{name}.v.weight", "tucker", ranks=(1, 9), modes=(16, 9), n_parameters=25))
    return ExtractionReport(tuple(rows), 9999, 999, 0, 0.5, curve=((0, 1.0), (999, 0.5), (9999, 0.0)))


def test_ranks_are_shown_by_layer_and_mode():
    report = of_layers(24)
    grid, others, _ = Page(report_html(report)).tables
    assert grid[0] == ["weight", "mode", *map(str, range(24))]
    found = {(row[0], int(row[1])): row[2:] for row in grid[1:]}
    expected = {
        (label, mode): [""] * 24 for label, mode in (("attn.q", 0), ("attn.q", 1), ("attn.q", 2), ("attn.v", 0))
    }
    for row in report.rows[1:]:
        layer, label = int(row.name.split(".")[2]), row.name.partition(".attn.")[2][0]
        for mode, rank in enumerate(row.ranks):
            if (f"attn.{label}", mode) in expected:
                expected[f"attn.{label}", mode][layer] = str(rank)
    assert found == expected
    assert [row[0] for row in others[1:]] == ["patch.weight"]
    right = plot_report(report).axes[1]
    assert [text.get_text() for text in right.get_yticklabels()] == [f"{w}, mode {m}" for w, m in found]
    assert [text.get_text() for text in right.get_xticklabels()] == [str(k) for k in range(24)]
    assert sorted(t.get_text() for t in right.texts) == sorted(cell for row in found.values() for cell in row if cell)


def test_layers_are_told_by_the_number_that_takes_the_most_values():
    names = [f"blocks.{k}.to_out.0.weight" for k in range(3)]
    names += [f"moe.{k}.experts.{e}.up.weight" for k in range(2) for e in range(5)]
    names += ["stem.0.weight", "alone.weight"]
    grids = layer_grids(dict.fromkeys(names, ((1, 2), (4, 4))))
    assert {title: [(row.label, row.mode, list(row.cells)) for row in rows] for title, rows in grids.items()} == {
        "blocks.*": [("blocks.*.to_out.0.weight", mode, [0, 1, 2]) for mode in (0, 1)],
        "moe.*.experts.*": [(f"moe.{k}.experts.*.up.weight", mode, [0, 1, 2, 3, 4]) for k in (0, 1) for mode in (0, 1)],
    }


def test_a_picture_of_many_tensors_shows_the_largest(tmp_path: Path):
    rows = tuple(
        TensorRow(f"layer{k}.weight", "tucker", shape=(8, 8), ranks=(k % 8 + 1,) * 2, modes=(8, 8), n_parameters=k + 1)
        for k in range(50)
    )
    figure = plot_report(ExtractionReport(rows, 3200, 1275, 0, 0.5, curve=((0, 1.0), (1275, 0.5), (3200, 0.0))))
    left, right = figure.axes[:2]
    assert len(right.get_yticklabels()) == 40
    assert "the 40 largest" in right.get_title()
    assert left.lines[1].get_xydata().tolist() == [[1275 / 3200, 0.5]]
    save_figure(figure, tmp_path / "a.png")
    plot_report(ExtractionReport((), 0, 0, 0, 0.0))
