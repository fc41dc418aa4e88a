"""The rank study and its pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor.plots import plot_budgets, plot_spectra, save_figure


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {
        "conv": rng.standard_normal((8, 6, 3, 3)),
        "fc": np.zeros((5, 5)),
        "b": np.ones(3),
        "ids": np.ones((2, 2), int),
    }
    tuned = {
        **{n: t + 1 for n, t in base.items()},
        "conv": base["conv"] + rng.standard_normal((8, 6, 3, 3)),
        "fc": np.diag([4.0, 3.0, 1.0, 0.5, 0.0]),
    }
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


def test_a_study_agrees_with_the_functions_it_stands_for(pair: tuple[Path, Path]):
    study = ft.study_ranks(*pair, budgets=[0.1, 1.0])
    assert set(study.spectra) == {"conv", "fc"}
    np.testing.assert_allclose(study.spectra["fc"].values[0], [4, 3, 1, 0.5, 0], atol=1e-12)
    # 16, 25, 26, 26.25 of 26.25: nine tenths need two, 99 hundredths three.
    assert study.energy_ranks("fc", 0.9) == (2, 2)
    assert study.energy_ranks("fc", 0.99) == (3, 3)
    assert study.energy_ranks("fc", 1.0) == (4, 4)
    for budget in study.budgets:
        report = ft.extract(*pair, None, dry_run=True, max_ratio=budget.max_ratio, noise_floor=None, exclude="ids")
        assert budget.n_parameters == report.n_parameters
        assert budget.relative_error == pytest.approx(report.relative_error, rel=1e-9, abs=1e-12)
        assert budget.lower_bound <= budget.relative_error * (1 + 1e-12)
        assert budget.n_weights == report.count("tucker")
    with pytest.raises(ValueError, match="energy"):
        study.energy_ranks("fc", 1.5)
    with pytest.raises(KeyError):
        study.energy_ranks("b", 0.5)


def test_a_study_tries_heads_as_extraction_does(tmp_path: Path):
    rng = np.random.default_rng(0)
    # A sum of products over heads: of low rank with the heads as a mode, and of full rank without.
    change = np.einsum("h,d,i->hdi", *(rng.standard_normal(n) for n in (4, 6, 12)))
    change = (change * rng.choice([-1.0, 1.0], (4, 1, 12))).reshape(24, 12)
    base = {"layers.0.q_proj.weight": np.zeros((24, 12)), "fc": np.zeros((5, 4))}
    paths = (
        save(tmp_path / "b.safetensors", base),
        save(tmp_path / "t.safetensors", {"layers.0.q_proj.weight": change, "fc": rng.standard_normal((5, 4))}),
    )
    alone = ft.study_ranks(*paths, budgets=[0.2], heads=None)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_size": 24}')
    for study in (ft.study_ranks(*paths, budgets=[0.2]), ft.study_ranks(*paths, budgets=[0.2], heads=4)):
        report = ft.extract(*paths, None, dry_run=True, max_ratio=0.2, noise_floor=None)
        assert study.budgets[0].relative_error == pytest.approx(report.relative_error, rel=1e-9)
        assert study.budgets[0].relative_error < 0.9 * alone.budgets[0].relative_error
    shown = json.loads(run("ranks", *paths, "--heads", "none", "--budget", "20%", "--json").stdout)
    assert shown["budgets"][0]["relative_error"] == alone.budgets[0].relative_error
    with pytest.raises(ValueError, match="heads is 0; pass 'auto', None, or the number of heads"):
        ft.study_ranks(*paths, heads=0)


def test_a_study_looks_where_it_is_told_and_refuses_nothing_to_study(pair: tuple[Path, Path]):
    assert set(ft.study_ranks(*pair, include="c*").spectra) == {"conv"}
    assert set(ft.study_ranks(*pair, exclude=["c*"]).spectra) == {"fc"}
    with pytest.raises(ft.InputError, match="no selected weight differs"):
        ft.study_ranks(pair[0], pair[0])
    with pytest.raises(ValueError, match="budget is 0"):
        ft.study_ranks(*pair, budgets=[0.0])
    with pytest.raises(ft.ResourceError, match="ranks: 'conv' of shape"):
        ft.study_ranks(*pair, max_memory=10)


def test_pictures_have_titles_labels_and_a_panel_a_weight(pair: tuple[Path, Path], tmp_path: Path):
    study = ft.study_ranks(*pair)
    figure = plot_spectra(study.spectra, title="A title")
    assert [axes.get_title() for axes in figure.axes] == ["conv (8×6×3×3)", "fc (5×5)"]
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("index", "σ / σ₁")
        assert axes.get_legend() is not None
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [8, 6, 3, 3]
    assert len(figure.axes[1].lines[0].get_xdata()) == 4  # the zero has no place on a logarithm
    curves = plot_budgets({name: f[0] for name, f in study.frontiers.items()})
    (axes,) = curves.axes
    assert axes.get_ylabel() == "relative error"
    assert len(axes.lines) == 2
    for name, drawn in (("a.png", figure), ("b.svg", curves)):
        save_figure(drawn, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 2000


def test_many_weights_are_drawn_twelve_at_most_and_that_is_said():
    spectra = {f"w{k}": ft.mode_spectra(np.eye(3) * (k + 1)) for k in range(20)}
    figure = plot_spectra(spectra)
    assert len(figure.axes) == 12
    assert "12 largest of 20 weights" in figure.get_suptitle()
    assert figure.axes[0].get_title() == "w19 (3×3)"
    plot_spectra({"zero": ft.mode_spectra(np.zeros((3, 3)))})


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="plot_spectra: no spectra; pass at least one"):
        plot_spectra({})
    with pytest.raises(ValueError, match="plot_budgets: no frontiers; pass at least one"):
        plot_budgets({})


def test_without_matplotlib_the_error_names_the_extra():
    code = """
import sys
sys.modules["matplotlib"] = None
import numpy as np, flora_tensor as ft
from flora_tensor.plots import plot_spectra
try:
    plot_spectra({"w": ft.mode_spectra(np.eye(3))})
except ImportError as error:
    assert "pip install 'flora-tensor[viz]'" in str(error), error
else:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_of_stacks_agrees_with_extraction_and_is_shown_everywhere(tmp_path: Path):
    rng = np.random.default_rng(0)
    names, pattern = [f"layers.{k}.fc.weight" for k in range(5)], "layers.*.fc.weight"
    u, v = rng.standard_normal((12, 2)), rng.standard_normal((2, 10))
    steps = {name: u @ rng.standard_normal((2, 2)) @ v + 0.01 * rng.standard_normal((12, 10)) for name in names}
    steps |= {
        "head": rng.standard_normal((4, 4)),
        "layers.0.up.weight": np.eye(3),
        "layers.1.up.weight": np.zeros((3, 3)),
    }
    paths = (
        save(tmp_path / "b.safetensors", {name: np.zeros(x.shape) for name, x in steps.items()}),
        save(tmp_path / "t.safetensors", steps),
    )
    seen: list[tuple[int, int, str]] = []
    options = {"stack": [pattern, "layers.*.up.weight"], "budgets": [0.02, 0.2, 0.9]}
    study = ft.study_ranks(*paths, progress=lambda _, *call: seen.append(call), **options)
    assert [call[1] for call in seen] == [len(steps) + 2] * (len(steps) + 2)
    assert study.stacks == {pattern: tuple(names)}  # of the other only one member changed
    joint = np.stack([steps[name] for name in names])
    for values, expected in zip(study.spectra[pattern].values, ft.mode_spectra(joint).values):
        np.testing.assert_allclose(values, expected, atol=1e-12)
    assert set(study.weights) == set(steps) - {"layers.1.up.weight"}
    for budget in study.budgets:
        given = {"max_ratio": budget.max_ratio, "noise_floor": None, "stack": pattern}
        report = ft.extract(*paths, None, dry_run=True, **given)
        assert budget.n_parameters == report.n_parameters
        assert budget.relative_error == pytest.approx(report.relative_error, rel=1e-9, abs=1e-12)
        assert budget.lower_bound == pytest.approx(report.lower_bound, rel=1e-9, abs=1e-12)
        assert (budget.n_weights, bool(budget.stacks)) == (report.count("tucker"), any(r.stack for r in report.rows))
    assert study.budgets[1].stacks == (pattern,)
    alone = ft.study_ranks(*paths, budgets=[0.2])
    assert study.budgets[1].relative_error < 0.5 * alone.budgets[0].relative_error
    assert study.curve[-1] == pytest.approx(alone.curve[-1])
    page, picture = tmp_path / "ranks.html", tmp_path / "ranks.png"
    command = ["ranks", *paths, "--stack", pattern, "--budget", "20%", "--html", page]
    done = run(*command, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "5×12×10" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"  {pattern}")
    assert "Ranks of each stack" in page.read_text()
    assert picture.stat().st_size > 2000
    told = json.loads(run(*command, "--json").stdout)
    assert told["budgets"][0]["stacks"] == [pattern]
    assert {w["name"]: w["members"] for w in told["weights"] if "members" in w} == {pattern: names}
    with pytest.raises(ValueError, match=r"ranks: the stack 'x\*' matches no tensor to compare"):
        ft.study_ranks(*paths, stack="x*")
    for option in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"ranks: {option} pattern 'fc' matches no tensor; .*'\*fc\*'"):
            ft.study_ranks(*paths, **{option: "fc"})
    with pytest.raises(ft.ResourceError, match=r"ranks: 'layers.\*.fc.weight' of shape \(5, 12, 10\) needs"):
        ft.study_ranks(*paths, stack=pattern, max_memory=20_000)
