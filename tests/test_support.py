"""The tests' own tools: a tolerance or a strategy that is wrong would make other tests pass for nothing."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from support import (
    EVERY_DTYPE,
    KINDS,
    LAYOUTS,
    Sample,
    dense,
    distance,
    dtype_name,
    for_all,
    frobenius,
    library,
    orthonormal,
    same_bits,
    samples,
    to_numpy,
    tolerance,
    tucker_samples,
)


@for_all(sample=samples(dtypes=EVERY_DTYPE))
def test_layouts_hold_the_values_that_are_described(xp, sample):
    x = sample.to(xp)
    assert tuple(x.shape) == sample.shape
    assert dtype_name(x.dtype) == sample.dtype
    assert same_bits(x, sample.values)


def test_layouts_are_what_they_say():
    shape = (3, 4, 5)
    xp = np
    x = {layout: Sample(shape, layout=layout).to(xp) for layout in LAYOUTS}
    assert x["C"].flags.c_contiguous
    assert x["F"].flags.f_contiguous
    assert not x["strided"].flags.c_contiguous
    assert x["expanded"].strides[0] == 0
    assert all(s < 0 for s in x["negative"].strides)
    assert not x["read-only"].flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_finite_and_repeatable(kind):
    sample = Sample((4, 3, 5), kind=kind, seed=3)
    assert np.isfinite(sample.values).all()
    assert same_bits(sample.values, sample.values)


def test_kinds_have_the_spectra_they_are_named_for():
    def spectrum(kind):
        return np.linalg.svd(Sample((5, 5, 5), kind=kind).values.reshape(5, -1), compute_uv=False)

    assert np.linalg.matrix_rank(Sample((5, 5, 5), kind="low-rank").values.reshape(5, -1)) == 2
    assert np.ptp(spectrum("superdiagonal")) == 0
    assert 1e-8 < np.ptp(spectrum("near-tie")) < 1e-6
    assert spectrum("graded")[-1] < 0.1 * spectrum("graded")[0]


@given(samples(scales=("huge", "tiny", "subnormal"), dtypes=("float32", "float64", "complex64", "complex128")))
def test_frobenius_agrees_with_exact_arithmetic(sample):
    exact = sum((Fraction(float(v.real)) ** 2 + Fraction(float(v.imag)) ** 2 for v in sample.values.flat), Fraction(0))
    # The square root of a rational number of any size, through an integer square root.
    shift = 2 * max(0, 1200 - (exact.numerator.bit_length() - exact.denominator.bit_length()) // 2)
    root = Fraction(math.isqrt(exact.numerator * 2**shift // exact.denominator), 2 ** (shift // 2))
    assert abs(Fraction(frobenius(sample.values)) - root) <= Fraction(tolerance("float64", 2)) * root + Fraction(5e-324)


@given(tucker_samples())
def test_dense_agrees_with_kronecker_products(sample):
    rows = sample.core.astype("complex128").reshape(-1)
    matrix = np.ones((1, 1))
    for u, n in zip(sample.factors, sample.shape):
        matrix = np.kron(matrix, np.eye(n) if u is None else u)
    limit = tolerance("float64", rows.size, norm=sample.bound)
    assert distance(sample.dense, (matrix @ rows).reshape(sample.shape)) <= limit


def test_orthonormal_columns():
    u = orthonormal(np.random.default_rng(0), 7, 4, "complex128")
    assert distance(u.conj().T @ u, np.eye(4)) <= tolerance("float64", 7)


def test_tolerance_scales_as_it_says():
    assert tolerance("float32", 4, 9, norm=2.0, factor=1.0) == pytest.approx(2.0**-23 * 2 * 6)
    assert tolerance("complex128") == tolerance(np.float64)
    assert tolerance("float32", norm=0.0) > 0


def test_dense_leaves_whole_modes(xp):
    core = np.arange(6.0).reshape(2, 3)
    u = np.ones((4, 3))
    assert distance(dense(core, [None, u]), core @ u.T) == 0
    assert library(xp) in xp.__name__
    assert to_numpy(xp.asarray([1.0])).shape == (1,)
