"""Tucker decompositions: HOSVD, ST-HOSVD, HOOI, and the driver `tucker` that picks and combines them.

All of them scale the tensor by a power of two first (nothing overflows or vanishes, and the factors of ``x`` and ``x ·
2**k`` agree bit for bit), work in float32 for 16-bit input, return the input's type, and never change the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flora_tensor._arrays import (
    accumulation_dtype,
    array_namespace,
    concrete,
    epsilon,
    is_complex,
    is_differentiated,
    largest_magnitude,
    result_dtype,
    stop_gradient,
    sum_of_squares,
    times_power_of_two,
    to_numpy,
)
from flora_tensor._bases import left_basis
from flora_tensor._checks import (
    as_int,
    check_finite,
    check_mode,
    check_ranks,
    check_tolerance,
    exactly_one,
    feasible_ranks,
)
from flora_tensor._typing import Array, DType, Namespace, Ranks
from flora_tensor.algebra import contract, multi_mode_dot, unfold
from flora_tensor.ranks import fewest_parameters, smallest_error
from flora_tensor.spectra import ModeSpectra, Spectrum, frobenius, prepare, spectrum_of
from flora_tensor.tucker_tensor import TuckerTensor, orthogonalize, reconstruct

__all__ = ["TuckerFit", "hooi", "hosvd", "round_tucker", "st_hosvd", "tucker"]

Method = Literal["auto", "hosvd", "st_hosvd", "hooi"]

# Sweeps stop once one of them takes less than this share off the squared error …
_ENOUGH = 1e-4
# … and after this many in any case: on flat spectra the gains shrink slowly and amount to nothing.
_MOST_SWEEPS = 30


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
        What the method guarantees beforehand, relative to ‖X‖: √(Σ_n Σ_{i≥r_n} σ_i²) over the singular values that it
        truncated, which is at most √N times the error of the best tensor of these ranks.
    lower_bound : float
        No tensor of these ranks has a smaller relative error: √(max_n Σ_{i≥r_n} σ_i²) over the modes whose exact
        singular values are known. ``relative_error / lower_bound`` certifies how close to the best the fit is.
    spectra : ModeSpectra
        The singular values that the method computed; ``spectra.kind`` tells of which tensor.
    method : str
        What ran.
    """

    tucker: TuckerTensor
    relative_error: float
    error_bound: float
    lower_bound: float
    spectra: ModeSpectra
    method: str

    def __repr__(self) -> str:
        return (
            f"TuckerFit({self.tucker!r}, relative_error={self.relative_error:.4g}, "
            f"error_bound={self.error_bound:.4g}, method={self.method!r})"
        )


@dataclass(frozen=True, eq=False)
class _Truncation:
    """What the algorithms hand to each other: factors, core and the singular values that were truncated."""

    core: Array
    factors: list[Array]
    values: list[Array]
    kind: str


def hosvd(x: Array, ranks: Ranks | None = None, *, rtol: float | None = None) -> TuckerTensor:
    """Decompose a tensor by the (truncated) higher-order SVD.

    Each factor holds leading left singular vectors of an unfolding of ``x`` itself. The error is at most √N times that
    of the best tensor of the same ranks, and the core of the full HOSVD is all-orthogonal.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int, optional
        One rank a mode, or one number for all (lowered where a mode cannot have it). By default the full ranks
        min(I_n, ∏_{j≠n} I_j), which represent ``x`` exactly.
    rtol : float, optional
        Instead of ranks: the relative error ‖X − X̂‖ / ‖X‖ to stay within, each mode taking ``rtol² ‖X‖² / N`` of the
        squares. `tucker` needs fewer parameters for the same tolerance.

    Returns
    -------
    TuckerTensor
        Core of shape (r_0, …, r_{N-1}) and orthonormal factors of shape (I_n, r_n), in the data type of ``x``.

    Raises
    ------
    ValueError
        If ``x`` has no axes or holds NaN or infinity, if a rank is below 1, above its mode's size or above the product
        of the other ranks, or if ``rtol`` is not in [0, 1].
    TypeError
        If both ``ranks`` and ``rtol`` are given.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *A multilinear singular value decomposition*, SIMAX 21 (2000), section 4.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((6, 5, 4))
    >>> bool(np.allclose(hosvd(x).to_tensor(), x))
    True
    >>> hosvd(x, (3, 3, 2)).ranks
    (3, 3, 2)
    """
    xp, scaled, k = prepare("hosvd", x)
    target = _target("hosvd", tuple(x.shape), ranks, rtol)
    return _finished("hosvd", xp, x, _hosvd(xp, scaled, target), k)


def st_hosvd(
    x: Array,
    ranks: Ranks | None = None,
    *,
    rtol: float | None = None,
    mode_order: Sequence[int] | None = None,
) -> TuckerTensor:
    """Decompose a tensor by the sequentially truncated HOSVD.

    Each mode is truncated in turn and the next one sees the smaller tensor, which costs a fraction of `hosvd` and is
    usually a little more accurate; the same √N bound holds. The result depends on the order of the modes.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int, optional
        One rank a mode, or one number for all (lowered where a mode cannot have it); by default the full ranks.
    rtol : float, optional
        Instead of ranks: the relative error to stay within. The n-th mode may spend 1/(N − n) of what the modes before
        it left of ``rtol² ‖X‖²``.
    mode_order : sequence of int, optional
        The order in which modes are truncated, a permutation of 0, …, N-1; by default the one of least arithmetic.

    Returns
    -------
    TuckerTensor
        Core of shape (r_0, …, r_{N-1}) and orthonormal factors of shape (I_n, r_n), in the data type of ``x``.

    Raises
    ------
    ValueError
        As for `hosvd`, and if ``mode_order`` is not a permutation.
    TypeError
        If both ``ranks`` and ``rtol`` are given.

    References
    ----------
    Vannieuwenhoven, Vandebril and Meerbergen, *A new truncation strategy for the higher-order singular value
    decomposition*, SISC 34 (2012), algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((6, 5, 4))
    >>> st_hosvd(x, 2)
    TuckerTensor(shape=(6, 5, 4), ranks=(2, 2, 2), n_parameters=38, dtype=float64)
    """
    xp, scaled, k = prepare("st_hosvd", x)
    target = _target("st_hosvd", tuple(x.shape), ranks, rtol)
    shape = tuple(x.shape)
    order = _cheapest_order(shape, target.ranks) if mode_order is None else _checked_order(mode_order, len(shape))
    return _finished("st_hosvd", xp, x, _st_hosvd(xp, scaled, target, order), k)


def hooi(
    x: Array,
    ranks: Ranks,
    *,
    init: Literal["st_hosvd", "hosvd"] | TuckerTensor = "st_hosvd",
    max_sweeps: int = _MOST_SWEEPS,
    tolerance: float = _ENOUGH,
) -> TuckerTensor:
    """Decompose a tensor by higher-order orthogonal iteration: the best factors found by alternating improvement.

    Every update of a factor is optimal given the others, so the error never exceeds that of the start. The result is
    rotated so that its core is all-orthogonal.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int
        One rank a mode, or one number for all (lowered where a mode cannot have it).
    init : {"st_hosvd", "hosvd"} or TuckerTensor
        Where to start; a Tucker tensor must have these ranks and orthonormal factors.
    max_sweeps : int
        At most this many sweeps over the modes.
    tolerance : float
        Stop when a sweep lowers the squared error by less than this share of it.

    Returns
    -------
    TuckerTensor
        Core of shape (r_0, …, r_{N-1}) and orthonormal factors of shape (I_n, r_n), in the data type of ``x``.

    Raises
    ------
    ValueError
        If ``x`` has no axes or holds NaN or infinity, if a rank is not feasible, if ``init`` is neither a known name
        nor a Tucker tensor of these ranks and this shape, or ``max_sweeps`` is negative.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *On the best rank-1 and rank-(R1, …, RN) approximation of higher-order
    tensors*, SIMAX 21 (2000), algorithm 4.2. Partial products are shared along a binary tree of the modes, as in Kaya
    and Uçar, *Parallel Candecomp/Parafac decomposition using dimension trees*, SISC 40 (2018).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((6, 5, 4))
    >>> error = lambda t: np.linalg.norm(t.to_tensor() - x)
    >>> bool(error(hooi(x, 2)) <= error(st_hosvd(x, 2)))
    True
    """
    xp, scaled, k = prepare("hooi", x)
    wanted = check_ranks("hooi", ranks, tuple(x.shape))
    most = as_int("hooi", "max_sweeps", max_sweeps)
    if most < 0:
        raise ValueError(f"hooi: max_sweeps is {most}; pass 0 or more")
    start = _start(xp, scaled, wanted, init)
    result, _ = _hooi(xp, scaled, start, most, float(tolerance))
    return _finished("hooi", xp, x, _all_orthogonal(xp, result), k)


def tucker(
    x: Array,
    ranks: Ranks | None = None,
    *,
    rtol: float | None = None,
    max_parameters: int | None = None,
    method: Method = "auto",
    rng: "int | np.random.Generator | None" = None,  # noqa: ARG001
) -> TuckerFit:
    """Decompose a tensor as well as its ranks, a tolerance or a parameter budget allow, and say how good the result is.

    Given ranks, the default is HOOI started from ST-HOSVD. Given a tolerance or a budget, the ranks are the optimum
    over *all* rank tuples of the full HOSVD (fewest parameters within the error, or smallest error within the
    parameters), then the factors are improved by HOOI, which only lowers the error.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int, optional
        One rank a mode, or one number for all (lowered where a mode cannot have it).
    rtol : float, optional
        The relative error ‖X − X̂‖ / ‖X‖ to stay within, in [0, 1].
    max_parameters : int, optional
        How many numbers core and factors may store, ∏ r_n + Σ I_n r_n.
    method : {"auto", "hosvd", "st_hosvd", "hooi"}
        Force an algorithm.
    rng : int or numpy.random.Generator, optional
        The source of randomness for methods that draw random numbers; none of the present ones does.

    Returns
    -------
    TuckerFit
        The decomposition with orthonormal factors and an all-orthogonal core, its true relative error and its bounds.
        With none of ``ranks``, ``rtol`` and ``max_parameters`` it has full ranks and is exact to rounding.

    Raises
    ------
    ValueError
        If ``x`` has no axes or holds NaN or infinity, a rank is not feasible, ``rtol`` is not in [0, 1], the budget
        does not hold the smallest Tucker tensor of this shape, ``method`` is unknown, or ``x`` is traced (under ``jit``
        or ``vmap``).
    TypeError
        If more than one of ``ranks``, ``rtol`` and ``max_parameters`` is given.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000); Vannieuwenhoven, Vandebril and Meerbergen (2012); the ranks follow from
    the identity that `error_table` evaluates.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = TuckerTensor(rng.standard_normal((2, 2, 2)), [rng.standard_normal((n, 2)) for n in (9, 8, 3)]).to_tensor()
    >>> fit = tucker(x, rtol=1e-6)
    >>> fit.tucker.ranks, fit.relative_error < 1e-6
    ((2, 2, 2), True)
    >>> tucker(x, max_parameters=40).tucker.ranks
    (1, 2, 2)
    """
    if method not in ("auto", "hosvd", "st_hosvd", "hooi"):
        raise ValueError(f"tucker: method is {method!r}; pass 'auto', 'hosvd', 'st_hosvd' or 'hooi'")
    xp, scaled, k = prepare("tucker", x)
    if largest_magnitude(xp, scaled) is None:
        raise ValueError(
            "tucker: x is traced by jit or vmap, and a TuckerFit holds numbers; call hosvd, st_hosvd or hooi"
        )
    target = _target("tucker", tuple(x.shape), ranks, rtol, max_parameters)
    result, bounds, ran = _fit(xp, scaled, tuple(x.shape), target, method)
    result = _all_orthogonal(xp, result)
    norm = frobenius(xp, scaled)
    decomposed = _finished("tucker", xp, x, result, k)
    lower, upper = bounds
    return TuckerFit(
        tucker=decomposed,
        relative_error=_relative_error(xp, stop_gradient(scaled), decomposed, k, norm),
        error_bound=upper / norm if norm else 0.0,
        lower_bound=lower / norm if norm else 0.0,
        spectra=ModeSpectra(
            tuple(times_power_of_two(v, k) for v in result.values), math.ldexp(norm, k), tuple(x.shape), result.kind
        ),
        method=ran,
    )


def round_tucker(
    a: TuckerTensor,
    *,
    ranks: Ranks | None = None,
    rtol: float | None = None,
    max_parameters: int | None = None,
) -> TuckerTensor:
    """Lower the ranks of a Tucker tensor without forming it.

    The factors are orthogonalized and the core is decomposed by `tucker`: the error in the core is the error in the
    tensor, so the ranks are as good as those of the dense tensor would be.

    Parameters
    ----------
    a : TuckerTensor
        The tensor, of shape (I_0, …, I_{N-1}); of any ranks, for example the sum of several.
    ranks : int or sequence of int, optional
        The new ranks, at most the present ones and at most I_n.
    rtol : float, optional
        The error to stay within, relative to ‖A‖. ``rtol=0`` only drops what is exactly redundant.
    max_parameters : int, optional
        How many numbers core and factors may store.

    Returns
    -------
    TuckerTensor
        The rounded tensor, with orthonormal factors. A mode that was whole (``None``) and keeps its full rank stays
        whole.

    Raises
    ------
    ValueError
        As for `tucker`.
    TypeError
        Unless exactly one of ``ranks``, ``rtol`` and ``max_parameters`` is given.

    References
    ----------
    Oseledets, Savostyanov and Tyrtyshnikov, *Linear algebra for tensor problems*, Computing 85 (2009), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import add
    >>> a, b = (TuckerTensor(np.full((1, 1), c), [np.ones((4, 1)), np.ones((5, 1))]) for c in (3.0, 2.0))
    >>> add(a, b).ranks, round_tucker(add(a, b), rtol=1e-12).ranks
    ((2, 2), (1, 1))
    """
    exactly_one("round_tucker", ranks=ranks, rtol=rtol, max_parameters=max_parameters)
    xp = array_namespace("round_tucker", a.core, *a.factors)
    dtype = result_dtype(xp, xp.result_type(a.core, *(u for u in a.factors if u is not None)))
    upright = orthogonalize(a.map(lambda array: xp.astype(array, _wide(xp, array), copy=False)))
    xp, scaled, k = prepare("round_tucker", upright.core)
    target = _target("round_tucker", upright.ranks, ranks, rtol, max_parameters)
    result, _, _ = _fit(xp, scaled, a.shape, target, "auto")
    result = _all_orthogonal(xp, result)
    core, factors = times_power_of_two(result.core, k), list[Array | None](result.factors)
    for mode, (outer, inner) in enumerate(zip(upright.factors, result.factors)):
        if outer is not None:
            factors[mode] = xp.matmul(outer, inner)
        elif inner.shape[0] == inner.shape[1]:
            core, factors[mode] = contract(xp, core, inner, mode), None
    return TuckerTensor(core, tuple(factors)).map(lambda array: xp.astype(array, dtype, copy=False))


@dataclass(frozen=True)
class _Target:
    """What a caller asked for, checked: one of ranks, a tolerance and a number of parameters."""

    ranks: tuple[int, ...] | None = None
    rtol: float = 0.0
    max_parameters: int | None = None


def _target(
    where: str, shape: tuple[int, ...], ranks: Ranks | None, rtol: float | None, max_parameters: int | None = None
) -> _Target:
    if sum(option is not None for option in (ranks, rtol, max_parameters)) > 1:
        exactly_one(where, ranks=ranks, rtol=rtol, max_parameters=max_parameters)
    if rtol is not None:
        return _Target(rtol=check_tolerance(where, rtol))
    if max_parameters is not None:
        return _Target(max_parameters=as_int(where, "max_parameters", max_parameters))
    return _Target(feasible_ranks(shape, shape) if ranks is None else check_ranks(where, ranks, shape))


def _fit(
    xp: Namespace, x: Array, shape: tuple[int, ...], target: _Target, method: Method
) -> tuple[_Truncation, tuple[float, float], str]:
    """Decompose a prepared tensor, parameters counted by ``shape``: the result, its bounds times ‖x‖, and what ran."""
    if target.max_parameters is None and (target.ranks is not None or method in ("hosvd", "st_hosvd")):
        return _fit_directly(xp, x, target, method)
    spectrum = spectrum_of(xp, stop_gradient(x), 0)
    if target.max_parameters is not None:
        chosen = smallest_error(spectrum, shape, target.max_parameters, "tucker")
    else:
        chosen = fewest_parameters(spectrum, shape, target.rtol**2) or spectrum.max_ranks
    if method in ("hosvd", "st_hosvd"):
        return _fit_directly(xp, x, _Target(chosen), method)
    result = _truncated(xp, x, spectrum, chosen)
    bounds = (spectrum.lower_bound(chosen) * spectrum.norm, spectrum.upper_bound(chosen) * spectrum.norm)
    if len(x.shape) <= 2 or chosen == spectrum.max_ranks:
        return result, bounds, "hosvd"
    result, sweeps = _hooi(xp, x, result, _MOST_SWEEPS, _ENOUGH)
    if target.max_parameters is None:
        result = _trimmed(xp, result, shape, target.rtol, spectrum.norm)
    return result, bounds, f"hosvd, then {sweeps} sweeps of hooi"


def _fit_directly(
    xp: Namespace, x: Array, target: _Target, method: Method
) -> tuple[_Truncation, tuple[float, float], str]:
    """Decompose to given ranks, or by the tolerance rule of the method itself."""
    ndim = len(x.shape)
    full = target.ranks == feasible_ranks(x.shape, x.shape)
    if method == "hosvd" or (full and method == "auto"):
        result = _hosvd(xp, x, target)
        tails = [_tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
        return result, (math.sqrt(max(tails)), math.sqrt(sum(tails))), "hosvd"
    order = _cheapest_order(x.shape, target.ranks)
    result = _st_hosvd(xp, x, target, order)
    tails = [_tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
    bounds = (math.sqrt(tails[order[0]]), math.sqrt(sum(tails)))
    if method == "st_hosvd" or ndim <= 2:
        return result, bounds, "st_hosvd"
    result, sweeps = _hooi(xp, x, result, _MOST_SWEEPS, _ENOUGH)
    return result, bounds, f"st_hosvd, then {sweeps} sweeps of hooi"


def _hosvd(xp: Namespace, x: Array, target: _Target) -> _Truncation:
    bases = [left_basis(unfold(x, mode)) for mode in range(len(x.shape))]
    if target.ranks is not None:
        ranks = target.ranks
    else:
        allowed = target.rtol**2 * float(sum_of_squares(xp, stop_gradient(x))) / len(x.shape)
        ranks = tuple(_rank_within(b.values, allowed) for b in bases)
    factors = [b.vectors[:, :r] for b, r in zip(bases, ranks)]
    core = multi_mode_dot(x, factors, transpose=True)
    result = _Truncation(core, factors, [b.values for b in bases], "exact")
    return result if ranks == feasible_ranks(ranks, ranks) else _all_orthogonal(xp, result)


def _st_hosvd(xp: Namespace, x: Array, target: _Target, order: Sequence[int]) -> _Truncation:
    factors: list[Array] = [None] * len(order)
    values: list[Array] = [None] * len(order)
    left = target.rtol**2 * float(sum_of_squares(xp, stop_gradient(x)))
    for step, mode in enumerate(order):
        basis = left_basis(unfold(x, mode))
        if target.ranks is not None:
            rank = target.ranks[mode]
        else:
            rank = _rank_within(basis.values, left / (len(order) - step))
            left -= _tail(basis.values, rank)
        factors[mode], values[mode] = basis.vectors[:, :rank], basis.values
        x = multi_mode_dot(x, [factors[mode]], modes=[mode], transpose=True)
    result = _Truncation(x, factors, values, "sequential" if len(order) > 1 else "exact")
    ranks = tuple(x.shape)
    return result if ranks == feasible_ranks(ranks, ranks) else _all_orthogonal(xp, result)


def _truncated(xp: Namespace, x: Array, spectrum: Spectrum, ranks: tuple[int, ...]) -> _Truncation:
    """Truncate a full HOSVD; recompute the bases of ``x`` where somebody differentiates through it."""
    if is_differentiated(x):
        return _hosvd(xp, x, _Target(ranks))
    core = spectrum.core[tuple(slice(r) for r in ranks)]
    factors = [u[:, :r] for u, r in zip(spectrum.factors, ranks)]
    return _Truncation(core, factors, list(spectrum.values), "exact")


def _hooi(xp: Namespace, x: Array, start: _Truncation, most: int, enough: float) -> tuple[_Truncation, int]:
    """Sweep until the squared error ‖X‖² − ‖G‖² stops falling; return the result and the number of sweeps."""
    factors, core = list(start.factors), start.core
    ranks = tuple(core.shape)
    if len(ranks) < 2 or 0 in x.shape or ranks == tuple(x.shape):
        return start, 0
    squares = concrete(sum_of_squares(xp, x))
    error = _error_left(xp, squares, core)
    # The longest shrinking first, then in turn to either half: the first product of each half is the one that shrinks
    # most.
    modes = sorted(range(len(ranks)), key=lambda k: (-x.shape[k] / ranks[k], k))
    for sweep in range(1, most + 1):
        core = _sweep(xp, x, modes, factors)
        before, error = error, _error_left(xp, squares, core)
        if squares is not None and before - error <= max(enough * error, epsilon(xp, x.dtype) * squares):
            return _Truncation(core, factors, start.values, start.kind), sweep
    return _Truncation(core, factors, start.values, start.kind), most


def _sweep(xp: Namespace, partial: Array, modes: list[int], factors: list[Array]) -> Array:
    """Update the factors of ``modes`` in place and return the core after the last of them.

    ``partial`` is X multiplied by the transposed factors of all other modes. Each half of the modes is updated from
    ``partial`` times the factors of the other half, so products are shared along a binary tree: two products with X a
    sweep, not N.
    """
    if len(modes) == 1:
        (mode,) = modes
        factors[mode] = left_basis(unfold(partial, mode)).vectors[:, : factors[mode].shape[1]]
        return multi_mode_dot(partial, [factors[mode]], modes=modes, transpose=True)
    first, second = modes[0::2], modes[1::2]
    _sweep(xp, multi_mode_dot(partial, [factors[m] for m in second], modes=second, transpose=True), first, factors)
    return _sweep(
        xp, multi_mode_dot(partial, [factors[m] for m in first], modes=first, transpose=True), second, factors
    )


def _error_left(xp: Namespace, squares: float | None, core: Array) -> float:
    return 0.0 if squares is None else squares - float(sum_of_squares(xp, stop_gradient(core)))


def _all_orthogonal(xp: Namespace, result: _Truncation) -> _Truncation:
    """Rotate the factors so that the core is all-orthogonal, and drop directions that the core does not use; exact."""
    if 0 in result.core.shape:
        return result
    inner = [left_basis(unfold(result.core, mode)).vectors for mode in range(len(result.factors))]
    core = multi_mode_dot(result.core, inner, transpose=True)
    factors = [xp.matmul(u, v) for u, v in zip(result.factors, inner)]
    return _Truncation(core, factors, result.values, result.kind)


def _trimmed(xp: Namespace, result: _Truncation, shape: Sequence[int], rtol: float, norm: float) -> _Truncation:
    """Spend what HOOI gained: choose among the truncations of the improved core the smallest within the tolerance."""
    kept = float(sum_of_squares(xp, stop_gradient(result.core)))
    allowed = rtol**2 * norm**2 - max(norm**2 - kept, 0.0)
    if allowed <= 0 or kept == 0:
        return result
    inner = spectrum_of(xp, stop_gradient(result.core), 0)
    ranks = fewest_parameters(inner, shape, allowed / kept)
    if ranks is None or ranks == tuple(result.core.shape):
        return result
    small = _truncated(xp, result.core, inner, ranks)
    factors = [xp.matmul(u, v) for u, v in zip(result.factors, small.factors)]
    return _Truncation(small.core, factors, result.values, result.kind)


def _rank_within(values: Array, allowed: float) -> int:
    """Return the smallest rank ≥ 1 whose discarded squares stay within ``allowed``."""
    squares = to_numpy(stop_gradient(values)).astype(np.float64) ** 2
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return max(1, int(np.argmax(tails <= allowed))) if squares.size else 0


def _tail(values: Array, rank: int) -> float:
    """Return Σ_{i≥rank} σ_i², summed from the smallest up."""
    rest = to_numpy(stop_gradient(values)).astype(np.float64)[rank:]
    return float(np.sum((rest**2)[::-1]))


def _cheapest_order(shape: Sequence[int], ranks: tuple[int, ...] | None) -> list[int]:
    """Order the modes of ST-HOSVD by arithmetic.

    Mode k costs I_k · s on a tensor of s elements and leaves s · r_k/I_k. Comparing "a before b" with "b before a", a
    goes first iff I_a / (1 − r_a/I_a) < I_b / (1 − r_b/I_b): sorting by that key is optimal. Without ranks the smallest
    mode goes first.
    """

    def key(mode: int) -> tuple[float, int]:
        size = shape[mode]
        rank = ranks[mode] if ranks is not None else 0
        return (size / (1 - rank / size) if rank < size else math.inf, mode)

    return sorted(range(len(shape)), key=key)


def _checked_order(mode_order: Sequence[int], ndim: int) -> list[int]:
    order = [check_mode("st_hosvd", mode, ndim) for mode in mode_order]
    if sorted(order) != list(range(ndim)):
        raise ValueError(f"st_hosvd: mode_order {tuple(mode_order)} for {ndim} modes; pass each mode once")
    return order


def _start(xp: Namespace, x: Array, ranks: tuple[int, ...], init: str | TuckerTensor) -> _Truncation:
    if isinstance(init, TuckerTensor):
        if init.shape != tuple(x.shape) or init.ranks != ranks:
            raise ValueError(
                f"hooi: init has shape {init.shape} and ranks {init.ranks}; "
                f"pass one of shape {tuple(x.shape)} and ranks {ranks}"
            )
        check_finite("hooi", init.core, "init's core")
        factors = [xp.astype(u, x.dtype, copy=False) for u in orthogonalize(init).factors if u is not None]
        if len(factors) != len(ranks):
            raise ValueError("hooi: init leaves a mode whole (a factor is None); pass a factor for every mode")
        return _Truncation(multi_mode_dot(x, factors, transpose=True), factors, [], "exact")
    if init == "hosvd":
        return _hosvd(xp, x, _Target(ranks))
    if init == "st_hosvd":
        return _st_hosvd(xp, x, _Target(ranks), _cheapest_order(x.shape, ranks))
    raise ValueError(f"hooi: init is {init!r}; pass 'st_hosvd', 'hosvd' or a TuckerTensor")


def _finished(where: str, xp: Namespace, x: Array, result: _Truncation, k: int) -> TuckerTensor:
    """Undo the scaling and return to the input's data type."""
    dtype = result_dtype(xp, x.dtype)
    core = xp.astype(times_power_of_two(result.core, k), dtype, copy=False)
    largest = largest_magnitude(xp, core)
    if largest is not None and not math.isfinite(largest):
        raise ValueError(
            f"{where}: the core's largest entry, about 2**{k}, is beyond the range of {dtype}; "
            "pass x in a wider type, or scaled"
        )
    return TuckerTensor(core, tuple(xp.astype(u, dtype, copy=False) for u in result.factors))


def _relative_error(xp: Namespace, x: Array, fit: TuckerTensor, k: int, norm: float) -> float:
    """Measure ‖X − X̂‖ / ‖X‖ for the prepared ``x`` and the finished ``fit`` of ``x · 2**k``.

    ‖X‖² − ‖G‖² is the squared error while it stands well above the rounding of the two norms; below, and where the
    result was rounded to a shorter type, the residual itself is summed.
    """
    if norm == 0.0:
        return 0.0
    core = times_power_of_two(xp.astype(stop_gradient(fit.core), x.dtype, copy=False), -k)
    factors = [xp.astype(stop_gradient(u), x.dtype, copy=False) for u in fit.factors]
    lost = norm**2 - float(sum_of_squares(xp, core))
    if fit.dtype == x.dtype and lost > 1e4 * epsilon(xp, x.dtype) * norm**2:
        return math.sqrt(lost) / norm
    return _residual_norm(xp, x, TuckerTensor(core, tuple(factors))) / norm


def _residual_norm(xp: Namespace, x: Array, fit: TuckerTensor) -> float:
    """Return ‖X − X̂‖, slab by slab along the longest mode, in float64 where there is float64."""
    if 0 in x.shape:
        return 0.0
    wide = _wide(xp, x)
    fit = fit.map(lambda array: xp.astype(array, wide, copy=False))
    mode = max(range(len(x.shape)), key=lambda k: x.shape[k])
    rows = max(1, (1 << 22) * x.shape[mode] // math.prod(x.shape))
    total = 0.0
    for start in range(0, x.shape[mode], rows):
        slab = slice(start, min(start + rows, x.shape[mode]))
        factors = tuple(u[slab, :] if k == mode and u is not None else u for k, u in enumerate(fit.factors))
        part = x[(*(slice(None),) * mode, slab, ...)]
        rest = xp.astype(part, wide, copy=False) - reconstruct(TuckerTensor(fit.core, factors))
        total += float(sum_of_squares(xp, rest))
    return math.sqrt(total)


def _wide(xp: Namespace, x: Array) -> DType:
    """Return the widest type of the same kind: float64 or complex128 where there are any."""
    wide = accumulation_dtype(xp, x)
    if is_complex(xp, x.dtype):
        return xp.complex128 if wide == xp.float64 else xp.complex64
    return wide
