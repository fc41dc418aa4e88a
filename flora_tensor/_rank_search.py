"""The ranks of least cost within a tolerance or a budget, searched for over all tuples whose errors are known.

Errors fall as any rank grows: for fixed other ranks only one rank of the longest mode needs a look. Tables beyond
memory are searched on grids of ranks that close in. `ranks` speaks for this to users, and `_driver` to `tucker`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from flora_tensor._rank_bounds import Bounds, ranks_for_budget, ranks_for_tolerance, stored_numbers
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray
from flora_tensor._spectrum import Spectrum

__all__ = ["check_budget", "fewest_parameters", "partial_ranks", "smallest_error"]

# Tolerances are met up to the rounding of the sums that they are compared with.
_SLACK = 1 + 1e-13


def fewest_parameters(
    spectrum: Spectrum,
    shape: Sequence[int],
    relative_squares: float,
    caps: Sequence[int] | None = None,
    kept: Collection[int] = (),
) -> tuple[int, ...] | None:
    """Return the ranks of fewest parameters whose squared error stays within ``relative_squares`` · ‖X‖², or None.

    Parameters are counted for a tensor of ``shape``, which is the spectrum's own unless a core stands for a larger
    tensor. The modes in ``kept`` are left whole: they are not cut and store no factor.
    """
    caps = caps or spectrum.max_ranks
    if 0 in spectrum.shape:
        return (0,) * len(shape)
    if len(kept) == len(shape):
        return spectrum.max_ranks
    if len(shape) <= 2:  # a matrix: both ranks are equal, and so many as the tail demands
        tail = spectrum.squared_tails[0]
        rank = max(1, int(np.argmax(tail <= relative_squares * tail[0] * _SLACK)))
        return _uncut(spectrum, (rank,) * len(shape), kept) if rank <= min(caps) else None
    allowed, blur = relative_squares * float(spectrum.squared_tails[0][0]), _blur(spectrum)
    bounds = ranks_for_tolerance(spectrum.squared_tails, shape, allowed, blur, caps, kept)
    found = _search(
        spectrum, caps, bounds, lambda table: _fewest(table, shape, relative_squares * table.total * _SLACK, kept)
    )
    return found and _uncut(spectrum, found, kept)


def smallest_error(
    spectrum: Spectrum,
    shape: Sequence[int],
    budget: int,
    caps: Sequence[int] | None = None,
    kept: Collection[int] = (),
) -> tuple[int, ...] | None:
    """Return the ranks of smallest error that store at most ``budget`` numbers, or None; as `fewest_parameters`."""
    caps = caps or spectrum.max_ranks
    if 0 in spectrum.shape:
        return (0,) * len(shape)
    if stored_numbers((1,) * len(shape), shape, kept) > budget:
        return None
    if len(kept) == len(shape):
        return spectrum.max_ranks
    if len(shape) <= 2:
        ranks = np.arange(1, min(caps) + 1)
        affordable = stored_numbers([ranks] * len(shape), shape, kept) <= budget
        errors = np.where(affordable, spectrum.squared_tails[0][ranks], np.inf)
        return _uncut(spectrum, (int(ranks[np.argmin(errors)]),) * len(shape), kept)
    bounds = ranks_for_budget(spectrum.squared_tails, shape, budget, _blur(spectrum), caps, kept)
    found = _search(spectrum, caps, bounds, lambda table: _best(table, shape, budget, kept))
    return _uncut(spectrum, found or (1,) * len(shape), kept)


def partial_ranks(
    spectrum: Spectrum,
    shape: Sequence[int],
    whole: Collection[int],
    *,
    relative_squares: float = 0.0,
    budget: int | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Choose ranks, and which of the modes that may be left whole are; None where nothing is within the limit.

    A whole mode stores no factor but fills the core: neither is better in general, so every subset is tried. Returns
    the ranks, full ones where a mode is whole, and the whole modes.
    """
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for kept in _subsets(whole):
        if budget is not None:
            ranks = smallest_error(spectrum, shape, budget, kept=kept)
        else:
            ranks = fewest_parameters(spectrum, shape, relative_squares, kept=kept)
        if ranks is not None:
            found.append((ranks, kept))

    def merit(choice: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[float, float]:
        error, stored = spectrum.error(choice[0]), float(stored_numbers(choice[0], shape, choice[1]))
        return (error, stored) if budget is not None else (stored, error)

    return min(found, key=merit) if len(found) > 1 else found[0] if found else None


def check_budget(where: str, shape: Sequence[int], budget: int, whole: Collection[int] = ()) -> None:
    """Refuse a budget that the smallest Tucker tensor of ``shape`` exceeds; modes in ``whole`` need no factor."""
    least = min(int(stored_numbers((1,) * len(shape), shape, kept)) for kept in _subsets(whole))
    if 0 not in shape and budget < least:
        raise ValueError(
            f"{where}: a budget of {budget} parameters for shape {tuple(shape)}, whose smallest Tucker tensor "
            f"stores {least}; pass at least {least}"
        )


def _subsets(modes: Collection[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(sorted(modes), n) for n in range(len(modes) + 1))


def _uncut(spectrum: Spectrum, ranks: tuple[int, ...], kept: Collection[int]) -> tuple[int, ...]:
    """Put the spectrum's own ranks in the modes that are not cut."""
    return tuple(m if mode in kept else r for mode, (r, m) in enumerate(zip(ranks, spectrum.max_ranks)))


def _blur(spectrum: Spectrum) -> float:
    """Bound by how much roots of sums of squares differ between the core and the singular values, for rounding.

    The core comes from products of length I_k: its error, relative to ‖X‖, grows as √I_k · ε.
    """
    reach = 4 * math.sqrt(max(spectrum.shape)) * float(np.finfo(spectrum.dtype).eps)
    return reach * math.sqrt(float(spectrum.squared_tails[0][0]))


def _search(
    spectrum: Spectrum,
    caps: Sequence[int],
    bounds: Bounds,
    pick: Callable[[ErrorTable], tuple[int, ...] | None],
) -> tuple[int, ...] | None:
    """Apply ``pick`` to the errors of all tuples within bounds, or, beyond memory, to grids that close in."""
    table = spectrum.table_within(*bounds)
    if table is not None and (chosen := pick(table)) is not None:
        return chosen
    table = spectrum.table.up_to(caps)
    chosen = pick(table)
    while chosen is not None and not table.is_dense_around(chosen):
        table = spectrum.table_around(chosen, table).up_to(caps)
        finer = pick(table)
        if finer is None or finer == chosen:
            break
        chosen = finer
    return chosen


def _fewest(table: ErrorTable, shape: Sequence[int], allowed: float, kept: Collection[int]) -> tuple[int, ...] | None:
    """Return the cheapest tuple on the grid with an error of at most ``allowed``."""
    split = _Split.of(table, shape, kept)
    # Errors fall along the longest mode: count those above the tolerance to find the first rank within it.
    first = np.count_nonzero(split.errors > allowed, axis=-1)
    index = np.maximum(first, np.searchsorted(split.points, split.least))
    inside = index < len(split.points)
    rank = split.points[np.minimum(index, len(split.points) - 1)]
    valid = inside & (rank <= split.most)
    if not valid.any():
        return None
    cost = np.where(valid, split.other_products * rank + split.other_sums + split.size * rank, np.iinfo(np.int64).max)
    error = np.take_along_axis(split.errors, np.minimum(index, len(split.points) - 1)[..., None], axis=-1)[..., 0]
    return split.tuple_at(_first_of_least(cost, error), rank)


def _best(table: ErrorTable, shape: Sequence[int], budget: int, kept: Collection[int]) -> tuple[int, ...] | None:
    """Return the tuple on the grid of smallest error among those of at most ``budget`` parameters."""
    split = _Split.of(table, shape, kept)
    affordable = (budget - split.other_sums) // (split.other_products + split.size)
    index = np.searchsorted(split.points, np.minimum(affordable, split.most), side="right") - 1
    rank = split.points[np.maximum(index, 0)]
    valid = (index >= 0) & (rank >= np.maximum(split.least, 1))
    if not valid.any():
        return None
    error = np.take_along_axis(split.errors, np.maximum(index, 0)[..., None], axis=-1)[..., 0]
    cost = split.other_products * rank + split.other_sums + split.size * rank
    return split.tuple_at(_first_of_least(np.where(valid, error, np.inf), cost), rank)


def _first_of_least(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> tuple[int, ...]:
    """Return the index of the least ``first``, ties broken by the least ``second``."""
    among = np.where(first == first.min(), second, second.max() + 1)
    return tuple(int(i) for i in np.unravel_index(int(np.argmin(among)), first.shape))


@dataclass(frozen=True, eq=False)
class _Split:
    """A table with its longest mode last and rank 0 left out elsewhere, and what the other modes' ranks imply."""

    errors: FloatArray
    mode: int  # the longest of those that may be cut
    points: IntArray  # its ranks, 0 included
    size: int  # its size in the tensor
    grids: tuple[IntArray, ...]  # ranks of the other modes: of one that is left whole, its size alone
    other_products: IntArray
    other_sums: IntArray
    least: IntArray  # the longest mode's rank must reach this, or another mode's rank would not be feasible …
    most: IntArray  # … and must not exceed this, or its own would not be

    @classmethod
    def of(cls, table: ErrorTable, shape: Sequence[int], kept: Collection[int]) -> "_Split":
        mode = max((k for k in range(len(shape)) if k not in kept), key=lambda k: len(table.grid[k]))
        others = [k for k in range(len(shape)) if k != mode]
        chosen = tuple(slice(-1, None) if k in kept else slice(1, None) for k in others)
        errors = np.moveaxis(table.errors, mode, -1)[(*chosen, slice(None))]
        grids = tuple(np.array([shape[k]]) if k in kept else table.grid[k][1:] for k in others)
        ranks = np.meshgrid(*grids, indexing="ij", sparse=True)
        products = np.broadcast_to(math.prod(ranks[1:], start=ranks[0]), errors.shape[:-1])
        sums = sum(shape[k] * r for k, r in zip(others, ranks) if k not in kept) + np.zeros_like(products)
        least = np.ones_like(products)
        for k, r in zip(others, ranks):  # r ≤ rank · (product of the others) ⇔ rank ≥ r² / product of all
            least = least if k in kept else np.maximum(least, -(-(r * r) // products))
        return cls(errors, mode, table.grid[mode], shape[mode], grids, products, sums, least, products)

    def tuple_at(self, index: tuple[int, ...], rank: IntArray) -> tuple[int, ...]:
        others = [int(g[i]) for g, i in zip(self.grids, index)]
        return (*others[: self.mode], int(rank[index]), *others[self.mode :])
