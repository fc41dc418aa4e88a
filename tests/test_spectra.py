"""Singular values of unfoldings, and the exact error of every rank tuple, compared with brute force."""

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor._prepared import prepare
from flora_tensor._rank_errors import ErrorTable, rank_grid
from flora_tensor._unformed import UnformedSpectrum
from flora_tensor.spectra import cheapest_spectrum
from support import (
    EVERY_DTYPE,
    FLOATING,
    INTEGRAL,
    Sample,
    Truth,
    as_array,
    dense,
    distance,
    dtype_name,
    for_all,
    frobenius,
    normal,
    orthonormal,
    same_bits,
    samples,
    seeds,
    shapes,
    supports,
    times_power_of_two,
    to_numpy,
    tolerance,
)

DOUBLE = {"dtypes": ("float64", "complex128"), "scales": ("unit",), "layouts": ("C",)}


def cores(**options):
    """Draw NumPy tensors of 1 to 5 modes of 0 to 6 entries."""
    options = {"max_ndim": 5, "max_dim": 6, "max_size": 600} | DOUBLE | options
    return samples(**options).map(lambda sample: sample.values)


def brute_error(core: np.ndarray, ranks) -> float:
    """Return the sum of the squares outside the leading block, by exact summation."""
    squares = np.abs(core.astype(complex)) ** 2
    squares[tuple(slice(r) for r in ranks)] = 0.0
    return math.fsum(squares.flat)


def n_parameters(ranks, shape) -> int:
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks))


def brute_frontier(spectrum: ft.Spectrum) -> dict[int, float]:
    """Return the Pareto set as {parameters: squared error}, over all feasible tuples."""
    points = {0: spectrum.norm**2}
    for ranks in itertools.product(*(range(1, m + 1) for m in spectrum.max_ranks)):
        if ft.feasible_ranks(ranks, ranks) != ranks:
            continue
        p = n_parameters(ranks, spectrum.shape)
        points[p] = min(points.get(p, math.inf), brute_error(to_numpy(spectrum.core), ranks))
    best, front = math.inf, {}
    for p, e in sorted(points.items()):
        if e < best:
            best, front[p] = e, e
    return front


# --- singular values ---------------------------------------------------------------------------------


@for_all(jax_shapes=((4, 3, 5), (5, 3)), sample=samples(dtypes=EVERY_DTYPE, max_size=512))
def test_mode_spectra_are_the_singular_values_of_the_unfoldings(xp, sample):
    spectra = ft.mode_spectra(sample.to(xp))
    truth = Truth.of(sample.values)
    assert spectra.kind == "exact"
    assert spectra.shape == sample.shape
    assert len(spectra.values) == len(sample.shape)
    for ours, theirs in zip(spectra.values, truth.values):
        limit = tolerance(ours.dtype, sum(sample.shape), norm=sample.norm, xp=xp)
        assert distance(ours, times_power_of_two(theirs, truth.exponent)) <= limit
        assert (np.diff(to_numpy(ours).astype(float)) <= 0).all()
    assert abs(spectra.norm - sample.norm) <= tolerance(
        spectra.values[0].dtype, sum(sample.shape), norm=sample.norm, xp=xp
    )
    if sample.dtype not in INTEGRAL:
        real = "float64" if sample.dtype in ("float64", "complex128") else "float32"
        assert {dtype_name(v.dtype) for v in spectra.values} == {real}


@for_all(jax_shapes=((4, 3, 5), (5, 3)), sample=samples(dtypes=FLOATING, scales=("unit",), max_size=512))
def test_tails_are_the_squares_that_a_rank_leaves_out(xp, sample):
    spectra = ft.mode_spectra(sample.to(xp))
    for tail, values in zip(spectra.tails(), spectra.values):
        values = to_numpy(values).astype(float)
        expected = [math.fsum(values[r:] ** 2) for r in range(len(values) + 1)]
        assert np.allclose(tail, expected, rtol=1e-12, atol=0)


@for_all(jax_shapes=((4, 3, 5), (5, 3)), sample=samples(dtypes=FLOATING, max_size=512))
def test_a_spectrum_is_a_full_hosvd(xp, sample):
    spectrum = ft.hosvd_spectrum(sample.to(xp))
    t = ft.TuckerTensor(spectrum.core, spectrum.factors)
    limit = tolerance(sample.dtype, sum(sample.shape), norm=sample.norm, xp=xp)
    assert Truth.of(sample.values).error(t) * (sample.norm or 1.0) <= limit
    counts = tuple(min(n, math.prod(sample.shape[:k] + sample.shape[k + 1 :])) for k, n in enumerate(sample.shape))
    assert spectrum.max_ranks == tuple(spectrum.core.shape) == counts
    assert tuple(v.shape[0] for v in spectrum.values) == counts
    assert spectrum.norm == pytest.approx(sample.norm, rel=1e-6, abs=limit)


@for_all(
    jax_shapes=((2, 3),),
    sample=samples(dtypes=FLOATING, min_ndim=2, max_ndim=3, min_dim=1, max_dim=3),
    place=st.integers(0, 3),
    data=st.data(),
)
def test_a_mode_longer_than_all_others_is_seen_without_its_svd(xp, sample, place, data):
    place = min(place, len(sample.shape))
    tall = dataclasses.replace(sample, shape=(*sample.shape[:place], 30, *sample.shape[place:]))
    spectrum, truth = cheapest_spectrum("test", tall.to(xp)), Truth.of(tall.values)
    limit = tolerance(tall.dtype, sum(tall.shape), norm=tall.norm, xp=xp)
    for ours, theirs in zip(spectrum.values, truth.values, strict=True):
        assert distance(ours, times_power_of_two(theirs, truth.exponent)) <= limit
    assert spectrum.shape == tall.shape
    # The error that a truncation is said to have is that of the numbers themselves, formed densely.
    ranks = tuple(data.draw(st.integers(0, m)) for m in spectrum.max_ranks)
    wide = np.complex128 if np.iscomplexobj(tall.values) else np.float64
    core, *factors = (to_numpy(a).astype(wide) for a in (spectrum.core, *spectrum.factors))
    kept = dense(core[tuple(slice(r) for r in ranks)], [u[:, :r] for u, r in zip(factors, ranks)])
    assert abs(frobenius(tall.values - kept) - spectrum.error(ranks) * tall.norm) <= limit


def test_reprs_are_summaries():
    x = np.diag([2.0, 1.0])
    assert repr(ft.mode_spectra(x)) == "ModeSpectra(shape=(2, 2), kind='exact', counts=(2, 2), norm=2.23607)"
    assert repr(ft.hosvd_spectrum(x)) == "Spectrum(shape=(2, 2), max_ranks=(2, 2), norm=2.23607)"


# --- the error of every rank tuple -------------------------------------------------------------------


@given(core=cores(min_dim=0))
def test_the_table_equals_brute_force_for_all_tuples(core):
    table = ft.error_table(core)
    assert table.shape == tuple(n + 1 for n in core.shape)
    total = math.fsum((np.abs(core) ** 2).flat)
    for ranks in itertools.product(*(range(n + 1) for n in core.shape)):
        assert abs(table[ranks] - brute_error(core, ranks)) <= 1e-13 * total


@given(sample=samples(**DOUBLE, max_ndim=4, max_dim=4, max_size=96))
def test_the_table_of_a_spectrum_is_the_error_of_every_truncation(sample):
    """The error formed densely, tuple by tuple, from the factors."""
    spectrum = ft.hosvd_spectrum(sample.values)
    table = ft.error_table(spectrum.core)
    for ranks in itertools.product(*(range(m + 1) for m in spectrum.max_ranks)):
        core = spectrum.core[tuple(slice(r) for r in ranks)]
        rest = sample.values - dense(core, [u[:, :r] for u, r in zip(spectrum.factors, ranks)])
        assert abs(table[ranks] - frobenius(rest) ** 2) <= 1e-13 * max(sample.norm, 1e-300) ** 2


@for_all(jax_shapes=((4, 3, 5),), core=cores(min_dim=1, dtypes=("float64",)))
def test_the_table_is_the_same_for_every_library(xp, core):
    assert same_bits(ft.error_table(as_array(xp, core)), ft.error_table(core))


@given(core=cores(min_dim=1))
def test_errors_fall_with_every_rank(core):
    table = ft.error_table(core)
    total = float(table.flat[0])
    for mode in range(core.ndim):
        assert (np.diff(table, axis=mode) <= 1e-15 * total * core.size).all()
    assert table[(-1,) * core.ndim] == 0.0


@pytest.mark.parametrize("power", range(0, 29, 4))
def test_errors_far_below_rounding_keep_their_accuracy(power):
    """A difference of norms gives 0 from E/‖X‖² = 1e-16 on; the sum of what is discarded keeps its digits."""
    n = 8
    index = np.indices((n, n, n)).sum(axis=0)
    core = 10.0 ** (-(index - 0.0) * (power / 2) / (3 * (n - 2))) * np.random.default_rng(0).uniform(0.5, 1, (n, n, n))
    table, spectrum = ft.error_table(core), None
    for ranks in itertools.product(range(1, n + 1), repeat=3):
        exact = brute_error(core, ranks)
        assert table[ranks] == pytest.approx(exact, rel=1e-12, abs=0.0)
    spectrum = ft.Spectrum(values=(), core=core, factors=(), norm=frobenius(core), shape=core.shape)
    last = (n - 1, n - 1, n - 1)
    assert spectrum.error(last) == pytest.approx(math.sqrt(brute_error(core, last)) / frobenius(core), rel=1e-12)


def test_graded_tensors_have_accurate_errors_down_to_the_floor_of_the_svd():
    """E/‖X‖² = 1e-28, through the decomposition and not only through the table."""
    planted = np.diag([1.0, 1e-7, 1e-14])
    core = np.zeros((3, 3, 3))
    for i in range(3):
        core[i, i, i] = planted[i, i]
    rng = np.random.default_rng(0)
    spectrum = ft.hosvd_spectrum(core)
    assert spectrum.error((2, 2, 2)) == pytest.approx(1e-14, rel=1e-2)
    assert spectrum.error((1, 1, 1)) == pytest.approx(1e-7, rel=1e-2)
    turned = ft.hosvd_spectrum(dense(core, [orthonormal(rng, 5, 3) for _ in range(3)]))
    assert turned.error((1, 1, 1)) == pytest.approx(1e-7, rel=1e-2)
    assert turned.error((2, 2, 2)) <= 1e-14 + tolerance("float64", 15)  # the SVD's own floor: eps · σ₁


@for_all(jax_shapes=((4, 3, 5), (5, 3)), sample=samples(dtypes=FLOATING, max_size=256, min_dim=1), data=st.data())
def test_error_and_bounds_of_a_truncation(xp, sample, data):
    spectrum = ft.hosvd_spectrum(sample.to(xp))
    ranks = tuple(data.draw(st.integers(0, m)) for m in spectrum.max_ranks)
    core = tuple(slice(r) for r in ranks)
    truth = Truth.of(sample.values)
    t = ft.TuckerTensor(to_numpy(spectrum.core)[core], [to_numpy(u)[:, :r] for u, r in zip(spectrum.factors, ranks)])
    rounding = tolerance(sample.dtype, sum(sample.shape), norm=sample.norm, xp=xp) / (sample.norm or 1.0)
    error = spectrum.error(ranks)
    assert error == pytest.approx(truth.error(t), abs=rounding)
    lower, upper = spectrum.lower_bound(ranks), spectrum.upper_bound(ranks)
    assert lower - rounding <= error <= upper + rounding
    assert upper <= math.sqrt(len(sample.shape)) * lower * (1 + 1e-12) + math.ulp(0.0)
    tails = truth.tails(ranks)
    assert lower == pytest.approx(math.sqrt(max(tails)), abs=rounding)
    assert upper == pytest.approx(math.sqrt(sum(tails)), abs=rounding)


def test_the_error_of_nothing_kept_is_one_and_of_all_kept_is_zero():
    spectrum = ft.hosvd_spectrum(Sample((4, 3, 5), seed=1).values)
    assert spectrum.error((0, 0, 0)) == pytest.approx(1.0, rel=1e-15)
    assert spectrum.error(spectrum.max_ranks) == 0.0
    zero = ft.hosvd_spectrum(np.zeros((3, 2, 2)))
    assert (zero.error((1, 1, 1)), zero.lower_bound((1, 1, 1)), zero.upper_bound((1, 1, 1))) == (0.0, 0.0, 0.0)


# --- the frontier ------------------------------------------------------------------------------------


@given(sample=samples(**DOUBLE, min_dim=1, max_ndim=4, max_dim=5, max_size=120))
def test_the_frontier_is_the_pareto_set_of_brute_force(sample):
    spectrum = ft.hosvd_spectrum(sample.values)
    frontier = spectrum.frontier()
    norm_squared = sample.norm**2
    assert (np.diff(frontier.n_parameters) > 0).all()
    assert (np.diff(frontier.error_squared) < 0).all()
    assert (frontier.n_parameters[0], tuple(frontier.ranks[0])) == (0, (0,) * len(sample.shape))
    assert frontier.error_squared[0] == pytest.approx(norm_squared, rel=1e-12, abs=1e-300)
    assert frontier.norm_squared == frontier.error_squared[0]
    assert frontier.error_squared[-1] <= 1e-24 * norm_squared
    assert frontier.n_entries == sample.values.size
    assert len(frontier) == len(frontier.ranks)
    for p, e, ranks in zip(frontier.n_parameters[1:], frontier.error_squared[1:], frontier.ranks[1:]):
        assert p == n_parameters(ranks.tolist(), sample.shape)
        assert e == pytest.approx(brute_error(spectrum.core, ranks), rel=1e-9, abs=1e-13 * norm_squared)
    best = brute_frontier(spectrum)
    at = np.searchsorted(frontier.n_parameters, list(best), side="right") - 1
    for i, e in zip(at, best.values()):  # at every number of parameters where brute force improves
        assert frontier.error_squared[i] <= e + 1e-13 * norm_squared


@pytest.mark.parametrize("options", [{}, {"partial": True}, {"partial": True, "one_whole": True}])
@pytest.mark.parametrize("many", [1, 1 << 30])
def test_a_shorter_frontier_is_the_beginning_of_the_whole_one(options, many, monkeypatch):
    for shape in ((9, 8, 3), (12, 7), (4, 3, 5, 2)):
        spectrum = ft.hosvd_spectrum(Sample(shape, kind="graded", seed=1).values)
        monkeypatch.setattr("flora_tensor._frontiers._MANY", 1 << 30)
        full = spectrum.frontier(**options)
        monkeypatch.setattr("flora_tensor._frontiers._MANY", many)
        for most in (0, 40, 90, 1000):
            found = spectrum.frontier(**options, max_parameters=most)
            count = np.count_nonzero(full.n_parameters <= most)
            assert found.ranks[:count].tolist() == full.ranks[:count].tolist()
            assert found.error_squared[:count].tolist() == full.error_squared[:count].tolist()
            dense = [list(shape)] if "partial" in options and count < len(full) else []
            assert found.ranks[count:].tolist() == dense


def test_the_frontier_of_a_zero_tensor_keeps_nothing():
    for x in (np.zeros((3, 2, 4)), np.zeros((3, 0))):
        frontier = ft.hosvd_spectrum(x).frontier()
        assert (len(frontier), frontier.n_parameters.tolist(), frontier.error_squared.tolist()) == (1, [0], [0.0])


def test_a_coarse_frontier_has_true_errors_and_hardly_loses(monkeypatch):
    x = Sample((12, 10, 9), kind="graded", seed=2).values
    spectrum = ft.hosvd_spectrum(x)
    full = spectrum.frontier()
    monkeypatch.setattr("flora_tensor._spectrum._MAX_FRONTIER", 300)
    spectrum = ft.hosvd_spectrum(Sample((40, 30, 20), kind="graded", seed=2).values)
    thinned = spectrum.frontier()
    assert len(full) > 10
    assert len(thinned) > 10
    for e, ranks in list(zip(thinned.error_squared, thinned.ranks))[1::7]:
        assert e == pytest.approx((spectrum.error(ranks) * spectrum.norm) ** 2, rel=1e-9)


# --- grids -------------------------------------------------------------------------------------------


@given(core=cores(min_dim=1), most=st.integers(2, 60), seed=seeds)
def test_a_table_on_a_grid_is_the_full_table_at_its_points(core, most, seed):
    rng = np.random.default_rng(seed)
    grid = tuple(np.unique(np.concatenate([[0, n], rng.integers(0, n + 1, 3)])) for n in core.shape)
    table, full = ErrorTable.of_core(core, 0, grid), ft.error_table(core)
    assert np.allclose(table.errors, full[np.ix_(*grid)], rtol=1e-12, atol=1e-14 * float(full.flat[0]))
    assert table.total == pytest.approx(float(full.flat[0]), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("shape", [(40, 36, 3, 3), (3, 70, 20), (5, 4, 3)])
def test_errors_are_those_of_the_core_that_is_not_formed(shape, dtype):
    x = Sample(shape, dtype=dtype, kind="graded").values
    formed, unformed = ft.hosvd_spectrum(x), UnformedSpectrum.of(prepare("test", x), 0.0)
    assert unformed.max_ranks == formed.max_ranks
    assert unformed.dtype == formed.dtype
    rng = np.random.default_rng(0)
    grid = tuple(np.unique(np.concatenate([[0, m], rng.integers(0, m + 1, 4)])) for m in formed.max_ranks)
    full = ft.error_table(formed.core)
    rounding = tolerance(dtype, sum(shape)) * np.sqrt(full.flat[0])
    table = unformed.table_within([g[1] for g in grid], formed.max_ranks)
    for errors, points in ((unformed._table_on(grid).errors, grid), *(((table.errors, table.grid),) if table else ())):
        # Roots of sums of squares differ by no more than the core does.
        errors = np.ldexp(errors, 2 * unformed.exponent)
        scale = math.ldexp(1.0, prepare("test", x).exponent)
        assert np.abs(np.sqrt(errors) * scale - np.sqrt(full[np.ix_(*points)])).max() <= rounding
    for _ in range(5):
        ranks = tuple(int(rng.integers(0, m + 1)) for m in formed.max_ranks)
        assert unformed.error(ranks) == pytest.approx(formed.error(ranks), rel=1e-4, abs=tolerance(dtype, sum(shape)))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_errors_within_bounds_take_no_more_vectors_than_the_bounds_leave(share, dtype):
    """What is left out is ‖X‖² − ‖G‖², which rounding moves by c ε ‖X‖²: at 10⁴ ε, 1e-3 of the error allows c = 20."""
    x = normal(np.random.default_rng(0), (150, 140, 3, 3), dtype).astype(dtype)
    unformed, full = UnformedSpectrum.of(prepare("test", x), 0.0), ft.error_table(ft.hosvd_spectrum(x).core)
    low, high = (20, 10, 3, 2), (int(share * 150), int(share * 140), 3, 3)
    table = unformed.table_within(low, high)
    assert table is not None
    assert [u.shape[1] for u in unformed.bases.values()] == [3, 3, *high[:2]]
    assert [int(points[-1]) for points in table.grid] == list(high)
    errors = np.ldexp(table.errors, 2 * (unformed.exponent + prepare("test", x).exponent))
    assert errors == pytest.approx(full[np.ix_(*table.grid)], rel=1e-3, abs=tolerance(dtype, norm=full.flat[0]))
    assert unformed.error((30, 30, 2, 3)) == pytest.approx(math.sqrt(full[30, 30, 2, 3] / full.flat[0]), rel=1e-3)


@given(core=cores(min_dim=1, min_ndim=1), room=st.integers(1, 3))
def test_a_table_may_have_room_for_more(core, room):
    grid = tuple(np.arange(n + 1) for n in core.shape)
    errors = ErrorTable.of_core(core, 0, grid, [room] * core.ndim).errors
    assert errors.shape == tuple(n + 1 + room for n in core.shape)
    assert same_bits(np.array(errors[tuple(slice(n + 1) for n in core.shape)]), ft.error_table(core))


@given(shape=shapes(min_dim=1, max_dim=300, max_size=10**9, max_ndim=4), most=st.sampled_from((100, 10_000, 1 << 20)))
def test_grids_reach_from_nothing_to_everything(shape, most):
    grid = rank_grid(shape, most)
    for points, n in zip(grid, shape):
        assert (points[0], points[-1]) == (0, n)
        assert (np.diff(points) > 0).all()
        assert points[: min(10, n)].tolist() == list(range(min(10, n)))
    assert math.prod(map(len, grid)) <= max(most, 27 ** len(shape))


_MEMORY = """
import resource
import numpy as np
import flora_tensor as ft
core = np.random.default_rng(0).standard_normal((1280, 1280, 3, 3))
core *= (np.arange(1, 1281.0) ** -0.5)[:, None, None, None]
spectrum = ft.Spectrum(
    values=tuple(np.sqrt(np.einsum(core, range(4), core, range(4), [k])) for k in range(4)),
    core=core, factors=(), norm=float(np.linalg.norm(core)), shape=core.shape,
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
choice = ft.select_ranks(spectrum, max_ratio=0.05)
assert choice.n_parameters <= 0.05 * core.size
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_the_table_of_a_large_kernel_fits_in_memory():
    """A choice of ranks for 1280 x 1280 x 3 x 3: a table of 1281 x 1281 x 4 x 4 numbers, and little beside it."""
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 1.4 * 1281 * 1281 * 16 * 8 / 2**20  # MiB


# --- refusals ----------------------------------------------------------------------------------------


def test_refusals():
    spectrum = ft.hosvd_spectrum(Sample((4, 3, 5)).values)
    with pytest.raises(ValueError, match=r"Spectrum.error: 2 ranks for 3 modes; pass one a mode"):
        spectrum.error((1, 1))
    with pytest.raises(ValueError, match=r"Spectrum.error: rank 5 for mode 0; pass a number from 0 to 4"):
        spectrum.error((5, 1, 1))
    with pytest.raises(ValueError, match=r"Spectrum.error: rank -1 for mode 1; pass a number from 0 to 3"):
        spectrum.error((1, -1, 1))
    with pytest.raises(TypeError, match=r"Spectrum.error: ranks is 3; pass a sequence, one number a mode"):
        spectrum.error(3)
    with pytest.raises(TypeError, match=r"Spectrum.error: ranks\[0\] is 1.0; pass an integer"):
        spectrum.error((1.0, 1, 1))
    bad = np.ones((2, 3))
    bad[1, 2] = np.nan
    for name in ("mode_spectra", "hosvd_spectrum", "error_table"):
        with pytest.raises(
            ValueError, match=rf"{name}: x has 1 entries that are NaN or infinite, the first at \(1, 2\)"
        ):
            getattr(ft, name)(bad)
        with pytest.raises(ValueError, match=f"{name}: x is a scalar; a decomposition needs at least one axis"):
            getattr(ft, name)(np.array(1.0))


# Magnitudes ----------------------------------------------------------------------------------------------------------


def test_singular_values_of_sixteen_bit_floats_do_not_overflow(xp):
    if not supports(xp, "float16"):
        pytest.skip("the array-API standard has no 16-bit floats")
    x = xp.full((4, 3, 2), 6e4, dtype=xp.float16)
    spectra = ft.mode_spectra(x)
    assert {dtype_name(v.dtype) for v in spectra.values} == {"float32"}
    expected = float(np.float16(6e4)) * math.sqrt(24)
    assert all(float(v[0]) == pytest.approx(expected, rel=tolerance("float32", 24)) for v in spectra.values)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5), (90, 4, 3)])
@pytest.mark.parametrize("call", [ft.mode_spectra, ft.hosvd_spectrum, ft.effective_ranks])
def test_singular_values_beyond_their_type_are_refused(call, shape):
    name = "hosvd_spectrum" if call is ft.hosvd_spectrum else "mode_spectra"
    with pytest.raises(
        ValueError, match=f"{name}: the largest singular value, about .*, is beyond .* float32; pass x in a"
    ):
        call(np.full(shape, 3e38, np.float32))


def test_what_keeps_squares_refuses_those_beyond_float64_and_all_else_takes_them():
    x = Sample((6, 5, 4), seed=3).values
    huge, spectrum = 1e300 * x, ft.hosvd_spectrum(1e300 * x)
    with pytest.raises(ValueError, match=r"error_table: the core's squared norm is beyond .*; pass it scaled down"):
        ft.error_table(huge)
    for call in (spectrum.frontier, lambda: ft.allocate_ranks({"w": spectrum}, max_ratio=0.5)):
        with pytest.raises(
            ValueError, match=r"Spectrum.frontier: the norm is .*e\+30., whose square is beyond float64"
        ):
            call()
    for criterion in ({"rtol": 0.3}, {"max_ratio": 0.5}, *({"method": m} for m in ("noise", "evbmf", "bic"))):
        assert ft.select_ranks(huge, **criterion).ranks == ft.select_ranks(x, **criterion).ranks
