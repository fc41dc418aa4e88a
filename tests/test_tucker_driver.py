"""The driver `tucker`: the error that it reports, its bounds, its tolerances and budgets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from decomposition_cases import FORCED, for_all, slack, small
from flora_tensor._unformed import RELIABLE
from support import (
    EVERY_DTYPE,
    FLOATING,
    LOW_PRECISION,
    REAL,
    Sample,
    Truth,
    as_array,
    dense,
    distance,
    frobenius,
    library,
    normal,
    orthonormal,
    ranked_samples,
    same_bits,
    samples,
    supports,
    times_power_of_two,
    tolerance,
)


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


@pytest.mark.parametrize("times", [3.0, 1.1, 0.9, 0.1])
@pytest.mark.parametrize("shape", [(60, 50, 3, 3), (70, 60)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_the_error_is_the_true_one_on_both_sides_of_the_change_to_the_residual(dtype, shape, times):
    """Down to an error e with e² = 10⁴ ε, √(‖X‖² − ‖G‖²)/‖X‖ is reported; below, the residual.

    If rounding moves ‖G‖² by c ε ‖X‖², it moves the squared error by c/10⁴ of itself at most, and the error by half of
    that: 1e-3 allows c = 20.
    """
    rng, ranks = np.random.default_rng(0), (5, 5, 3, 3)[: len(shape)]
    planted = dense(normal(rng, ranks, dtype), [orthonormal(rng, n, r, dtype) for n, r in zip(shape, ranks)])
    noise = normal(rng, shape, dtype)
    size = times * math.sqrt(RELIABLE * np.finfo(dtype).eps)
    x = (planted + size * frobenius(planted) / frobenius(noise) * noise).astype(dtype)
    fit = ft.tucker(x, ranks, method="st_hosvd")
    rebuilt = dense(fit.tucker.core.astype("complex128"), [u.astype("complex128") for u in fit.tucker.factors])
    true = frobenius(x.astype("complex128") - rebuilt) / frobenius(x)
    assert fit.relative_error == pytest.approx(true, rel=1e-3)
