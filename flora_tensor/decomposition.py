"""Tucker decompositions: HOSVD, ST-HOSVD, HOOI, and the driver `tucker` that picks and combines them.

All of them scale the tensor by a power of two first (nothing overflows or vanishes, and the factors of ``x`` and ``x ·
2**k`` agree bit for bit), work in float32 for 16-bit input, return the input's type, and never change the input.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import array_api_compat
import numpy as np

from flora_tensor._algorithms import (
    ENOUGH,
    MOST_SWEEPS,
    Target,
    Truncation,
    all_orthogonal,
    cheapest_order,
    hooi_of,
    hosvd_of,
    left_whole,
    st_hosvd_of,
    tail,
)
from flora_tensor._arrays import (
    accumulation_dtype,
    array_namespace,
    epsilon,
    float_squares,
    host_view,
    is_complex,
    is_differentiated,
    largest_magnitude,
    result_dtype,
    stop_gradient,
    times_power_of_two,
    working_dtype,
)
from flora_tensor._checks import (
    as_int,
    check_finite,
    check_mode,
    check_ranks,
    check_tolerance,
    exactly_one,
    feasible_ranks,
    whole_modes,
)
from flora_tensor._randomized import large_modes, randomized_of, range_sizes
from flora_tensor._typing import Array, DType, Namespace, Ranks
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.ranks import check_budget, partial_ranks
from flora_tensor.spectra import ModeSpectra, Prepared, Spectrum, prepare, spectrum_of
from flora_tensor.tucker_tensor import TuckerTensor, orthogonalize, reconstruct

__all__ = ["TuckerFit", "hooi", "hosvd", "round_tucker", "st_hosvd", "tucker"]

Method = Literal["auto", "hosvd", "st_hosvd", "hooi", "randomized"]


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
        singular values are known, 0 where none are (the randomized method). ``relative_error / lower_bound`` certifies
        how close to the best the fit is.
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

    def __repr__(self) -> str:
        return (
            f"TuckerFit({self.tucker!r}, relative_error={self.relative_error:.4g}, "
            f"error_bound={self.error_bound:.4g}, method={self.method!r})"
        )


def hosvd(x: Array, ranks: Ranks | None = None, *, rtol: float | None = None) -> TuckerTensor:
    """Decompose a tensor by the (truncated) higher-order SVD.

    Each factor holds leading left singular vectors of an unfolding of ``x`` itself. The error is at most √N times that
    of the best tensor of the same ranks, and the core of the full HOSVD is all-orthogonal.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int, optional
        One rank a mode, or one number for all (lowered where a mode cannot have it). ``None`` for a mode leaves it
        whole: it stores no factor. By default the full ranks min(I_n, ∏_{j≠n} I_j), which represent ``x`` exactly.
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
    ready = _on_host(prepare("hosvd", x))
    target = _target("hosvd", tuple(x.shape), ranks, rtol)
    result = left_whole(ready.xp, hosvd_of(ready.xp, ready.x, target, ready.squares), whole_modes(ranks))
    return _finished("hosvd", x, result, ready.exponent)


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
    ready = _on_host(prepare("st_hosvd", x))
    target = _target("st_hosvd", tuple(x.shape), ranks, rtol)
    shape = tuple(x.shape)
    order = cheapest_order(shape, target.ranks) if mode_order is None else _checked_order(mode_order, len(shape))
    result = st_hosvd_of(ready.xp, ready.x, target, order, squares=ready.squares)
    return _finished("st_hosvd", x, left_whole(ready.xp, result, whole_modes(ranks)), ready.exponent)


def hooi(
    x: Array,
    ranks: Ranks,
    *,
    init: Literal["st_hosvd", "hosvd"] | TuckerTensor = "st_hosvd",
    max_sweeps: int = MOST_SWEEPS,
    tolerance: float = ENOUGH,
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
    ready = _on_host(prepare("hooi", x))
    wanted = check_ranks("hooi", ranks, tuple(x.shape))
    most = as_int("hooi", "max_sweeps", max_sweeps)
    if most < 0:
        raise ValueError(f"hooi: max_sweeps is {most}; pass 0 or more")
    start = _start(ready, wanted, init)
    result, _ = hooi_of(ready.xp, ready.x, start, most, float(tolerance), ready.squares)
    result = left_whole(ready.xp, all_orthogonal(ready.xp, result), whole_modes(ranks))
    return _finished("hooi", x, result, ready.exponent)


def tucker(
    x: Array,
    ranks: Ranks | None = None,
    *,
    rtol: float | None = None,
    max_parameters: int | None = None,
    method: Method = "auto",
    rng: "int | np.random.Generator | None" = None,
) -> TuckerFit:
    """Decompose a tensor as well as its ranks, a tolerance or a parameter budget allow, and say how good the result is.

    Given a tolerance or a budget, the ranks are the optimum over *all* rank tuples of the full HOSVD (fewest parameters
    within the error, or smallest error within the parameters), then the factors are improved by HOOI, which only lowers
    the error.

    Given ranks, ``method="auto"`` goes by these rules, the first that fits:

    1. Full ranks cut nothing: HOSVD.
    2. Where at least two modes shrink to less than half and five products with thin bases are estimated to cost less
       than the Gram matrices of ST-HOSVD, and nobody differentiates through ``x``: the randomized method. It
       alternates products of ``x`` with bases wider than the ranks and HOOI inside the small core these leave; for a
       matrix that is a block Krylov method. Four products at least, five on spectra that decay; it ends when a product
       lowers the squared error by less than 0.02 %, or all to come are expected to by less than 0.03 %.
    3. For a matrix: ST-HOSVD, which is its truncated SVD.
    4. ST-HOSVD, then HOOI until further sweeps are expected to gain less than 0.03 % of the squared error.

    float32 data goes through Gram matrices in float64, which resolve what float32 holds; float64 data does so only
    where the singular values that matter lie above 1e-5 of the largest. HOOI differentiates its unrolled sweeps.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.
    ranks : int or sequence of int, optional
        One rank a mode, or one number for all (lowered where a mode cannot have it). ``None`` for a mode leaves it
        whole: it stores no factor, as in ``tucker(kernel, (16, 16, None, None))``.
    rtol : float, optional
        The relative error ‖X − X̂‖ / ‖X‖ to stay within, in [0, 1].
    max_parameters : int, optional
        How many numbers core and factors may store, ∏ r_n + Σ I_n r_n.
    method : {"auto", "hosvd", "st_hosvd", "hooi", "randomized"}
        Force an algorithm; ``fit.method`` says which one ran and why. ``"randomized"`` becomes ``"hooi"`` where fewer
        than two modes shrink to less than half.
    rng : int or numpy.random.Generator, optional
        The source of randomness of the randomized method; 0 by default, so that equal input gives equal bits.

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
    if method not in get_args(Method):
        raise ValueError(f"tucker: method is {method!r}; pass one of {', '.join(map(repr, get_args(Method)))}")
    ready = prepare("tucker", x)
    target = _target("tucker", tuple(x.shape), ranks, rtol, max_parameters)
    if target.max_parameters is not None:
        check_budget("tucker", tuple(x.shape), target.max_parameters)
    return tucker_of(x, ready, target, whole_modes(ranks), method, rng)


def tucker_of(
    x: Array,
    ready: Prepared,
    target: Target,
    whole: Iterable[int] = (),
    method: Method = "auto",
    rng: "int | np.random.Generator | None" = None,
) -> TuckerFit:
    """Do what `tucker` does with a prepared tensor and a checked target; ``whole`` modes get no factor."""
    ready = _on_host(ready)
    if ready.squares is None:
        raise ValueError(
            "tucker: x is traced by jit or vmap, and a TuckerFit holds numbers; call hosvd, st_hosvd or hooi"
        )
    xp, k, norm = ready.xp, ready.exponent, ready.norm()
    fit = _fit(ready, tuple(x.shape), target, method, rng)
    result = left_whole(xp, all_orthogonal(xp, fit.result), whole)
    decomposed = _finished("tucker", x, result, k)
    relative_error = _relative_error(ready, result, decomposed)
    return TuckerFit(
        tucker=decomposed,
        relative_error=relative_error,
        # Bounds are sums and differences of squares, which rounding blurs where errors are small: what was measured
        # stands.
        error_bound=max(fit.upper / norm, relative_error) if norm else 0.0,
        lower_bound=min(fit.lower / norm, relative_error) if norm else 0.0,
        spectra=ModeSpectra(
            tuple(times_power_of_two(_like(x, v), k) for v in result.values),
            math.ldexp(norm, k),
            tuple(x.shape),
            result.kind,
        ),
        method=fit.ran,
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
        How many numbers core and factors may store, as ``n_parameters`` of the result counts them.

    Returns
    -------
    TuckerTensor
        The rounded tensor, with orthonormal factors. A mode that was whole (``None``) and keeps its full rank stays
        whole. Given a tolerance or a budget, it stays whole too where that is the better choice: it then stores no
        factor, and the others need not carry its rank.

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
    for part in (a.core, *(u for u in a.factors if u is not None)):  # before any QR sees it
        check_finite("round_tucker", part, "a")
    xp = array_namespace("round_tucker", a.core, *a.factors)
    dtype = result_dtype(xp, xp.result_type(a.core, *(u for u in a.factors if u is not None)))
    upright = orthogonalize(a.map(lambda array: xp.astype(array, _wide(xp, array), copy=False)))
    ready = prepare("round_tucker", upright.core)
    target = _target("round_tucker", upright.ranks, ranks, rtol, max_parameters)
    whole = [mode for mode, u in enumerate(upright.factors) if u is None]
    if target.max_parameters is not None:
        check_budget("round_tucker", a.shape, target.max_parameters, whole)
    fit = _fit(ready, a.shape, target, "auto", None, whole)
    result = all_orthogonal(xp, fit.result)
    stay = [mode for mode in whole if result.core.shape[mode] == upright.ranks[mode]]
    result = left_whole(xp, result, {*stay, *fit.kept, *whole_modes(ranks)})
    factors = [
        inner if outer is None else outer if inner is None else xp.matmul(outer, inner)
        for outer, inner in zip(upright.factors, result.factors)
    ]
    core = times_power_of_two(result.core, ready.exponent)
    return TuckerTensor(core, tuple(factors)).map(lambda array: xp.astype(array, dtype, copy=False))


def _target(
    where: str, shape: tuple[int, ...], ranks: Ranks | None, rtol: float | None, max_parameters: int | None = None
) -> Target:
    if sum(option is not None for option in (ranks, rtol, max_parameters)) > 1:
        exactly_one(where, ranks=ranks, rtol=rtol, max_parameters=max_parameters)
    if rtol is not None:
        return Target(rtol=check_tolerance(where, rtol))
    if max_parameters is not None:
        return Target(max_parameters=as_int(where, "max_parameters", max_parameters))
    return Target(feasible_ranks(shape, shape) if ranks is None else check_ranks(where, ranks, shape))


@dataclass(frozen=True, eq=False)
class _Fit:
    """A result, its bounds on the error times ‖x‖, what ran, and the modes to leave whole."""

    result: Truncation
    lower: float
    upper: float
    ran: str
    kept: tuple[int, ...] = ()


def _fit(
    ready: Prepared,
    shape: tuple[int, ...],
    target: Target,
    method: Method,
    rng: "int | np.random.Generator | None",
    whole: Collection[int] = (),
) -> _Fit:
    """Decompose a prepared tensor; parameters are counted by ``shape``, and modes in ``whole`` need no factor."""
    if target.max_parameters is None and (target.ranks is not None or method in ("hosvd", "st_hosvd")):
        return _fit_directly(ready, target, method, rng)
    spectrum = spectrum_of(ready._replace(x=stop_gradient(ready.x), exponent=0), target.accuracy)
    limit = target.rtol**2
    chosen, kept = partial_ranks(spectrum, shape, whole, relative_squares=limit, budget=target.max_parameters) or (
        spectrum.max_ranks,
        (),
    )
    if method not in ("auto", "hooi"):
        return _fit_directly(ready, Target(chosen), method, rng)
    result = _truncated(ready.xp, ready.x, spectrum, chosen)
    lower, upper = (bound(chosen) * spectrum.norm for bound in (spectrum.lower_bound, spectrum.upper_bound))
    if len(shape) <= 2 or chosen == spectrum.max_ranks:
        return _Fit(result, lower, upper, "hosvd at the best ranks", kept)
    if kept:  # a mode that is not cut may have more directions than the others now carry
        result = all_orthogonal(ready.xp, result)
    result, sweeps = hooi_of(ready.xp, ready.x, result, MOST_SWEEPS, ENOUGH, ready.squares)
    if target.max_parameters is None:
        result, kept = _trimmed(ready.xp, result, shape, target.rtol, spectrum.norm, whole, kept)
    return _Fit(result, lower, upper, f"hosvd at the best ranks, then {sweeps} sweeps of hooi", kept)


def _fit_directly(ready: Prepared, target: Target, method: Method, rng: "int | np.random.Generator | None") -> _Fit:
    """Decompose to given ranks, or by the tolerance rule of the method itself."""
    xp, x, squares = ready.xp, ready.x, ready.norm() ** 2
    method, why, quick = _chosen(tuple(x.shape), target.ranks, method, is_differentiated(x))
    if method == "hosvd":
        result = hosvd_of(xp, x, target, squares)
        tails = [tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
        return _Fit(result, math.sqrt(max(tails)), math.sqrt(sum(tails)), f"hosvd: {why}")
    if method == "randomized":
        generator = np.random.default_rng(0 if rng is None else rng)
        result, products = randomized_of(xp, x, target.ranks or (), generator, squares)
        error = math.sqrt(max(squares - float_squares("tucker", xp, result.core), 0.0))
        return _Fit(result, 0.0, error, f"randomized, {products} products with x: {why}")
    order = cheapest_order(x.shape, target.ranks)
    result = st_hosvd_of(xp, x, target, order, quick=quick, squares=squares)
    tails = [tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
    lower, upper = math.sqrt(tails[order[0]]), math.sqrt(sum(tails))
    if method == "st_hosvd" or len(x.shape) <= 2:
        return _Fit(result, lower, upper, f"st_hosvd: {why}")
    result, sweeps = hooi_of(xp, x, result, MOST_SWEEPS, ENOUGH, squares)
    return _Fit(result, lower, upper, f"st_hosvd, then {sweeps} sweeps of hooi: {why}")


def _chosen(
    shape: tuple[int, ...], ranks: tuple[int, ...] | None, method: Method, differentiated: bool
) -> tuple[Method, str, bool]:
    """Return the method, why it is that one, and whether the Gram kernel may be tried on float64 data too.

    Picks by the rule of `tucker`, by counts of multiply-adds.
    """
    sizes = () if ranks is None else range_sizes(shape, ranks)
    large = [] if ranks is None else large_modes(shape, sizes)
    if method == "randomized" and (ranks is None or len(large) < 2):
        return "hooi", "as asked, but fewer than two modes shrink to less than half", True
    if method != "auto" or ranks is None:
        return method, "as asked", method == "randomized"
    if ranks == feasible_ranks(shape, shape):
        return "hosvd", "nothing is cut", False
    # About five products with X; beside them the sequential way forms one Gram matrix after the other (in float64) and
    # takes its eigenvectors, about ten times n³.
    sketched = 5.0 * math.prod(shape) * max((sizes[k] for k in large), default=0)
    gram, left = 0.0, float(math.prod(shape))
    for mode in cheapest_order(shape, ranks):
        gram += left * shape[mode] + 10.0 * min(shape[mode], left / shape[mode]) ** 3
        left *= ranks[mode] / shape[mode]
    if len(large) >= 2 and sketched < gram and not differentiated:
        return "randomized", "the ranks are small beside the sizes", True
    if len(shape) <= 2:
        return "st_hosvd", "of a matrix it is the best", True
    return "hooi", "the ranks are not small beside the sizes", True


def _truncated(xp: Namespace, x: Array, spectrum: Spectrum, ranks: tuple[int, ...]) -> Truncation:
    """Truncate a full HOSVD; recompute the bases of ``x`` where somebody differentiates through it."""
    if is_differentiated(x):
        return hosvd_of(xp, x, Target(ranks))
    core = spectrum.core[tuple(slice(r) for r in ranks)]
    factors = [u[:, :r] for u, r in zip(spectrum.factors, ranks)]
    return Truncation(core, factors, list(spectrum.values), "exact")


def _trimmed(
    xp: Namespace,
    result: Truncation,
    shape: Sequence[int],
    rtol: float,
    norm: float,
    whole: Collection[int],
    kept: tuple[int, ...],
) -> tuple[Truncation, tuple[int, ...]]:
    """Spend what HOOI gained: choose among the truncations of the improved core the smallest within the tolerance."""
    left = float_squares("tucker", xp, result.core)
    allowed = rtol**2 * norm**2 - max(norm**2 - left, 0.0)
    if allowed <= 0 or left == 0:
        return result, kept
    inner = spectrum_of(Prepared(xp, stop_gradient(result.core), 0, left))
    chosen = partial_ranks(inner, shape, whole, relative_squares=allowed / left)
    if chosen is None or chosen[0] == tuple(result.core.shape):
        return result, kept
    small = _truncated(xp, result.core, inner, chosen[0])
    factors = [xp.matmul(u, v) for u, v in zip(result.factors, small.factors)]
    return Truncation(small.core, factors, result.values, result.kind), chosen[1]


def _checked_order(mode_order: Sequence[int], ndim: int) -> list[int]:
    order = [check_mode("st_hosvd", mode, ndim) for mode in mode_order]
    if sorted(order) != list(range(ndim)):
        raise ValueError(f"st_hosvd: mode_order {tuple(mode_order)} for {ndim} modes; pass each mode once")
    return order


def _start(ready: Prepared, ranks: tuple[int, ...], init: str | TuckerTensor) -> Truncation:
    xp, x = ready.xp, ready.x
    if isinstance(init, TuckerTensor):
        if init.shape != tuple(x.shape) or init.ranks != ranks:
            raise ValueError(
                f"hooi: init has shape {init.shape} and ranks {init.ranks}; "
                f"pass one of shape {tuple(x.shape)} and ranks {ranks}"
            )
        check_finite("hooi", init.core, "init's core")
        given = [u for u in orthogonalize(init).factors if u is not None]
        factors = [xp.astype(_like(x, u), x.dtype, copy=False) for u in given]
        if len(factors) != len(ranks):
            raise ValueError("hooi: init leaves a mode whole (a factor is None); pass a factor for every mode")
        return Truncation(multi_mode_dot(x, factors, transpose=True), factors, [], "exact")
    if init == "hosvd":
        return hosvd_of(xp, x, Target(ranks), ready.squares)
    if init == "st_hosvd":
        return st_hosvd_of(xp, x, Target(ranks), cheapest_order(x.shape, ranks))
    raise ValueError(f"hooi: init is {init!r}; pass 'st_hosvd', 'hosvd' or a TuckerTensor")


def _on_host(ready: Prepared) -> Prepared:
    """Hand tensors of PyTorch and JAX that lie in the processor's memory to NumPy, which shares it.

    NumPy's products of thin matrices are faster there, and the bits are the same for all libraries.
    """
    known = array_api_compat.is_torch_array(ready.x) or array_api_compat.is_jax_array(ready.x)
    host = host_view(ready.x) if known and not is_differentiated(ready.x) and ready.squares is not None else None
    return ready if host is None else ready._replace(xp=array_namespace("tucker", host), x=host)


def _like(x: Array, result: Array) -> Array:
    """Return an array as one of the library and the device of ``x``."""
    if not array_api_compat.is_numpy_array(result) or array_api_compat.is_numpy_array(x):
        if array_api_compat.is_numpy_array(x) and not array_api_compat.is_numpy_array(result):
            return host_view(result)
        return result
    xp = array_namespace("tucker", x)
    return xp.asarray(result, device=array_api_compat.device(x))


def _working(array: Array) -> Array:
    """Return an array as a constant in a type that every library has."""
    xp = array_namespace("tucker", array)
    return xp.astype(stop_gradient(array), working_dtype(xp, array.dtype), copy=False)


def _finished(where: str, x: Array, result: Truncation, k: int) -> TuckerTensor:
    """Undo the scaling and return to the input's library and data type."""
    xp = array_namespace(where, x)
    dtype = result_dtype(xp, x.dtype)
    core = _like(x, result.core)
    with np.errstate(over="ignore"):  # NumPy would warn of what is refused in the next lines
        core = xp.astype(times_power_of_two(core, k), dtype, copy=False)
    largest = largest_magnitude(xp, core)
    if largest is not None and not math.isfinite(largest):
        raise ValueError(
            f"{where}: the core's largest entry, about 2**{k}, is beyond the range of {dtype}; "
            "pass x in a wider type, or scaled"
        )
    factors = tuple(None if u is None else xp.astype(_like(x, u), dtype, copy=False) for u in result.factors)
    return TuckerTensor(core, factors)


def _relative_error(ready: Prepared, result: Truncation, fit: TuckerTensor) -> float:
    """Measure ‖X − X̂‖ / ‖X‖ for a prepared tensor, its decomposition, and that in its final data type.

    ‖X‖² − ‖G‖² is the squared error while it stands well above the rounding of the two norms; below, and where the
    result was rounded to a shorter type, the residual itself is summed.
    """
    norm = ready.norm()
    if norm == 0.0:
        return 0.0
    xp, x = ready.xp, stop_gradient(ready.x)
    lost = norm**2 - float_squares("tucker", xp, result.core)
    same = str(fit.dtype).rsplit(".", maxsplit=1)[-1] == str(x.dtype).rsplit(".", maxsplit=1)[-1]
    if same and lost > 1e4 * epsilon(xp, x.dtype) * norm**2:
        return math.sqrt(lost) / norm
    rounded = fit.map(lambda array: xp.astype(_like(x, _working(array)), x.dtype, copy=False))
    core = times_power_of_two(rounded.core, -ready.exponent)
    return _residual_norm(xp, x, TuckerTensor(core, rounded.factors)) / norm


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
        here = (*(slice(None),) * mode, slab, ...)
        factors = tuple(u[slab, :] if k == mode and u is not None else u for k, u in enumerate(fit.factors))
        core = fit.core if fit.factors[mode] is not None else fit.core[here]
        rest = xp.astype(x[here], wide, copy=False) - reconstruct(TuckerTensor(core, factors))
        total += float_squares("tucker", xp, rest)
    return math.sqrt(total)


def _wide(xp: Namespace, x: Array) -> DType:
    """Return the widest type of the same kind: float64 or complex128 where there are any."""
    wide = accumulation_dtype(xp, x)
    if is_complex(xp, x.dtype):
        return xp.complex128 if wide == xp.float64 else xp.complex64
    return wide
