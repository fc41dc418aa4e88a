"""The way of a tensor into a decomposition: checked, in its working type, scaled, and in the processor's memory.

What comes out is handed back to the library and the device of the tensor that came in.
"""

import math
from typing import NamedTuple

import array_api_compat
import numpy as np

from flora_tensor._arrays import (
    array_namespace,
    float_squares,
    host_view,
    is_differentiated,
    power_of_two,
    squared_norm,
    times_power_of_two,
    working_dtype,
)
from flora_tensor._checks import check_loaded, check_tensor
from flora_tensor._typing import Array, Namespace

__all__ = ["Prepared", "like", "on_host", "prepare"]


class Prepared(NamedTuple):
    """A checked tensor in its working type and at magnitudes near 1."""

    xp: Namespace
    x: Array  # the tensor, times 2**-exponent
    exponent: int
    squares: float | None  # ‖x‖² of the scaled tensor; None where it is only a symbol
    where: str = "tucker"  # the function that an error names

    def norm(self) -> float:
        """Return ‖x‖ of the scaled tensor, where the numbers are known."""
        return math.sqrt(float_squares(self.where, self.xp, self.x) if self.squares is None else self.squares)


def prepare(where: str, x: Array, squares: float | None = None) -> Prepared:
    """Check a tensor and bring it to the working type and to magnitudes near 1; ``squares`` is ‖x‖² where it is known.

    One pass over the data does for nearly all: Σ x² in float64 tells whether float32 numbers are finite, how large they
    are, and what their norm is. Only where it leaves the range of float64 are the entries looked at.
    """
    xp = array_namespace(where, x)
    if len(x.shape) == 0:
        check_tensor(where, x)
    work = xp.astype(x, working_dtype(xp, x.dtype), copy=False)
    if squares is None:
        with np.errstate(over="ignore", invalid="ignore"):
            squares = squared_norm(xp, work)
    if squares is None:  # a symbol under jit or vmap, or what has no numbers yet
        check_loaded(where, x)
        return Prepared(xp, work, 0, None, where)
    if 1e-200 < squares < 1e200:
        k = math.frexp(squares)[1] // 2
        if abs(k) <= 16:  # nothing can overflow or vanish, and scaling would only copy. The bits agree either way.
            return Prepared(xp, work, 0, squares, where)
        return Prepared(xp, times_power_of_two(work, -k), k, math.ldexp(squares, -2 * k), where)
    check_tensor(where, x)
    k = power_of_two(xp, work)
    work = times_power_of_two(work, -k)
    return Prepared(xp, work, k, squared_norm(xp, work), where)


def on_host(ready: Prepared) -> Prepared:
    """Hand tensors of PyTorch and JAX that lie in the processor's memory to NumPy, which shares it.

    NumPy's products of thin matrices are faster there, and the bits are the same for all libraries.
    """
    known = array_api_compat.is_torch_array(ready.x) or array_api_compat.is_jax_array(ready.x)
    host = host_view(ready.x) if known and not is_differentiated(ready.x) and ready.squares is not None else None
    return ready if host is None else ready._replace(xp=array_namespace("tucker", host), x=host)


def like(x: Array, result: Array) -> Array:
    """Return an array as one of the library and the device of ``x``."""
    if not array_api_compat.is_numpy_array(result) or array_api_compat.is_numpy_array(x):
        if array_api_compat.is_numpy_array(x) and not array_api_compat.is_numpy_array(result):
            return host_view(result)
        return result
    xp = array_namespace("tucker", x)
    return xp.asarray(result, device=array_api_compat.device(x))
