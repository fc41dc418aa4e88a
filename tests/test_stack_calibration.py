"""Stacks under a calibration: the error of all outputs, against dense computations and least squares."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor._stack_norms import Outputs, StackMoments
from flora_tensor._weighting import Calibration
from flora_tensor.stacking import stacked_arrangement
from support import seeds

NAMES, STACK = tuple(f"layers.{k}.fc.weight" for k in range(4)), "layers.*.fc.weight"


def spd(rng: np.random.Generator, n: int, condition: float = 100.0) -> np.ndarray:
    """Return a second moment whose eigenvalues no floor touches."""
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return rng.uniform(0.1, 10.0) * (q * np.geomspace(1.0, condition, n)) @ q.T


def moments_of(rng: np.random.Generator, kind: str, n: int, axes: str = "i") -> ft.Moments:
    """Moments of all layers: multiples of one, unrelated, diagonals, or some of each and one missing."""
    common = spd(rng, n)
    found: dict[str, np.ndarray] = {}
    for k, name in enumerate(NAMES):
        own = spd(rng, n)
        if kind == "multiples":
            found[name] = 3.0**k * common
        elif kind == "mixed":
            found |= {} if k == 1 else {name: np.diag(own) if k == 2 else own}
        else:
            found[name] = np.diag(own) if kind == "diagonals" else own
    return ft.Moments(found, dict.fromkeys(found, axes), dict.fromkeys(found, 1))


def root_of(moments: ft.Moments, name: str, n: int) -> np.ndarray:
    """Return L with C = L Lᵀ."""
    value = np.asarray(moments.get(name, np.ones(n)))
    return np.linalg.cholesky(np.diag(value) if value.ndim == 1 else value)


def output_error(x: np.ndarray, moments: ft.Moments, weights: np.ndarray | None = None) -> float:
    """Return √(Σ w_l² ‖X_l C_l^½‖²) of a stack (L, o, i, …), densely."""
    n, parts = x.shape[2], zip(x, NAMES)
    lengths = [np.linalg.norm(np.einsum("oi...,ij->oj...", part, root_of(moments, name, n))) for part, name in parts]
    return float(np.linalg.norm(np.asarray(lengths) * (1.0 if weights is None else weights)))


def outputs_of(moments: ft.Moments, shape: tuple[int, ...], units: Any = (1.0,) * 4) -> list[Outputs]:
    found = StackMoments.of(Calibration.of(moments), STACK, NAMES, shape)
    assert found is not None
    return list(found.norms(units))


@settings(max_examples=25)
@given(
    seed=seeds,
    kind=st.sampled_from(["multiples", "unrelated", "diagonals", "mixed"]),
    case=st.sampled_from(
        [((5, 4), "o i"), ((3, 4, 2, 2), "o i h w"), ((3, 4, 2, 2), "(o h) (i w)"), ((4, 3, 2), "o (i w)")]
    ),
)
def test_the_error_of_every_truncation_is_that_of_the_outputs(seed: int, kind: str, case: tuple[tuple[int, ...], str]):
    shape, pattern = case
    rng = np.random.default_rng(seed)
    stack, moments = rng.standard_normal((4, *shape)), moments_of(rng, kind, shape[1])
    weights = rng.uniform(0.2, 3.0, 4)
    arrangement = stacked_arrangement(ft.Arrangement(pattern))
    for outputs in outputs_of(moments, shape, tuple(1 / weights)):
        x = arrangement.arrange(outputs.norm.scale_(stack.copy()))
        spectrum = ft.hosvd_spectrum(x)
        table = outputs.output_errors(x, [np.asarray(u) for u in spectrum.factors], arrangement)
        size = output_error(stack, moments, weights)
        assert table.total == pytest.approx(size**2, rel=1e-9)
        for _ in range(4):
            ranks = tuple(int(rng.choice(points)) for points in table.grid)
            factors = [u[:, :r] for u, r in zip(spectrum.factors, ranks)]
            core = spectrum.core[tuple(slice(r) for r in ranks)]
            back = outputs.norm.unscale(ft.TuckerTensor(core, factors), arrangement) if min(ranks) else None
            stored = 0.0 if back is None else arrangement.restore(back.to_tensor(), stack.shape)
            at = tuple(int(np.searchsorted(points, rank)) for points, rank in zip(table.grid, ranks))
            error = output_error(stack - stored, moments, weights)
            assert np.sqrt(table.errors[at]) == pytest.approx(error, rel=1e-6, abs=1e-7 * size)
        if kind == "multiples" and outputs.norm.root is not None:  # the plain error of the scaled stack
            np.testing.assert_allclose(table.errors, ft.error_table(spectrum.core), atol=1e-8 * size**2)


@settings(max_examples=15)
@given(seed=seeds, whole=st.sampled_from([(), (0,), (2,), (0, 2)]), kind=st.sampled_from(["unrelated", "mixed"]))
def test_the_core_approaches_that_of_least_squares(seed: int, whole: tuple[int, ...], kind: str):
    rng = np.random.default_rng(seed)
    stack, moments = rng.standard_normal((4, 6, 5)), moments_of(rng, kind, 5, axes="i")
    arrangement = stacked_arrangement(ft.Arrangement("o i"))
    for outputs in outputs_of(moments, (6, 5)):
        x = outputs.norm.scale_(stack.copy())
        ranks = [None if k in whole else r for k, r in enumerate((2, 3, 2))]
        start = ft.tucker(x, ranks).tucker
        better, error = outputs.best_core(x, start, arrangement)
        stored = outputs.norm.unscale(better, arrangement).to_tensor()
        assert output_error(stack - stored, moments) == pytest.approx(error, rel=1e-9)
        assert error <= output_error(stack - outputs.norm.unscale(start, arrangement).to_tensor(), moments) * (
            1 + 1e-12
        )
        # Oracle: all entries of the core as unknowns of one dense least-squares problem in the weights themselves.
        units = np.eye(start.core.size).reshape(-1, *start.core.shape)
        columns = []
        for unit in units:
            part = outputs.norm.unscale(ft.TuckerTensor(unit, start.factors), arrangement).to_tensor()
            columns.append(np.stack([p @ root_of(moments, n, 5) for p, n in zip(part, NAMES)]).ravel())
        wanted = np.stack([p @ root_of(moments, n, 5) for p, n in zip(stack, NAMES)]).ravel()
        design = np.stack(columns, axis=1)
        least = np.linalg.norm(wanted - design @ np.linalg.lstsq(design, wanted, rcond=None)[0])
        assert least * (1 - 1e-9) <= error <= least * (1 + 1e-2)


def pair(directory: Path, seed: int, *, noise: float = 0.1) -> tuple[tuple[Path, Path], dict[str, np.ndarray]]:
    """Layers that share directions, with noise, and a head."""
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((16, 3)), rng.standard_normal((3, 12))
    steps = {name: u @ rng.standard_normal((3, 3)) @ v + noise * rng.standard_normal((16, 12)) for name in NAMES}
    steps["head.weight"] = rng.standard_normal((6, 5))
    base = save(directory / "b.safetensors", {name: np.zeros_like(x) for name, x in steps.items()})
    return (base, save(directory / "t.safetensors", steps)), steps


def relative(steps: dict[str, np.ndarray], adapter: ft.Adapter, moments: ft.Moments, *, uniform: bool = False) -> float:
    """Return the error that counts, from the dense changes."""
    lost: list[float] = []
    size: list[float] = []
    for name, change in steps.items():
        root = root_of(moments, name, change.shape[1])
        kept = adapter.delta(name, dtype="float64") if name in adapter else 0 * change
        size.append(float(np.linalg.norm(change @ root)))
        lost.append(float(np.linalg.norm((change - kept) @ root)))
    return float(
        np.sqrt(np.mean((np.array(lost) / size) ** 2)) if uniform else np.linalg.norm(lost) / np.linalg.norm(size)
    )


@settings(max_examples=8)
@given(
    seed=seeds,
    kind=st.sampled_from(["multiples", "unrelated", "mixed"]),
    limit=st.sampled_from([{"max_ratio": 0.12}, {"max_ratio": 0.3}, {"rtol": 0.3}, {"rtol": 0.03}]),
    weights=st.sampled_from(["norm", "uniform"]),
)
def test_extraction_keeps_its_promises_in_the_norm_that_counts(
    seed: int, kind: str, limit: dict[str, Any], weights: str, tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("stack")
    paths, steps = pair(here, seed)
    moments = moments_of(np.random.default_rng(seed), kind, 12)
    uniform = weights == "uniform"
    options: dict[str, Any] = {"calibration": moments, "weights": weights, "dtype": "float64"} | limit
    report = ft.extract(*paths, here / "stack", stack=STACK, **options)
    apart = ft.extract(*paths, here / "apart", **options)
    adapter = ft.load_adapter(here / "stack")
    error, alone = (relative(steps, a, moments, uniform=uniform) for a in (adapter, ft.load_adapter(here / "apart")))
    if "rtol" in limit:
        assert error <= limit["rtol"] * (1 + 1e-6)
        assert report.n_parameters <= apart.n_parameters
        assert (report.lower_bound or 0) <= report.n_parameters
    else:
        assert error <= alone * (1 + 1e-6)
        assert report.n_parameters <= limit["max_ratio"] * report.dense_parameters
    if not uniform:
        assert report.weighted_error == pytest.approx(error, rel=1e-9)
    for row in report.rows:  # each measured on what is stored
        left = steps[row.name] - (adapter.delta(row.name, dtype="float64") if row.name in adapter else 0.0)
        root = root_of(moments, row.name, left.shape[1])
        assert row.weighted_norm == pytest.approx(np.linalg.norm(steps[row.name] @ root), rel=1e-9)
        assert row.weighted_error == pytest.approx(np.linalg.norm(left @ root) / row.weighted_norm, rel=1e-7, abs=1e-9)
        assert row.relative_error == pytest.approx(
            np.linalg.norm(left) / np.linalg.norm(steps[row.name]), rel=1e-7, abs=1e-9
        )
    promised = ft.extract(*paths, None, dry_run=True, stack=STACK, **options)
    if any(row.stack for row in report.rows):
        assert [row.ranks for row in promised.rows] == [row.ranks for row in report.rows]
        if not uniform:
            assert report.weighted_error <= (promised.weighted_error or 0.0) * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["multiples", "unrelated", "diagonals"])
def test_at_the_same_size_the_outputs_are_nearer_than_without_the_calibration(kind: str, tmp_path: Path):
    """Inputs vary a hundred times more in some directions than in others."""
    paths, steps = pair(tmp_path, 3, noise=0.5)
    moments = moments_of(np.random.default_rng(1), kind, 12)
    gains: list[float] = []
    for ratio in (0.05, 0.1, 0.15, 0.2, 0.3):
        given: dict[str, Any] = {"max_ratio": ratio, "stack": STACK, "include": STACK, "dtype": "float64"}
        plain = ft.extract(*paths, tmp_path / "p", overwrite=True, **given)
        weighted = ft.extract(*paths, tmp_path / "w", overwrite=True, calibration=moments, **given)
        layers = {name: steps[name] for name in NAMES}
        with_it, without = (relative(layers, ft.load_adapter(tmp_path / d), moments) for d in "wp")
        assert weighted.n_parameters <= ratio * weighted.dense_parameters
        assert with_it <= without * (1 + 1e-9)
        if plain[NAMES[0]].stack and weighted[NAMES[0]].stack:
            gains.append(with_it / without)
    assert len(gains) >= 2
    assert min(gains) < 0.95


def test_the_command_line_the_journal_and_refusals(tmp_path: Path):
    paths, _ = pair(tmp_path, 0)
    rng = np.random.default_rng(0)
    moments = moments_of(rng, "unrelated", 12)
    file = ft.save_moments(tmp_path / "m.safetensors", moments)
    out = tmp_path / "out"
    command = ["extract", *paths, "-o", out, "--max-ratio", "20%", "--stack", STACK, "--calibration", file]
    assert run(*command, "--dry-run").exit_code == 0
    done = run(*command, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert f"layer o i in {STACK}" in done.stdout
    left = iter(range(7))

    def interrupt(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"max_ratio": 0.2, "stack": STACK, "calibration": file}
    with pytest.raises(KeyboardInterrupt):
        ft.extract(*paths, tmp_path / "again", progress=interrupt, **options)
    ft.extract(*paths, tmp_path / "again", resume=True, **options)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    other = ft.Moments(
        dict(moments) | {NAMES[2]: np.ones(16)},
        moments.axes | {NAMES[2]: "o"},
        dict.fromkeys(moments, 1),
    )
    with pytest.raises(ft.InputError, match=r"the stack 'layers.\*.fc.weight' has moments of .* over the axes .*alike"):
        ft.extract(*paths, None, dry_run=True, max_ratio=0.2, stack=STACK, calibration=other)
    none = ft.Moments({"head.weight": np.eye(5)}, {"head.weight": "i"}, {"head.weight": 1})
    report = ft.extract(*paths, None, dry_run=True, max_ratio=0.2, stack=STACK, calibration=none)
    assert report[NAMES[0]].weighted_norm == report[NAMES[0]].delta_norm
