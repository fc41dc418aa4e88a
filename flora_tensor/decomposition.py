"""Tucker decompositions: HOSVD, ST-HOSVD, HOOI, and the driver `tucker` that picks and combines them.

All of them scale the tensor by a power of two first (nothing overflows or vanishes, and the factors of ``x`` and ``x ·
2**k`` agree bit for bit), work in float32 for 16-bit input, return the input's type, and never change the input. The
entry of largest magnitude in each column of a factor is real and positive, whichever method found it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

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
    with_fixed_factors,
)
from flora_tensor._arrays import (
    array_namespace,
    float_squares,
    result_dtype,
    times_power_of_two,
    widest_dtype,
)
from flora_tensor._checks import (
    as_int,
    as_number,
    as_sequence,
    check_choice,
    check_finite,
    check_mode,
    check_ranks,
    check_tolerance,
    exactly_one,
    feasible_ranks,
    whole_modes,
)
from flora_tensor._driver import Method, Random, fit_to
from flora_tensor._fits import TuckerFit, finished, tucker_of
from flora_tensor._prepared import Prepared, like, on_host, prepare
from flora_tensor._rank_search import check_budget
from flora_tensor._typing import Array, Ranks
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.tucker_algebra import orthogonalize
from flora_tensor.tucker_tensor import TuckerTensor, check_tucker

__all__ = ["TuckerFit", "hooi", "hosvd", "round_tucker", "st_hosvd", "tucker"]


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
        If both ``ranks`` and ``rtol`` are given, or ``x`` is no dense array of numbers of up to 64 bits.

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
    ready = on_host(prepare("hosvd", x))
    target = _target("hosvd", tuple(x.shape), ranks, rtol)
    result = left_whole(ready.xp, hosvd_of(ready.xp, ready.x, target, ready.squares), whole_modes(ranks))
    return finished("hosvd", x, result, ready.exponent)


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
        If both ``ranks`` and ``rtol`` are given, or ``x`` is no dense array of numbers of up to 64 bits.

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
    ready = on_host(prepare("st_hosvd", x))
    target = _target("st_hosvd", tuple(x.shape), ranks, rtol)
    shape = tuple(x.shape)
    order = cheapest_order(shape, target.ranks) if mode_order is None else _checked_order(mode_order, len(shape))
    result = st_hosvd_of(ready.xp, ready.x, target, order, squares=ready.squares)
    return finished("st_hosvd", x, left_whole(ready.xp, result, whole_modes(ranks)), ready.exponent)


def hooi(
    x: Array,
    ranks: Ranks,
    *,
    init: Literal["st_hosvd", "hosvd"] | TuckerTensor = "st_hosvd",
    max_sweeps: int = MOST_SWEEPS,
    tolerance: float = ENOUGH,
) -> TuckerTensor:
    """Decompose a tensor by higher-order orthogonal iteration: the best factors found by alternating improvement.

    Every update of a factor is optimal given the others, so the error never exceeds that of the start. Between sweeps
    the factors are extrapolated, which halves their number on flat spectra; a sweep that loses by that is taken back.
    The result is rotated so that its core is all-orthogonal.

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
        Stop when all further sweeps are expected, from what the last two gained, to lower the squared error by less
        than this share of it.

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
    and Uçar, *Parallel Candecomp/Parafac decomposition using dimension trees*, SISC 40 (2018). The steps between sweeps
    are those of Nesterov, *A method for solving the convex programming problem with convergence rate O(1/k²)*, Soviet
    Mathematics Doklady 27 (1983), k/(k + 3) of the last one, begun anew where the error rises.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((6, 5, 4))
    >>> error = lambda t: np.linalg.norm(t.to_tensor() - x)
    >>> bool(error(hooi(x, 2)) <= error(st_hosvd(x, 2)))
    True
    """
    ready = on_host(prepare("hooi", x))
    wanted = check_ranks("hooi", ranks, tuple(x.shape))
    most = as_int("hooi", "max_sweeps", max_sweeps)
    if most < 0:
        raise ValueError(f"hooi: max_sweeps is {most}; pass 0 or more")
    enough = as_number("hooi", "tolerance", tolerance)
    if not enough >= 0:
        raise ValueError(f"hooi: tolerance is {enough}; pass 0 or more")
    start = _start(ready, wanted, init)
    captured = None if ready.squares is None else float_squares("hooi", ready.xp, start.core)
    start = replace(start, core=None)  # no two are held
    result, _ = hooi_of(ready.xp, ready.x, start, most, enough, ready.squares, captured)
    result = left_whole(ready.xp, all_orthogonal(ready.xp, result), whole_modes(ranks))
    return finished("hooi", x, result, ready.exponent)


def tucker(
    x: Array,
    ranks: Ranks | None = None,
    *,
    rtol: float | None = None,
    max_parameters: int | None = None,
    method: Method = "auto",
    rng: Random = None,
) -> TuckerFit:
    """Decompose a tensor as well as its ranks, a tolerance or a parameter budget allow, and say how good the result is.

    Given a tolerance or a budget, the ranks are the optimum over *all* rank tuples of the full HOSVD (fewest parameters
    within the error, or smallest error within the parameters), then the factors are improved by HOOI, which only lowers
    the error. With ``method="auto"``, where the longest mode has 128 entries or more, an adaptive range finder first
    looks whether the leading directions suffice: a block Krylov basis grows until the ranks chosen take up at most half
    of it, and is given up, for the full HOSVD, where it would have to hold more than a quarter of the mode. What the
    basis misses is part of every error, so the tolerance is kept; the ranks are those of the full HOSVD where the
    spectrum decays, and among tuples that cost nearly the same it may pick another where it does not.

    Given ranks, ``method="auto"`` goes by these rules, the first that fits:

    1. Full ranks cut nothing: HOSVD.
    2. Where at least two modes shrink to less than half and five products with thin bases, and the small steps
       between them, are estimated to cost less than ST-HOSVD and two sweeps of HOOI, and nobody differentiates through
       ``x``: the randomized method. It alternates products of ``x`` with bases wider than the ranks and HOOI inside
       the small core these leave. Four products at least, five on spectra that decay; it ends when all to come are
       expected to lower the squared error by less than 0.15 %. A matrix is projected
       onto a block Krylov space instead, whose blocks hold a quarter of the rank and eight directions more, or the
       rank up to 16: four blocks of two products at least, until one lowers the squared error by less than 0.07 %.
    3. For a matrix: ST-HOSVD, which is its truncated SVD.
    4. ST-HOSVD, then HOOI until all further sweeps are expected to gain less than 0.03 % of the squared error. Up to
       16384 entries HOOI starts from HOSVD too, with the modes in two orders, and goes on from the best end to 0.001 %.

    The error is then hardly ever 0.1 % above that of HOOI run to convergence from HOSVD, on flat spectra too. HOOI
    converges to a local optimum, so this is no theorem: of 9,000 random small tensors nine ended higher, by 0.4 % at
    most.

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
        than two modes shrink to less than half, and where somebody differentiates through ``x``.
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
        If more than one of ``ranks``, ``rtol`` and ``max_parameters`` is given, or ``x`` is no dense array of numbers.

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
    check_choice("tucker", "method", method, get_args(Method))
    ready = prepare("tucker", x)
    target = _target("tucker", tuple(x.shape), ranks, rtol, max_parameters)
    if target.max_parameters is not None:
        check_budget("tucker", tuple(x.shape), target.max_parameters)
    return tucker_of(x, ready, target, whole_modes(ranks), method, rng)


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
        The new ranks, at most the present ones and at most I_n. The only choice where ``a`` is traced by ``jit`` or
        ``vmap``.
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
        If ``a`` is no Tucker tensor, or unless exactly one of ``ranks``, ``rtol`` and ``max_parameters`` is given.

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
    check_tucker("round_tucker", a)
    exactly_one("round_tucker", ranks=ranks, rtol=rtol, max_parameters=max_parameters)
    for part in (a.core, *(u for u in a.factors if u is not None)):  # before any QR sees it
        check_finite("round_tucker", part, "a")
    xp = array_namespace("round_tucker", a.core, *a.factors)
    dtype = result_dtype(xp, xp.result_type(a.core, *(u for u in a.factors if u is not None)))
    upright = orthogonalize(a.map(lambda array: xp.astype(array, widest_dtype(xp, array), copy=False)))
    ready = prepare("round_tucker", upright.core)
    target = _target("round_tucker", upright.ranks, ranks, rtol, max_parameters)
    whole = [mode for mode, u in enumerate(upright.factors) if u is None]
    if target.max_parameters is not None:
        check_budget("round_tucker", a.shape, target.max_parameters, whole)
    kept: tuple[int, ...] = ()
    if ready.squares is None and target.ranks is not None:  # a symbol, whose error is not known: as `hooi` does
        start = _start(ready, target.ranks, "st_hosvd")
        result, _ = hooi_of(xp, ready.x, start, MOST_SWEEPS, ENOUGH)
    else:
        fit = fit_to(ready, a.shape, target, "auto", None, whole)
        result, kept = fit.result, fit.kept
    result = all_orthogonal(xp, result)
    stay = [mode for mode in whole if result.core.shape[mode] == upright.ranks[mode]]
    result = left_whole(xp, result, {*stay, *kept, *whole_modes(ranks)})
    factors = [
        inner if outer is None else outer if inner is None else xp.matmul(outer, inner)
        for outer, inner in zip(upright.factors, result.factors)
    ]
    result = with_fixed_factors(xp, replace(result, factors=factors))
    core = times_power_of_two(result.core, ready.exponent)
    return TuckerTensor(core, tuple(result.factors)).map(lambda array: xp.astype(array, dtype, copy=False))


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


def _checked_order(mode_order: Sequence[int], ndim: int) -> list[int]:
    order = [check_mode("st_hosvd", mode, ndim) for mode in as_sequence("st_hosvd", "mode_order", mode_order)]
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
        factors = [xp.astype(like(x, u), x.dtype, copy=False) for u in given]
        if len(factors) != len(ranks):
            raise ValueError("hooi: init leaves a mode whole (a factor is None); pass a factor for every mode")
        return Truncation(multi_mode_dot(x, factors, transpose=True), factors, [], "exact")
    if init == "hosvd":
        return hosvd_of(xp, x, Target(ranks), ready.squares)
    if init == "st_hosvd":
        return st_hosvd_of(xp, x, Target(ranks), cheapest_order(x.shape, ranks))
    raise ValueError(f"hooi: init is {init!r}; pass 'st_hosvd', 'hosvd' or a TuckerTensor")
