"""The error of what is stored, against the dense difference in extended precision."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor import _residual
from flora_tensor._residual import residual_norm


def dense(x: np.ndarray, stored: ft.TuckerTensor) -> float:
    """‖X − X̂‖ from the definition, in the longest floats there are."""
    product = stored.core.astype(np.longdouble)
    for mode, factor in enumerate(stored.factors):
        if factor is not None:
            product = np.moveaxis(np.tensordot(factor.astype(np.longdouble), product, axes=(1, mode)), 0, mode)
    return float(np.sqrt(np.sum((x.astype(np.longdouble) - product) ** 2)))


def sample(rng: np.random.Generator, shape: list[int], ranks: list[int | None], dtype: Any) -> ft.TuckerTensor:
    core = rng.standard_normal([n if r is None else r for n, r in zip(shape, ranks)]).astype(dtype)
    factors = [None if r is None else rng.standard_normal((n, r)).astype(dtype) for n, r in zip(shape, ranks)]
    return ft.TuckerTensor(core, tuple(factors))


@given(data=st.data())
def test_the_residual_is_the_dense_one(data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ranks = [data.draw(st.none() | st.integers(1, n)) for n in shape]
    x_type, stored_type = (data.draw(st.sampled_from([np.float32, np.float64])) for _ in range(2))
    stored = sample(rng, shape, ranks, stored_type)
    size = 10.0 ** data.draw(st.integers(-9, 1))
    x = (stored.to_tensor() + size * rng.standard_normal(shape)).astype(x_type)
    exponent = data.draw(st.sampled_from([0, -90, 80] if x_type == np.float32 else [0, -900, 900]))
    large = ft.TuckerTensor(np.ldexp(stored.core.astype(np.float64), exponent), stored.factors)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_residual, "_SLAB", data.draw(st.integers(1, 100)))
        found = residual_norm(np.ldexp(x, exponent), large, math.ldexp(norm, exponent))
    # Products of fewer than 10⁴ terms in float64, whose sizes may exceed that of their sum a hundredfold.
    tolerance = 1e-6 * dense(x, stored) + 1e6 * np.finfo(np.float64).eps * norm
    assert math.ldexp(found, -exponent) == pytest.approx(dense(x, stored), abs=tolerance)


@pytest.mark.parametrize("residual", [1e-1, 2e-3, 1.1e-3, 0.9e-3, 1e-5, 1e-7])
def test_it_is_accurate_on_both_sides_of_the_change_of_type(residual: float):
    rng = np.random.default_rng(0)
    stored = ft.tucker(rng.standard_normal((96, 80, 3, 3)).astype(np.float32), (96, 80, None, None)).tucker
    noise = rng.standard_normal(stored.shape)
    exact = stored.map(lambda a: a.astype(np.float64)).to_tensor()
    x = (exact + residual * np.linalg.norm(exact) / np.linalg.norm(noise) * noise).astype(np.float32)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    # Rounding of 3e-7 ‖X‖, at random over 55,296 entries, changes a residual of 1e-3 ‖X‖ by a share of 1.3e-6; four
    # times that is hardly ever reached.
    assert residual_norm(x, stored, norm) == pytest.approx(dense(x, stored), rel=5e-6)


def test_no_copy_of_the_change_is_made():
    import tracemalloc

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 64, 3, 3)).astype(np.float32)
    for ranks in ((16, 16, None, None), (500, 60, None, None), (None, 16, None, None)):
        stored = ft.tucker(x, ranks).tucker
        tracemalloc.start()
        residual_norm(x, stored, float(np.linalg.norm(x)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The core, in each of two types, what it is multiplied out to, and slabs of 2¹⁸ numbers.
        assert peak < 3 * stored.core.nbytes + x.nbytes // 2 + 6 * 4 * 2**18
