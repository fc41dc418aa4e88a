"""The full HOSVD of a large tensor whose core, as large as the tensor, is never formed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora_tensor._arrays import hermitian, to_numpy
from flora_tensor._bases import mode_bases
from flora_tensor._prepared import Prepared
from flora_tensor._rank_errors import ErrorTable, IntArray, longest_mode
from flora_tensor._spectrum import Spectrum
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import product_slabs

__all__ = ["UnformedSpectrum"]


@dataclass(frozen=True, eq=False)
class UnformedSpectrum(Spectrum):
    """A `Spectrum` that holds the tensor in place of the core: errors are read off slabs of the core as they are made.

    Attributes
    ----------
    xp : namespace
        The namespace of the tensor.
    tensor : array
        The tensor itself.
    """

    xp: Namespace = None
    tensor: Array = None

    @classmethod
    def of(cls, ready: Prepared, accuracy: float) -> "UnformedSpectrum":
        """Compute the bases of a prepared tensor, with singular values right down to ``accuracy`` of the largest."""
        bases = mode_bases(ready.xp, ready.x, accuracy)
        values, factors = tuple(b.values for b in bases), tuple(b.vectors for b in bases)
        return cls(values, None, factors, ready.norm(), tuple(ready.x.shape), ready.xp, ready.x)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the numbers were computed in, as NumPy's."""
        return to_numpy(self.factors[0]).dtype

    def error(self, ranks: Sequence[int]) -> float:
        """Return the exact relative error of the truncation to ``ranks``, as `Spectrum.error`."""
        table = self._table_on(tuple(np.unique([0, r, m]) for r, m in zip(ranks, self.max_ranks)))
        at = tuple(int(np.searchsorted(points, r)) for points, r in zip(table.grid, ranks))
        return float(np.sqrt(table.errors[at] / table.total)) if table.total > 0 else 0.0

    def _table_on(self, grid: tuple[IntArray, ...]) -> ErrorTable:
        mode = longest_mode(self.max_ranks)
        return ErrorTable.of_slabs(self._core_slabs(mode), self.exponent, grid, mode)

    def _core_slabs(self, mode: int) -> Iterator[tuple[int, Any]]:
        steps = [(k, hermitian(self.xp, u)) for k, u in enumerate(self.factors)]
        for start, slab in product_slabs(self.xp, self.tensor, steps, mode):
            yield start, to_numpy(slab)
