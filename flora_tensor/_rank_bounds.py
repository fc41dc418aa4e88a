"""Bounds on the ranks that the best choice can have, from singular values alone.

With tails t_k(r) = Σ_{i≥r} σ_{k,i}², truncating a HOSVD to ranks r has a squared error E(r) between max_k t_k(r_k) and
Σ_k t_k(r_k). So the choice that is looked for needs at least some rank in every mode; and as another choice is known to
do at its price, can have at most some. What lies between is often a small part of all rank tuples.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from flora_tensor._checks import feasible_ranks
from flora_tensor._frontiers import n_parameters_of
from flora_tensor._rank_errors import FloatArray

__all__ = ["Bounds", "ranks_for_budget", "ranks_for_tolerance", "stored_numbers"]

# The lowest and the highest rank of every mode, both included.
Bounds = tuple[tuple[int, ...], tuple[int, ...]]


def stored_numbers(ranks: Sequence[Any], shape: Sequence[int], kept: Collection[int] = ()) -> Any:
    """Return ∏ r_k + Σ I_k r_k, where the modes in ``kept`` fill the core and have no factor."""
    core = [n if mode in kept else r for mode, (r, n) in enumerate(zip(ranks, shape))]
    return n_parameters_of(core, [0 if mode in kept else n for mode, n in enumerate(shape)])


def ranks_for_tolerance(
    tails: Sequence[FloatArray],
    shape: Sequence[int],
    allowed: float,
    blur: float,
    caps: Sequence[int],
    kept: Collection[int] = (),
) -> Bounds:
    """Bound the ranks of fewest parameters whose squared error is at most ``allowed``.

    ``blur`` is how far a root of a sum of squares may be off for rounding.
    """
    lengths = [np.sqrt(tail) for tail in tails]
    low = _least(lengths, math.sqrt(allowed) + blur, caps, kept)
    # What no mode that is cut may lose more than its share of is one choice within the tolerance.
    cut = [k for k, (r, cap) in enumerate(zip(low, caps)) if r < cap]
    share = math.sqrt(allowed / max(len(cut), 1)) - blur
    enough = tuple(_first(lengths[k], share) if k in cut else cap for k, cap in enumerate(caps))
    if any(r > cap for r, cap in zip(enough, caps)) or enough != feasible_ranks(enough, enough):
        return low, tuple(caps)
    return low, _most(low, shape, stored_numbers(enough, shape, kept), caps, kept)


def ranks_for_budget(
    tails: Sequence[FloatArray],
    shape: Sequence[int],
    budget: int,
    blur: float,
    caps: Sequence[int],
    kept: Collection[int] = (),
) -> Bounds:
    """Bound the ranks of least error that store at most ``budget`` numbers; ``blur`` as for a tolerance."""
    lengths = [np.sqrt(tail) for tail in tails]

    def at(allowed: float) -> tuple[int, ...]:
        """Lose at most so much in every mode."""
        return tuple(cap if k in kept else min(_first(lengths[k], allowed), cap) for k, cap in enumerate(caps))

    def affordable(allowed: float) -> bool:
        ranks = at(allowed)
        return stored_numbers(ranks, shape, kept) <= budget and ranks == feasible_ranks(ranks, ranks)

    low = tuple(cap if k in kept else 1 for k, cap in enumerate(caps))
    reached = _bisected(affordable, max(float(v[0]) for v in lengths))
    if reached is not None:
        error = math.sqrt(sum((float(v[r]) + blur) ** 2 for v, r in zip(lengths, at(reached))))
        low = _least(lengths, error + blur, caps, kept)
    return low, _most(low, shape, budget, caps, kept)


def _bisected(holds: Callable[[float], bool], most: float) -> float | None:
    """Return a small number that something holds for, which holds for larger ones; None where not even for ``most``."""
    if not holds(most):
        return None
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _first(lengths: FloatArray, allowed: float) -> int:
    """Return the smallest rank from 1 on that loses at most ``allowed``; one too many where there is none."""
    return max(1, int(np.searchsorted(-lengths, -allowed)))


def _least(
    lengths: Sequence[FloatArray], allowed: float, caps: Sequence[int], kept: Collection[int]
) -> tuple[int, ...]:
    return tuple(cap if k in kept else min(_first(v, allowed), cap) for k, (v, cap) in enumerate(zip(lengths, caps)))


def _most(
    low: Sequence[int], shape: Sequence[int], budget: int, caps: Sequence[int], kept: Collection[int]
) -> tuple[int, ...]:
    """Return the highest ranks that ``budget`` numbers allow where all other ranks are at their lowest.

    Rank r in mode k stores r (∏_{j≠k} r_j + I_k) numbers, and Σ_{j≠k} I_j r_j more.
    """
    found = list(caps)
    for k in range(len(shape)):
        if k not in kept:
            none = stored_numbers([0 if j == k else r for j, r in enumerate(low)], shape, kept)
            each = stored_numbers([1 if j == k else r for j, r in enumerate(low)], shape, kept) - none
            found[k] = max(low[k], min(caps[k], (budget - none) // each))
    return tuple(found)
