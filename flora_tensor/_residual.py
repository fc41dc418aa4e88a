"""How far a change is from what is stored of it, measured on the stored numbers."""

import math
from collections.abc import Mapping

import numpy as np

from flora_tensor._arrays import squared_norm
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["PLAIN", "residual_norm"]

# Relative errors from here on may be taken from the decomposition, as √(‖X‖² − ‖G‖²)/‖X‖ with G the core of what is
# stored. The rounding of the float32 products behind G moves that difference by at most 4e-7 ‖X‖² (measured), which is
# 4e-5 of it here, and 2e-5 of the error.
PLAIN = 0.1

# Numbers of the change that are compared at a time: what stays in the processor's cache.
_SLAB = 1 << 18

# Entries of all modes but the first that are multiplied out at a time.
_COLUMNS = 1 << 19

# float32 products are taken where their rounding cannot show: ε‖X‖ (ε = 3e-7 for sums of a hundred terms, measured),
# spread at random over n entries, changes a residual of size ‖R‖ by a share of about ε‖X‖/(‖R‖√n) + (ε‖X‖/‖R‖)²/2,
# here about 1e-6.
_COARSE, _MANY = 1e-3, 1 << 16


def residual_norm(x: np.ndarray, stored: TuckerTensor, norm: float) -> float:
    """Return ‖X − X̂‖ for a stored X̂ of X's shape, given ‖X‖; X is float32 or float64.

    The residual itself is summed, slab by slab, never a difference of squares. The products are float32 where X and the
    residual allow it, else float64; sums are float64. Nothing as large as X is allocated, unless X is so large or small
    that its squares would leave float64's range or its products float32's.
    """
    exponent = math.frexp(norm)[1]
    if abs(exponent) > 60:
        scaled = TuckerTensor(np.ldexp(stored.core.astype(np.float64), -exponent), stored.factors)
        return math.ldexp(residual_norm(np.ldexp(x, -exponent), scaled, math.ldexp(norm, -exponent)), exponent)
    if x.dtype == np.float32 and x.size >= _MANY:
        found = math.sqrt(_squares(x, stored.map(lambda a: a.astype(np.float32, copy=False)), np.float32))
        if found >= _COARSE * norm:
            return found
    return math.sqrt(_squares(x, stored.map(lambda a: a.astype(np.float64, copy=False)), np.float64))


def _squares(x: np.ndarray, stored: TuckerTensor, dtype: type) -> float:
    """Sum the squares of X − X̂.

    All modes but the first are multiplied out once, unless that is not much smaller than X: of the longest of them, a
    part at a time.
    """
    first, along = stored.factors[0], max(range(x.ndim), key=lambda k: (k > 0, x.shape[k]))
    if first is None or along == 0 or 4 * first.shape[1] > first.shape[0]:
        return _squares_of_part(x, stored, dtype, wide=False)
    step = max(1, _COLUMNS * x.shape[0] * x.shape[along] // (first.shape[1] * x.size))
    total = 0.0
    for start in range(0, x.shape[along], step):
        here = slice(start, start + step)
        total += _squares_of_part(x[(*(slice(None),) * along, here)], _cut(stored, along, here), dtype, wide=True)
    return total


def _cut(stored: TuckerTensor, mode: int, rows: slice) -> TuckerTensor:
    """Return some rows of a mode."""
    factors = tuple(u if u is None or k != mode else u[rows] for k, u in enumerate(stored.factors))
    core = stored.core[(*(slice(None),) * mode, rows)] if stored.factors[mode] is None else stored.core
    return TuckerTensor(core, factors)


def _squares_of_part(x: np.ndarray, stored: TuckerTensor, dtype: type, *, wide: bool) -> float:
    """Sum the squares of X − X̂ over slabs of the first mode; ``wide``: multiply out all others before."""
    rows = max(1, _SLAB * x.shape[0] // x.size)
    first = stored.factors[0]
    rest = {k: u for k, u in enumerate(stored.factors) if k and u is not None}
    core = multi_mode_dot(stored.core, list(rest.values()), modes=list(rest)) if wide else stored.core
    buffer = np.empty((rows, x.size // x.shape[0]), dtype)
    total = 0.0
    for start in range(0, x.shape[0], rows):
        slab = x[start : start + rows]
        difference = buffer[: slab.shape[0]]
        if first is not None and wide:
            np.matmul(first[start : start + rows], core.reshape(core.shape[0], -1), out=difference)
            difference = difference.reshape(slab.shape)
        else:
            difference = _product(core, first, slice(start, start + rows), rest)
        np.subtract(slab, difference, out=difference)
        total += squared_norm(np, difference) or 0.0  # type: ignore[arg-type]
    return total


def _product(core: np.ndarray, first: np.ndarray | None, rows: slice, rest: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return some rows of X̂, in fresh memory."""
    part = core[rows] if first is None else multi_mode_dot(core, [first[rows]], modes=[0])
    product = multi_mode_dot(part, list(rest.values()), modes=list(rest))
    return product.copy() if np.may_share_memory(product, core) else product
