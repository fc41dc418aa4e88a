"""What one can ask of a decomposition: the sweeps of HOOI, orders, ranks, tolerances, and what is refused."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import flora_tensor as ft
from decomposition_cases import FORCED, METHODS, assert_orthonormal, for_all, gap, methods, slack, small
from flora_tensor import TuckerTensor
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
    dtype_name,
    frobenius,
    library,
    normal,
    orthonormal,
    ranked_samples,
    same_bits,
    samples,
    supports,
    to_numpy,
    unfolded,
)

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
        for name, call in calls.items():
            message = (
                rf"{name.strip()}: x has 1 entries that are NaN or infinite, the first at \({place[0]}, {place[1]}\)"
            )
            with pytest.raises(ValueError, match=message):
                call(x, (2, 2))


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
