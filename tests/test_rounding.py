"""A Tucker tensor rounded to lower ranks: as good as from the dense tensor, without forming it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
import support
from decomposition_cases import assert_orthonormal, for_all
from flora_tensor import TuckerTensor
from support import (
    FLOATING,
    Truth,
    as_array,
    dense,
    distance,
    frobenius,
    normal,
    orthonormal,
    seeds,
    shapes,
    to_numpy,
    tolerance,
)

SHAPE = (3, 4, 5)


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
