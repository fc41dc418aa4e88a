"""Decompositions of tensors so large that sketches pay, against all singular values."""

import math

import numpy as np
import pytest

import flora_tensor as ft
import support
from decomposition_cases import FORCED, assert_all_orthogonal, assert_orthonormal
from support import (
    Truth,
    as_array,
    dense,
    distance,
    frobenius,
    normal,
    optional,
    orthonormal,
    same_bits,
    tolerance,
)

torch = optional("torch")

# --- sizes at which sketching pays -------------------------------------------------------------------

LARGE = [((90, 80), (6, 6)), ((60, 50, 3), (5, 6, 3)), ((40, 36, 32), (4, 3, 5)), ((48, 40, 3, 3), (6, 5, 2, 2))]


def noisy(shape, ranks, dtype: str, level: float) -> np.ndarray:
    """Return a tensor of given ranks with noise of relative norm ``level`` on top."""
    rng = np.random.default_rng(math.prod(shape))
    planted = dense(normal(rng, ranks, dtype), [orthonormal(rng, n, r, dtype) for n, r in zip(shape, ranks)])
    noise = normal(rng, shape, dtype)
    return (planted + noise * (level * frobenius(planted) / frobenius(noise))).astype(dtype)


@pytest.mark.parametrize("method", ["auto", "randomized"])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize(("shape", "ranks"), LARGE)
@pytest.mark.parametrize("level", [1e-4, 0.3])
def test_sketched_decompositions_hold_the_same_identities(method, dtype, shape, ranks, level):
    """Orthonormal factors, an all-orthogonal core, the true error reported, and an error within the bounds of the
    spectra: the noise's flat spectrum is the hard case.
    """
    x = noisy(shape, ranks, dtype, level)
    fit = ft.tucker(x, ranks, method=method, rng=0)
    truth, t = Truth.of(x), fit.tucker
    rounding = tolerance(dtype, sum(shape))
    assert_orthonormal(t)
    assert_all_orthogonal(truth.core(t), 2 * rounding * truth.norm**2)
    true, tails = truth.error(t), truth.tails(ranks)
    assert fit.relative_error == pytest.approx(true, rel=1e-3)
    assert math.sqrt(max(tails)) - rounding <= true <= math.sqrt(sum(tails)) + rounding
    assert fit.lower_bound - rounding <= fit.relative_error <= fit.error_bound + rounding
    assert true <= 1.001 * truth.error(ft.st_hosvd(x, ranks))


@pytest.mark.parametrize("method", ["auto", "randomized"])
@pytest.mark.parametrize(("shape", "ranks"), LARGE)
def test_the_same_seed_gives_the_same_bits(method, shape, ranks):
    x = noisy(shape, ranks, "float64", 0.1)
    first, second = (ft.tucker(x, ranks, method=method, rng=3).tucker for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip((first.core, *first.factors), (second.core, *second.factors)))
    assert same_bits(ft.tucker(x, ranks, method=method).tucker.core, ft.tucker(x, ranks, method=method).tucker.core)
    other = ft.tucker(x, ranks, method=method, rng=np.random.default_rng(4))
    assert other.relative_error == pytest.approx(ft.tucker(x, ranks, method=method, rng=3).relative_error, rel=1e-2)


@pytest.mark.parametrize(("shape", "ranks"), LARGE)
@pytest.mark.parametrize("method", FORCED)
def test_tolerances_and_budgets_are_kept_at_size(method, shape, ranks):
    x = noisy(shape, ranks, "float32", 0.02)
    truth = Truth.of(x)
    for rtol in (0.03, 0.3):
        fit = ft.tucker(x, rtol=rtol, method=method)
        assert fit.relative_error == pytest.approx(truth.error(fit.tucker), rel=1e-3)
        assert truth.error(fit.tucker) <= rtol + tolerance("float32", sum(shape))
    budget = 1 + sum(n * r for n, r in zip(shape, ranks)) + math.prod(ranks)
    fit = ft.tucker(x, max_parameters=budget, method=method)
    assert fit.tucker.n_parameters <= budget
    assert truth.error(fit.tucker) <= 0.03


@pytest.mark.parametrize("name", ["torch", "array_api_strict"])
def test_every_library_sketches_alike(name):
    """The random numbers come from one generator whatever the library, so the results agree to rounding, with signs."""
    shape, ranks = LARGE[2]
    x = noisy(shape, ranks, "float64", 0.1)
    ours = ft.tucker(as_array(support.namespace(name), x), ranks, method="randomized", rng=0)
    theirs = ft.tucker(x, ranks, method="randomized", rng=0)
    assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-6)
    assert distance(ours.tucker.to_tensor(), theirs.tucker.to_tensor()) <= 1e-4 * frobenius(x)
    for u, v in zip(ours.tucker.factors, theirs.tucker.factors):
        assert (np.sum(support.to_numpy(u) * v, axis=0) > 0.99).all()


@pytest.mark.parametrize("shape", [(1500, 1400), (2000, 300), (400, 300, 3), (60, 50, 40)])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_sketches_of_what_has_hardly_any_rank_are_exact(shape, dtype):
    """A corner of four rows, a single entry, ones and zeros: bases have more room than there are directions."""
    corner, single = np.zeros(shape, dtype), np.zeros(shape, dtype)
    corner[:4, :4] = np.arange(1.0, 5).reshape(4, *[1] * (len(shape) - 1))  # of rank one
    single[(0,) * len(shape)] = 1.5
    ranks = (2,) * len(shape)
    for x in (corner, single, np.ones(shape, dtype), np.zeros(shape, dtype)):
        fit = ft.tucker(x, ranks, method="randomized")
        assert fit.method.startswith("randomized")
        assert_orthonormal(fit.tucker)
        assert Truth.of(x).error(fit.tucker) <= tolerance(dtype, sum(shape))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("kind", ["falling", "slow", "white", "low rank and noise"])
@pytest.mark.parametrize("shape", [(300, 260), (256, 700), (640, 256)])
def test_a_matrix_comes_within_a_thousandth_of_its_truncated_svd(shape, kind, dtype):
    """The documented end of the Krylov space, against all singular values; twelve equal ones are more than a block."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.standard_normal(shape)
    if kind != "white":
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        k = np.arange(1.0, len(s) + 1)
        s = {"falling": 0.9**k, "slow": k**-0.5, "low rank and noise": np.where(k <= 12, 1.0, 0.01 * s / s[0])}[kind]
        x = (u * s) @ vh
    x = x.astype(dtype)
    values = np.linalg.svd(x.astype(complex if np.dtype(dtype).kind == "c" else float), compute_uv=False)
    for rank in (1, 12, 40):
        fit = ft.tucker(x, rank, method="randomized")
        assert fit.method.startswith("randomized")
        least = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
        assert least * (1 - 1e-6) <= fit.relative_error <= least * (1 + 1e-3) + tolerance(dtype, sum(shape))
        assert_orthonormal(fit.tucker)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_tensors_in_the_processors_memory_give_the_bits_of_numpy(name):
    for shape, ranks in LARGE:
        x = noisy(shape, ranks, "float32", 0.1)
        ours, theirs = ft.tucker(as_array(support.namespace(name), x), ranks).tucker, ft.tucker(x, ranks).tucker
        assert all(same_bits(a, b) for a, b in zip((ours.core, *ours.factors), (theirs.core, *theirs.factors)))


# --- tolerances and budgets whose ranks are small: the adaptive range finder -------------------------

WIDE = [(300, 256), (160, 144, 3, 3), (8, 200, 170)]


def spread(shape, kind: str, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Return a tensor whose long modes decay ("exponential", "power"), or of low rank with noise, or white ("flat")."""
    rng = np.random.default_rng(seed)
    if kind == "noisy":
        return noisy(shape, [min(n, 5) for n in shape], dtype, 0.02)
    x = rng.standard_normal(shape)
    for mode, n in enumerate(shape):
        place = np.arange(n).reshape([-1 if k == mode else 1 for k in range(len(shape))])
        if n > 8 and kind != "flat":
            x = x * (np.exp(-0.8 * place) if kind == "exponential" else (1.0 + place) ** -1.5)
        x = np.moveaxis(np.tensordot(orthonormal(rng, n, n), x, axes=(1, mode)), 0, mode)
    return (x / frobenius(x)).astype(dtype)


def full_choice(x: np.ndarray, **criterion) -> ft.RankChoice:
    return ft.select_ranks(ft.hosvd_spectrum(x), **criterion)


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_the_range_finder_needs_no_more_ranks_than_the_full_hosvd(shape, rtol):
    """In float32. HOOI may save a rank of what the full HOSVD needs, so the parameters are compared from above."""
    x = spread(shape, "exponential")
    truth, exact = Truth.of(x), full_choice(x, rtol=rtol)
    fit = ft.tucker(x, rtol=rtol)
    assert fit.method.startswith("adaptive range finder")
    assert truth.error(fit.tucker) <= rtol * (1 + 1e-6)
    assert fit.tucker.n_parameters <= exact.n_parameters
    assert all(r <= s for r, s in zip(fit.tucker.ranks, exact.ranks))
    tails = truth.tails(fit.tucker.ranks)
    assert fit.lower_bound <= math.sqrt(max(tails)) * (1 + 1e-3) + 1e-7
    assert fit.lower_bound <= fit.relative_error <= fit.error_bound
    assert_orthonormal(fit.tucker)


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, "float32") for k in ("exponential", "power", "noisy", "flat")]
    + [("exponential", "complex128"), ("noisy", "float64")],
)
@pytest.mark.parametrize("rtol", [0.5, 0.05, 1e-3])
def test_tolerances_are_kept_whether_or_not_the_range_finder_gives_up(shape, kind, dtype, rtol):
    x = spread(shape, kind, dtype)
    truth, exact = Truth.of(x), full_choice(x, rtol=rtol)
    fit = ft.tucker(x, rtol=rtol)
    assert truth.error(fit.tucker) <= rtol * (1 + 1e-6)
    assert fit.relative_error == pytest.approx(truth.error(fit.tucker), rel=1e-3)
    assert fit.relative_error <= fit.error_bound
    # Choices among tuples of nearly the same cost may differ where the spectrum does not end.
    assert fit.tucker.n_parameters <= 1.02 * exact.n_parameters
    small = max(exact.ranks[k] / shape[k] for k in range(len(shape)) if shape[k] > 100) < 1 / 16
    assert fit.method.startswith("adaptive range finder") or not small
    assert "not small beside the sizes" in fit.method or fit.method.startswith("adaptive range finder")


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("kind", ["exponential", "power", "noisy", "flat"])
@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_budgets_are_spent_as_well_as_by_the_full_hosvd(shape, kind, share):
    x = spread(shape, kind)
    truth, budget = Truth.of(x), max(1 + sum(shape), int(share * math.prod(shape)))
    fit = ft.tucker(x, max_parameters=budget)
    assert fit.tucker.n_parameters <= budget
    error = truth.error(fit.tucker)
    # Products end when they gain less than rounding hides, or 0.02 % of the squared error.
    assert error <= 1.002 * full_choice(x, max_parameters=budget).relative_error + 1e-6
    assert fit.relative_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert fit.lower_bound <= fit.relative_error <= fit.error_bound


def test_the_range_finder_is_repeatable_and_leaves_small_or_differentiated_tensors_alone():
    x = spread(WIDE[1], "exponential")
    first, second = (ft.tucker(x, rtol=1e-3).tucker for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip((first.core, *first.factors), (second.core, *second.factors)))
    scaled = ft.tucker(x * np.float32(2.0**40), rtol=1e-3).tucker
    assert all(same_bits(a, b) for a, b in zip(first.factors, scaled.factors))
    other = ft.tucker(x, rtol=1e-3, rng=7).tucker
    assert distance(first.to_tensor(), other.to_tensor()) <= 2e-3
    for tensor, method in (
        (x[:100, :100], "auto"),
        (x, "hooi"),
        (x, "hosvd"),
        (torch.tensor(x, requires_grad=True), "auto"),
    ):
        assert "range finder" not in ft.tucker(tensor, rtol=0.1, method=method).method


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_the_range_finder_is_exact_on_what_has_hardly_any_rank(dtype):
    for shape in WIDE:
        corner = np.zeros(shape, dtype)
        corner[:4, :4] = np.arange(1.0, 5).reshape(4, *[1] * (len(shape) - 1))
        for x, ranks in ((corner, (1,) * len(shape)), (np.ones(shape, dtype), (1,) * len(shape))):
            fit = ft.tucker(x, rtol=1e-4)
            assert fit.method.startswith("adaptive range finder")
            assert fit.tucker.ranks == ranks
            assert fit.relative_error <= tolerance(dtype, sum(shape))


def test_float32_keeps_tolerances_where_differences_of_squares_cannot_see():
    """HOOI's gain, computed as ‖X‖² − ‖G‖², was once spent twice below √eps."""
    shape = (100, 100, 3, 3)
    for kind in ("power", "exponential"):
        x = spread(shape, kind)
        for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 2e-6):
            fit = ft.tucker(x, rtol=rtol)
            assert Truth.of(x).error(fit.tucker) <= rtol * (1 + 1e-6), (kind, rtol)
            assert fit.relative_error <= rtol
