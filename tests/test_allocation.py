"""One budget over many weights: against brute force, against simple rules, and against its own lower bound."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from support import Sample, dense, orthonormal, seeds, tolerance

SLACK = 1 + 1e-9


def n_parameters(ranks, shape) -> int:
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks)) if any(ranks) else 0


def decaying(seed: int, shape, power: float, magnitude: float) -> np.ndarray:
    """Return a tensor whose singular values fall like i^-power in every mode."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(shape)
    for mode, n in enumerate(shape):
        slope = np.arange(1.0, n + 1) ** (-power / math.sqrt(len(shape)))
        core = core * slope.reshape([-1 if k == mode else 1 for k in range(len(shape))])
    x = dense(core, [orthonormal(rng, n, n) for n in shape])
    return magnitude * x / np.linalg.norm(x)


@pytest.fixture(scope="module")
def mix() -> dict[str, ft.Spectrum]:
    """24 weights of a network: matrices and kernels of several sizes, decays and magnitudes."""
    shapes = [(48, 32), (64, 64), (32, 24, 3, 3), (24, 24, 3, 3), (16, 16, 5, 5), (40, 40, 1, 1), (96, 16), (20, 18, 7)]
    rng = np.random.default_rng(0)
    return {
        f"layer.{i}": ft.hosvd_spectrum(
            decaying(i, shapes[i % len(shapes)], float(rng.uniform(0.4, 2.5)), float(rng.lognormal(0, 1)))
        )
        for i in range(24)
    }


def relative_error(spectra, ranks) -> float:
    lost = sum((spectra[name].error(r) * spectra[name].norm) ** 2 for name, r in ranks.items())
    return math.sqrt(lost / sum(s.norm**2 for s in spectra.values()))


def tiny_options(rng: np.random.Generator, alternatives: int) -> list[ft.Spectrum]:
    """Return one weight's spectra: one arrangement, or several of the same numbers."""
    shape = (int(rng.integers(2, 5)), int(rng.integers(2, 5)), 2)
    x = decaying(int(rng.integers(1 << 20)), shape, float(rng.uniform(0, 3)), float(rng.lognormal(0, 1)))
    arranged = [x, x.reshape(shape[0], -1), x.reshape(-1, 2)]
    return [ft.hosvd_spectrum(a) for a in arranged[:alternatives]]


def brute_force(spectra: dict[str, list[ft.Spectrum]], weights=None):
    """Return (parameters, weighted squared error) for every combination of points on the frontiers."""
    curves = []
    for name, options in spectra.items():
        w = 1.0 if weights is None else weights[name]
        frontiers = [s.frontier() for s in options]
        curves.append([(int(p), w * float(e)) for f in frontiers for p, e in zip(f.n_parameters, f.error_squared)])
    for points in itertools.product(*curves):
        yield sum(p for p, _ in points), math.fsum(e for _, e in points)


# --- budgets -----------------------------------------------------------------------------------------


@given(seed=seeds, alternatives=st.integers(1, 3), budget=st.integers(0, 80), weighted=st.booleans())
def test_a_budget_against_brute_force(seed, alternatives, budget, weighted):
    rng = np.random.default_rng(seed)
    spectra = {name: tiny_options(rng, alternatives) for name in "ab"}
    weights = {name: float(rng.uniform(0.1, 10)) for name in spectra} if weighted else None
    total = sum((weights or dict.fromkeys(spectra, 1.0))[n] * s[0].norm ** 2 for n, s in spectra.items())
    result = ft.allocate_ranks(spectra, max_parameters=budget, weights=weights)
    best = math.sqrt(min(e for p, e in brute_force(spectra, weights) if p <= budget) / total)
    assert result.n_parameters <= budget
    assert result.lower_bound <= best * SLACK + 1e-12
    assert best <= result.relative_error * SLACK + 1e-12
    assert result.relative_error >= result.lower_bound * (1 - 1e-9) - 1e-12
    # The search near the relaxation ends with the best choice, or within 0.01 % of the bound.
    assert result.relative_error**2 <= best**2 * (1 + 1e-4) + 1e-12


@given(seed=seeds, budget=st.integers(0, 400), count=st.integers(1, 5))
def test_what_an_allocation_says_of_itself_is_true(seed, budget, count):
    rng = np.random.default_rng(seed)
    spectra = {f"w{i}": tiny_options(rng, 3) for i in range(count)}
    result = ft.allocate_ranks(spectra, max_parameters=budget)
    lost = 0.0
    assert list(result.choices) == list(spectra)
    for name, choice in result.choices.items():
        spectrum = spectra[name][choice.option]
        assert choice.n_parameters == n_parameters(choice.ranks, spectrum.shape)
        assert choice.error_squared == pytest.approx((spectrum.error(choice.ranks) * spectrum.norm) ** 2, abs=1e-12)
        assert result.ranks[name] == choice.ranks
        lost += choice.error_squared
    assert result.n_parameters == sum(c.n_parameters for c in result.choices.values()) <= budget
    total = sum(o[0].norm ** 2 for o in spectra.values())
    assert result.relative_error == pytest.approx(math.sqrt(lost / total), abs=1e-12)
    if result.lower_bound > 0:
        assert result.gap == pytest.approx(max(0.0, result.relative_error / result.lower_bound - 1))


@given(seed=seeds)
def test_no_bound_is_above_what_was_reached(seed):
    """Also where all but rounding is kept: there the relaxation's sum is only as exact as what it began with."""
    rng = np.random.default_rng(seed)
    spectra = {name: ft.hosvd_spectrum(rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))) for name in "abc"}
    result = ft.allocate_ranks(spectra, max_parameters=3 * (6 * 2 + 2 * 5 + 4))
    assert result.relative_error < tolerance("float64", 6, 5)
    assert result.lower_bound <= result.relative_error


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.2])
def test_a_mix_of_weights_is_allocated_within_half_a_percent_of_the_bound(mix, ratio):
    result = ft.allocate_ranks(mix, max_ratio=ratio)
    dense_size = sum(math.prod(s.shape) for s in mix.values())
    assert result.n_parameters <= ratio * dense_size
    assert result.relative_error == pytest.approx(relative_error(mix, result.ranks), rel=1e-9)
    assert result.lower_bound <= result.relative_error
    assert result.gap <= 0.005


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.2])
def test_the_price_is_the_multiplier_of_the_relaxation(mix, ratio):
    """With numbers at a price q, Σ min (E + q p) − q B bounds the error for every q, most sharply at the price."""
    result = ft.allocate_ranks(mix, max_ratio=ratio)
    budget = math.floor(ratio * sum(math.prod(s.shape) for s in mix.values()))
    frontiers = [s.frontier() for s in mix.values()]

    def bound(price: float) -> float:
        return sum(float(np.min(f.error_squared + price * f.n_parameters)) for f in frontiers) - price * budget

    total = sum(s.norm**2 for s in mix.values())
    assert bound(result.price) <= result.lower_bound**2 * total * SLACK
    assert bound(result.price) >= (result.lower_bound * 0.995) ** 2 * total
    for factor in (0.7, 0.98, 1.02, 1.4):
        assert bound(factor * result.price) <= bound(result.price) * SLACK
    assert ft.allocate_ranks(mix, max_parameters=10**9).price == 0.0


def test_many_equal_weights_are_allocated_near_the_bound():
    """Where every weight offers the same steps the sums are many: the search must end, and not lose what it had."""
    frontier = ft.hosvd_spectrum(decaying(0, (24, 16, 3, 3), 0.7, 1.0)).frontier(partial=True)
    alike = {f"w{i}": frontier for i in range(150)}
    for options in ({"max_ratio": 0.03}, {"max_parameters": 40 * 150 + 13}, {"rtol": 0.6}):
        result = ft.allocate_ranks(alike, **options)
        assert result.gap <= 0.005
        assert result.lower_bound <= (result.n_parameters if "rtol" in options else result.relative_error) * SLACK


def test_no_budget_is_left_that_would_buy_something(mix):
    points = {name: spectrum.frontier().n_parameters for name, spectrum in mix.items()}
    for budget in range(200, 4000, 190):
        result = ft.allocate_ranks(mix, max_parameters=budget)
        for name, choice in result.choices.items():
            larger = points[name][points[name] > choice.n_parameters]
            assert len(larger) == 0 or larger[0] - choice.n_parameters > budget - result.n_parameters


@given(seed=seeds, rtol=st.floats(0.01, 0.99), count=st.integers(1, 4))
def test_no_numbers_are_kept_that_the_tolerance_does_not_need(seed, rtol, count):
    rng = np.random.default_rng(seed)
    spectra = {f"w{i}": tiny_options(rng, 1)[0] for i in range(count)}
    result = ft.allocate_ranks(spectra, rtol=rtol)
    total = sum(s.norm**2 for s in spectra.values())
    lost = sum(choice.error_squared for choice in result.choices.values())
    for name, choice in result.choices.items():
        frontier = spectra[name].frontier()
        at = int(np.searchsorted(frontier.n_parameters, choice.n_parameters))
        assert at == 0 or lost - choice.error_squared + frontier.error_squared[at - 1] > rtol**2 * total * (1 - 1e-9)


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.2])
def test_simple_rules_are_no_better(mix, ratio):
    budget = math.floor(ratio * sum(math.prod(s.shape) for s in mix.values()))
    result = ft.allocate_ranks(mix, max_parameters=budget)

    def affordable(rule, settings):
        tried = [{name: rule(s, value) for name, s in mix.items()} for value in settings]
        fits = [r for r in tried if sum(n_parameters(r[name], mix[name].shape) for name in r) <= budget]
        return min((relative_error(mix, r) for r in fits), default=1.0)

    def within(spectrum, share):
        points = spectrum.frontier()
        at = int(np.searchsorted(points.n_parameters, share * math.prod(spectrum.shape), side="right")) - 1
        return tuple(points.ranks[at].tolist())

    rank = affordable(lambda s, r: ft.feasible_ranks([r] * len(s.shape), s.shape), range(1, 40))
    fraction = affordable(within, np.linspace(0.3, 1.0, 15) * ratio)
    tolerance = affordable(lambda s, rtol: ft.select_ranks(s, rtol=rtol).ranks, np.linspace(0.02, 0.98, 49))
    assert min(rank, fraction, tolerance) < 1.0
    assert result.relative_error <= min(rank, fraction, tolerance)
    assert result.relative_error < 0.97 * fraction, "sharing the budget is worth something on unlike weights"


def test_errors_fall_as_the_budget_grows(mix):
    results = [ft.allocate_ranks(mix, max_ratio=ratio) for ratio in (0.01, 0.05, 0.2, 0.5, 1.0)]
    assert all(a.relative_error > b.relative_error for a, b in itertools.pairwise(results))
    assert all(a.lower_bound >= b.lower_bound for a, b in itertools.pairwise(results))


def test_the_ends_of_the_range(mix):
    nothing = ft.allocate_ranks(mix, max_parameters=0)
    assert (nothing.n_parameters, nothing.relative_error) == (0, 1.0)
    assert all(not any(ranks) for ranks in nothing.ranks.values())
    everything = ft.allocate_ranks(mix, max_parameters=10**9)
    assert everything.relative_error <= 1e-12
    assert everything.gap == 0.0


# --- tolerances --------------------------------------------------------------------------------------


@given(seed=seeds, alternatives=st.integers(1, 3), rtol=st.floats(0.0, 1.0))
def test_a_tolerance_against_brute_force(seed, alternatives, rtol):
    rng = np.random.default_rng(seed)
    spectra = {name: tiny_options(rng, alternatives) for name in "ab"}
    total = sum(s[0].norm ** 2 for s in spectra.values())
    result = ft.allocate_ranks(spectra, rtol=rtol)
    best = min(p for p, e in brute_force(spectra) if e <= rtol**2 * total * (1 - 1e-12) or e <= 1e-25 * total)
    assert result.relative_error <= rtol * (1 + 1e-12) + 1e-12
    assert result.lower_bound <= best * SLACK
    assert result.lower_bound <= result.n_parameters * SLACK
    assert result.n_parameters <= best * (1 + 1e-4)


@pytest.mark.parametrize("rtol", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_a_mix_within_a_tolerance_is_near_the_bound_and_cheaper_than_one_tolerance_for_each(mix, rtol):
    result = ft.allocate_ranks(mix, rtol=rtol)
    assert relative_error(mix, result.ranks) <= rtol * (1 + 1e-9)
    assert 0 < result.lower_bound <= result.n_parameters
    assert result.gap <= 0.005
    each = sum(ft.select_ranks(s, rtol=rtol).n_parameters for s in mix.values())
    assert result.n_parameters <= each


def test_a_tolerance_and_its_budget_agree(mix):
    by_tolerance = ft.allocate_ranks(mix, rtol=0.3)
    by_budget = ft.allocate_ranks(mix, max_parameters=by_tolerance.n_parameters)
    assert by_budget.relative_error <= 0.3 * 1.005
    assert ft.allocate_ranks(mix, rtol=1.0).n_parameters == 0
    assert ft.allocate_ranks(mix, rtol=0.0).relative_error <= 1e-12


# --- weights, options, what may be passed ------------------------------------------------------------


def test_weights_move_the_budget():
    spectra = {name: ft.hosvd_spectrum(decaying(k, (12, 10), 1.0, 1.0)) for k, name in enumerate("ab")}
    even = ft.allocate_ranks(spectra, max_parameters=120)
    for favored, other in ("ab", "ba"):
        tilted = ft.allocate_ranks(spectra, max_parameters=120, weights={favored: 100.0, other: 1.0})
        assert tilted.choices[favored].n_parameters > even.choices[favored].n_parameters
        assert tilted.choices[other].n_parameters < even.choices[other].n_parameters
    only = ft.allocate_ranks(spectra, max_parameters=10**6, weights={"a": 1.0, "b": 0.0})
    assert only.ranks["b"] == (0, 0)
    assert only.relative_error <= 1e-12


def test_relative_weights_do_not_see_magnitudes():
    tensors = {name: decaying(k, (10, 8, 3), 1.0, 1.0) for k, name in enumerate("abc")}
    plain = {name: ft.hosvd_spectrum(x) for name, x in tensors.items()}
    scaled = {name: ft.hosvd_spectrum(x * 4.0**k) for k, (name, x) in enumerate(tensors.items())}
    one, other = (ft.allocate_ranks(s, max_parameters=150, weights="relative") for s in (plain, scaled))
    assert one.ranks == other.ranks
    assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)
    assert ft.allocate_ranks(scaled, max_parameters=150).ranks != other.ranks
    assert ft.allocate_ranks(scaled, max_parameters=150, weights="uniform") == other
    assert ft.allocate_ranks(scaled, max_parameters=150, weights="norm") == ft.allocate_ranks(
        scaled, max_parameters=150
    )


def test_alternatives_are_never_worse_than_one_of_them():
    """A kernel that is a product of one matrix over (o h) and (i w) is cheap in that arrangement alone."""
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 18))
    kernel = flat.reshape(8, 3, 6, 3).transpose(0, 2, 1, 3)
    plain = {"a": [ft.hosvd_spectrum(kernel)], "b": [ft.hosvd_spectrum(decaying(1, (9, 7), 1.0, 30.0))]}
    both = {"a": [*plain["a"], ft.hosvd_spectrum(flat)], "b": plain["b"]}
    for budget in (60, 120, 200):
        one, two = (ft.allocate_ranks(s, max_parameters=budget) for s in (plain, both))
        assert two.relative_error <= one.relative_error * SLACK
    assert two.choices["a"].option == 1
    assert len(two.ranks["a"]) == 2


def test_frontiers_may_be_passed_in_place_of_spectra(mix):
    by_frontier = ft.allocate_ranks({name: s.frontier() for name, s in mix.items()}, max_ratio=0.05)
    assert by_frontier == ft.allocate_ranks(mix, max_ratio=0.05)


def test_zero_weights_are_given_nothing():
    spectra = {"zero": ft.hosvd_spectrum(np.zeros((4, 3, 2))), "x": ft.hosvd_spectrum(Sample((4, 3, 2)).values)}
    for options in ({"max_parameters": 1000}, {"rtol": 0.1}, {"max_ratio": 1.0, "weights": "relative"}):
        assert ft.allocate_ranks(spectra, **options).ranks["zero"] == (0, 0, 0)
    nothing = ft.allocate_ranks({"zero": spectra["zero"]}, max_parameters=100)
    assert (nothing.n_parameters, nothing.relative_error, nothing.gap) == (0, 0.0, 0.0)


@given(power=st.sampled_from((-60, -3, 5, 60)), budget=st.integers(0, 300))
def test_a_power_of_two_common_to_all_changes_nothing(power, budget):
    tensors = {name: decaying(k, (8, 6, 3), 1.0, 2.0**-k) for k, name in enumerate("abc")}
    one = ft.allocate_ranks({n: ft.hosvd_spectrum(x) for n, x in tensors.items()}, max_parameters=budget)
    other = ft.allocate_ranks({n: ft.hosvd_spectrum(x * 2.0**power) for n, x in tensors.items()}, max_parameters=budget)
    assert (one.ranks, one.relative_error, one.lower_bound) == (other.ranks, other.relative_error, other.lower_bound)


# --- refusals ----------------------------------------------------------------------------------------


def test_refusals():
    x = Sample((4, 3, 2)).values
    spectra = {"a": ft.hosvd_spectrum(x), "b": ft.hosvd_spectrum(2 * x)}
    with pytest.raises(
        TypeError, match="allocate_ranks: got none of them; pass exactly one of max_parameters, max_ratio, rtol"
    ):
        ft.allocate_ranks(spectra)
    with pytest.raises(TypeError, match="allocate_ranks: got max_parameters and rtol; pass exactly one of"):
        ft.allocate_ranks(spectra, max_parameters=3, rtol=0.1)
    with pytest.raises(ValueError, match="allocate_ranks: no weights; pass at least one name with its spectrum"):
        ft.allocate_ranks({}, max_parameters=3)
    with pytest.raises(TypeError, match="allocate_ranks: spectra is list; pass a mapping of names to spectra"):
        ft.allocate_ranks([x], max_parameters=3)
    for array in (x, [x]):
        with pytest.raises(TypeError, match=r"'a' holds numpy.ndarray; pass hosvd_spectrum\(x\), or a list of spectra"):
            ft.allocate_ranks({"a": array}, max_parameters=3)
    with pytest.raises(ValueError, match="allocate_ranks: 'a' has no spectrum; pass at least one"):
        ft.allocate_ranks({"a": []}, max_parameters=3)
    with pytest.raises(ValueError, match="allocate_ranks: max_parameters is -1; pass 0 or more"):
        ft.allocate_ranks(spectra, max_parameters=-1)
    with pytest.raises(TypeError, match=r"allocate_ranks: max_parameters is 3.0; pass an integer"):
        ft.allocate_ranks(spectra, max_parameters=3.0)
    with pytest.raises(ValueError, match=r"allocate_ranks: rtol is 1.5; pass a number from 0 to 1"):
        ft.allocate_ranks(spectra, rtol=1.5)
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"allocate_ranks: max_ratio is {ratio}; pass a number above 0 to 1"):
            ft.allocate_ranks(spectra, max_ratio=ratio)


def test_refusals_of_weights_and_alternatives():
    x = Sample((4, 3, 2)).values
    spectra = {"a": ft.hosvd_spectrum(x), "b": ft.hosvd_spectrum(2 * x)}
    with pytest.raises(ValueError, match="allocate_ranks: weights lacks b; pass a number for every weight"):
        ft.allocate_ranks(spectra, rtol=0.1, weights={"a": 1.0})
    for bad in (-1.0, math.inf, math.nan):
        message = f"allocate_ranks: the weight of 'b' is {bad}; pass a finite number of at least 0"
        with pytest.raises(ValueError, match=message):
            ft.allocate_ranks(spectra, rtol=0.1, weights={"a": 1.0, "b": bad})
    with pytest.raises(
        ValueError, match="allocate_ranks: weights is 'even'; pass 'norm', 'uniform', or a mapping of names"
    ):
        ft.allocate_ranks(spectra, rtol=0.1, weights="even")
    with pytest.raises(ValueError, match=r"the alternatives of 'a' have squared norms .*; pass spectra of one weight"):
        ft.allocate_ranks({"a": [spectra["a"], spectra["b"]]}, rtol=0.1)
