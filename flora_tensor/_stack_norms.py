"""The norm in which a stack is decomposed: its slices scaled before, and what is stored of them scaled back.

Under relative weights each slice is divided by its norm: the squared error of the whole is then the sum of the members'
squared relative errors. Scaling a slice scales a row of the layers' factor, so that a Tucker tensor remains one.
"""

from dataclasses import dataclass

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._deltas import frobenius_norm
from flora_tensor.tucker_algebra import orthogonalize
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["StackNorm"]


@dataclass(frozen=True)
class StackNorm:
    """What each slice of a stack is divided by before it is decomposed.

    Parameters
    ----------
    units : tuple of float
        One positive number a slice.
    """

    units: tuple[float, ...]

    @classmethod
    def relative(cls, stack: np.ndarray) -> "StackNorm":
        """Take the slices' own norms."""
        return cls(tuple(frobenius_norm(x) or 1.0 for x in stack))

    def scale_(self, stack: np.ndarray) -> np.ndarray:
        """Divide the slices, in place; in float64, as a norm may be outside the range of float32."""
        for x, unit in zip(stack, self.units):
            np.divide(x, unit, out=x, dtype=np.float64, casting="same_kind")
        return stack

    def unscale(self, tucker: TuckerTensor) -> TuckerTensor:
        """Multiply a decomposition of the scaled stack by the units, and make its factors orthonormal again."""
        core, factors = to_numpy(tucker.core), [None if u is None else to_numpy(u) for u in tucker.factors]
        units = np.asarray(self.units)
        if factors[0] is None:  # the mode is whole: the core has it
            core = (core * units.reshape(-1, *(1,) * (core.ndim - 1))).astype(core.dtype, copy=False)
        else:
            factors[0] = (factors[0] * units[:, None]).astype(core.dtype, copy=False)
        return orthogonalize(TuckerTensor(core, tuple(factors)))
