"""Which rank tuples are worth their parameters: the frontier of error against size."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray

__all__ = ["Choices", "Frontier", "n_parameters_of"]


# More tuples than this are compared with a sample of themselves before they are sorted.
_MANY = 1 << 12

# Tuples that are compared at a time.
_PIECE = 1 << 17


@dataclass(frozen=True, eq=False, repr=False)
class Frontier:
    """The best error for every number of parameters: rank tuples that no other tuple beats in both.

    Attributes
    ----------
    n_parameters : numpy array of int64, shape (K,)
        Numbers stored, strictly increasing. The first entry is 0: nothing kept.
    error_squared : numpy array of float64, shape (K,)
        ‖X − X_r‖², strictly decreasing; the first entry is ‖X‖².
    ranks : numpy array of int64, shape (K, N)
        The rank tuples; all zeros in the first row.
    norm_squared : float
        ‖X‖².
    n_entries : int
        ∏ I_k, the numbers that the dense tensor stores.
    """

    n_parameters: IntArray
    error_squared: FloatArray
    ranks: IntArray
    norm_squared: float
    n_entries: int

    def __len__(self) -> int:
        return len(self.n_parameters)

    def __repr__(self) -> str:
        most = self.n_parameters[-1] if len(self) else 0
        return f"Frontier({len(self)} points of 0 to {most} numbers, for a tensor of {self.n_entries})"


@dataclass(frozen=True)
class Choices:
    """Lists rank tuples of a tensor of some shape with their errors, and keeps those that no other beats.

    ``most`` leaves out what stores more numbers, ``partial`` is that of `n_parameters_of`. Tuples are integers of shape
    (K, N), errors have shape (K,).
    """

    shape: tuple[int, ...]
    most: int | None = None
    partial: bool = False

    def feasible(self, table: ErrorTable) -> tuple[IntArray, FloatArray]:
        """List the grid's rank tuples that a decomposition can have, and (0, …, 0)."""
        grids = np.meshgrid(*table.grid, indexing="ij", sparse=True)
        allowed = np.ones(table.errors.shape, dtype=bool)
        for k, g in enumerate(grids):
            others = math.prod((h.astype(np.float64) for j, h in enumerate(grids) if j != k), start=np.float64(1))
            allowed &= (g <= others) & (g >= 1)
        if self.most is not None:
            allowed &= n_parameters_of(grids, self.shape, partial=self.partial) <= self.most
        allowed[(0,) * allowed.ndim] = True
        where = np.nonzero(allowed)
        ranks = np.stack([g[i] for g, i in zip(table.grid, where)], axis=1)
        return ranks, table.errors[where]

    def one_whole(self, table: ErrorTable, mode: int) -> tuple[IntArray, FloatArray]:
        """List the tuples that leave one mode whole, more directions than the other ranks could carry.

        A whole mode stores no factor, so that this is less: a matrix of rank r then takes r (m + n) numbers, as in a
        truncated SVD, and no core between its factors.
        """
        grids = list(np.meshgrid(*(g for k, g in enumerate(table.grid) if k != mode), indexing="ij", sparse=True))
        errors, size = np.take(table.errors, -1, axis=mode), self.shape[mode]
        allowed = np.ones(errors.shape, dtype=bool)
        for k, g in enumerate(grids):  # with the whole mode the others must still be feasible
            others = math.prod((h.astype(np.float64) for j, h in enumerate(grids) if j != k), start=np.float64(size))
            allowed &= (g <= others) & (g >= 1)
        if self.most is not None:
            whole = [*grids[:mode], np.asarray(size), *grids[mode:]]
            allowed &= n_parameters_of(whole, self.shape, partial=self.partial) <= self.most
        where = np.nonzero(allowed)
        ranks = [g.ravel()[i] for g, i in zip(grids, where)]
        ranks.insert(mode, np.full(len(where[0]), size))
        return np.stack(ranks, axis=1), errors[where]

    def frontier(
        self,
        found: Sequence[tuple[IntArray, FloatArray]],
        *,
        unit: float,
        max_ranks: Sequence[int] | None = None,
        available: Sequence[int] = (),
        one_whole: bool = False,
    ) -> Frontier:
        """Keep of several lists of tuples, errors in units of ``unit``, what no other tuple beats.

        With `partial` the dense tensor is one of them. ``max_ranks`` bounds the ranks, of which there are as many as
        ``available`` says.
        """
        caps = None if max_ranks is None or tuple(max_ranks) == tuple(available) else max_ranks
        if self.partial:
            found = [*found, (np.asarray([self.shape], dtype=np.int64), np.zeros(1))]
        # List by list and piece by piece: of the hundreds of thousands of tuples nearly all are beaten at once.
        kept = [self._best(*part, caps, available, one_whole) for listed in found for part in _pieces(*listed)]
        ranks, errors, parameters = (np.concatenate(part) for part in zip(*kept))
        best = _unbeaten(parameters, errors)
        errors = errors[best] * unit
        return Frontier(parameters[best], errors, ranks[best], float(errors[0]), math.prod(self.shape))

    def _best(
        self,
        ranks: IntArray,
        errors: FloatArray,
        max_ranks: Sequence[int] | None,
        available: Sequence[int],
        one_whole: bool,
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """Return those of some tuples that are allowed and that no other of them beats, and what they store."""
        if max_ranks is not None:
            allowed = self._within(ranks, max_ranks, available, one_whole)
            ranks, errors = ranks[allowed], errors[allowed]
        counts = n_parameters_of(list(ranks.T), self.shape, partial=self.partial)
        parameters = np.where(ranks.any(axis=1), counts, 0)
        if self.most is not None:
            allowed = (parameters <= self.most) | (self.partial & (ranks == self.shape).all(axis=1))
            ranks, errors, parameters = ranks[allowed], errors[allowed], parameters[allowed]
        if len(errors) > _MANY:
            allowed = _rivals(parameters, errors)
            ranks, errors, parameters = ranks[allowed], errors[allowed], parameters[allowed]
        best = _unbeaten(parameters, errors)
        return ranks[best], errors[best], parameters[best]

    def _within(self, ranks: IntArray, max_ranks: Sequence[int], available: Sequence[int], one_whole: bool) -> Any:
        if one_whole:
            # A whole mode has no more directions than the others carry: that is its rank.
            carried = np.stack([np.delete(ranks, k, axis=1).prod(axis=1) for k in range(len(self.shape))], axis=1)
            return (np.minimum(ranks, np.maximum(carried, 1)) <= np.asarray(max_ranks)).all(axis=1)
        bounds = [n if r == m else r for r, m, n in zip(max_ranks, available, self.shape)]
        return (ranks <= np.asarray(bounds)).all(axis=1)


def _pieces(ranks: IntArray, errors: FloatArray) -> Iterator[tuple[IntArray, FloatArray]]:
    for start in range(0, len(errors), _PIECE):
        yield ranks[start : start + _PIECE], errors[start : start + _PIECE]


def _unbeaten(parameters: IntArray, errors: FloatArray) -> IntArray:
    """Return, in the order of their parameters, the tuples that no other beats."""
    order = np.lexsort((errors, parameters))
    errors = errors[order]
    return order[np.concatenate([[True], errors[1:] < np.minimum.accumulate(errors)[:-1]])[: len(order)]]


def _rivals(parameters: IntArray, errors: FloatArray) -> IntArray:
    """Leave out of many tuples what a sample of them beats already, which is nearly all."""
    sample = np.arange(0, len(errors), 16)
    sample = sample[_unbeaten(parameters[sample], errors[sample])]
    beaten_by = np.searchsorted(parameters[sample], parameters, side="right") - 1
    bound = np.where(beaten_by >= 0, errors[sample][beaten_by], np.inf)
    return np.flatnonzero(errors <= bound)


def n_parameters_of(ranks: Sequence[Any], shape: Sequence[int], *, partial: bool = False) -> Any:
    """Return ∏ r_k + Σ I_k r_k for ranks that are numbers or arrays that broadcast.

    ``partial`` leaves out the modes of full rank: the factor of such a mode can be multiplied into the core.
    """
    factors = sum(n * r * (r < n) if partial else n * r for n, r in zip(shape, ranks))
    return math.prod(ranks[1:], start=ranks[0]) + factors
