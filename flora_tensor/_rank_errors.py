"""The exact error of every rank tuple, as a table over the core of a full HOSVD or over a grid of ranks.

Squares are kept in units of 4**exponent, near ‖X‖², so that no magnitude of the data overflows or vanishes. The core is
read slab by slab: beside a table no second array of its size is ever held.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ErrorTable",
    "FloatArray",
    "IntArray",
    "Slabs",
    "discarded",
    "grid_within",
    "longest_mode",
    "rank_grid",
    "table_of",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Slabs = Iterable[tuple[int, npt.NDArray[Any]]]

# A full table beyond this many rank tuples (256 MiB) gives way to one on a coarse grid, exact at its points.
_MAX_TABLE = 1 << 25

# Full tables up to this size are not worth asking which part is needed.
_SMALL_TABLE = 1 << 16

# Entries of the core that are squared at a time.
_SLAB = 1 << 16


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Squared errors of rank tuples on a grid: ``errors[i, j, …]`` belongs to ``(grid[0][i], grid[1][j], …)``."""

    errors: FloatArray
    grid: tuple[IntArray, ...]
    total: float

    @classmethod
    def of_core(
        cls, core: npt.NDArray[Any], exponent: int, grid: tuple[IntArray, ...], room: Sequence[int] = ()
    ) -> "ErrorTable":
        """Build the table of a core at the points of ``grid``, each from 0 to the core's size; see `of_slabs`."""
        mode = longest_mode(core.shape)
        slabs = ((slab[mode].start, core[slab]) for slab in _slabs(core.shape))
        return cls.of_slabs(slabs, exponent, grid, mode, room)

    @classmethod
    def of_slabs(
        cls, slabs: Slabs, exponent: int, grid: tuple[IntArray, ...], mode: int, room: Sequence[int] = ()
    ) -> "ErrorTable":
        """Build the table of a core that is given as slabs of ``mode``, each with the index that it starts at.

        ``room`` for so many points more of each mode is left in its memory, for the caller to fill.
        """
        shape = tuple(len(points) - 1 for points in grid)
        errors = _table(shape, lambda out: _add_blocks(out, slabs, exponent, grid, mode), room)
        return cls(errors, grid, float(errors[(0,) * errors.ndim]))

    def up_to(self, caps: Sequence[int]) -> "ErrorTable":
        """Leave out the ranks above ``caps``."""
        ends = [int(np.searchsorted(g, cap, side="right")) for g, cap in zip(self.grid, caps)]
        errors = self.errors[tuple(slice(end) for end in ends)]
        return ErrorTable(errors, tuple(g[:end] for g, end in zip(self.grid, ends)), self.total)

    def is_dense_around(self, ranks: Sequence[int]) -> bool:
        """Tell whether the neighbors of ``ranks`` on the grid are the numbers next to them."""
        return all(high - low <= 2 for low, high in self._neighbors(ranks))

    def grid_around(self, ranks: Sequence[int], max_ranks: Sequence[int]) -> tuple[IntArray, ...]:
        """Return a grid with a few points everywhere and many between the neighbors of ``ranks``."""
        each = max(24, int(_MAX_TABLE ** (1 / len(self.grid))) // 2)
        grid: list[IntArray] = []
        for (low, high), most in zip(self._neighbors(ranks), max_ranks):
            inside = np.unique(np.linspace(low, high, min(each, high - low + 1)).round().astype(np.int64))
            grid.append(np.unique(np.concatenate([[0], _thinned(most, 12), inside])))
        return tuple(grid)

    def _neighbors(self, ranks: Sequence[int]) -> list[tuple[int, int]]:
        at = [int(np.searchsorted(g, r)) for g, r in zip(self.grid, ranks)]
        return [(int(g[max(i - 1, 0)]), int(g[min(i + 1, len(g) - 1)])) for g, i in zip(self.grid, at)]


def rank_grid(max_ranks: Sequence[int], most: int | None = None) -> tuple[IntArray, ...]:
    """Choose ranks 0 = g_0 < g_1 < … < g_last = m for each mode so that at most about ``most`` tuples result.

    Small ranks are all kept; beyond them the points grow geometrically. The longest modes are thinned first.
    """
    most = _MAX_TABLE if most is None else most
    counts = [m + 1 for m in max_ranks]
    while math.prod(counts) > most and max(counts) > 24:
        longest = max(range(len(counts)), key=counts.__getitem__)
        counts[longest] = max(24, counts[longest] * 3 // 4)
    return tuple(_thinned(m, count) for m, count in zip(max_ranks, counts))


def grid_within(low: Sequence[int], high: Sequence[int], max_ranks: Sequence[int]) -> tuple[IntArray, ...] | None:
    """Return the ranks from ``low`` to ``high``, 0 and the full one; None where that saves little or is too much."""
    bounds = list(zip(low, high, max_ranks))
    grid = tuple(np.unique(np.concatenate([[0], np.arange(a, b + 1), [m]])) for a, b, m in bounds)
    listed, every = math.prod(len(points) for points in grid), math.prod(m + 1 for m in max_ranks)
    return None if every <= _SMALL_TABLE or 2 * listed > every or listed > _MAX_TABLE else grid


def _thinned(most: int, count: int) -> IntArray:
    if count > most:
        return np.arange(most + 1)
    dense = count // 2
    sparse = np.geomspace(dense, most, count - dense)
    return np.unique(np.concatenate([np.arange(dense), np.rint(sparse).astype(np.int64), [most]]))


def table_of(core: npt.NDArray[Any], exponent: int = 0) -> FloatArray:
    """Return the squared errors of all rank tuples, shape (m_0 + 1, …); see `spectra.error_table`."""
    return ErrorTable.of_core(core, exponent, tuple(np.arange(n + 1) for n in core.shape)).errors


def discarded(core: npt.NDArray[Any], exponent: int, ranks: tuple[int, ...]) -> float:
    """Sum the squares outside the leading block, box by box; ``ranks`` of zero give ‖core‖²."""
    total = 0.0
    for mode, rank in enumerate(ranks):
        box = core[(*(slice(r) for r in ranks[:mode]), slice(rank, None))]
        total += sum(float(_squares_of(box[slab], exponent).sum()) for slab in _slabs(box.shape))
    return total


def _table(shape: tuple[int, ...], write: Callable[[FloatArray], None], room: Sequence[int] = ()) -> FloatArray:
    """Sum the boxes of `spectra.error_table`; ``write`` fills an array of ``shape`` with the core's squares.

    The longest mode is worked on last, where sums run along contiguous memory. Its box is as large as the table: the
    squares are written and summed up in place.
    """
    order = sorted(range(len(shape)), key=lambda k: (shape[k], k))
    last, back = len(shape) - 1, np.argsort(order)
    sizes = tuple(shape[k] + 1 for k in order)
    whole = np.zeros(tuple(size + room[k] for size, k in zip(sizes, order)) if room else sizes)
    errors = whole[tuple(slice(size) for size in sizes)]
    squares = errors[(*(slice(1, None),) * last, slice(None, -1))]
    write(np.transpose(squares, back))
    # `free` of a mode has shape (n_0, …, n_mode), summed over the modes behind it; its box has one entry more a mode.
    free = [squares]
    for _ in range(last):
        free.insert(0, free[0].sum(axis=-1))
    for mode in reversed(range(len(shape))):
        box = errors if mode == last else np.zeros(tuple(n + 1 for n in free[mode].shape))
        if mode < last:
            box[(*(slice(1, None),) * mode, slice(None, -1))] = free[mode]
        # NumPy sums up in place by way of a copy of the whole.
        for at in np.ndindex(box.shape[:-2]):
            reverse = box[at][..., ::-1]
            np.cumsum(reverse, axis=-1, out=reverse)
        for before in range(mode):
            rows = np.moveaxis(box, before, 0)
            for i in range(1, len(rows)):
                rows[i] += rows[i - 1]
        if mode < last:
            errors += box.reshape(box.shape + (1,) * (last - mode))
    return np.transpose(whole, back)


def _add_blocks(sums: FloatArray, slabs: Slabs, exponent: int, grid: tuple[IntArray, ...], longest: int) -> None:
    """Add the core's squares, over the blocks between the points of a grid, to zeros."""
    rows = grid[longest]
    for start, slab in slabs:
        part = _squares_of(slab, exponent)
        # The rows of a slab may begin and end inside a block.
        cuts = rows[(rows > start) & (rows < start + slab.shape[longest])] - start
        first = int(np.searchsorted(rows, start, side="right")) - 1
        for mode, points in enumerate(grid):
            starts = np.append(0, cuts) if mode == longest else points[:-1]
            if len(starts) < part.shape[mode]:
                part = np.add.reduceat(part, starts, axis=mode)
        sums[(*(slice(None),) * longest, slice(first, first + len(cuts) + 1))] += part


def longest_mode(shape: Sequence[int]) -> int:
    """Return the first mode of most entries."""
    return max(range(len(shape)), key=lambda k: shape[k])


def _slabs(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Split an array along its longest mode into slabs of about `_SLAB` entries."""
    longest = longest_mode(shape)
    rows = max(1, _SLAB * shape[longest] // max(math.prod(shape), 1))
    for start in range(0, shape[longest], rows):
        yield (*(slice(None),) * longest, slice(start, start + rows))


def _squares_of(part: npt.NDArray[Any], exponent: int) -> FloatArray:
    """Return squared magnitudes in float64, in units of 4**exponent."""
    magnitudes = np.ldexp(np.abs(part).astype(np.float64, copy=False), -exponent)
    return np.multiply(magnitudes, magnitudes, out=magnitudes)
