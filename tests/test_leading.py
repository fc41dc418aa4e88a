"""Ranks of large matrices, chosen by their leading singular values alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor import _survey
from flora_tensor._leading import Look, Reach, leading_look, reach_of
from support import optional

torch = optional("torch")


def falling(rows: int, columns: int, seed: int, power: float = 0.7, flat: float = 0.0) -> np.ndarray:
    """A matrix with singular values k^-power, plus noise of a norm."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(rows, columns))))[0] for n in (rows, columns))
    x = left * np.arange(1, min(rows, columns) + 1) ** -power @ right.T
    noise = rng.standard_normal(x.shape)
    return (x + flat * np.linalg.norm(x) / np.linalg.norm(noise) * noise).astype(np.float32)


def look(x: np.ndarray, rank: int, norm: float, noise: float | None) -> Look:
    return leading_look(x, Reach(rank * sum(x.shape), (rank, rank)), norm, noise)


@pytest.mark.parametrize(("power", "flat", "tolerance"), [(0.7, 0.0, 1e-5), (2.0, 0.1, 5e-4), (0.0, 0.0, 2e-2)])
def test_the_errors_are_those_of_the_singular_values(power: float, flat: float, tolerance: float):
    x = falling(600, 700, 0, power, flat)
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    tails = np.append(np.cumsum(exact[::-1])[::-1], 0.0)
    frontier, end, caps, *_ = look(x, 60, float(np.linalg.norm(x.astype(np.float64))), None)
    assert (end, caps) == (60 * 1300, None)
    ranks = frontier.ranks[:-1, 0]
    assert ranks.tolist() == list(range(61))
    assert frontier.n_parameters[:-1].tolist() == (ranks * 1300).tolist()
    assert frontier.ranks[-1].tolist() == [600, 700]
    assert (frontier.n_parameters[-1], frontier.error_squared[-1]) == (420000, 0)
    # Never below the least error, but for rounding, and hardly above it for the first quarter of the ranks.
    assert (frontier.error_squared[:-1] >= tails[:61] - 1e-6 * tails[0]).all()
    assert (frontier.error_squared[:16] <= tails[:16] * (1 + tolerance)).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_magnitude_is_too_small_or_large(scale: float):
    x = falling(520, 540, 0)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    expected = look(x, 20, norm, None).frontier
    found = look((x.astype(np.float64) * scale).astype(np.float32), 20, norm * scale, None).frontier
    np.testing.assert_allclose(found.error_squared[:-1] / scale**2, expected.error_squared[:-1], rtol=1e-4)


def test_directions_in_the_noise_are_not_listed():
    rng = np.random.default_rng(0)
    strong = rng.standard_normal((600, 3)) @ rng.standard_normal((3, 640))
    x = (strong + rng.standard_normal((600, 640))).astype(np.float32)
    frontier, end, caps, *_ = look(x, 30, float(np.linalg.norm(x)), 1.0)
    assert (end, caps) == (None, (3, 3))
    assert frontier.ranks[-1].tolist() == [3, 640]
    assert look(x, 2, float(np.linalg.norm(x)), 1.0).caps is None


def test_what_is_looked_at_grows_until_it_is_everything():
    for widening, rank in enumerate((82, 328, 1311)):
        assert reach_of((4096, 4096), 0.01, widening) == (rank * 8192, (rank, rank))
    assert reach_of((4096, 4096), 0.01, 3) is None
    for shape, share in (((256, 9999), 0.01), ((4096, 4096, 3), None), ((4096, 4096), None), ((4096, 4096), 0.3)):
        assert reach_of(shape, share, 0) is None
    # Of a tensor the large modes alone are cut, in proportion; where that is no small part only the list is.
    most, ranks = reach_of((1024, 512, 3, 3), 0.01, 0) or (0, None)
    assert most == -(-4 * 1024 * 512 * 9 // 100)
    assert ranks is not None
    assert ranks[2:] == (3, 3)
    assert abs(ranks[0] - 2 * ranks[1]) <= 2
    assert 0.95 * most < 9 * ranks[0] * ranks[1] + 1024 * ranks[0] + 512 * ranks[1] < 1.05 * most
    assert reach_of((1024, 512, 3, 3), 0.2, 0) == (-(-4 * 1024 * 512 * 9 // 5), None)
    assert reach_of((320, 320, 3, 3), 0.05, 0) == (184320, None)
    assert reach_of((4, 30, 5000), 0.05, 0) == (120000, None)
    assert reach_of((320, 320, 3, 3), 0.05, 2) is None


def kernel(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int, flat: float) -> np.ndarray:
    """A kernel of multilinear ranks, its core falling in all directions, and noise of a relative norm."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(ranks)
    for k, r in enumerate(ranks):
        core *= (np.arange(1.0, r + 1) ** -0.5).reshape([-1 if j == k else 1 for j in range(len(ranks))])
    factors = [np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in zip(shape, ranks)]
    x = ft.reconstruct(ft.TuckerTensor(core, tuple(factors)))
    noise = rng.standard_normal(shape)
    return (x + flat * np.linalg.norm(x) / np.linalg.norm(noise) * noise).astype(np.float32)


@pytest.mark.parametrize("shape", [(512, 528, 3, 2), (96, 520, 3, 3), (20, 30, 540)])
def test_the_errors_of_a_tensor_are_those_of_projections(shape: tuple[int, ...]):
    x = kernel(shape, tuple(min(n, 40) for n in shape), 0, 0.02)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    reach = reach_of(shape, 0.02, 0)
    assert reach is not None
    assert reach.ranks is not None
    frontier, end, _, values, _ = leading_look(x, reach, norm, None)
    assert end is not None
    full = ft.hosvd_spectrum(x)
    exact = full.frontier(partial=True, one_whole=True)
    for k, found in values.items():
        assert shape[k] >= 512
        leading = np.asarray(full.values[k])[: min(len(found) // 3, 20)]
        np.testing.assert_allclose(found[: len(leading)], leading, rtol=1e-4)
    assert frontier.error_squared[0] == pytest.approx(norm**2)
    assert frontier.ranks[-1].tolist() == list(shape)
    for count, error, ranks in zip(frontier.n_parameters, frontier.error_squared, frontier.ranks):
        if count < end / 4:
            at = np.searchsorted(exact.n_parameters, count, side="right") - 1
            assert error <= exact.error_squared[at] * (1 + 2e-3) + 1e-6 * norm**2
        # No truncation of the best tensor of these ranks could do better than its weakest unfolding.
        tails = [float(np.sum(np.square(v[r:], dtype=np.float64))) for v, r in zip(full.values, ranks)]
        assert error >= max(tails) * (1 - 1e-4) - 1e-6 * norm**2


def test_noise_in_a_tensor_ends_its_list():
    rng = np.random.default_rng(0)
    x = kernel((520, 512, 3, 3), (5, 4, 3, 3), 0, 0.0)
    deviation = 0.02 * float(np.linalg.norm(x)) / x.size**0.5
    x += (deviation * rng.standard_normal(x.shape)).astype(np.float32)
    reach = reach_of(x.shape, 0.01, 0)
    assert reach is not None
    frontier, end, caps, *_ = leading_look(x, reach, float(np.linalg.norm(x.astype(np.float64))), deviation)
    assert caps is not None
    assert caps[:2] == (5, 4)
    assert end is None
    assert frontier.ranks.max(axis=0).tolist() <= [520, 512, 3, 3]
    assert not (frontier.ranks == (520, 512, 3, 3)).all(axis=1).any()


def in_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_survey, "reach_of", lambda *_: None)


@pytest.mark.parametrize(
    "options", [{"max_ratio": 0.02}, {"max_parameters": 30000}, {"max_ratio": 0.02, "weights": "uniform"}]
)
def test_the_choice_is_that_of_full_spectra(options: dict[str, Any], tmp_path: Path):
    base = {f"w{k}": np.zeros((520, 560 + k), np.float32) for k in range(4)}
    tuned = {n: falling(*x.shape, k, 0.6 + 0.2 * k) for k, (n, x) in enumerate(base.items())}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    promised = ft.extract(*paths, None, dry_run=True, **options)
    quick = ft.extract(*paths, tmp_path / "quick", **options)
    with pytest.MonkeyPatch.context() as patch:
        in_full(patch)
        full = ft.extract(*paths, None, dry_run=True, **options)
    assert sum(row.ranks != other.ranks for row, other in zip(quick.rows, full.rows)) <= 1  # ties may fall either way
    assert promised.relative_error == pytest.approx(full.relative_error, rel=1e-5)
    assert quick.relative_error == pytest.approx(full.relative_error, rel=5e-4)  # `tucker` stops at such gains
    assert quick.n_parameters <= (options.get("max_parameters") or 0.02 * quick.dense_parameters)


def test_a_weight_that_wants_most_of_the_budget_is_looked_at_again(tmp_path: Path):
    base = {f"w{k}": np.zeros((512, 512), np.float32) for k in range(6)}
    tuned = {n: falling(512, 512, k, 0.1) * (1.0 if k == 2 else 1e-6) for k, n in enumerate(base)}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    phases: list[tuple[str, int, str]] = []
    report = ft.extract(
        *paths,
        tmp_path / "a",
        max_ratio=0.02,
        progress=lambda phase, done, total, name: phases.append((phase, total, name)),
    )
    assert [p for p in phases if p[0] == "reading" and p[1] == 1] == [("reading", 1, "w2")]
    with pytest.MonkeyPatch.context() as patch:
        in_full(patch)
        full = ft.extract(*paths, tmp_path / "full", max_ratio=0.02)
    assert report["w2"].ranks == full["w2"].ranks
    reach = reach_of((512, 512), 0.02, 0)
    assert reach is not None
    assert reach.ranks is not None
    assert report["w2"].ranks[0] > reach.ranks[0]


@pytest.mark.parametrize("options", [{"max_ratio": 0.02}, {"max_ratio": 0.02, "heads": 8}])
def test_the_choice_among_arrangements_is_that_of_full_spectra(options: dict[str, Any], tmp_path: Path):
    shapes = {"conv.weight": (512, 520, 3, 2), "small.weight": (64, 48, 3, 3), "attn.q_proj.weight": (512, 576)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tuned = {n: kernel(x.shape, tuple(min(20, m) for m in x.shape), k, 0.05) for k, (n, x) in enumerate(base.items())}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    quick = ft.extract(*paths, None, dry_run=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        in_full(patch)
        full = ft.extract(*paths, None, dry_run=True, **options)
    assert quick.relative_error == pytest.approx(full.relative_error, rel=1e-4)
    assert quick.n_parameters <= 0.02 * quick.dense_parameters


def test_a_merged_low_rank_update_comes_back_with_its_rank_at_default_settings(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    for name, shape in {"fc.weight": (512, 640), "conv.weight": (512, 520, 2, 2), "head.weight": (96, 80)}.items():
        weight = 0.02 * torch.randn(shape, generator=generator)
        change = torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, weight[0].numel(), generator=generator)
        base[name] = weight.bfloat16()
        tuned[name] = (base[name].float() + change.reshape(shape) * (0.01 * weight.norm() / change.norm())).bfloat16()
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    assert run("extract", *paths, "-o", tmp_path / "out").exit_code == 0
    assert {name: tucker.ranks[0] for name, tucker in ft.load_adapter(tmp_path / "out").items()} == dict.fromkeys(
        base, 8
    )


@pytest.mark.parametrize(("shape", "ratio"), [((640, 768), 0.03), ((520, 128, 3, 3), 0.04)])
def test_what_is_stored_is_as_good_as_the_best_of_its_rank(shape: tuple[int, ...], ratio: float, tmp_path: Path):
    tuned = falling(shape[0], int(np.prod(shape[1:])), 0, 0.5, 0.3).reshape(shape)
    paths = (
        save(tmp_path / "b.safetensors", {"w": np.zeros_like(tuned)}),
        save(tmp_path / "t.safetensors", {"w": tuned}),
    )
    report = ft.extract(*paths, tmp_path / "a", max_ratio=ratio)
    (tucker,) = ft.load_adapter(tmp_path / "a").values()
    if len(shape) == 2:
        rank = min(tucker.ranks)
        assert tucker.factors[1] is None
        exact = np.linalg.svd(tuned.astype(np.float64), compute_uv=False)
        least = float(np.sqrt(np.sum(exact[rank:] ** 2) / np.sum(exact**2)))
        assert least * (1 - 1e-6) <= report.relative_error <= least * (1 + 1e-3)
    stored = ft.load_adapter(tmp_path / "a").delta("w", dtype=np.float64)
    dense = float(np.linalg.norm(stored - tuned) / np.linalg.norm(tuned.astype(np.float64)))
    assert report.relative_error == pytest.approx(dense, rel=2e-5)
    for factor in tucker.factors:
        if factor is not None:
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-5)
