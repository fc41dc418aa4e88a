"""The full HOSVD of a large tensor whose core, as large as the tensor, is never formed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flora_tensor._arrays import epsilon, hermitian, to_numpy
from flora_tensor._bases import by_gram, grams_of, mode_basis, mode_values
from flora_tensor._gram import SHORT
from flora_tensor._prepared import Prepared
from flora_tensor._rank_errors import ErrorTable, IntArray, grid_within, longest_mode
from flora_tensor._spectrum import Spectrum
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import product_slabs

__all__ = ["RELIABLE", "UnformedSpectrum"]

# ‖X‖² − ‖G‖² is a squared error to four digits while it stands this many ε above the rounding of ‖X‖².
RELIABLE = 1e4


@dataclass(frozen=True, eq=False)
class UnformedSpectrum(Spectrum):
    """A `Spectrum` that holds the tensor in place of the core: errors are read off slabs of the core as they are made.

    Vectors are computed when they are asked for, and no more than are: what singular values say of a choice of ranks
    leaves few of a long mode's in question.

    Attributes
    ----------
    xp : namespace
        The namespace of the tensor.
    tensor : array
        The tensor itself.
    accuracy : float
        The share of the largest singular value down to which they are right.
    bases : dict from int to array
        The left singular vectors that were found, by modes.
    """

    xp: Namespace = None
    tensor: Array = None
    accuracy: float = 0.0
    bases: dict[int, Array] = field(default_factory=dict[int, Array])

    @classmethod
    def of(cls, ready: Prepared, accuracy: float, *, cut: bool = True) -> "UnformedSpectrum":
        """Compute the singular values of a prepared tensor; unless it is likely to be ``cut``, its bases too."""
        xp, x, grams = ready.xp, ready.x, grams_of(ready.x)
        values: list[Array] = []
        bases: dict[int, Array] = {}
        for mode, n in enumerate(x.shape):
            if cut and n > SHORT and by_gram(xp, x, mode, accuracy):
                values.append(mode_values(xp, x, mode, accuracy, grams))
            else:
                bases[mode], found = mode_basis(xp, x, mode, accuracy, None, grams)
                values.append(found)
        return cls(tuple(values), None, (), ready.norm(), tuple(x.shape), xp, x, accuracy, bases)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the numbers were computed in, as NumPy's."""
        return np.dtype(self.tensor.dtype)

    def leading(self, ranks: Sequence[int]) -> list[Array]:
        """Return the leading left singular vectors of every mode, so many as the ranks say."""
        grams = grams_of(self.tensor)
        for mode, rank in enumerate(ranks):
            if mode not in self.bases or self.bases[mode].shape[1] < rank:
                self.bases.pop(mode, None)
                self.bases[mode] = mode_basis(self.xp, self.tensor, mode, self.accuracy, rank, grams).vectors
        return [self.bases[mode][:, :rank] for mode, rank in enumerate(ranks)]

    def error(self, ranks: Sequence[int]) -> float:
        """Return the exact relative error of the truncation to ``ranks``, as `Spectrum.error`."""
        table = self._table_to(tuple(np.unique([0, r, m]) for r, m in zip(ranks, self.max_ranks)), ranks)
        at = tuple(int(np.searchsorted(points, r)) for points, r in zip(table.grid, ranks))
        return float(np.sqrt(table.errors[at] / table.total)) if table.total > 0 else 0.0

    def table_within(self, low: Sequence[int], high: Sequence[int]) -> ErrorTable | None:
        """Compute the errors of the rank tuples within bounds, as `Spectrum.table_within`."""
        grid = grid_within(low, high, self.max_ranks)
        return None if grid is None else self._table_to(grid, high).up_to(high)

    def _table_to(self, grid: tuple[IntArray, ...], high: Sequence[int]) -> ErrorTable:
        """Return errors on a grid up to ``high``, by the leading part of the core alone where that is exact enough.

        What that part leaves out is ‖X‖² − ‖G[:high]‖², and no less than any mode's Σ_{i≥high} σ_i² of it.
        """
        total = math.ldexp(self.norm, -self.exponent) ** 2
        least = max((float(t[r]) for t, r in zip(self.squared_tails, high)), default=0.0)
        if least <= RELIABLE * epsilon(self.xp, self.tensor.dtype) * total:
            return self._table_on(grid)
        inside = self._table_on(tuple(points[points <= most] for points, most in zip(grid, high)))
        return ErrorTable(inside.errors + (total - inside.total), inside.grid, total)

    def _table_on(self, grid: tuple[IntArray, ...]) -> ErrorTable:
        ranks = [int(points[-1]) for points in grid]
        mode = longest_mode(ranks)
        return ErrorTable.of_slabs(self._core_slabs(mode, ranks), self.exponent, grid, mode)

    def _core_slabs(self, mode: int, ranks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        steps = [(k, hermitian(self.xp, u)) for k, u in enumerate(self.leading(ranks))]
        for start, slab in product_slabs(self.xp, self.tensor, steps, mode):
            yield start, to_numpy(slab)
