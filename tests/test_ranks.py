"""Rank choices compared with a search through all rank tuples, and invariant where the tensor's spectra are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor._rank_errors import ErrorTable
from flora_tensor._rank_search import fewest_parameters, smallest_error
from support import (
    FLOATING,
    LOW_PRECISION,
    Sample,
    Truth,
    as_array,
    dense,
    for_all,
    orthonormal,
    samples,
    to_numpy,
    tolerance,
)

TINY = {"min_dim": 1, "max_ndim": 4, "max_dim": 5, "max_size": 120}
DOUBLE = {"dtypes": ("float64", "complex128"), "scales": ("unit",), "layouts": ("C",)}
SEPARATED = ("gauss", "graded")  # kinds with distinct singular values, where the choice is unique


def n_parameters(ranks, shape) -> int:
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks))


def tuples(spectrum: ft.Spectrum, caps=None):
    """Return every feasible rank tuple with its parameters and its relative error."""
    caps = caps or spectrum.max_ranks
    table, total = ft.error_table(spectrum.core), max(spectrum.norm**2, 1e-300)
    for ranks in itertools.product(*(range(1, min(m, c) + 1) for m, c in zip(spectrum.max_ranks, caps))):
        if ft.feasible_ranks(ranks, ranks) == ranks:
            yield ranks, n_parameters(ranks, spectrum.shape), math.sqrt(max(float(table[ranks]), 0.0) / total)


def best_within(spectrum, budget, caps=None) -> float:
    return min(e for _, p, e in tuples(spectrum, caps) if p <= budget)


def fewest_within(spectrum, rtol, caps=None) -> int:
    return min(p for _, p, e in tuples(spectrum, caps) if e <= rtol)


@given(sample=samples(**DOUBLE, **TINY), extra=st.integers(0, 200))
def test_a_budget_buys_the_smallest_error(sample, extra):
    spectrum = ft.hosvd_spectrum(sample.values)
    budget = 1 + sum(sample.shape) + extra
    choice = ft.select_ranks(spectrum, max_parameters=budget)
    assert choice.n_parameters == n_parameters(choice.ranks, sample.shape) <= budget
    assert choice.relative_error <= best_within(spectrum, budget) + 1e-9 * 1e-3
    assert choice.relative_error == spectrum.error(choice.ranks)
    assert choice.lower_bound == spectrum.lower_bound(choice.ranks)
    assert choice.method == "max_parameters"
    assert ft.feasible_ranks(choice.ranks, sample.shape) == choice.ranks


@given(sample=samples(**DOUBLE, **TINY), rtol=st.floats(0.001, 1.0))
def test_a_tolerance_costs_the_fewest_parameters(sample, rtol):
    spectrum = ft.hosvd_spectrum(sample.values)
    choice = ft.select_ranks(spectrum, rtol=rtol)
    assert choice.relative_error <= rtol * (1 + 1e-12)
    assert choice.n_parameters <= fewest_within(spectrum, rtol * (1 - 1e-12))
    assert ft.feasible_ranks(choice.ranks, sample.shape) == choice.ranks
    assert choice.method == "rtol"


@pytest.mark.parametrize("shape", [(3, 3, 4), (4, 3, 3), (2, 3, 2, 4)])
def test_infeasible_ranks_are_not_chosen_though_the_table_prices_them(shape):
    """Keeping (1, 1, 2) of a core keeps a tensor of ranks (1, 1, 1), and may still lose less than (1, 1, 1)."""
    for seed in range(6):
        spectrum = ft.hosvd_spectrum(Sample(shape, seed=seed).values)
        for budget in range(1 + sum(shape), 70):
            choice = ft.select_ranks(spectrum, max_parameters=budget)
            assert ft.feasible_ranks(choice.ranks, choice.ranks) == choice.ranks
            assert choice.relative_error <= best_within(spectrum, budget) + 1e-12
        for rtol in np.linspace(0.05, 0.95, 19):
            choice = ft.select_ranks(spectrum, rtol=float(rtol))
            assert ft.feasible_ranks(choice.ranks, choice.ranks) == choice.ranks
            assert choice.n_parameters <= fewest_within(spectrum, float(rtol))


@given(sample=samples(**DOUBLE, **TINY))
def test_a_tolerance_of_zero_keeps_what_there_is(sample):
    spectrum = ft.hosvd_spectrum(sample.values)
    choice = ft.select_ranks(spectrum, rtol=0)
    assert choice.relative_error == 0.0
    assert all(1 <= r <= m for r, m in zip(choice.ranks, spectrum.max_ranks))


@given(sample=samples(**DOUBLE, **TINY), energy=st.floats(0.01, 1.0))
def test_energy_is_the_share_of_the_squares_to_keep(sample, energy):
    spectrum = ft.hosvd_spectrum(sample.values)
    choice = ft.select_ranks(spectrum, energy=energy)
    assert choice.method == "energy"
    assert choice.ranks == ft.select_ranks(spectrum, rtol=math.sqrt(1 - energy)).ranks
    assert 1 - choice.relative_error**2 >= energy * (1 - 1e-12) or not sample.norm


@given(sample=samples(**DOUBLE, min_dim=2, min_ndim=3, max_ndim=4, max_dim=6, max_size=200), ratio=st.floats(0.05, 1.0))
def test_a_ratio_is_a_budget_in_shares_of_the_dense_tensor(sample, ratio):
    spectrum = ft.hosvd_spectrum(sample.values)
    budget = math.floor(ratio * sample.values.size)
    if budget < 1 + sum(sample.shape):
        with pytest.raises(ValueError, match=f"select_ranks: a budget of {budget} parameters"):
            ft.select_ranks(spectrum, max_ratio=ratio)
        return
    choice = ft.select_ranks(spectrum, max_ratio=ratio)
    assert choice.n_parameters <= ratio * sample.values.size
    assert choice.ranks == ft.select_ranks(spectrum, max_parameters=budget).ranks
    assert choice.method == "max_ratio"


@given(sample=samples(**DOUBLE, **TINY), data=st.data())
def test_caps_are_kept_and_the_choice_is_the_best_below_them(sample, data):
    spectrum = ft.hosvd_spectrum(sample.values)
    caps = tuple(data.draw(st.integers(1, 6)) for _ in sample.shape)
    budget = 1 + sum(sample.shape) + data.draw(st.integers(0, 100))
    choice = ft.select_ranks(spectrum, max_parameters=budget, max_ranks=caps)
    assert all(r <= c for r, c in zip(choice.ranks, caps))
    assert choice.relative_error <= best_within(spectrum, budget, caps) + 1e-12
    rtol = data.draw(st.floats(0.01, 1.0))
    reachable = [p for _, p, e in tuples(spectrum, caps) if e <= rtol * (1 - 1e-12)]
    if reachable:
        choice = ft.select_ranks(spectrum, rtol=rtol, max_ranks=caps)
        assert all(r <= c for r, c in zip(choice.ranks, caps))
        assert choice.n_parameters <= min(reachable)
        assert choice.relative_error <= rtol * (1 + 1e-12)
    elif not any(e <= rtol * (1 + 1e-12) for *_, e in tuples(spectrum, caps)):
        with pytest.raises(
            ValueError, match=r"no ranks up to max_ranks=.* reach a relative error of .*; raise max_ranks"
        ):
            ft.select_ranks(spectrum, rtol=rtol, max_ranks=caps)


@for_all(jax_shapes=((4, 3, 5),), sample=samples(dtypes=FLOATING + LOW_PRECISION, min_dim=1, max_ndim=4, max_size=256))
def test_choices_keep_their_promise_in_every_library(xp, sample):
    x = sample.to(xp)
    truth = Truth.of(sample.values)
    choice = ft.select_ranks(x, rtol=0.3)
    computed = "float32" if sample.dtype in LOW_PRECISION else sample.dtype
    rounding = tolerance(computed, sum(sample.shape), norm=sample.norm, xp=xp) / (sample.norm or 1.0)
    t = ft.hosvd(as_array(np, truth.x), choice.ranks)
    assert Truth.of(truth.x).error(t) <= 0.3 + rounding
    budget = sum(sample.shape) + 20
    assert ft.select_ranks(x, max_parameters=budget).n_parameters <= budget


# --- bounds ------------------------------------------------------------------------------------------


def stored_with_whole(ranks, shape, whole) -> int:
    core = [n if k in whole else r for k, (r, n) in enumerate(zip(ranks, shape))]
    return math.prod(core) + sum(n * r for k, (r, n) in enumerate(zip(ranks, shape)) if k not in whole)


def feasible_with_whole(ranks, shape, whole) -> bool:
    carried = [n if k in whole else r for k, (r, n) in enumerate(zip(ranks, shape))]
    return all(k in whole or r <= math.prod(carried) // carried[k] for k, r in enumerate(ranks))


@pytest.mark.parametrize("whole", [(), (0,), (2,)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((12, 9, 3), "float64"), ((7, 8, 9), "float32"), ((9, 8, 2, 3), "float64")]
)
def test_the_best_ranks_lie_within_their_bounds(monkeypatch, shape, dtype, decay, whole):
    """Looked for between bounds from singular values alone, they are those of a search through all tuples."""
    monkeypatch.setattr("flora_tensor._rank_errors._SMALL_TABLE", 0)
    x = np.random.default_rng(len(shape)).standard_normal(shape)
    for k, n in enumerate(shape):
        x = x * (np.arange(1, n + 1) ** -decay).reshape([-1 if j == k else 1 for j in range(len(shape))])
    spectrum = ft.hosvd_spectrum(x.astype(dtype))
    table = ft.error_table(spectrum.core) / float(ft.error_table(spectrum.core).flat[0])
    every = itertools.product(*([m] if k in whole else range(1, m + 1) for k, m in enumerate(spectrum.max_ranks)))
    listed = [r for r in every if feasible_with_whole(r, shape, whole)]
    costs = np.array([stored_with_whole(r, shape, whole) for r in listed])
    errors = np.array([table[r] for r in listed])
    for rtol in (0.9, 0.4, 0.1, 0.03, 1e-3):
        found = fewest_parameters(spectrum, shape, rtol**2, kept=whole)
        assert table[found] <= rtol**2 * (1 + 1e-12)
        assert stored_with_whole(found, shape, whole) == costs[errors <= rtol**2 * (1 - 1e-12)].min()
    for budget in np.linspace(costs.min(), costs.max(), 7, dtype=int).tolist():
        found = smallest_error(spectrum, shape, budget, kept=whole)
        assert stored_with_whole(found, shape, whole) <= budget
        assert table[found] <= errors[costs <= budget].min() + 1e-13


def test_bounds_leave_little_to_search(monkeypatch):
    """Of 130 × 120 × 3 × 3 the whole table is never asked for, though it is there without bounds."""
    x = np.random.default_rng(0).standard_normal((130, 120, 3, 3))
    x *= np.arange(1, 131)[:, None, None, None] ** -0.7 * np.arange(1, 121)[:, None, None] ** -0.7
    asked: list[int] = []
    of_core = ErrorTable.of_core
    monkeypatch.setattr(
        ErrorTable, "of_core", lambda *given: asked.append(of_core(*given).errors.size) or of_core(*given)
    )
    for options in ({"rtol": 0.1}, {"rtol": 0.01}, {"max_ratio": 0.05}, {"max_ratio": 0.2}):
        ft.select_ranks(ft.hosvd_spectrum(x), **options)
    assert max(asked) < 131 * 121 * 4 * 4 / 3


# --- coarse grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss", "graded"])
@pytest.mark.parametrize("shape", [(40, 36, 30), (60, 48, 3, 3)])
def test_choices_from_coarse_grids_keep_their_promise_and_are_near_the_best(monkeypatch, kind, shape):
    x = Sample(shape, kind=kind, seed=1).values
    x = x + 20 * dense(
        np.ones((2, 2, 2, 2)[: len(shape)]), [orthonormal(np.random.default_rng(k), n, 2) for k, n in enumerate(shape)]
    )
    budgets, tolerances = [int(s * x.size) for s in (0.05, 0.2, 0.5)], (0.1, 0.5)
    exact = ft.hosvd_spectrum(x)
    best = [ft.select_ranks(exact, max_parameters=b) for b in budgets]
    cheapest = [ft.select_ranks(exact, rtol=t) for t in tolerances]
    monkeypatch.setattr("flora_tensor._rank_errors._MAX_TABLE", 2000)
    spectrum = ft.hosvd_spectrum(x)
    assert spectrum.table.errors.size < 20_000 < math.prod(n + 1 for n in spectrum.max_ranks)
    for budget, reference in zip(budgets, best):
        choice = ft.select_ranks(spectrum, max_parameters=budget)
        assert choice.n_parameters <= budget
        assert reference.relative_error <= choice.relative_error + 1e-12
        assert choice.relative_error <= reference.relative_error * 1.02 + 1e-3
    for rtol, reference in zip(tolerances, cheapest):
        choice = ft.select_ranks(spectrum, rtol=rtol)
        assert choice.relative_error <= rtol * (1 + 1e-12)
        assert reference.n_parameters <= choice.n_parameters <= reference.n_parameters * 1.1 + 10


# --- invariances -------------------------------------------------------------------------------------


def choices(x):
    """Return the ranks by a tolerance and by a budget."""
    spectrum = ft.hosvd_spectrum(x)
    budget = sum(x.shape) + max(20, int(np.prod(x.shape)) // 4)
    return ft.select_ranks(spectrum, rtol=0.3), ft.select_ranks(spectrum, max_parameters=budget)


@given(sample=samples(**DOUBLE, kinds=SEPARATED, min_dim=2, min_ndim=3, max_ndim=4, max_dim=6, max_size=300))
def test_the_choice_does_not_depend_on_the_order_of_modes(sample):
    axes = np.random.default_rng(sample.seed).permutation(len(sample.shape))
    for one, other in zip(choices(sample.values), choices(sample.values.transpose(axes))):
        # Tuples of equal cost are possible for permuted shapes; cost and error decide.
        assert other.n_parameters == one.n_parameters or other.relative_error == pytest.approx(
            one.relative_error, rel=1e-9
        )
        if tuple(one.ranks[k] for k in axes) != other.ranks:
            assert (one.method, one.n_parameters) == (other.method, other.n_parameters)


@given(
    sample=samples(dtypes=FLOATING, scales=("unit",), layouts=("C",), min_dim=1, max_ndim=4, max_size=300),
    power=st.sampled_from((-80, -17, 5, 40, 80)),
)
def test_the_choice_does_not_depend_on_a_power_of_two_bit_for_bit(sample, power):
    for one, other in zip(
        choices(sample.values), choices(sample.values * np.array(2.0**power, sample.values.real.dtype))
    ):
        assert one == other


@given(sample=samples(**DOUBLE, kinds=SEPARATED, min_dim=2, min_ndim=3, max_ndim=4, max_dim=6, max_size=300))
def test_the_choice_does_not_depend_on_the_bases(sample):
    rng = np.random.default_rng(sample.seed)
    turned = dense(sample.values, [orthonormal(rng, n, n, sample.dtype) for n in sample.shape])
    for one, other in zip(choices(sample.values), choices(turned)):
        assert one.ranks == other.ranks
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-9, abs=1e-12)


@given(sample=samples(dtypes=("float64",), kinds=SEPARATED, min_dim=2, max_ndim=4, max_size=300, scales=("unit",)))
def test_the_choice_does_not_depend_on_the_layout(sample):
    for one, other in zip(choices(sample.values), choices(sample.to(np))):
        assert one.ranks == other.ranks


@given(sample=samples(**DOUBLE, min_dim=1, max_ndim=4, max_size=300), data=st.data())
def test_sweeps_never_lose_and_the_certificate_lies_between_one_and_the_root_of_the_order(sample, data):
    choice = ft.select_ranks(sample.values, rtol=data.draw(st.floats(0.05, 0.9)))
    truth = Truth.of(sample.values)
    rounding = tolerance("float64", sum(sample.shape))
    polished = truth.error(ft.hooi(sample.values, choice.ranks, init="hosvd"))
    assert polished <= choice.relative_error + rounding
    assert choice.lower_bound - rounding <= polished
    if choice.lower_bound > 1e-6:
        assert 1 - 1e-9 <= choice.certificate <= math.sqrt(len(sample.shape)) * (1 + 1e-9)
        assert choice.relative_error / choice.certificate <= polished + rounding
    assert ft.select_ranks(sample.values, rtol=0).certificate == 1.0


# --- what it says ------------------------------------------------------------------------------------


def test_a_spectrum_and_its_tensor_give_the_same_choice(xp):
    x = as_array(xp, Sample((6, 5, 4), seed=3).values)
    assert ft.select_ranks(x, rtol=0.4) == ft.select_ranks(ft.hosvd_spectrum(x), rtol=0.4)


def test_zero_and_empty_tensors():
    choice = ft.select_ranks(np.zeros((3, 4, 2)), rtol=0.1)
    assert (choice.ranks, choice.relative_error, choice.lower_bound) == ((1, 1, 1), 0.0, 0.0)
    empty = ft.select_ranks(np.zeros((3, 0, 2)), rtol=0.1)
    assert (empty.ranks, empty.n_parameters, empty.relative_error) == ((0, 0, 0), 0, 0.0)
    assert ft.select_ranks(np.zeros((3, 0)), max_parameters=5).ranks == (0, 0)


def test_planted_ranks_are_found():
    rng = np.random.default_rng(0)
    x = dense(rng.standard_normal((3, 2, 4)), [orthonormal(rng, n, r) for n, r in zip((12, 9, 11), (3, 2, 4))])
    assert ft.select_ranks(x, rtol=1e-10).ranks == (3, 2, 4)
    assert ft.select_ranks(x, energy=1 - 1e-12).ranks == (3, 2, 4)
    assert ft.select_ranks(x, max_parameters=n_parameters((3, 2, 4), x.shape)).ranks == (3, 2, 4)


def test_refusals():
    x = Sample((4, 3, 5)).values
    with pytest.raises(
        TypeError, match="select_ranks: got none of them; pass exactly one of rtol, energy, max_parameters"
    ):
        ft.select_ranks(x)
    with pytest.raises(TypeError, match="select_ranks: got rtol and energy; pass exactly one of"):
        ft.select_ranks(x, rtol=0.1, energy=0.9)
    message = r"select_ranks: a budget of 12 parameters for shape \(4, 3, 5\), .* stores 13; pass at least 13"
    with pytest.raises(ValueError, match=message):
        ft.select_ranks(x, max_parameters=12)
    with pytest.raises(TypeError, match=r"select_ranks: max_parameters is 20.5; pass an integer"):
        ft.select_ranks(x, max_parameters=20.5)
    with pytest.raises(
        ValueError, match=r"select_ranks: max_ranks is \(2, 2\); pass 3 integers of at least 1, one a mode"
    ):
        ft.select_ranks(x, rtol=0.1, max_ranks=(2, 2))
    with pytest.raises(ValueError, match=r"select_ranks: max_ranks is \(2, 0, 2\); pass 3 integers of at least 1"):
        ft.select_ranks(x, rtol=0.1, max_ranks=(2, 0, 2))
    with pytest.raises(
        ValueError, match=r"no ranks up to max_ranks=\(1, 1, 1\) reach a relative error of 0.01; raise max_ranks"
    ):
        ft.select_ranks(x, rtol=0.01, max_ranks=(1, 1, 1))
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"select_ranks: rtol is {value}; pass a number from 0 to 1"):
            ft.select_ranks(x, rtol=value)
    for name in ("energy", "max_ratio"):
        for value in (0.0, -0.5, 1.5, math.nan):
            with pytest.raises(ValueError, match=f"select_ranks: {name} is {value}; pass a number above 0 to 1"):
                ft.select_ranks(x, **{name: value})
        with pytest.raises(TypeError, match=f"select_ranks: {name} is 'x'; pass a number"):
            ft.select_ranks(x, **{name: "x"})


@pytest.mark.parametrize(
    ("dtype", "itemsize"),
    [("float16", 2), ("float32", 4), ("float64", 8), ("complex64", 8), ("complex128", 16), ("int32", 8)],
)
def test_a_budget_in_bytes_counts_numbers_of_the_tensors_type(dtype, itemsize):
    x = (10 * np.random.default_rng(0).standard_normal((9, 8, 7))).astype(dtype)
    for numbers in (60, 150, 400):
        by_bytes = ft.select_ranks(x, max_bytes=numbers * itemsize + itemsize - 1)
        assert by_bytes.ranks == ft.select_ranks(x, max_parameters=numbers).ranks
        assert by_bytes.n_parameters * itemsize <= numbers * itemsize
        assert by_bytes.method == "max_bytes"
    with pytest.raises(TypeError, match=r"select_ranks: max_bytes is 20.5; pass an integer"):
        ft.select_ranks(x, max_bytes=20.5)


def test_choices_hold_plain_numbers(xp):
    choice = ft.select_ranks(as_array(xp, Sample((4, 3, 5)).values), rtol=0.5)
    assert [type(r) for r in choice.ranks] == [int] * 3
    assert (type(choice.n_parameters), type(choice.relative_error), type(choice.lower_bound)) == (int, float, float)
    assert to_numpy(xp.asarray(choice.ranks)).tolist() == list(choice.ranks)
