"""Decompositions: the identities and bounds of the theory, for every kind of tensor, on every array library."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

import flora_tensor as ft
import support
from flora_tensor import TuckerTensor
from support import (
    EVERY_DTYPE,
    FLOATING,
    INTEGRAL,
    LAYOUTS,
    LOW_PRECISION,
    REAL,
    Sample,
    Truth,
    as_array,
    dense,
    distance,
    dtype_name,
    frobenius,
    library,
    normal,
    orthonormal,
    ranked_samples,
    same_bits,
    samples,
    seeds,
    shapes,
    supports,
    times_power_of_two,
    to_numpy,
    tolerance,
    unfolded,
)

# Each takes (x, ranks) and returns a TuckerTensor.
METHODS = {
    "hosvd": ft.hosvd,
    "st_hosvd": ft.st_hosvd,
    "hooi": ft.hooi,
    "tucker": lambda x, ranks: ft.tucker(x, ranks).tucker,
    "tucker-hosvd": lambda x, ranks: ft.tucker(x, ranks, method="hosvd").tucker,
    "tucker-st_hosvd": lambda x, ranks: ft.tucker(x, ranks, method="st_hosvd").tucker,
    "tucker-hooi": lambda x, ranks: ft.tucker(x, ranks, method="hooi").tucker,
    "tucker-randomized": lambda x, ranks: ft.tucker(x, ranks, method="randomized", rng=0).tucker,
}
FORCED = ("auto", "hosvd", "st_hosvd", "hooi")
methods = st.sampled_from(sorted(METHODS))
# A randomized start may, with small probability, end above what the spectra promise.
certain = st.sampled_from(sorted(set(METHODS) - {"tucker-randomized"}))
small = {"max_size": 256}
for_all = functools.partial(support.for_all, jax_shapes=((4, 3, 5), (5, 3)), jax_examples=3)


def slack(t: TuckerTensor, sample: Sample, xp=None) -> float:
    """Return how far rounding may carry the relative error of a decomposition."""
    norm = sample.norm
    limit = tolerance(t.dtype, sum(sample.shape), norm=norm, xp=xp)
    return limit / norm if norm else limit


def gap(truth: Truth, ranks) -> float:
    """Return the least (σ_r − σ_{r+1}) / σ_1 over the modes: how well the leading subspaces are determined."""
    if not truth.norm:
        return 0.0
    padded = [np.append(v, 0.0) for v in truth.values]
    return min((float(v[r - 1] - v[r]) / float(v[0]) for v, r in zip(padded, ranks) if r < len(v) - 1), default=1.0)


def assert_orthonormal(t: TuckerTensor) -> None:
    """Hold every factor to LAPACK's ratio ‖I − UᴴU‖ / (n · eps) < 30."""
    for u in (u for u in t.factors if u is not None):
        wide = to_numpy(u).astype(np.complex128)
        n, r = wide.shape
        assert distance(wide.conj().T @ wide, np.eye(r)) <= tolerance(t.dtype, max(n, 1) ** 2)


def assert_all_orthogonal(core: np.ndarray, limit: float) -> None:
    """Hold the slices of a core along every mode to be orthogonal and of decreasing norm; ``limit`` in the core's
    squared units.
    """
    for mode in range(core.ndim):
        matrix = unfolded(core, mode)
        gram = matrix @ matrix.conj().T
        assert np.linalg.norm(gram - np.diag(np.diagonal(gram))) <= limit
        assert (np.diff(np.diagonal(gram).real) <= limit).all()


def loss(weights, t: TuckerTensor):
    """Return a real number that depends on all entries of the dense tensor."""
    product = weights * t.to_tensor()
    return product.real.sum() if hasattr(product, "real") else product.sum()


# --- what holds for every method ---------------------------------------------------------------------


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_core_and_factors_have_the_ranks_and_the_type_of_the_input(xp, case, method):
    sample, ranks = case
    x = sample.to(xp)
    t = METHODS[method](x, ranks)
    assert (t.shape, t.ranks) == (sample.shape, ranks)
    expected = (
        x.dtype if sample.dtype not in INTEGRAL else xp.__array_namespace_info__().default_dtypes()["real floating"]
    )
    assert {t.core.dtype, *(u.dtype for u in t.factors)} == {expected}
    assert all(u is not None for u in t.factors)


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_factors_are_orthonormal(xp, case, method):
    sample, ranks = case
    assert_orthonormal(METHODS[method](sample.to(xp), ranks))


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_the_core_is_the_projection_of_the_tensor(xp, case, method):
    sample, ranks = case
    truth = Truth.of(sample.values)
    t = METHODS[method](sample.to(xp), ranks)
    projection = dense(truth.x, [to_numpy(u).astype(np.complex128).conj().T for u in t.factors])
    assert distance(truth.core(t), projection) <= slack(t, sample, xp) * (truth.norm or 1.0)


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_the_squared_error_is_what_the_core_lacks(xp, case, method):
    sample, ranks = case
    truth = Truth.of(sample.values)
    t = METHODS[method](sample.to(xp), ranks)
    lost = truth.norm**2 - frobenius(truth.core(t)) ** 2
    assert (
        abs(truth.error(t) ** 2 * (truth.norm or 1.0) ** 2 - lost) <= 2 * slack(t, sample, xp) * (truth.norm or 1) ** 2
    )


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=certain)
def test_the_error_lies_within_the_bounds_of_the_spectra(xp, case, method):
    """max_k tail_k ≤ ‖X − X̂‖² ≤ Σ_k tail_k for HOSVD, ST-HOSVD, and all that starts from them and only improves."""
    sample, ranks = case
    truth = Truth.of(sample.values)
    t = METHODS[method](sample.to(xp), ranks)
    tails = truth.tails(ranks)
    error, rounding = truth.error(t), slack(t, sample, xp)
    assert math.sqrt(max(tails)) - rounding <= error <= math.sqrt(sum(tails)) + rounding


@for_all(sample=samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_full_ranks_are_exact(xp, sample, method):
    t = METHODS[method](sample.to(xp), ft.feasible_ranks(sample.shape, sample.shape))
    assert Truth.of(sample.values).error(t) <= slack(t, sample, xp)


@for_all(sample=samples(dtypes=EVERY_DTYPE, **small))
def test_full_ranks_are_the_default(xp, sample):
    x = sample.to(xp)
    full = ft.feasible_ranks(sample.shape, sample.shape)
    for t in (ft.hosvd(x), ft.st_hosvd(x), ft.tucker(x).tucker):
        assert t.ranks == full
        assert Truth.of(sample.values).error(t) <= slack(t, sample, xp)


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_the_core_is_all_orthogonal(xp, case, method):
    """`hosvd` and `st_hosvd` promise it for full ranks; `hooi` and `tucker` for any."""
    sample, ranks = case
    if method in {"hosvd", "st_hosvd"}:
        ranks = ft.feasible_ranks(sample.shape, sample.shape)
    truth = Truth.of(sample.values)
    t = METHODS[method](sample.to(xp), ranks)
    assert_all_orthogonal(truth.core(t), 2 * slack(t, sample, xp) * (truth.norm or 1.0) ** 2)


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=methods)
def test_same_bits_twice(xp, case, method):
    sample, ranks = case
    first, second = (METHODS[method](sample.to(xp), ranks) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip((first.core, *first.factors), (second.core, *second.factors)))


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, layouts=LAYOUTS[1:], **small), method=methods)
def test_the_input_is_not_changed_whatever_its_layout(xp, case, method):
    sample, ranks = case
    x = sample.to(xp)
    METHODS[method](x, ranks)
    ft.mode_spectra(x)
    ft.hosvd_spectrum(x)
    assert same_bits(x, sample.values)


@for_all(case=ranked_samples(dtypes=FLOATING, scales=("unit",), **small), method=st.sampled_from(("hosvd", "st_hosvd")))
def test_signs_are_fixed_by_the_largest_entry(xp, case, method):
    """The entry of largest magnitude in each column is real and positive; of entries equal in bits the first counts."""
    sample, _ranks = case
    if sample.kind == "zero":
        return  # nothing is determined, and the bases are completed anyhow
    x = sample.to(xp)
    t = METHODS[method](x, ft.feasible_ranks(sample.shape, sample.shape))
    for u in t.factors:
        u = to_numpy(u)
        if u.size == 0:
            continue
        largest = np.take_along_axis(u, np.argmax(np.abs(u), axis=0)[None, :], axis=0)[0]
        assert (largest.real > 0).all()
        assert np.abs(largest.imag).max() <= tolerance(u.dtype)


def test_the_first_of_equal_entries_is_made_positive(xp):
    x = xp.asarray([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=xp.float64)
    for method in METHODS.values():
        factors = method(x, (1, 1)).factors
        # Equal magnitudes may differ in their last bit after the SVD; then the larger one leads.
        u = to_numpy(factors[0])[:, 0]
        assert u[int(np.argmax(np.abs(u)))] > 0
        assert distance(factors[1], np.array([[1.0], [0.0], [0.0]])) <= tolerance("float64")


# --- degenerate tensors ------------------------------------------------------------------------------


@for_all(
    case=ranked_samples(dtypes=FLOATING + LOW_PRECISION, kinds=("zero",), layouts=("C",), min_dim=1, **small),
    method=methods,
    name=st.sampled_from(("ranks", "rtol", "exactly", "max_parameters")),
)
def test_a_zero_tensor_has_a_zero_core_orthonormal_factors_and_no_error(xp, case, method, name):
    sample, ranks = case
    x = sample.to(xp)
    t = METHODS[method](x, ranks)
    assert not to_numpy(t.core).any()
    assert_orthonormal(t)
    option = {"ranks": ranks, "rtol": 0.1, "exactly": 0, "max_parameters": 1 + sum(sample.shape)}[name]
    fit = ft.tucker(x, **{"rtol" if name == "exactly" else name: option})
    assert (fit.relative_error, fit.error_bound, fit.lower_bound) == (0.0, 0.0, 0.0)
    assert_orthonormal(fit.tucker)
    assert not to_numpy(fit.tucker.to_tensor()).any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0), (1, 0, 1, 5)])
def test_a_tensor_with_an_empty_mode_has_an_empty_decomposition(xp, shape):
    x = xp.zeros(shape)
    none = (0,) * len(shape)
    for method in METHODS.values():
        for ranks in (none, 2):
            t = method(x, ranks)
            assert (t.shape, t.ranks) == (shape, none)
            assert tuple(t.to_tensor().shape) == shape
    for fit in (ft.tucker(x), ft.tucker(x, rtol=0.1), ft.tucker(x, max_parameters=100)):
        assert (fit.tucker.ranks, fit.relative_error, fit.error_bound) == (none, 0.0, 0.0)


@for_all(sample=samples(dtypes=FLOATING, kinds=("gauss",), min_dim=1, max_ndim=1, scales=("unit", "huge", "tiny")))
def test_a_vector_is_its_direction_times_its_norm(xp, sample):
    x = sample.to(xp)
    for method in METHODS.values():
        t = method(x, (1,))
        assert abs(frobenius(t.core) - sample.norm) <= tolerance(sample.dtype, sample.shape[0], norm=sample.norm, xp=xp)
        overlap = np.vdot(to_numpy(t.factors[0])[:, 0], sample.values / sample.norm)
        assert abs(abs(overlap) - 1) <= tolerance(sample.dtype, sample.shape[0])


@for_all(jax_examples=1, sample=samples(dtypes=FLOATING, min_dim=1, max_ndim=3, max_dim=5), data=st.data())
def test_modes_of_size_one_change_nothing(xp, sample, data):
    x, where = sample.to(xp), data.draw(st.integers(0, len(sample.shape)))
    wider = (*sample.shape[:where], 1, *sample.shape[where:])
    ranks = ft.feasible_ranks([data.draw(st.integers(1, n)) for n in sample.shape], sample.shape)
    t = ft.hosvd(x, ranks)
    wide = ft.hosvd(xp.reshape(x, wider), (*ranks[:where], 1, *ranks[where:]))
    truth = Truth.of(sample.values)
    if gap(truth, ranks) < 1e-2:
        reject()
    limit = slack(t, sample, xp) * truth.norm / gap(truth, ranks)
    assert distance(truth.core(wide).reshape(ranks), truth.core(t)) <= 2 * limit
    assert distance(wide.factors[where], np.ones((1, 1))) <= tolerance(sample.dtype)


@for_all(case=ranked_samples(dtypes=FLOATING, min_ndim=2, max_ndim=2, min_dim=1, layouts=("C", "F")), method=methods)
def test_a_matrix_has_its_truncated_singular_value_decomposition(xp, case, method):
    sample, ranks = case
    truth = Truth.of(sample.values)
    t = METHODS[method](sample.to(xp), ranks)
    values = scipy.linalg.svdvals(truth.x)
    rounding = slack(t, sample, xp)
    best = float(np.linalg.norm(values[ranks[0] :])) / (truth.norm or 1.0)
    assert truth.error(t) == pytest.approx(best, abs=rounding)
    kept = scipy.linalg.svdvals(truth.core(t))
    assert np.abs(kept - values[: ranks[0]]).max() <= rounding * (truth.norm or 1.0)


@for_all(
    sample=samples(dtypes=REAL, kinds=("gauss",), scales=("unit",), layouts=("C",), min_ndim=2, max_ndim=2, min_dim=2)
)
def test_a_matrix_equals_the_truncation_of_scipy(xp, sample):
    truth, rank = Truth.of(sample.values), max(1, min(sample.shape) // 2)
    if gap(truth, (rank, rank)) < 1e-2:
        reject()
    u, s, vh = scipy.linalg.svd(sample.values.astype(float), full_matrices=False)
    for method in METHODS.values():
        t = method(sample.to(xp), rank)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        limit = tolerance(sample.dtype, sum(sample.shape), norm=sample.norm) / gap(truth, (rank, rank))
        assert distance(t.to_tensor(), expected) <= limit


# --- equivariance ------------------------------------------------------------------------------------


@for_all(case=ranked_samples(dtypes=FLOATING, min_dim=1, kinds=("gauss", "low-rank", "graded", "ones"), **small))
def test_permuting_the_modes_permutes_the_hosvd(xp, case):
    sample, ranks = case
    truth = Truth.of(sample.values)
    if gap(truth, ranks) < 1e-2:
        reject()
    axes = tuple(int(k) for k in np.random.default_rng(sample.seed).permutation(len(sample.shape)))
    x = sample.to(xp)
    t = ft.hosvd(x, ranks)
    turned = ft.hosvd(xp.permute_dims(x, axes), tuple(ranks[k] for k in axes))
    limit = slack(t, sample, xp) * sample.norm / gap(truth, ranks)
    assert distance(turned.to_tensor(), to_numpy(t.to_tensor()).transpose(axes)) <= 2 * limit
    for k, u in zip(axes, turned.factors):  # signs could differ only where two entries tie
        u, v = (to_numpy(a).astype(np.complex128) for a in (u, t.factors[k]))
        assert distance(u @ u.conj().T, v @ v.conj().T) <= 2 * limit / sample.norm


@for_all(
    case=ranked_samples(dtypes=FLOATING, min_dim=1, kinds=("gauss", "low-rank", "graded"), scales=("unit",), **small)
)
def test_permuting_modes_and_mode_order_permutes_st_hosvd(xp, case):
    sample, ranks = case
    truth, rng, ndim = Truth.of(sample.values), np.random.default_rng(sample.seed), len(sample.shape)
    axes, order = (tuple(int(k) for k in rng.permutation(ndim)) for _ in range(2))
    x = sample.to(xp)
    t = ft.st_hosvd(x, ranks, mode_order=order)
    turned = ft.st_hosvd(xp.permute_dims(x, axes), [ranks[k] for k in axes], mode_order=[axes.index(k) for k in order])
    assert Truth.of(sample.values.transpose(axes)).error(turned) == pytest.approx(
        truth.error(t), abs=1e2 * slack(t, sample)
    )


@for_all(
    case=ranked_samples(dtypes=FLOATING, scales=("unit",), layouts=("C",), **small),
    method=methods,
    power=st.sampled_from((-90, -17, -16, -1, 3, 16, 17, 60, 90)),
)
def test_a_power_of_two_scales_the_core_and_leaves_the_factors_bit_for_bit(xp, case, method, power):
    sample, ranks = case
    x = sample.to(xp)
    t, scaled = METHODS[method](x, ranks), METHODS[method](x * 2.0**power, ranks)
    assert all(same_bits(u, v) for u, v in zip(t.factors, scaled.factors))
    core, expected = to_numpy(scaled.core), times_power_of_two(to_numpy(t.core), power)
    tiny = np.finfo(core.dtype).smallest_normal  # subnormal numbers are rounded, and XLA flushes them to zero
    assert distance(core, expected) <= math.sqrt(core.size) * tiny


@for_all(
    case=ranked_samples(dtypes=("float64", "complex128"), kinds=("gauss", "low-rank", "graded"), min_dim=1, **small)
)
def test_orthogonal_transforms_turn_the_factors(xp, case):
    sample, ranks = case
    truth, rng = Truth.of(sample.values), np.random.default_rng(sample.seed)
    if gap(truth, ranks) < 1e-2:
        reject()
    turns = [orthonormal(rng, n, n, sample.dtype) for n in sample.shape]
    turned = dense(sample.values, turns)
    t, other = ft.hosvd(sample.to(xp), ranks), ft.hosvd(as_array(xp, turned, sample.dtype), ranks)
    limit = 4 * slack(t, sample, xp) * sample.norm / gap(truth, ranks)
    assert distance(other.to_tensor(), dense(to_numpy(t.to_tensor()), turns)) <= limit


# --- HOOI --------------------------------------------------------------------------------------------


@for_all(case=ranked_samples(dtypes=FLOATING, **small), init=st.sampled_from(("hosvd", "st_hosvd", "given")))
def test_hooi_never_ends_above_its_start(xp, case, init):
    sample, ranks = case
    x, truth = sample.to(xp), Truth.of(sample.values)
    if init == "given":
        rng = np.random.default_rng(sample.seed)
        factors = [
            as_array(xp, orthonormal(rng, n, r, sample.dtype), sample.dtype) for n, r in zip(sample.shape, ranks)
        ]
        start = init = TuckerTensor(ft.multi_mode_dot(x, factors, transpose=True), factors)
    else:
        start = METHODS[init](x, ranks)
    rounding = slack(start, sample, xp)
    errors = [truth.error(start)]
    errors += [truth.error(ft.hooi(x, ranks, init=init, max_sweeps=n, tolerance=0.0)) for n in (0, 1, 3)]
    assert errors[1] == pytest.approx(errors[0], abs=rounding)
    assert all(after <= before + rounding for before, after in itertools.pairwise(errors))


def test_hooi_improves_where_there_is_something_to_gain(xp):
    sample = Sample((8, 7, 6), seed=4)
    x, truth = sample.to(xp), Truth.of(sample.values)
    error = {n: truth.error(ft.hooi(x, (2, 2, 2), max_sweeps=n, tolerance=0.0)) for n in (0, 1, 10)}
    assert error[10] < error[1] < error[0] - 1e-3


def test_hooi_stops_at_its_tolerance(xp):
    sample = Sample((8, 7, 6), seed=4)
    x = sample.to(xp)
    eager = ft.hooi(x, (2, 2, 2), tolerance=0.9)
    once = ft.hooi(x, (2, 2, 2), max_sweeps=1)
    assert all(same_bits(a, b) for a, b in zip((eager.core, *eager.factors), (once.core, *once.factors)))


def test_hooi_is_stationary(xp):
    """At convergence each factor spans the leading singular subspace of X times the other factors."""
    sample = Sample((7, 6, 5), kind="gauss", seed=11)
    t = ft.hooi(sample.to(xp), (2, 3, 2), max_sweeps=2000, tolerance=0.0)
    factors = [to_numpy(u) for u in t.factors]
    for mode, u in enumerate(factors):
        others = [None if k == mode else v.T for k, v in enumerate(factors)]
        left = np.linalg.svd(unfolded(dense(sample.values, others), mode), full_matrices=False)[0][:, : u.shape[1]]
        assert distance(left @ left.T, u @ u.T) <= 1e-5  # the square root of where the error stops falling


def test_hooi_finds_the_error_of_tensorly():
    tensorly_decomposition = pytest.importorskip("tensorly.decomposition")
    for seed, (shape, ranks) in enumerate([((9, 8, 7), (3, 3, 2)), ((8, 6, 5, 4), (3, 2, 2, 2)), ((12, 10), (4, 4))]):
        rng = np.random.default_rng(seed)
        planted = dense(rng.standard_normal(ranks), [orthonormal(rng, n, r) for n, r in zip(shape, ranks)])
        x = planted + 0.1 * rng.standard_normal(shape)
        core, factors = tensorly_decomposition.tucker(x, list(ranks), init="svd", tol=1e-12, n_iter_max=2000)
        theirs = distance(dense(core, factors), x)
        ours = distance(ft.hooi(x, ranks, max_sweeps=2000, tolerance=1e-12).to_tensor(), x)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert distance(ft.tucker(x, ranks).tucker.to_tensor(), x) <= theirs * 1.001


# --- options -----------------------------------------------------------------------------------------


@given(case=ranked_samples(dtypes=("float64",), scales=("unit",), kinds=("gauss", "graded"), min_dim=1), data=st.data())
def test_st_hosvd_truncates_in_the_order_given(case, data):
    sample, ranks = case
    order = data.draw(st.permutations(range(len(sample.shape))))
    t = ft.st_hosvd(sample.values, ranks, mode_order=order)
    x = sample.values
    for mode in order:  # the definition, written out
        u = np.linalg.svd(unfolded(x, mode), full_matrices=False)[0][:, : ranks[mode]]
        if (
            ranks[mode] < x.shape[mode]
            and gap(Truth.of(x), [ranks[k] if k == mode else n for k, n in enumerate(x.shape)]) < 1e-3
        ):
            reject()
        x = dense(x, [u.T if k == mode else None for k in range(x.ndim)])
    assert frobenius(t.core) == pytest.approx(frobenius(x), rel=1e-9)
    by_the_end = [to_numpy(u) for u in t.factors]
    first = order[0]
    leading = np.linalg.svd(unfolded(sample.values, first), full_matrices=False)[0][:, : ranks[first]]
    assert distance(by_the_end[first] @ by_the_end[first].T, leading @ leading.T) <= 1e-9


def test_the_order_of_modes_matters_and_the_default_is_one_of_them():
    x = Sample((6, 5, 4), seed=2).values
    truth = Truth.of(x)
    errors = {order: truth.error(ft.st_hosvd(x, 2, mode_order=order)) for order in itertools.permutations(range(3))}
    assert len(set(errors.values())) > 1
    assert truth.error(ft.st_hosvd(x, 2)) in errors.values()
    assert truth.error(ft.st_hosvd(x, 2, mode_order=(-1, 0, 1))) == errors[2, 0, 1]


@for_all(
    case=ranked_samples(dtypes=REAL, kinds=("gauss", "low-rank"), scales=("unit",), layouts=("C",), min_dim=1, **small)
)
def test_a_forced_method_is_the_one_that_runs(xp, case):
    sample, ranks = case
    x, truth = sample.to(xp), Truth.of(sample.values)
    for method in ("hosvd", "st_hosvd"):
        direct, driven = METHODS[method](x, ranks), ft.tucker(x, ranks, method=method)
        assert truth.error(driven.tucker) == pytest.approx(truth.error(direct), abs=slack(direct, sample))
    best = ft.tucker(x, ranks, method="hooi")
    assert truth.error(best.tucker) <= truth.error(ft.st_hosvd(x, ranks)) + slack(best.tucker, sample)


@for_all(
    case=ranked_samples(dtypes=REAL, scales=("unit", "tiny"), min_dim=1, **small),
    rank=st.integers(1, 9),
    method=methods,
)
def test_one_number_is_the_rank_of_every_mode_as_far_as_feasible(xp, case, rank, method):
    sample, _ = case
    expected = ft.feasible_ranks([rank] * len(sample.shape), sample.shape)
    assert METHODS[method](sample.to(xp), rank).ranks == expected


@for_all(
    jax_examples=1, sample=samples(dtypes=EVERY_DTYPE, **small), rtol=st.sampled_from((0.0, 1e-5, 0.03, 0.3, 0.9, 1.0))
)
def test_a_tolerance_is_kept(xp, sample, rtol):
    x, truth = sample.to(xp), Truth.of(sample.values)
    results = [ft.hosvd(x, rtol=rtol), ft.st_hosvd(x, rtol=rtol)]
    results += [ft.tucker(x, rtol=rtol, method=method).tucker for method in FORCED]
    for t in results:
        assert truth.error(t) <= rtol + slack(t, sample, xp)
        assert t.ranks == ft.feasible_ranks(t.ranks, t.ranks)
        assert_orthonormal(t)
    fewest, sequential = results[2].n_parameters, results[0].n_parameters
    if sample.scale != "subnormal" and rtol > 0.01 and dtype_name(results[0].dtype) not in LOW_PRECISION:
        assert fewest <= sequential, "tucker needs no more parameters than the rule that gives each mode its share"


def test_a_tolerance_of_one_keeps_rank_one_and_of_zero_keeps_all():
    x = Sample((5, 4, 3)).values
    assert ft.tucker(x, rtol=1.0).tucker.ranks == (1, 1, 1)
    for decompose in (ft.hosvd, ft.st_hosvd, lambda x, rtol: ft.tucker(x, rtol=rtol).tucker):
        assert decompose(x, rtol=0.0).ranks == (5, 4, 3)


# --- the driver --------------------------------------------------------------------------------------


@for_all(case=ranked_samples(dtypes=EVERY_DTYPE, **small), method=st.sampled_from(FORCED))
def test_the_reported_error_is_the_true_one_and_lies_within_its_bounds(xp, case, method):
    sample, ranks = case
    fit = ft.tucker(sample.to(xp), ranks, method=method)
    true, rounding = Truth.of(sample.values).error(fit.tucker), slack(fit.tucker, sample, xp)
    assert fit.relative_error == pytest.approx(true, rel=1e-3, abs=rounding)
    assert fit.lower_bound - rounding <= fit.relative_error <= fit.error_bound + rounding
    assert (
        fit.error_bound
        <= math.sqrt(len(sample.shape)) * math.sqrt(max(Truth.of(sample.values).tails(ranks))) + rounding
    )
    assert fit.spectra.shape == sample.shape
    assert isinstance(fit.relative_error, float)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("method", FORCED)
@pytest.mark.parametrize("level", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_small_errors_are_reported_to_three_digits(xp, dtype, method, level):
    """A difference of squares would show nothing of an error of 1e-6 in float32, and 3 digits of 1e-7 in float64."""
    rng = np.random.default_rng(5)
    planted = dense(rng.standard_normal((3, 2, 2)), [orthonormal(rng, n, r) for n, r in zip((9, 8, 7), (3, 2, 2))])
    noise = rng.standard_normal(planted.shape)
    x = as_array(xp, planted + noise * (level * frobenius(planted) / frobenius(noise)), dtype)
    fit = ft.tucker(x, (3, 2, 2), method=method)
    true = Truth.of(x).error(fit.tucker)
    assert 0.5 * level <= true <= 2 * level
    assert fit.relative_error == pytest.approx(true, rel=1e-3)
    assert fit.lower_bound <= true * (1 + 1e-3) + 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("method", FORCED)
def test_the_reported_error_includes_the_rounding_of_the_result(xp, dtype, method):
    if not supports(xp, dtype):
        pytest.skip(f"{library(xp)} has no {dtype}")
    sample = Sample((9, 8, 7), kind="low-rank", dtype=dtype, seed=3)
    fit = ft.tucker(sample.to(xp), (2, 2, 2), method=method)
    true = Truth.of(sample.values).error(fit.tucker)
    assert true > 2.0**-14
    assert fit.relative_error == pytest.approx(true, rel=1e-3)
    assert fit.tucker.dtype == getattr(xp, dtype)


@for_all(
    jax_examples=1,
    case=ranked_samples(dtypes=EVERY_DTYPE, **small),
    method=st.sampled_from(FORCED),
    extra=st.integers(0, 300),
)
def test_a_budget_is_kept(xp, case, method, extra):
    sample, _ = case
    budget = 1 + sum(sample.shape) + extra
    x = sample.to(xp)
    fit = ft.tucker(x, max_parameters=budget, method=method)
    assert fit.tucker.n_parameters <= budget
    true, rounding = Truth.of(sample.values).error(fit.tucker), slack(fit.tucker, sample, xp)
    assert fit.relative_error == pytest.approx(true, rel=1e-3, abs=rounding)
    if 0 not in sample.shape:
        assert (
            true
            <= ft.select_ranks(x, max_parameters=budget).relative_error * (2 if method == "st_hosvd" else 1) + rounding
        )


@given(
    sample=samples(dtypes=REAL, kinds=("gauss",), scales=("unit",), layouts=("C",), min_dim=1, min_ndim=3, max_ndim=4)
)
def test_more_parameters_never_hurt(sample):
    least = 1 + sum(sample.shape)
    errors = [
        ft.tucker(sample.values, max_parameters=b, method="hosvd").relative_error for b in (least, 2 * least, 4 * least)
    ]
    assert all(b <= a + tolerance(sample.dtype) for a, b in itertools.pairwise(errors))


@for_all(sample=samples(dtypes=FLOATING, min_dim=1, **small))
def test_a_tolerance_of_zero_is_exact_to_rounding(xp, sample):
    fit = ft.tucker(sample.to(xp), rtol=0)
    assert Truth.of(sample.values).error(fit.tucker) <= slack(fit.tucker, sample, xp)
    assert fit.relative_error <= slack(fit.tucker, sample, xp)


def test_planted_ranks_are_found_by_tolerance(xp):
    rng = np.random.default_rng(1)
    x = dense(rng.standard_normal((2, 2, 2)), [orthonormal(rng, n, 2) for n in (4, 3, 5)])
    for dtype, rtol in (("float32", 1e-5), ("float64", 1e-12)):
        for method in FORCED:
            assert ft.tucker(as_array(xp, x, dtype), rtol=rtol, method=method).tucker.ranks == (2, 2, 2)


def test_rng_makes_the_result_repeatable():
    x = Sample((9, 8, 7)).values
    first, second = (ft.tucker(x, 3, rng=7).tucker for _ in range(2))
    assert same_bits(first.core, second.core)
    assert distance(ft.tucker(x, 3, rng=np.random.default_rng(7)).tucker.core, first.core) <= 1e-2 * frobenius(x)


def test_spectra_of_a_fit_say_what_they_are():
    sample = Sample((5, 4, 3))
    fit = ft.tucker(sample.values, 2, method="hosvd")
    assert fit.spectra.kind == "exact"
    for ours, theirs in zip(fit.spectra.values, Truth.of(sample.values).values):
        assert distance(ours, times_power_of_two(theirs, Truth.of(sample.values).exponent)) <= 1e-13 * sample.norm
    sequential = ft.tucker(sample.values, 2, method="st_hosvd").spectra
    assert sequential.kind == "sequential"
    for after, exact in zip(sequential.values, fit.spectra.values):
        assert (np.asarray(after) <= np.asarray(exact)[: len(after)] + 1e-13 * sample.norm).all()


def test_repr_of_a_fit_is_its_summary():
    text = repr(ft.tucker(np.diag([2.0, 1.0]), 1))
    assert text.startswith("TuckerFit(TuckerTensor(shape=(2, 2), ranks=(1, 1), ")
    assert "relative_error=0.4472" in text


# --- refusals ----------------------------------------------------------------------------------------

SHAPE = (3, 4, 5)
RANK_ERRORS = [
    ((4, 2, 2), r"{}: rank 4 for mode 0 exceeds its size 3; pass at most 3"),
    ((2, 2, 9), r"{}: rank 9 for mode 2 exceeds its size 5; pass at most 5"),
    ((2, 0, 2), r"{}: rank 0 for mode 1; pass at least 1 and at most 4"),
    ((2, -1, 2), r"{}: rank -1 for mode 1; pass at least 1"),
    ((2, 2), r"{}: 2 ranks for 3 modes of shape \(3, 4, 5\); pass one a mode"),
    ((2, 2, 2, 2), r"{}: 4 ranks for 3 modes"),
    ((1, 1, 2), r"{}: rank 2 for mode 2 exceeds 1, the product of the other ranks"),
    (0, r"{}: rank 0; pass at least 1"),
    (-2, r"{}: rank -2; pass at least 1"),
]


@pytest.mark.parametrize("method", ["hosvd", "st_hosvd", "hooi", "tucker"])
@pytest.mark.parametrize(("ranks", "message"), RANK_ERRORS)
def test_impossible_ranks_are_refused(xp, method, ranks, message):
    with pytest.raises(ValueError, match=message.format(method)):
        METHODS[method](xp.ones(SHAPE), ranks)


@pytest.mark.parametrize("method", ["hosvd", "st_hosvd", "hooi", "tucker"])
@pytest.mark.parametrize("ranks", [2.0, "222", (1, 1, 1.5), True])
def test_ranks_that_are_no_integers_are_refused(method, ranks):
    with pytest.raises(TypeError, match=rf"{method}: ranks.* is .*; pass an integer"):
        METHODS[method](np.ones(SHAPE), ranks)


@pytest.mark.parametrize("dtype", [*FLOATING, *LOW_PRECISION])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_at_once_with_their_place(xp, dtype, bad):
    """LAPACK's SVD loops for ever on this shape with an infinity at the first place."""
    if not supports(xp, dtype):
        pytest.skip(f"{library(xp)} has no {dtype}")
    for place in ((0, 0), (5, 13)):
        values = normal(np.random.default_rng(0), (6, 20), dtype)
        values[place] = bad
        x = as_array(xp, values, dtype)
        calls = {name: METHODS[name] for name in ("hosvd", "st_hosvd", "hooi", "tucker")}
        calls |= {"mode_spectra": lambda x, _: ft.mode_spectra(x), "hosvd_spectrum": lambda x, _: ft.hosvd_spectrum(x)}
        calls |= {"hosvd_spectrum ": lambda x, _: ft.select_ranks(x, rtol=0.1)}
        started = time.perf_counter()
        for name, call in calls.items():
            message = (
                rf"{name.strip()}: x has 1 entries that are NaN or infinite, the first at \({place[0]}, {place[1]}\)"
            )
            with pytest.raises(ValueError, match=message):
                call(x, (2, 2))
        assert time.perf_counter() - started < 1.0 * len(calls)


def test_a_scalar_is_refused(xp):
    for name in ("hosvd", "st_hosvd", "hooi", "tucker"):
        with pytest.raises(ValueError, match=f"{name}: x is a scalar; a decomposition needs at least one axis"):
            METHODS[name](xp.asarray(1.0), 1)


@pytest.mark.parametrize("rtol", [-0.1, 1.5, math.nan])
def test_tolerances_outside_zero_to_one_are_refused(rtol):
    for name, decompose in (("hosvd", ft.hosvd), ("st_hosvd", ft.st_hosvd), ("tucker", ft.tucker)):
        with pytest.raises(ValueError, match=rf"{name}: rtol is {rtol}; pass a number from 0 to 1"):
            decompose(np.ones(SHAPE), rtol=rtol)


def test_two_criteria_are_refused():
    x = np.ones(SHAPE)
    with pytest.raises(TypeError, match="hosvd: got ranks and rtol; pass exactly one of ranks, rtol"):
        ft.hosvd(x, 2, rtol=0.1)
    with pytest.raises(TypeError, match="st_hosvd: got ranks and rtol; pass exactly one of ranks, rtol"):
        ft.st_hosvd(x, 2, rtol=0.1)
    for given_options in (
        {"ranks": 2, "rtol": 0.1},
        {"ranks": 2, "max_parameters": 99},
        {"rtol": 0.1, "max_parameters": 99},
    ):
        names = " and ".join(given_options)
        with pytest.raises(TypeError, match=f"tucker: got {names}; pass exactly one of ranks, rtol, max_parameters"):
            ft.tucker(x, **given_options)


def test_other_refusals_of_the_driver():
    x = np.ones(SHAPE)
    with pytest.raises(ValueError, match=r"tucker: method is 'als'; pass .*'auto', 'hosvd', 'st_hosvd', 'hooi'"):
        ft.tucker(x, 2, method="als")
    message = r"tucker: a budget of 12 parameters for shape \(3, 4, 5\), .* stores 13; pass at least 13"
    with pytest.raises(ValueError, match=message):
        ft.tucker(x, max_parameters=12)
    with pytest.raises(TypeError, match=r"tucker: max_parameters is 20.0; pass an integer"):
        ft.tucker(x, max_parameters=20.0)


def test_refusals_of_mode_order():
    for order in ((0, 1), (0, 1, 1), (0, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"st_hosvd: mode_order .* for 3 modes; pass each mode once"):
            ft.st_hosvd(np.ones(SHAPE), 2, mode_order=order)
    with pytest.raises(ValueError, match="st_hosvd: mode 3 of a tensor with 3 modes"):
        ft.st_hosvd(np.ones(SHAPE), 2, mode_order=(0, 1, 3))


def test_refusals_of_hooi():
    x = np.ones(SHAPE)
    with pytest.raises(ValueError, match="hooi: init is 'random'; pass 'st_hosvd', 'hosvd' or a TuckerTensor"):
        ft.hooi(x, 2, init="random")
    with pytest.raises(ValueError, match="hooi: max_sweeps is -1; pass 0 or more"):
        ft.hooi(x, 2, max_sweeps=-1)
    start = ft.hosvd(x, (1, 1, 1))
    with pytest.raises(
        ValueError, match=r"hooi: init has shape \(3, 4, 5\) and ranks \(1, 1, 1\); pass one of .* \(2, 2, 2\)"
    ):
        ft.hooi(x, 2, init=start)
    whole = TuckerTensor(np.ones((3, 2, 2)), [None, np.eye(4)[:, :2], np.eye(5)[:, :2]])
    with pytest.raises(ValueError, match=r"hooi: init leaves a mode whole"):
        ft.hooi(x, (3, 2, 2), init=whole)
    broken = TuckerTensor(np.full((2, 2, 2), np.nan), [np.eye(n)[:, :2] for n in SHAPE])
    with pytest.raises(ValueError, match="hooi: init's core has 8 entries that are NaN or infinite"):
        ft.hooi(x, 2, init=broken)


def test_a_core_beyond_the_range_of_its_type_is_refused(xp):
    if not supports(xp, "float16"):
        pytest.skip(f"{library(xp)} has no float16")
    x = xp.full((64, 64), 6e4, dtype=xp.float16)
    with pytest.raises(
        ValueError, match=r"tucker: the core's largest entry, .* beyond the range of .*float16; pass x in a wider"
    ):
        ft.tucker(x, 1)


# --- rounding a Tucker tensor ------------------------------------------------------------------------


@st.composite
def sums(draw: st.DrawFn):
    """Draw a sum of Tucker tensors that has lower ranks than it stores; now and then with whole modes."""
    shape = draw(shapes(min_ndim=1, max_ndim=4, min_dim=1, max_dim=6))
    dtype, rng = draw(st.sampled_from(FLOATING)), np.random.default_rng(draw(seeds))
    whole = [draw(st.integers(0, 4)) == 0 for _ in shape]
    if support.few_shapes():
        dtype, whole = "float32", [False] * len(shape)
    ranks = [n if w else 2 if support.few_shapes() else draw(st.integers(1, n + 1)) for n, w in zip(shape, whole)]
    factors = [None if w else normal(rng, (n, r), dtype) for n, r, w in zip(shape, ranks, whole)]
    return normal(rng, ranks, dtype).astype(dtype), [None if u is None else u.astype(dtype) for u in factors]


def in_library(xp, core, factors) -> TuckerTensor:
    return TuckerTensor(as_array(xp, core), [None if u is None else as_array(xp, u) for u in factors])


def rounding_of(core, factors) -> float:
    """Return how far rounding may carry, relative to the norm of the dense tensor: cancellation may make it small."""
    bound = frobenius(core) * math.prod(frobenius(u) for u in factors if u is not None)
    x = dense(core.astype(complex), [None if u is None else u.astype(complex) for u in factors])
    sizes = sum(core.shape) + sum(x.shape)
    return tolerance(core.dtype, sizes, norm=bound) / frobenius(x)


@for_all(jax_examples=1, parts=sums(), rtol=st.sampled_from((0.0, 1e-4, 0.1, 0.5)))
def test_rounding_keeps_its_tolerance(xp, parts, rtol):
    core, factors = parts
    a = in_library(xp, core, factors)
    truth = Truth.of(dense(core.astype(complex), [None if u is None else u.astype(complex) for u in factors]))
    t = ft.round_tucker(a, rtol=rtol)
    assert truth.error(t) <= rtol + rounding_of(core, factors)
    assert t.dtype == a.dtype
    assert all(new <= min(old, n) for new, old, n in zip(t.ranks, a.ranks, a.shape))
    assert_orthonormal(t)


@for_all(jax_examples=1, parts=sums(), data=st.data())
def test_rounding_to_ranks_and_budgets_is_as_good_as_from_the_dense_tensor(xp, parts, data):
    core, factors = parts
    a = in_library(xp, core, factors)
    x = dense(core.astype(complex), [None if u is None else u.astype(complex) for u in factors])
    truth, rounding = Truth.of(x), rounding_of(core, factors)
    ranks = ft.feasible_ranks([data.draw(st.integers(1, min(n, r))) for n, r in zip(a.shape, a.ranks)], a.shape)
    t = ft.round_tucker(a, ranks=ranks)
    assert t.ranks == ranks
    tails = truth.tails(ranks)
    assert math.sqrt(max(tails)) - rounding <= truth.error(t) <= math.sqrt(sum(tails)) + rounding
    budget = 1 + sum(a.shape) + data.draw(st.integers(0, 60))
    t = ft.round_tucker(a, max_parameters=budget)
    assert t.n_parameters <= budget
    best = ft.select_ranks(x, max_parameters=budget).relative_error
    assert truth.error(t) <= best + rounding


def partial_choices(x: np.ndarray, whole):
    """Return the numbers stored by, and the relative error of, every rank tuple of the HOSVD with every set of modes
    left whole.
    """
    spectrum = ft.hosvd_spectrum(x)
    for kept in itertools.chain.from_iterable(itertools.combinations(whole, n) for n in range(len(whole) + 1)):
        cut = [[n] if k in kept else range(1, m + 1) for k, (n, m) in enumerate(zip(x.shape, spectrum.max_ranks))]
        for ranks in itertools.product(*cut):
            others = [math.prod(ranks[:k] + ranks[k + 1 :]) for k in range(x.ndim)]
            if all(r <= o for k, (r, o) in enumerate(zip(ranks, others)) if k not in kept):
                stored = math.prod(ranks) + sum(n * r for k, (n, r) in enumerate(zip(x.shape, ranks)) if k not in kept)
                yield stored, spectrum.error([min(r, m) for r, m in zip(ranks, spectrum.max_ranks)])


@given(
    shape=shapes(min_dim=1, max_dim=5, max_ndim=4, max_size=150),
    whole=st.sets(st.integers(0, 3), min_size=1),
    seed=seeds,
    extra=st.integers(0, 80),
    rtol=st.sampled_from((0.0, 0.03, 0.2, 0.5, 0.8, 1.0)),
)
def test_rounding_with_whole_modes_stores_no_more_than_the_best_of_all_choices(shape, whole, seed, extra, rtol):
    whole = sorted(mode for mode in whole if mode < len(shape))
    rng = np.random.default_rng(seed)
    x = dense(
        rng.standard_normal(shape) * 0.3 ** np.indices(shape).sum(axis=0), [orthonormal(rng, n, n) for n in shape]
    )
    turns = [None if k in whole else orthonormal(rng, n, n) for k, n in enumerate(shape)]
    a = TuckerTensor(dense(x, [None if u is None else u.T for u in turns]), turns)
    choices, rounding = list(partial_choices(x, whole)), tolerance("float64", sum(shape))
    least = min(stored for stored, _ in choices)
    t = ft.round_tucker(a, max_parameters=least + extra)
    assert t.n_parameters <= least + extra
    assert Truth.of(x).error(t) <= min(e for stored, e in choices if stored <= least + extra) + rounding
    t = ft.round_tucker(a, rtol=rtol)
    assert Truth.of(x).error(t) <= rtol + rounding
    assert t.n_parameters <= min(stored for stored, e in choices if e <= rtol)
    assert_orthonormal(t)
    with pytest.raises(
        ValueError, match=f"round_tucker: a budget of {least - 1} parameters .* stores {least}; pass at"
    ):
        ft.round_tucker(a, max_parameters=least - 1)


def test_rounding_a_sum_finds_its_true_ranks_without_forming_it(xp, monkeypatch):
    """The dense tensor would have 10¹⁵ entries."""
    rng = np.random.default_rng(0)
    a = TuckerTensor(
        as_array(xp, rng.standard_normal((2, 3, 2))), [as_array(xp, rng.standard_normal((10**5, r))) for r in (2, 3, 2)]
    )
    monkeypatch.setattr("flora_tensor.tucker_tensor.reconstruct", lambda *_, **__: pytest.fail("the tensor was formed"))
    total = a
    for share in (0.5, -0.25):  # other bases of the same spaces, which nothing can know to be the same
        turned = [u * 2.0 for u in a.factors]
        total = ft.add(total, TuckerTensor(a.core * (share / 8), turned))
    assert total.ranks == (6, 9, 6)
    t = ft.round_tucker(total, rtol=1e-10)
    assert t.ranks == (2, 3, 2)
    difference = ft.norm(ft.add(t, ft.scale(a, -1.25)))
    assert float(difference) <= 1e-6 * float(ft.norm(a))  # the norm of a difference: √eps of the norms
    assert ft.round_tucker(total, max_parameters=7 * 10**5 + 12).ranks == (2, 3, 2)


def test_whole_modes_that_keep_their_rank_stay_whole(xp):
    rng = np.random.default_rng(0)
    factor = as_array(xp, rng.standard_normal((5, 4)))
    a = TuckerTensor(as_array(xp, rng.standard_normal((3, 4, 2))), [None, factor, None])
    assert [u is None for u in ft.round_tucker(a, rtol=1e-8).factors] == [True, False, True]
    b = TuckerTensor(a.core, [None, None, None])
    lower = ft.round_tucker(b, ranks=(2, 4, 2))
    assert [u is None for u in lower.factors] == [False, True, True]
    assert lower.ranks == (2, 4, 2)
    exact = ft.round_tucker(b, ranks=(3, 4, 2))
    assert distance(exact.to_tensor(), a.core) <= tolerance("float64", 9, norm=frobenius(a.core))


def test_rounding_zero_and_scaled_tensors(xp):
    rng = np.random.default_rng(0)
    factors = [as_array(xp, rng.standard_normal((n, 2))) for n in (5, 4, 3)]
    zero = ft.round_tucker(TuckerTensor(xp.zeros((2, 2, 2), dtype=xp.float64), factors), rtol=0.1)
    assert not to_numpy(zero.to_tensor()).any()
    core = rng.standard_normal((2, 2, 2))
    for magnitude in (1e-200, 1e200):
        a = TuckerTensor(as_array(xp, core * magnitude), factors)
        assert (
            Truth.of(dense(core * magnitude, [to_numpy(u) for u in factors])).error(ft.round_tucker(a, rtol=1e-10))
            <= 1e-10
        )


def test_refusals_of_rounding():
    a = TuckerTensor(np.ones((2, 2, 2)), [np.eye(n)[:, :2] for n in SHAPE])
    with pytest.raises(
        TypeError, match="round_tucker: got none of them; pass exactly one of ranks, rtol, max_parameters"
    ):
        ft.round_tucker(a)
    with pytest.raises(TypeError, match="round_tucker: got ranks and rtol"):
        ft.round_tucker(a, ranks=1, rtol=0.1)
    with pytest.raises(ValueError, match="round_tucker: rank 3 for mode 0 exceeds its size 2; pass at most 2"):
        ft.round_tucker(a, ranks=(3, 2, 2))
    with pytest.raises(ValueError, match=r"round_tucker: rtol is 2.0; pass a number from 0 to 1"):
        ft.round_tucker(a, rtol=2)
    message = r"a budget of 3 parameters for shape \(3, 4, 5\), .* stores 13; pass at least 13"
    with pytest.raises(ValueError, match=message):
        ft.round_tucker(a, max_parameters=3)
    with pytest.raises(ValueError, match=r"entries that are NaN or infinite"):
        ft.round_tucker(TuckerTensor(np.full((2, 2, 2), np.inf), a.factors), rtol=0.1)


# --- derivatives and tracing -------------------------------------------------------------------------

DIFFERENTIABLE = ("hosvd", "st_hosvd")


def torch_tensor(values, **options):
    torch = pytest.importorskip("torch")
    return torch.tensor(values, **options)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((4, 3, 5), (2, 2, 3)), ((4, 3, 2), (4, 3, 2)), ((5, 3), (2, 2)), ((2, 9), (2, 2))]
)
def test_torch_gradients_of_the_dense_result(method, dtype, shape, ranks):
    x = torch_tensor(normal(np.random.default_rng(1), shape, dtype), requires_grad=True)
    torch = pytest.importorskip("torch")
    assert torch.autograd.gradcheck(lambda x: METHODS[method](x, ranks).to_tensor(), x)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize(("shape", "ranks"), [((4, 3, 5), (2, 2, 3)), ((5, 3), (2, 2)), ((6,), (1,))])
def test_torch_gradients_of_core_and_factors(method, shape, ranks):
    torch = pytest.importorskip("torch")
    x = torch_tensor(normal(np.random.default_rng(2), shape), requires_grad=True)

    def parts(x):
        t = METHODS[method](x, ranks)
        return (t.core, *t.factors)

    assert torch.autograd.gradcheck(parts, x)


def test_torch_gradients_of_singular_values():
    torch = pytest.importorskip("torch")
    for dtype in ("float64", "complex128"):
        x = torch_tensor(normal(np.random.default_rng(3), (4, 3, 2), dtype), requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: ft.mode_spectra(x).values, x)


def test_torch_gradients_of_hooi():
    """HOOI differentiates its iterations; at convergence that is the derivative of what they converge to."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    planted = dense(5 * rng.standard_normal((2, 2, 2)), [orthonormal(rng, n, 2) for n in (4, 3, 5)])
    x = torch_tensor(planted + 0.1 * rng.standard_normal((4, 3, 5)), requires_grad=True)

    def compressed(x):
        return ft.hooi(x, 2, max_sweeps=30, tolerance=0.0).to_tensor()

    assert torch.autograd.gradcheck(compressed, x, eps=1e-4, atol=1e-2)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_jax_gradients_equal_those_of_torch(method):
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(5)
    values, weights, ranks = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 3, 5)), (2, 2, 3)
    x = torch_tensor(values, requires_grad=True)
    loss(torch_tensor(weights), METHODS[method](x, ranks)).backward()
    theirs = jax.grad(lambda x: loss(jax.numpy.asarray(weights), METHODS[method](x, ranks)))(jax.numpy.asarray(values))
    assert distance(theirs, x.grad) <= 1e-9 * frobenius(x.grad)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["eye", "zero", "ones", "superdiagonal"])
@pytest.mark.parametrize("dtype", REAL)
def test_gradients_at_repeated_singular_values_and_zeros_are_finite(method, kind, dtype):
    values = np.eye(4) if kind == "eye" else Sample((3, 3, 3), kind=kind).values
    x = torch_tensor(values.astype(dtype), requires_grad=True)
    weights = torch_tensor(np.random.default_rng(0).standard_normal(values.shape).astype(dtype))
    for ranks in (2, 3):
        (gradient,) = pytest.importorskip("torch").autograd.grad(loss(weights, METHODS[method](x, ranks)), x)
        assert np.isfinite(to_numpy(gradient)).all()


def test_the_gradient_of_an_exact_decomposition_is_that_of_the_identity():
    """Also where singular values coincide: the result does not depend on the choice of basis."""
    for values in (np.eye(4), Sample((3, 4, 2)).values, Sample((3, 3, 3), kind="superdiagonal").values):
        x = torch_tensor(values, requires_grad=True)
        weights = torch_tensor(np.random.default_rng(0).standard_normal(values.shape))
        loss(weights, ft.hosvd(x)).backward()
        assert distance(x.grad, weights) <= 1e-10 * frobenius(weights)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_nothing_hangs_on_the_graph_unless_the_input_does(method):
    torch = pytest.importorskip("torch")
    x = torch_tensor(Sample((4, 3, 5)).values)
    t = METHODS[method](x, 2)
    assert not any(part.requires_grad for part in (t.core, *t.factors))
    x.requires_grad_()
    with torch.no_grad():
        t = METHODS[method](x, 2)
    assert not any(part.requires_grad for part in (t.core, *t.factors))
    fit = ft.tucker(x, 2)
    assert isinstance(fit.relative_error, float)
    assert fit.tucker.core.requires_grad


@pytest.mark.parametrize("method", ["hosvd", "st_hosvd", "hooi"])
def test_decompositions_with_given_ranks_can_be_jitted(method):
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(Sample((4, 3, 5), seed=6).values)
    # A traced HOOI cannot see its error fall and takes all its sweeps: let the other one do the same.
    options = {"max_sweeps": 3, "tolerance": 0.0} if method == "hooi" else {}

    def compressed(x):
        return getattr(ft, method)(x, (2, 2, 3), **options).to_tensor()

    assert distance(jax.jit(compressed)(x), compressed(x)) <= tolerance("float64", 12, norm=frobenius(x))


def test_the_driver_refuses_traced_input():
    jax = pytest.importorskip("jax")
    with pytest.raises(ValueError, match=r"tucker: x is traced by jit or vmap, .*; call hosvd, st_hosvd or hooi"):
        jax.jit(lambda x: ft.tucker(x, 2).tucker.core)(jax.numpy.ones((3, 3)))


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


@pytest.mark.parametrize("name", ["torch", "array_api_strict"])
def test_every_library_sketches_alike(name):
    """The random numbers come from one generator whatever the library, so the results agree to rounding."""
    shape, ranks = LARGE[2]
    x = noisy(shape, ranks, "float64", 0.1)
    ours = ft.tucker(as_array(support.namespace(name), x), ranks, method="randomized", rng=0)
    theirs = ft.tucker(x, ranks, method="randomized", rng=0)
    assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-6)
    assert distance(ours.tucker.to_tensor(), theirs.tucker.to_tensor()) <= 1e-4 * frobenius(x)


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
