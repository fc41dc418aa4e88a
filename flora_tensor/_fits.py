"""From a prepared tensor to a `TuckerFit`: run what was asked for, measure it, and keep what was promised."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flora_tensor._algorithms import Target, Truncation, all_orthogonal, left_whole
from flora_tensor._arrays import (
    array_namespace,
    epsilon,
    float_squares,
    largest_magnitude,
    result_dtype,
    stop_gradient,
    times_power_of_two,
    working_dtype,
)
from flora_tensor._checks import feasible_ranks
from flora_tensor._driver import Fit, Method, Random, fit_to, residual_norm
from flora_tensor._prepared import Prepared, like, on_host
from flora_tensor._spectrum import ModeSpectra
from flora_tensor._typing import Array
from flora_tensor._unformed import RELIABLE
from flora_tensor.ranks import certificate_of
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["TuckerFit", "finished", "tucker_of"]


@dataclass(frozen=True, eq=False)
class TuckerFit:
    """A Tucker decomposition and how good it is; made by `tucker`.

    Attributes
    ----------
    tucker : TuckerTensor
        The decomposition: orthonormal factors, all-orthogonal core, in the input's data type.
    relative_error : float
        ‖X − X̂‖ / ‖X‖ of the tensor as returned, the rounding to its data type included; 0 for a zero tensor.
    error_bound : float
        An upper bound on ``relative_error``. For HOSVD and ST-HOSVD, and HOOI started from them, √(Σ_n Σ_{i≥r_n} σ_i²)
        / ‖X‖ over the singular values that were truncated, which is at most √N times the error of the best tensor of
        these ranks. For the randomized method, ``relative_error`` itself.
    lower_bound : float
        No tensor of these ranks has a smaller relative error: √(max_n Σ_{i≥r_n} σ_i²) / ‖X‖ over the modes whose exact
        singular values are known, 0 where none are (the randomized method).
    certificate : float
        ``relative_error / lower_bound``: how many times the error of the best tensor of these ranks this is at most. At
        most √N for HOSVD; 1 where both are 0, infinite where no bound is known.
    spectra : ModeSpectra
        The singular values that the method computed; ``spectra.kind`` tells of which tensor.
    method : str
        What ran, and why, as in ``"randomized, 5 products with x: the ranks are small beside the sizes"``.
    """

    tucker: TuckerTensor
    relative_error: float
    error_bound: float
    lower_bound: float
    spectra: ModeSpectra
    method: str

    @property
    def certificate(self) -> float:
        """How many times the error of the best tensor of these ranks this one is at most."""
        return certificate_of(self.relative_error, self.lower_bound)

    def __repr__(self) -> str:
        return (
            f"TuckerFit({self.tucker!r}, relative_error={self.relative_error:.4g}, "
            f"error_bound={self.error_bound:.4g}, method={self.method!r})"
        )


def tucker_of(
    x: Array,
    ready: Prepared,
    target: Target,
    whole: Iterable[int] = (),
    method: Method = "auto",
    rng: Random = None,
) -> TuckerFit:
    """Do what `tucker` does with a prepared tensor and a checked target; ``whole`` modes get no factor."""
    ready = on_host(ready)
    if ready.squares is None:
        raise ValueError(
            "tucker: x is traced by jit or vmap, and a TuckerFit holds numbers; call hosvd, st_hosvd or hooi"
        )
    found = _measured(ready, x, target, method, rng, whole)
    # Ranks are chosen by sums that rounding blurs, and rounds core and factors. Where that breaks the promise, less is
    # asked for, and if it breaks again, all.
    for share in (0.99, 0.0):
        if not _breaks(x, target, found.error, found.decomposed):
            break
        asked = share * math.sqrt(max(2 * target.rtol**2 - found.error**2, 0.0))
        found = _measured(ready, x, replace(target, rtol=asked), method, rng, ())
    return _told(ready, x, found)


class _Measured(NamedTuple):
    """What ran and its result, that in the type of the input, and its relative error."""

    fit: Fit
    decomposed: TuckerTensor
    error: float


def _measured(
    ready: Prepared, x: Array, target: Target, method: Method, rng: Random, whole: Iterable[int]
) -> _Measured:
    fit = fit_to(ready, tuple(x.shape), target, method, rng)
    fit = replace(fit, result=all_orthogonal(ready.xp, fit.result))  # what it replaces is not held any longer
    fit = replace(fit, result=left_whole(ready.xp, fit.result, whole))
    decomposed = finished("tucker", x, fit.result, ready.exponent)
    return _Measured(fit, decomposed, _relative_error(ready, fit.result, decomposed, target.rtol))


def _breaks(x: Array, target: Target, error: float, decomposed: TuckerTensor) -> bool:
    """Tell whether a tolerance is not kept though higher ranks would; what rounding to a short type adds is allowed."""
    if target.ranks is not None or target.max_parameters is not None or error <= target.rtol:
        return False
    xp, shape = array_namespace("tucker", x), tuple(x.shape)
    return working_dtype(xp, x.dtype) == result_dtype(xp, x.dtype) and decomposed.ranks != feasible_ranks(shape, shape)


def _told(ready: Prepared, x: Array, found: _Measured) -> TuckerFit:
    """Put together what `tucker` returns."""
    norm, k = ready.norm(), ready.exponent
    fit, decomposed, error = found
    return TuckerFit(
        tucker=decomposed,
        relative_error=error,
        # Bounds are sums and differences of squares, which rounding blurs where errors are small: what was measured
        # stands.
        error_bound=max(fit.upper / norm, error) if norm else 0.0,
        lower_bound=min(fit.lower / norm, error) if norm else 0.0,
        spectra=ModeSpectra(
            tuple(times_power_of_two(like(x, v), k) for v in fit.result.values),
            math.ldexp(norm, k),
            tuple(x.shape),
            fit.result.kind,
        ),
        method=fit.ran,
    )


def finished(where: str, x: Array, result: Truncation, k: int) -> TuckerTensor:
    """Undo the scaling and return to the input's library and data type."""
    xp = array_namespace(where, x)
    dtype = result_dtype(xp, x.dtype)
    core = like(x, result.core)
    with np.errstate(over="ignore"):  # NumPy would warn of what is refused in the next lines
        core = xp.astype(times_power_of_two(core, k), dtype, copy=False)
    largest = largest_magnitude(xp, core)
    if largest is not None and not math.isfinite(largest):
        raise ValueError(
            f"{where}: the core's largest entry, about 2**{k}, is beyond the range of {dtype}; "
            "pass x in a wider type, or scaled"
        )
    factors = tuple(None if u is None else xp.astype(like(x, u), dtype, copy=False) for u in result.factors)
    return TuckerTensor(core, factors)


def _relative_error(ready: Prepared, result: Truncation, fit: TuckerTensor, rtol: float) -> float:
    """Measure ‖X − X̂‖ / ‖X‖ for a prepared tensor, its decomposition, and that in its final data type.

    ‖X‖² − ‖G‖² is the squared error while it stands well above the rounding of the two norms; below, where the
    result was rounded to a shorter type, and close to a tolerance, the residual itself is summed.
    """
    norm = ready.norm()
    if norm == 0.0:
        return 0.0
    xp, x = ready.xp, stop_gradient(ready.x)
    lost = norm**2 - float_squares("tucker", xp, result.core)
    same = str(fit.dtype).rsplit(".", maxsplit=1)[-1] == str(x.dtype).rsplit(".", maxsplit=1)[-1]
    if same and lost > RELIABLE * epsilon(xp, x.dtype) * norm**2:
        error = math.sqrt(lost) / norm
        if not 0 < abs(error - rtol) < error / RELIABLE:
            return error
    rounded = fit.map(lambda array: xp.astype(like(x, _working(array)), x.dtype, copy=False))
    core = times_power_of_two(rounded.core, -ready.exponent)
    return residual_norm(xp, x, TuckerTensor(core, rounded.factors), norm) / norm


def _working(array: Array) -> Array:
    """Return an array as a constant in a type that every library has."""
    xp = array_namespace("tucker", array)
    return xp.astype(stop_gradient(array), working_dtype(xp, array.dtype), copy=False)
