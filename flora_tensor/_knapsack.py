"""The multiple-choice knapsack behind `allocate_ranks`: one point of every curve, within one limit.

Every curve lists what it costs (numbers stored) and what error it then leaves. Both problems, least error within a
number of parameters and fewest parameters within an error, have the same linear relaxation: with a price λ of one
number in units of error, each curve minimizes e + λ p by itself. A point's *reduced cost* is how far its e + λ p lies
above that minimum. For any choice that keeps the limit,

    what it reaches − the bound = Σ reduced costs + what the limit leaves unused (times its price),

so a choice that beats a known one has a sum of reduced costs below that one's distance from the bound. Few points do:
they are searched for the best sum, and where the search was complete the choice is proven best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flora_tensor._rank_errors import FloatArray, IntArray

__all__ = ["Curve", "Limit", "refined", "segments"]

# A search stops where the choice is within this share of its bound: no one can tell such choices apart.
_NEAR = 1e-4
# Partial sums that are kept, and combinations that are formed of them, for each curve: some milliseconds.
_MOST_SUMS, _MOST_PAIRS = 1 << 14, 1 << 19
_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class Curve:
    """What one weight can be stored as: numbers increasing, errors falling, and the lower convex hull of the points."""

    parameters: IntArray
    errors: FloatArray
    hull: IntArray  # positions on the curve, the first 0, the last its end

    @classmethod
    def of(cls, parameters: IntArray, errors: FloatArray) -> "Curve":
        """Make a curve of points that are in order already."""
        return cls(parameters, errors, _lower_hull(parameters, errors))


@dataclass(frozen=True)
class Limit:
    """What a choice must keep: so many numbers, or so large an error; the other of the two is minimized."""

    amount: float
    is_budget: bool


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


def segments(curves: Sequence[Curve]) -> tuple[FloatArray, IntArray, IntArray]:
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


def refined(curves: Sequence[Curve], at: list[int], limit: Limit, price: float, bound: float) -> tuple[list[int], bool]:
    """Search near the relaxation for a better choice than ``at``: the best one found, and whether it is proven best.

    The windows of reduced cost grow, so that what a small one finds narrows the next.
    """
    if price <= 0:
        return at, False
    unit = 1.0 if limit.is_budget else price  # what is minimized, in units of error
    reduced = [c.errors + price * c.parameters for c in curves]
    reduced = [r - r.min() for r in reduced]
    for halvings in reversed(range(_WINDOWS)):
        distance = unit * (_reached(curves, at, limit) - bound)
        if distance <= unit * _NEAR * bound:
            return at, False
        window = distance * (1 + 1e-9) * 0.5**halvings
        found, complete = _best_sum(curves, reduced, limit, window)
        if found is not None and _keeps(curves, found, limit):
            at = min(at, found, key=lambda choice: _reached(curves, choice, limit))
        # What lies beyond the window is worse than what is held: that is the proof.
        if complete and unit * (_reached(curves, at, limit) - bound) <= window:
            return at, True
        if not complete:
            return at, False
    return at, False


def _reached(curves: Sequence[Curve], at: Sequence[int], limit: Limit) -> float:
    return _totals(curves, at)[1 if limit.is_budget else 0]


def _keeps(curves: Sequence[Curve], at: Sequence[int], limit: Limit) -> bool:
    return _totals(curves, at)[0 if limit.is_budget else 1] <= limit.amount


def _totals(curves: Sequence[Curve], at: Sequence[int]) -> tuple[float, float]:
    """Return the numbers stored and the error left, the latter without rounding on the way."""
    stored = sum(int(c.parameters[i]) for c, i in zip(curves, at))
    return float(stored), math.fsum(float(c.errors[i]) for c, i in zip(curves, at))


def _best_sum(
    curves: Sequence[Curve], reduced: Sequence[FloatArray], limit: Limit, window: float
) -> tuple[list[int] | None, bool]:
    """Combine the points whose reduced costs sum to ``window`` at most: the best choice, and whether all were seen."""
    near = [np.nonzero(r <= window)[0] for r in reduced]
    order = sorted(range(len(curves)), key=lambda k: len(near[k]))
    numbers, errors, costs = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[IntArray, IntArray]] = []  # for every curve in order: the sum that each came from, its position
    complete = True
    for k in order:
        points = near[k]
        if len(numbers) * len(points) > _MOST_PAIRS:
            cheapest = np.sort(np.argsort(costs, kind="stable")[: max(1, _MOST_PAIRS // len(points))])
            kept, complete = cheapest, complete and len(cheapest) == len(costs)
        else:
            kept = np.arange(len(numbers))
        pairs = costs[kept, None] + reduced[k][points]
        row, column = np.nonzero(pairs <= window)
        numbers, errors, costs, chosen = _undominated(
            numbers[kept[row]] + curves[k].parameters[points[column]],
            errors[kept[row]] + curves[k].errors[points[column]],
            pairs[row, column],
        )
        trail.append((kept[row[chosen]], points[column[chosen]]))
        if len(numbers) > _MOST_SUMS:
            return None, False
    fits = numbers <= limit.amount if limit.is_budget else errors <= limit.amount
    if not fits.any():
        return None, complete
    # Along the sums that none dominates numbers rise and errors fall: the limit is met at one end.
    best = int(np.nonzero(fits)[0][-1 if limit.is_budget else 0])
    at = [0] * len(curves)
    for k, (before, position) in zip(reversed(order), reversed(trail)):
        at[k], best = int(position[best]), int(before[best])
    return at, complete


def _undominated(
    numbers: IntArray, errors: FloatArray, costs: FloatArray
) -> tuple[IntArray, FloatArray, FloatArray, npt.NDArray[np.intp]]:
    """Keep the sums that no other beats in both numbers and error, in the order of the numbers."""
    order = np.lexsort((errors, numbers))
    best = np.minimum.accumulate(errors[order])
    keep = order[np.concatenate([[True], errors[order][1:] < best[:-1]])]
    return numbers[keep], errors[keep], costs[keep], keep
