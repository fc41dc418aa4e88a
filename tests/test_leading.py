"""Ranks of large matrices, chosen by their leading singular values alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import save
from flora_tensor import _leading
from flora_tensor._leading import leading_frontier, listed_ranks


def falling(rows: int, columns: int, seed: int, power: float = 0.7, flat: float = 0.0) -> np.ndarray:
    """A matrix with singular values k^-power, plus noise of a norm."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(rows, columns))))[0] for n in (rows, columns))
    x = left * np.arange(1, min(rows, columns) + 1) ** -power @ right.T
    noise = rng.standard_normal(x.shape)
    return (x + flat * np.linalg.norm(x) / np.linalg.norm(noise) * noise).astype(np.float32)


@pytest.mark.parametrize(("power", "flat", "tolerance"), [(0.7, 0.0, 2e-4), (2.0, 0.1, 2e-3), (0.0, 0.0, 2e-2)])
def test_the_errors_are_those_of_the_singular_values(power: float, flat: float, tolerance: float):
    x = falling(600, 700, 0, power, flat)
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    tails = np.append(np.cumsum(exact[::-1])[::-1], 0.0)
    frontier, above = leading_frontier(x, 60, float(np.linalg.norm(x.astype(np.float64))), None)
    assert above is None
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
    expected, _ = leading_frontier(x, 20, norm, None)
    found, _ = leading_frontier((x.astype(np.float64) * scale).astype(np.float32), 20, norm * scale, None)
    np.testing.assert_allclose(found.error_squared[:-1] / scale**2, expected.error_squared[:-1], rtol=1e-4)


def test_directions_in_the_noise_are_not_listed():
    rng = np.random.default_rng(0)
    strong = rng.standard_normal((600, 3)) @ rng.standard_normal((3, 640))
    x = (strong + rng.standard_normal((600, 640))).astype(np.float32)
    frontier, above = leading_frontier(x, 30, float(np.linalg.norm(x)), 1.0)
    assert above == 3
    assert frontier.ranks[-1].tolist() == [3, 640]
    assert leading_frontier(x, 2, float(np.linalg.norm(x)), 1.0)[1] is None


def test_what_is_looked_at_grows_until_it_is_everything():
    assert listed_ranks((4096, 4096), 0.01, 0) == 82
    assert listed_ranks((4096, 4096), 0.01, 1) == 328
    assert listed_ranks((4096, 4096), 0.01, 2) == 1311
    assert listed_ranks((4096, 4096), 0.01, 3) is None
    for shape, share in (((256, 9999), 0.01), ((4096, 4096, 3), 0.01), ((4096, 4096), None)):
        assert listed_ranks(shape, share, 0) is None


def in_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_leading, "_LARGE", 10**9)


@pytest.mark.parametrize(
    "options", [{"max_ratio": 0.02}, {"max_parameters": 30000}, {"max_ratio": 0.02, "weights": "uniform"}]
)
def test_the_choice_is_that_of_full_spectra(options: dict[str, Any], tmp_path: Path):
    base = {f"w{k}": np.zeros((520, 560 + k), np.float32) for k in range(4)}
    tuned = {n: falling(*x.shape, k, 0.6 + 0.2 * k) for k, (n, x) in enumerate(base.items())}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    quick = ft.extract(*paths, tmp_path / "quick", **options)
    with pytest.MonkeyPatch.context() as patch:
        in_full(patch)
        full = ft.extract(*paths, tmp_path / "full", **options)
    assert sum(row.ranks != other.ranks for row, other in zip(quick.rows, full.rows)) <= 1  # ties may fall either way
    assert quick.relative_error == pytest.approx(full.relative_error, rel=1e-4)
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
    assert report["w2"].ranks[0] > (listed_ranks((512, 512), 0.02, 0) or 0)
