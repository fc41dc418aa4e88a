"""One parameter budget shared by all weights of a model.

Each weight has a frontier: the best error for every number of parameters. Choosing one point per weight so that the
summed error is least within a budget is a multiple-choice knapsack. On the lower convex hulls the best choice is
greedy: take hull segments by their gain per parameter. That is optimal at every budget on a segment's end; between, the
hulls give a lower bound that no choice can beat, points off the hulls fill what is left, and a search among the points
near the bound ends within 0.01 % of it or proves its choice the best one (`flora_tensor._knapsack`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from flora_tensor._checks import as_int, check_fraction, check_tolerance, exactly_one, type_text
from flora_tensor._knapsack import Curve, Limit, refined, segments
from flora_tensor._rank_errors import FloatArray, IntArray
from flora_tensor.noise import worth_storing
from flora_tensor.spectra import Frontier, Spectrum

__all__ = ["Allocation", "RankAssignment", "allocate_ranks"]


@dataclass(frozen=True)
class RankAssignment:
    """What one weight was given.

    Attributes
    ----------
    option : int
        Which of the weight's frontiers was chosen; 0 where there was one.
    ranks : tuple of int
        The ranks; all zeros where nothing is stored.
    n_parameters : int
        How many numbers these ranks store.
    error_squared : float
        ‖X − X_r‖², not weighted.
    """

    option: int
    ranks: tuple[int, ...]
    n_parameters: int
    error_squared: float


@dataclass(frozen=True, repr=False)
class Allocation:
    """Ranks for every weight, and how close the whole is to the best possible; made by `allocate_ranks`.

    Attributes
    ----------
    choices : dict of str to RankAssignment
        What each weight was given, by name.
    n_parameters : int
        Numbers stored in all.
    relative_error : float
        √(Σ w ‖X − X_r‖² / Σ w ‖X‖²).
    lower_bound : float
        Given a budget: no choice of points on the frontiers has a smaller relative error. Given a tolerance: none
        stores fewer numbers. It equals what was reached where the search proved the choice best.
    gap : float
        How far the choice is from the bound, relative to it: 0.001 means at most 0.1 % above the best. 0 where both are
        0.
    price : float
        What one number more takes off the summed weighted squared error at the margin, the multiplier of the
        relaxation: the weights' curves go on where they are steeper. 0 where nothing is left to be chosen.
    """

    choices: dict[str, RankAssignment]
    n_parameters: int
    relative_error: float
    lower_bound: float
    gap: float
    price: float

    def __repr__(self) -> str:
        kept = sum(1 for choice in self.choices.values() if any(choice.ranks))
        return (
            f"Allocation(ranks for {kept} of {len(self.choices)} weights, n_parameters={self.n_parameters}, "
            f"relative_error={self.relative_error:.4g}, lower_bound={self.lower_bound:.4g}, gap={self.gap:.2g})"
        )

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The ranks of each weight, by name."""
        return {name: choice.ranks for name, choice in self.choices.items()}


def allocate_ranks(
    spectra: Mapping[str, Spectrum | Frontier | Sequence[Spectrum | Frontier]],
    *,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    rtol: float | None = None,
    weights: Mapping[str, float] | str | None = None,
) -> Allocation:
    """Spread one budget, or one tolerance, over many weights.

    Parameters
    ----------
    spectra : mapping of str to Spectrum, Frontier, or a sequence of them
        For each weight its `hosvd_spectrum` or frontier; several stand for alternatives (arrangements of the same
        weight), of which one is chosen.
    max_parameters : int, optional
        The smallest summed error with at most so many numbers stored in all.
    max_ratio : float, optional
        The same budget as a share of the numbers in all dense weights, in (0, 1].
    rtol : float, optional
        The fewest numbers with √(Σ w ‖X − X_r‖² / Σ w ‖X‖²) ≤ rtol.
    weights : mapping of str to float, "norm", "uniform", or None
        The factor w of each weight's squared error. ``"norm"``, which is also ``None``, minimizes the summed squared
        error Σ ‖X − X_r‖²: every entry counts alike. ``"uniform"`` minimizes the sum of the squared *relative* errors
        (w = 1/‖X‖²): every weight counts alike, however little it changed. ``"relative"`` is another name of it.

    Returns
    -------
    Allocation
        Ranks per weight (zeros: nothing stored), the numbers stored, the error reached and the bound that proves how
        good it is.

    Raises
    ------
    ValueError
        If ``spectra`` is empty, a number is out of its range, ``weights`` lacks a name or holds a negative or infinite
        number, or the alternatives of a weight are of different norms.
    TypeError
        Unless exactly one of ``max_parameters``, ``max_ratio`` and ``rtol`` is given, or if ``spectra`` is no mapping
        to spectra or frontiers.

    References
    ----------
    Sinha and Zoltners, *The multiple-choice knapsack problem*, Operations Research 27 (1979), for the greedy solution
    of the relaxation; Shoham and Gersho, *Efficient bit allocation for an arbitrary set of quantizers*, IEEE TASSP 36
    (1988).

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import hosvd_spectrum
    >>> spectra = {"a": hosvd_spectrum(np.diag([9.0, 1.0, 1.0])), "b": hosvd_spectrum(np.diag([3.0, 2.0, 1.0]))}
    >>> allocate_ranks(spectra, max_parameters=14).ranks
    {'a': (1, 1), 'b': (1, 1)}
    >>> allocate_ranks(spectra, max_parameters=7).ranks
    {'a': (1, 1), 'b': (0, 0)}
    """
    limits = {"max_parameters": max_parameters, "max_ratio": max_ratio, "rtol": rtol}
    return _allocated("allocate_ranks", spectra, limits, weights, search=True)


def allocate_with_stacks(
    spectra: Mapping[str, Sequence[Frontier]],
    stacks: Mapping[str, Sequence[str]],
    *,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    rtol: float | None = None,
    floors: Mapping[str, float] = MappingProxyType({}),
    weights: str = "norm",
) -> Allocation:
    """Spread a budget or a tolerance where some weights can also be stored together, as one tensor.

    ``stacks`` gives for some names of ``spectra`` the other names that each stands for; a member belongs to one stack.
    In the allocation either a stack or its members have zeros for ranks. ``floors`` are the noise in stacks' entries:
    what needs more numbers, together or apart, for no more than noise is not chosen. ``weights`` are those of
    `allocate_ranks`; where they are ``"uniform"``, stacks are given as tensors of slices of norm one: their squared
    errors are sums of relative ones already.

    For the choice of together or apart a stack is one curve: the joint tensor's points, and the corners that the hulls
    of its members make when their segments are pooled. Whatever is chosen for the members lies on or above the hull of
    these corners, so that the relaxation over such curves bounds every choice, stacks or none. With the stacks decided,
    all points of all curves are allocated again; what that reaches is never above what the members alone reach, unless
    these would store noise.
    """
    where = "allocate_ranks"
    limits = {"max_parameters": max_parameters, "max_ratio": max_ratio, "rtol": rtol}
    scales = stack_scales(spectra, stacks, weights)
    apart = {name: given for name, given in spectra.items() if name not in stacks}
    found = _allocated(where, apart, limits, scales, search=True)
    if not stacks:
        return found
    grouped = grouped_frontiers(spectra, stacks, floors, weights=weights)
    bound = _allocated(where, grouped, limits, scales, search=False).lower_bound
    choices = _allocated(where, grouped, limits, scales, search=True).choices
    chosen = [name for name in stacks if choices[name].option > 0]
    if chosen:
        members = {member for name in chosen for member in stacks[name]}
        mixed = {n: f for n, f in apart.items() if n not in members} | {name: spectra[name] for name in chosen}
        other = _allocated(where, mixed, limits, scales, search=True)
        most = {name: max(int(f.n_parameters[-1]) for f in grouped[name]) for name in floors}
        noisy = any(sum(found.choices[m].n_parameters for m in stacks[name]) > n for name, n in most.items())
        if rtol is None:
            better = other.relative_error < found.relative_error
        else:  # frontiers that noise ended may stop short of a tolerance that the stack keeps
            better = _cost_within(other, rtol) < _cost_within(found, rtol)
        found = other if noisy or better else found
    none = {name: RankAssignment(0, (0,) * f[0].ranks.shape[1], 0, f[0].norm_squared) for name, f in spectra.items()}
    reached = found.n_parameters if rtol is not None else found.relative_error
    bound = min(bound, reached)  # the two are equal, to rounding, where the relaxation is met
    return replace(found, choices=none | found.choices, lower_bound=bound, gap=_gap(reached, bound))


def _cost_within(found: Allocation, rtol: float) -> tuple[float, int]:
    """Order allocations under a tolerance: by how far each misses it, then by the numbers stored."""
    missed = found.relative_error - rtol
    return (missed if missed > 1e-9 * rtol else 0.0), found.n_parameters


def grouped_frontiers(
    spectra: Mapping[str, Sequence[Frontier]],
    stacks: Mapping[str, Sequence[str]],
    floors: Mapping[str, float] = MappingProxyType({}),
    *,
    weights: str = "norm",
) -> dict[str, list[Frontier]]:
    """Give each stack its members' sum as its first frontier, in the members' place; each up to its floor of noise."""
    scales = stack_scales(spectra, stacks, weights)
    members = {member for names in stacks.values() for member in names}
    rest = {name: list(given) for name, given in spectra.items() if name not in stacks and name not in members}
    joined = {
        name: [_summed_frontier({m: spectra[m] for m in stacks[name]}, scales), *spectra[name]] for name in stacks
    }
    return rest | {n: worth_storing(given, floors[n]) if n in floors else given for n, given in joined.items()}


def stack_scales(
    spectra: Mapping[str, Sequence[Frontier]], stacks: Mapping[str, Sequence[str]], weights: str
) -> dict[str, float]:
    """Return the factors of all squared errors: those of stacks are weighted already."""
    scales = _scales("allocate_ranks", {name: list(given) for name, given in spectra.items()}, weights)
    return scales | dict.fromkeys(stacks, 1.0)


def _summed_frontier(several: Mapping[str, Sequence[Frontier]], scales: Mapping[str, float]) -> Frontier:
    """Add weights up, scaled: the corners of the hull of all that can be chosen for them together."""
    stored, errors = _corners([_Options.of(given, scales[name]).curve for name, given in several.items()])
    norm_squared = math.fsum(given[0].norm_squared * scales[name] for name, given in several.items())
    lower = np.concatenate([[True], np.diff(errors) < 0])  # rounding can make two errors one
    stored, errors = stored[lower], errors[lower]
    return Frontier(
        stored, errors, stored[:, None], norm_squared, sum(given[0].n_entries for given in several.values())
    )


def _allocated(
    where: str,
    spectra: Any,
    limits: Mapping[str, Any],
    weights: Mapping[str, float] | str | None,
    *,
    search: bool,
) -> Allocation:
    """Do what `allocate_ranks` says; without ``search`` the bound is that of the relaxation."""
    criterion = exactly_one(where, **limits)
    if not isinstance(spectra, Mapping):
        raise TypeError(f"{where}: spectra is {type_text(spectra)}; pass a mapping of names to spectra")
    if not spectra:
        raise ValueError(f"{where}: no weights; pass at least one name with its spectrum")
    options = {name: _frontiers(where, name, given) for name, given in spectra.items()}
    scales = _scales(where, options, weights)
    made = {name: _Options.of(options[name], scales[name]) for name in options}
    curves = [o.curve for o in made.values()]
    total = math.fsum(float(c.errors[0]) for c in curves)
    if criterion == "rtol":
        limit = Limit(check_tolerance(where, limits["rtol"]) ** 2 * total * (1 + 1e-13), is_budget=False)
        at, price, bound = _cheapest(curves, limit.amount)
    else:
        limit = Limit(_budget(where, options, limits["max_parameters"], limits["max_ratio"]), is_budget=True)
        at, price, bound = _most_accurate(curves, int(limit.amount))
    at, proven = refined(curves, at, limit, price, bound) if search else (at, False)
    choices = {name: made[name].choice(options[name], i) for name, i in zip(options, at)}
    stored = sum(choice.n_parameters for choice in choices.values())
    left = _summed(curves, at)
    best = left if limit.is_budget else stored
    # The relaxation's running sum rounds at the scale of what it began with: it may end above what was reached.
    bound = best if proven else min(bound, best)
    error = math.sqrt(left / total) if total else 0.0
    if limit.is_budget:
        bound = math.sqrt(bound / total) if total else 0.0
    reached = error if limit.is_budget else float(stored)
    return Allocation(choices, stored, error, bound, _gap(reached, bound), price)


def _gap(reached: float, bound: float) -> float:
    return max(0.0, reached / bound - 1) if bound > 0 else (0.0 if reached <= 1e-12 else math.inf)


def budget_curve(
    spectra: Mapping[str, Sequence[Frontier]], *, weights: Mapping[str, float] | str | None = None, most: int = 64
) -> tuple[tuple[int, float], ...]:
    """List what growing budgets buy: (numbers stored in all, relative error), from nothing stored to all that can be.

    Parameters
    ----------
    spectra : mapping of str to sequence of Frontier
        For each weight its frontiers, as for `allocate_ranks`.
    weights : mapping of str to float, "norm", "uniform", or None
        As for `allocate_ranks`.
    most : int
        About how many points to list.

    Returns
    -------
    tuple of (int, float)
        Budgets at which the relaxation is met exactly: no choice with so many numbers has a smaller error.

    References
    ----------
    Sinha and Zoltners, *The multiple-choice knapsack problem*, Operations Research 27 (1979).

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import hosvd_spectrum
    >>> budget_curve({"a": [hosvd_spectrum(np.diag([4.0, 3.0])).frontier()]})
    ((0, 1.0), (5, 0.6), (12, 0.0))
    """
    options = {name: list(given) for name, given in spectra.items()}
    scales = _scales("budget_curve", options, weights)
    curves = [_Options.of(options[name], scales[name]).curve for name in options]
    total = math.fsum(float(c.errors[0]) for c in curves)
    if total == 0.0:
        return ()
    stored, errors = _corners(curves)
    wanted = np.geomspace(1, max(len(errors) - 1, 1), most).round().astype(np.int64)
    kept = np.unique(np.concatenate([[0, len(errors) - 1], np.minimum(wanted, len(errors) - 1)]))
    return tuple((int(stored[i]), math.sqrt(max(0.0, float(errors[i])) / total)) for i in kept)


def _corners(curves: Sequence[Curve]) -> tuple[IntArray, FloatArray]:
    """Return the corners of the summed curves' lower hull: numbers stored in all, and the summed error."""
    slope, owner, end = segments(curves)
    # Where a segment begins is where the one before it on its curve ends; the first begins at nothing stored.
    start = np.zeros_like(end)
    for k, c in enumerate(curves):
        start[owner == k] = c.hull[:-1]
    cost = np.array([c_p[e] - c_p[s] for c_p, e, s in zip((curves[k].parameters for k in owner), end, start)], np.int64)
    stored = np.concatenate([np.zeros(1, np.int64), np.cumsum(cost)])
    # Summed from the end: small errors keep their digits.
    last = math.fsum(float(c.errors[-1]) for c in curves)
    return stored, last + np.append(np.cumsum((slope * cost)[::-1])[::-1], 0.0)


@dataclass(frozen=True, eq=False)
class _Options:
    """A weight's frontiers as one curve, with the weighted errors, and where each of its points comes from."""

    curve: Curve
    option: IntArray
    row: IntArray

    @classmethod
    def of(cls, frontiers: Sequence[Frontier], scale: float) -> "_Options":
        parameters = np.concatenate([f.n_parameters for f in frontiers])
        errors = np.concatenate([f.error_squared for f in frontiers]) * scale
        option = np.concatenate([np.full(len(f), k) for k, f in enumerate(frontiers)])
        row = np.concatenate([np.arange(len(f)) for f in frontiers])
        order = np.lexsort((option, errors, parameters))
        sorted_errors = errors[order]
        best = np.minimum.accumulate(sorted_errors)
        order = order[np.concatenate([[True], sorted_errors[1:] < best[:-1]])]
        return cls(Curve.of(parameters[order], errors[order]), option[order], row[order])

    def choice(self, frontiers: Sequence[Frontier], at: int) -> RankAssignment:
        frontier, row = frontiers[int(self.option[at])], int(self.row[at])
        return RankAssignment(
            option=int(self.option[at]),
            ranks=tuple(int(r) for r in frontier.ranks[row]),
            n_parameters=int(frontier.n_parameters[row]),
            error_squared=float(frontier.error_squared[row]),
        )


def _most_accurate(curves: Sequence[Curve], budget: int) -> tuple[list[int], float, float]:
    """Minimize the summed error within ``budget``: positions, the relaxation's price of a number, and its bound."""
    at = [0] * len(curves)
    left, error = budget, math.fsum(float(c.errors[0]) for c in curves)
    bound: float | None = None
    price = 0.0
    closed: set[int] = set()  # a curve whose next segment did not fit: its later ones may not be taken before it
    for slope, k, end in zip(*segments(curves)):
        cost = int(curves[k].parameters[end] - curves[k].parameters[at[k]])
        if cost <= left and k not in closed:
            error -= float(curves[k].errors[at[k]] - curves[k].errors[end])
            left, at[k] = left - cost, int(end)
        else:
            closed.add(int(k))
            if bound is None:  # the relaxation would take the fitting share of this segment
                bound, price = error - slope * left, float(slope)
    if bound is None:
        bound = math.fsum(float(c.errors[-1]) for c in curves)
    _fill(curves, at, left)
    return at, price, max(0.0, bound)


def _fill(curves: Sequence[Curve], at: list[int], left: int) -> None:
    """Spend what is left on the points, on a hull or off it, that gain most."""
    while True:
        gain, curve, position = 0.0, -1, -1
        for k, c in enumerate(curves):
            reach = int(np.searchsorted(c.parameters, c.parameters[at[k]] + left, side="right")) - 1
            saved = float(c.errors[at[k]] - c.errors[reach])
            if reach > at[k] and saved > gain:
                gain, curve, position = saved, k, reach
        if curve < 0:
            return
        left -= int(curves[curve].parameters[position] - curves[curve].parameters[at[curve]])
        at[curve] = position


def _cheapest(curves: Sequence[Curve], allowed: float) -> tuple[list[int], float, float]:
    """Minimize the numbers stored with a summed error of at most ``allowed``: positions, price and bound, as above."""
    at = [0] * len(curves)
    bound, price, stored = 0.0, 0.0, 0
    error = _summed(curves, at)
    for slope, k, end in zip(*segments(curves)):
        if error <= allowed and _summed(curves, at) <= allowed:  # the running sum decides, the exact one confirms
            break
        c = curves[k]
        bound, price = stored + max(0.0, error - allowed) / slope, float(slope)
        stored += int(c.parameters[end] - c.parameters[at[k]])
        error -= float(c.errors[at[k]] - c.errors[end])
        at[k] = int(end)
    _trim(curves, at, allowed)
    return at, price, float(math.ceil(bound * (1 - 1e-12)))  # numbers are whole


def _trim(curves: Sequence[Curve], at: list[int], allowed: float) -> None:
    """Give back numbers while the tolerance still holds: each time the step that gives back most."""
    while True:
        slack = allowed - _summed(curves, at)
        back, curve, position = 0, -1, -1
        for k, c in enumerate(curves):
            # Errors fall along a curve: the first position whose error is within reach.
            first = int(np.searchsorted(-c.errors, -(c.errors[at[k]] + slack), side="left"))
            given = int(c.parameters[at[k]] - c.parameters[min(first, at[k])])
            if given > back:
                back, curve, position = given, k, first
        if curve < 0:
            return
        at[curve] = position
        if _summed(curves, at) > allowed:  # rounding: one step less far
            at[curve] = position + 1


def _summed(curves: Sequence[Curve], at: Sequence[int]) -> float:
    return math.fsum(float(c.errors[i]) for c, i in zip(curves, at))


def _frontiers(where: str, name: str, given: Any) -> list[Frontier]:
    several: list[Any] = list(given) if isinstance(given, Sequence) else [given]
    for item in several:
        if not isinstance(item, Spectrum | Frontier):
            raise TypeError(f"{where}: {name!r} holds {type_text(item)}; pass hosvd_spectrum(x), or a list of spectra")
    frontiers = [item.frontier() if isinstance(item, Spectrum) else item for item in several]
    if not frontiers:
        raise ValueError(f"{where}: {name!r} has no spectrum; pass at least one")
    norms = [f.norm_squared for f in frontiers]
    if max(norms) > min(norms) * (1 + 1e-3):
        raise ValueError(
            f"{where}: the alternatives of {name!r} have squared norms {norms}; pass spectra of one weight"
        )
    return frontiers


def _scales(
    where: str, options: Mapping[str, Sequence[Frontier]], weights: Mapping[str, float] | str | None
) -> dict[str, float]:
    if weights is None or weights == "norm":
        return dict.fromkeys(options, 1.0)
    if isinstance(weights, str):
        if weights not in ("uniform", "relative"):
            raise ValueError(
                f"{where}: weights is {weights!r}; pass 'norm', 'uniform', or a mapping of names to numbers"
            )
        return {name: 1.0 / f[0].norm_squared if f[0].norm_squared > 0 else 1.0 for name, f in options.items()}
    if missing := sorted(set(options) - set(weights)):
        raise ValueError(f"{where}: weights lacks {', '.join(missing[:5])}; pass a number for every weight")
    for name in options:
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"{where}: the weight of {name!r} is {weights[name]}; pass a finite number of at least 0")
    return {name: float(weights[name]) for name in options}


def _budget(
    where: str, options: Mapping[str, Sequence[Frontier]], max_parameters: int | None, max_ratio: float | None
) -> int:
    if max_ratio is not None:
        dense = sum(f[0].n_entries for f in options.values())
        return math.floor(check_fraction(where, "max_ratio", max_ratio) * dense)
    budget = as_int(where, "max_parameters", max_parameters)
    if budget < 0:
        raise ValueError(f"{where}: max_parameters is {budget}; pass 0 or more")
    return min(budget, 1 << 60)  # NumPy counts in 64 bits, and no model has as many
