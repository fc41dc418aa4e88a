"""Ranks of large matrices, chosen by their leading singular values alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor import _survey
from flora_tensor._krylov import KrylovSpace
from flora_tensor._leading import Look, Reach, _leading, full_look, leading_look, reach_of
from support import namespace, optional

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
    for widening, rank in enumerate((31, 123, 492)):
        assert reach_of((4096, 4096), 0.01, widening) == Reach(rank * 8192, (rank, rank))
    assert reach_of((4096, 4096), 0.01, 3) is None
    # Where it is known what a number is worth, so wide a space grows in blocks that are as narrow as at first.
    assert reach_of((4096, 4096), 0.01, 1, price=2.0) == Reach(123 * 8192, (123, 123), 1 / 4, 2.0)
    assert reach_of((4096, 4096), 0.05, 1, price=2.0) == Reach(615 * 8192, (615, 615), 1 / 4, 2.0)
    assert reach_of((4096, 4096), 0.05, 2, price=2.0) == Reach(901 * 8192, (901, 901), 1 / 16, 2.0)
    assert reach_of((4096, 4096), 0.05, 3, price=2.0) is None
    for shape, share in (((256, 9999), 0.01), ((4096, 4096, 3), None), ((4096, 4096), None), ((4096, 4096), 0.3)):
        assert reach_of(shape, share, 0) is None
    # Of a tensor the large modes alone are cut, in proportion; where that is no small part only the list is.
    most, ranks, *_ = reach_of((1024, 512, 3, 3), 0.01, 0) or (0, None)
    assert most == -(-3 * 1024 * 512 * 9 // 200)
    assert ranks is not None
    assert ranks[2:] == (3, 3)
    assert abs(ranks[0] - 2 * ranks[1]) <= 2
    assert 0.95 * most < 9 * ranks[0] * ranks[1] + 1024 * ranks[0] + 512 * ranks[1] < 1.05 * most
    assert reach_of((1024, 512, 3, 3), 0.3, 0) is None
    assert reach_of((320, 320, 3, 3), 0.05, 0) == Reach(184320, None)
    assert reach_of((4, 30, 5000), 0.05, 0) == Reach(120000, None)
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
    frontier, end, _, values, *_ = leading_look(x, reach, norm, None)
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
    patch.setattr(_survey, "reach_of", lambda *_, **__: None)


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
    assert {p for p in phases if p[0] == "reading" and p[1] == 1} == {("reading", 1, "w2")}
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


@pytest.mark.parametrize("kind", ["low-rank", "graded", "equal", "scattered"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_blocks_of_a_krylov_space_are_orthonormal_whatever_the_matrix(kind: str, dtype: Any):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 80)))[0] for n in (90, 150))
    values = {
        "low-rank": np.where(np.arange(80) < 20, 1.0, 0.0),
        "graded": 10.0 ** -np.arange(80),
        "equal": np.ones(80),
        "scattered": np.where(np.arange(80) % 2, 1e-9, 1.0),
    }[kind]
    x = (left * values @ right.T).astype(dtype)
    space = KrylovSpace(namespace("numpy"), x, 0, 12, np.random.default_rng(0))
    for _ in range(5):
        space.grow()
    basis = space.basis.astype(np.complex128)
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(60), atol=50 * np.finfo(dtype).eps)
    np.testing.assert_allclose(np.concatenate(space.rows), space.basis.conj().T @ x, atol=1e-5)


@given(st.lists(st.integers(1, 7), min_size=3, max_size=4), st.floats(0.05, 0.9), st.integers(0, 99))
def test_the_short_list_of_a_tensor_is_what_its_spectrum_lists(sizes: list[int], share: float, seed: int):
    x = np.random.default_rng(seed).standard_normal(sizes)
    most = math.ceil(share * x.size)
    expected = ft.hosvd_spectrum(x).frontier(max_parameters=most, partial=True, one_whole=True)
    found = full_look(x, None, most).frontier
    # Of errors that are equal but for rounding either may be listed: the least error at every size is the same.
    at = np.union1d(found.n_parameters, expected.n_parameters)
    left, right = (f.error_squared[np.searchsorted(f.n_parameters, at, side="right") - 1] for f in (found, expected))
    np.testing.assert_allclose(left, right, atol=1e-12 * expected.norm_squared)


@settings(max_examples=6)
@given(st.floats(0, 2), st.floats(0, 1), st.integers(0, 99))
def test_estimates_come_from_below_and_those_that_settled_are_near(power: float, flat: float, seed: int):
    x = falling(520, 560, seed, power, flat)
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    total = float(np.sum(exact))
    found = _leading(x, 0, Reach(40 * 1080, (40, 40)), total)
    assert (found.squares <= exact[:40] + 1e-6 * total).all()
    tails = total - np.cumsum(exact)[:40]
    listed = total - np.cumsum(found.squares)
    assert (listed >= tails - 1e-6 * total).all()
    near = slice(found.settled)
    assert found.settled >= 30
    # What further blocks would take off was at most 2.8 times what the last one may, 7e-4 (measured, on noise alone).
    assert (listed[near] <= tails[near] * (1 + 4 * 7e-4) + 1e-6 * total).all()


def test_an_arrangement_without_hope_is_left_early_and_changes_nothing():
    x = kernel((512, 520, 3, 2), (30, 520, 3, 2), 0, 0.01)
    rows, other = x.reshape(512, -1), np.ascontiguousarray(np.transpose(x, (0, 2, 1, 3))).reshape(1536, 1040)
    norm, reach = float(np.linalg.norm(x.astype(np.float64))), Reach(30 * 3632, (40, 40))
    best = leading_look(rows, reach, norm, None)
    early = leading_look(other, reach, norm, None, rivals=[best.frontier])
    late = leading_look(other, reach, norm, None)
    assert early.bases[1].shape[1] < late.bases[1].shape[1]
    chosen = [
        ft.allocate_ranks({"w": [best.frontier, look.frontier]}, max_parameters=most)
        for most in (5000, 20000, 80000, 150000)
        for look in (early, late)
    ]
    for a, b in zip(chosen[::2], chosen[1::2]):
        assert a.choices["w"].option == b.choices["w"].option
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-3)


@pytest.mark.parametrize("shape", [(640, 768), (768, 640), (90, 70), (40, 90), (24, 20, 3, 3), (20, 24, 3, 3)])
def test_what_was_found_by_looking_is_what_is_stored(shape: tuple[int, ...], tmp_path: Path):
    tuned = falling(shape[0], math.prod(shape[1:]), 0, 1.0, 0.1).reshape(shape)
    base = save(tmp_path / "b.safetensors", {"w": np.zeros_like(tuned)})
    report = ft.extract(base, save(tmp_path / "t.safetensors", {"w": tuned}), tmp_path / "a", max_ratio=0.1)
    adapter = ft.load_adapter(tmp_path / "a")
    (tucker,) = adapter.values()
    rest = adapter.delta("w", dtype=np.float64) - tuned
    assert report["w"].relative_error == pytest.approx(
        float(np.linalg.norm(rest) / np.linalg.norm(tuned.astype(np.float64))), rel=2e-5
    )
    whole = [mode for mode, factor in enumerate(tucker.factors) if factor is not None]
    arranged = ft.Arrangement(report["w"].arrangement or "").arrange(tuned).astype(np.float64)
    if len(whole) == 1:
        exact = np.linalg.svd(ft.unfold(arranged, whole[0]), compute_uv=False)
        tail = float(np.sum(exact[tucker.ranks[whole[0]] :] ** 2))
        # 2e-4: where a block of the Krylov space gains less than 7e-4 of the squared error it was the last.
        assert np.linalg.norm(rest) <= math.sqrt(tail) * (1 + 2e-4)
    for factor in tucker.factors:
        if factor is not None:
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-5)
