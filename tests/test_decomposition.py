"""Decompositions: the identities and bounds of the theory, for every kind of tensor, on every array library."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import reject
from hypothesis import strategies as st

import flora_tensor as ft
from decomposition_cases import (
    METHODS,
    assert_all_orthogonal,
    assert_orthonormal,
    certain,
    for_all,
    gap,
    methods,
    slack,
    small,
)
from support import (
    EVERY_DTYPE,
    FLOATING,
    INTEGRAL,
    LAYOUTS,
    LOW_PRECISION,
    REAL,
    Truth,
    as_array,
    dense,
    distance,
    frobenius,
    orthonormal,
    ranked_samples,
    same_bits,
    samples,
    times_power_of_two,
    to_numpy,
    tolerance,
)

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


@for_all(case=ranked_samples(dtypes=FLOATING, scales=("unit",), **small), method=methods)
def test_signs_are_fixed_by_the_largest_entry(xp, case, method):
    """The entry of largest magnitude in each column is real and positive; of entries equal in bits the first counts."""
    sample, ranks = case
    if sample.kind == "zero":
        return  # nothing is determined, and the bases are completed anyhow
    t = METHODS[method](sample.to(xp), ranks)
    for u in (*t.factors, *ft.round_tucker(ft.add(t, t), rtol=1e-3).factors):
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
