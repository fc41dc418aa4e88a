"""One parameter budget shared by all weights of a model.

Each weight has a frontier: the best error for every number of parameters. Choosing one point per weight so that the
summed error is least within a budget is a multiple-choice knapsack. On the lower convex hulls the best choice is
greedy: take hull segments by their gain per parameter. That is optimal at every budget on a segment's end; between, the
hulls give a lower bound that no choice can beat, and points off the hulls fill what is left. Small problems are solved
exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flora_tensor._checks import as_int, check_fraction, check_tolerance, exactly_one
from flora_tensor.spectra import FloatArray, Frontier, IntArray, Spectrum

__all__ = ["Allocation", "RankAssignment", "allocate_ranks"]


# Points times budget up to which the knapsack is solved exactly: some tenths of a second.
_SMALL_KNAPSACK = 1 << 27


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


@dataclass(frozen=True)
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
        stores fewer numbers.
    gap : float
        How far the choice is from the bound, relative to it: 0.001 means at most 0.1 % above the best. 0 where both are
        0.
    """

    choices: dict[str, RankAssignment]
    n_parameters: int
    relative_error: float
    lower_bound: float
    gap: float

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
    weights : mapping of str to float, "relative", or None
        The factor w of each weight's squared error. ``None`` counts all entries alike; ``"relative"`` counts every
        weight's relative error alike (w = 1/‖X‖²).

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
        Unless exactly one of ``max_parameters``, ``max_ratio`` and ``rtol`` is given.

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
    where = "allocate_ranks"
    criterion = exactly_one(where, max_parameters=max_parameters, max_ratio=max_ratio, rtol=rtol)
    if not spectra:
        raise ValueError(f"{where}: no weights; pass at least one name with its spectrum")
    options = {name: _frontiers(where, name, given) for name, given in spectra.items()}
    scales = _scales(where, options, weights)
    curves = [_Curve.of(options[name], scales[name]) for name in options]
    total = math.fsum(float(c.errors[0]) for c in curves)
    if criterion == "rtol":
        allowed = check_tolerance(where, rtol) ** 2 * total * (1 + 1e-13)
        at, bound = _cheapest(curves, allowed)
    else:
        budget = _budget(where, options, max_parameters, max_ratio)
        at, squares = _most_accurate(curves, budget)
        # Few weights leave the greedy choice far from the best; then the exact one costs next to nothing.
        if sum(len(c.parameters) for c in curves) * budget <= _SMALL_KNAPSACK:
            at = _exactly(curves, budget)
        bound = math.sqrt(squares / total) if total else 0.0
    choices = {name: curve.choice(options[name], i) for name, curve, i in zip(options, curves, at)}
    stored = sum(choice.n_parameters for choice in choices.values())
    left = math.fsum(float(c.errors[i]) for c, i in zip(curves, at))
    error = math.sqrt(left / total) if total else 0.0
    reached = stored if criterion == "rtol" else error
    gap = max(0.0, reached / bound - 1) if bound > 0 else (0.0 if reached <= 1e-12 else math.inf)
    return Allocation(choices, stored, error, bound, gap)


@dataclass(frozen=True, eq=False)
class _Curve:
    """A weight's frontier over all its options, with the weighted errors, and its lower convex hull."""

    parameters: IntArray
    errors: FloatArray
    option: IntArray
    row: IntArray
    hull: IntArray  # positions on the curve, the first 0, the last its end

    @classmethod
    def of(cls, frontiers: Sequence[Frontier], scale: float) -> "_Curve":
        parameters = np.concatenate([f.n_parameters for f in frontiers])
        errors = np.concatenate([f.error_squared for f in frontiers]) * scale
        option = np.concatenate([np.full(len(f), k) for k, f in enumerate(frontiers)])
        row = np.concatenate([np.arange(len(f)) for f in frontiers])
        order = np.lexsort((option, errors, parameters))
        sorted_errors = errors[order]
        best = np.minimum.accumulate(sorted_errors)
        order = order[np.concatenate([[True], sorted_errors[1:] < best[:-1]])]
        parameters, errors = parameters[order], errors[order]
        return cls(parameters, errors, option[order], row[order], _lower_hull(parameters, errors))

    def choice(self, frontiers: Sequence[Frontier], at: int) -> RankAssignment:
        frontier, row = frontiers[int(self.option[at])], int(self.row[at])
        return RankAssignment(
            option=int(self.option[at]),
            ranks=tuple(int(r) for r in frontier.ranks[row]),
            n_parameters=int(frontier.n_parameters[row]),
            error_squared=float(frontier.error_squared[row]),
        )


def _lower_hull(x: IntArray, y: FloatArray) -> IntArray:
    """Return the positions of the lower convex hull of points with increasing x and decreasing y (Andrew's scan)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # b lies on or above the chord from a to i: it is no corner
            if (y[b] - y[a]) * float(x[i] - x[a]) >= (y[i] - y[a]) * float(x[b] - x[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return np.array(hull, dtype=np.int64)


def _segments(curves: Sequence[_Curve]) -> tuple[FloatArray, IntArray, IntArray]:
    """Pool the hulls' segments, steepest first: gain per parameter, curve, and the position each leads to."""
    slopes: list[FloatArray] = []
    owners: list[IntArray] = []
    ends: list[IntArray] = []
    for k, c in enumerate(curves):
        corners = c.hull
        gain = -np.diff(c.errors[corners]) / np.diff(c.parameters[corners])
        slopes.append(gain)
        owners.append(np.full(len(gain), k))
        ends.append(corners[1:])
    slope = np.concatenate(slopes)
    order = np.argsort(-slope, kind="stable")  # within a curve slopes fall, so its segments stay in order
    return slope[order], np.concatenate(owners)[order], np.concatenate(ends)[order]


def _most_accurate(curves: Sequence[_Curve], budget: int) -> tuple[list[int], float]:
    """Minimize the summed error within ``budget``: return a position per curve and a lower bound on the sum."""
    at = [0] * len(curves)
    left, error = budget, math.fsum(float(c.errors[0]) for c in curves)
    bound: float | None = None
    closed: set[int] = set()  # a curve whose next segment did not fit: its later ones may not be taken before it
    for slope, k, end in zip(*_segments(curves)):
        cost = int(curves[k].parameters[end] - curves[k].parameters[at[k]])
        if cost <= left and k not in closed:
            error -= float(curves[k].errors[at[k]] - curves[k].errors[end])
            left, at[k] = left - cost, int(end)
        else:
            closed.add(int(k))
            if bound is None:  # the relaxation would take the fitting share of this segment
                bound = error - slope * left
    if bound is None:
        bound = math.fsum(float(c.errors[-1]) for c in curves)
    _fill(curves, at, left)
    return at, max(0.0, bound)


def _exactly(curves: Sequence[_Curve], budget: int) -> list[int]:
    """Solve the knapsack by dynamic programming over the budget: positions of least summed error."""
    least = np.zeros(budget + 1)  # least[b]: the least error of the curves so far with at most b numbers
    chosen: list[npt.NDArray[np.int32]] = []
    for c in curves:
        best = np.full(budget + 1, np.inf)
        position = np.zeros(budget + 1, dtype=np.int32)
        for i, (cost, error) in enumerate(zip(c.parameters, c.errors)):
            if cost > budget:
                break
            offer = least[: budget + 1 - cost] + error
            better = offer < best[cost:]
            best[cost:][better], position[cost:][better] = offer[better], i
        least, chosen = best, [*chosen, position]
    at, left = [0] * len(curves), budget
    for k in reversed(range(len(curves))):
        at[k] = int(chosen[k][left])
        left -= int(curves[k].parameters[at[k]])
    return at


def _fill(curves: Sequence[_Curve], at: list[int], left: int) -> None:
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


def _cheapest(curves: Sequence[_Curve], allowed: float) -> tuple[list[int], float]:
    """Minimize the numbers stored with a summed error of at most ``allowed``: positions, and a lower bound."""
    at = [0] * len(curves)
    bound, stored = 0.0, 0
    error = _summed(curves, at)
    for slope, k, end in zip(*_segments(curves)):
        if error <= allowed and _summed(curves, at) <= allowed:  # the running sum decides, the exact one confirms
            break
        c = curves[k]
        bound = stored + max(0.0, error - allowed) / slope
        stored += int(c.parameters[end] - c.parameters[at[k]])
        error -= float(c.errors[at[k]] - c.errors[end])
        at[k] = int(end)
    _trim(curves, at, allowed)
    return at, bound


def _trim(curves: Sequence[_Curve], at: list[int], allowed: float) -> None:
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


def _summed(curves: Sequence[_Curve], at: Sequence[int]) -> float:
    return math.fsum(float(c.errors[i]) for c, i in zip(curves, at))


def _frontiers(where: str, name: str, given: Spectrum | Frontier | Sequence[Spectrum | Frontier]) -> list[Frontier]:
    several = [given] if isinstance(given, Spectrum | Frontier) else list(given)
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
    if weights is None:
        return dict.fromkeys(options, 1.0)
    if isinstance(weights, str):
        if weights != "relative":
            raise ValueError(
                f"{where}: weights is {weights!r}; pass 'relative', a mapping of names to numbers, or None"
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
    return budget
