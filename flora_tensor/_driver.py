"""What `tucker` does once it knows what is wanted: choose the ranks, choose the method, and combine the algorithms."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    st_hosvd_of,
    tail,
)
from flora_tensor._arrays import epsilon, float_squares, host_view, is_differentiated, stop_gradient, widest_dtype
from flora_tensor._checks import feasible_ranks
from flora_tensor._krylov import matrix_of
from flora_tensor._prepared import Prepared
from flora_tensor._randomized import large_modes, randomized_of, range_sizes
from flora_tensor._range_finder import Found, find_range
from flora_tensor._rank_search import partial_ranks
from flora_tensor._residual import residual_norm as host_residual_norm
from flora_tensor._spectrum import Spectrum
from flora_tensor._typing import Array, Namespace
from flora_tensor._unformed import RELIABLE, UnformedSpectrum
from flora_tensor.algebra import LARGE, multi_mode_dot
from flora_tensor.spectra import spectrum_of
from flora_tensor.tucker_tensor import TuckerTensor, reconstruct

Method = Literal["auto", "hosvd", "st_hosvd", "hooi", "randomized"]
Random = int | np.random.Generator | None


@dataclass(frozen=True, eq=False)
class Fit:
    """A result, its bounds on the error times ‖x‖, what ran, and the modes to leave whole."""

    result: Truncation
    lower: float
    upper: float
    ran: str
    kept: tuple[int, ...] = ()


# What the small steps between the products of the randomized method cost, whatever the size, in multiply-adds.
# Measured: up to 200 × 200 and 160 × 160 × 3 × 3 the sequential way is as fast on spectra that decay, and two to three
# times as fast on flat ones.
_SMALL_STEPS = 1e8

# HOOI converges to a local optimum. On tensors of up to so many entries, where a sweep costs little more than its calls
# do, those that two starts or two orders of the modes lead to lie up to 1 % apart (measured; on larger ones hardly
# 0.1 %), and a sweep that gains little may be followed by better ones: both starts are tried, HOSVD also with the modes
# in turn as in the textbook, and from the best end sweeps go on until this share of what is enough.
_SMALL, _SHARE_OF_ENOUGH = 1 << 14, 1 / 30

# What a pass over the tensor costs, an entry, in multiply-adds of float64 matrix products (measured).
_PASS = 60.0


def fit_to(
    ready: Prepared,
    shape: tuple[int, ...],
    target: Target,
    method: Method,
    rng: Random,
    whole: Collection[int] = (),
) -> Fit:
    """Decompose a prepared tensor; parameters are counted by ``shape``, and modes in ``whole`` need no factor."""
    if target.max_parameters is None and (target.ranks is not None or method in ("hosvd", "st_hosvd")):
        return _fit_directly(ready, target, method, rng)
    if method in ("auto", "randomized") and not whole and not is_differentiated(ready.x):
        allowed = None if target.max_parameters is not None else target.rtol**2 * ready.norm() ** 2
        generator = np.random.default_rng(0 if rng is None else rng)
        found = find_range(ready, target.accuracy, allowed, lambda s: _best_ranks(s, shape, target)[0], generator)
        if found is not None and target.max_parameters is None:
            return _fit_found(ready, shape, target, found)
        if found is not None:
            spectrum, chosen, ran = found.spectrum, found.ranks, found.ran
            lower = spectrum.lower_bound(chosen) * spectrum.norm
            del found, spectrum  # as much memory as the fit to come
            fit = _fit_directly(ready, Target(chosen), "auto", generator)
            return replace(fit, lower=max(lower, fit.lower), ran=f"{ran} for the ranks, then {fit.ran}")
        why = ": their bases are not small beside the sizes"
    else:
        why = ", differentiable" if method == "auto" else ", as asked"
    allowed = None if target.max_parameters is not None else target.rtol**2
    spectrum = _spectrum(ready._replace(x=stop_gradient(ready.x), exponent=0), target.accuracy, allowed)
    chosen, kept = _best_ranks(spectrum, shape, target, whole)
    if method not in ("auto", "hooi"):
        return _fit_directly(ready, Target(chosen), method, rng)
    start = _truncated(ready.xp, ready.x, spectrum, chosen)
    lower, upper = (bound(chosen) * spectrum.norm for bound in (spectrum.lower_bound, spectrum.upper_bound))
    if len(shape) <= 2 or chosen == spectrum.max_ranks:
        return Fit(start, lower, upper, f"hosvd at the best ranks{why}", kept)
    del spectrum  # its bases are as large as all ranks
    if kept:  # a mode that is not cut may have more directions than the others now carry
        start = all_orthogonal(ready.xp, start)
    captured, start = float_squares("tucker", ready.xp, start.core), replace(start, core=None)
    result, sweeps = hooi_of(ready.xp, ready.x, start, MOST_SWEEPS, ENOUGH, ready.squares, captured)
    if target.max_parameters is None:
        squares = ready.norm() ** 2
        spare = target.rtol**2 * squares - squared_residual(ready.xp, stop_gradient(ready.x), result, squares)
        if spare < 0:  # where the error is all but rounding, sweeps may raise it
            result = replace(start, core=multi_mode_dot(ready.x, start.factors, transpose=True))
        else:
            result, kept = _trimmed(ready.xp, result, shape, spare, whole, kept)
    return Fit(result, lower, upper, f"hosvd at the best ranks, then {sweeps} sweeps of hooi{why}", kept)


def _spectrum(ready: Prepared, accuracy: float, allowed: float | None) -> Spectrum:
    """Compute the full HOSVD; of a large tensor without its core, which takes as much memory.

    ``allowed`` is the share of the squared norm that a choice of ranks may lose, where it is known.
    """
    if len(ready.x.shape) <= 2 or not array_api_compat.is_numpy_array(ready.x) or ready.x.size < LARGE:
        return spectrum_of(ready, accuracy)
    cut = allowed is None or allowed > RELIABLE * epsilon(ready.xp, ready.x.dtype)
    return UnformedSpectrum.of(ready, accuracy, cut=cut)


def _best_ranks(
    spectrum: Spectrum, shape: tuple[int, ...], target: Target, whole: Collection[int] = ()
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose ranks for a budget or a tolerance, and modes to leave whole; all ranks where nothing less will do."""
    limit, budget = target.rtol**2, target.max_parameters
    found = partial_ranks(spectrum, shape, whole, relative_squares=limit, budget=budget)
    return found or (spectrum.max_ranks, ())


def _fit_found(ready: Prepared, shape: tuple[int, ...], target: Target, found: Found) -> Fit:
    """Decompose to ranks that the range finder chose for a tolerance.

    The truncation of what was found keeps it, so that is what improves: HOOI inside the core that the bases leave,
    where sweeps cost next to nothing.
    """
    spectrum, ranks = found.spectrum, found.ranks
    lower, upper = (bound(ranks) * spectrum.norm for bound in (spectrum.lower_bound, spectrum.upper_bound))
    xp, core = ready.xp, spectrum.core
    eyes = [xp.eye(n, r, dtype=core.dtype, device=array_api_compat.device(core)) for n, r in zip(core.shape, ranks)]
    start = Truncation(core[tuple(slice(r) for r in ranks)], eyes, list(spectrum.values), "leading")
    captured = float_squares("tucker", xp, core)
    inner, sweeps = hooi_of(xp, core, start, MOST_SWEEPS, ENOUGH, captured)
    lost = spectrum.missed + squared_residual(xp, core, inner, captured)
    inner, _ = _trimmed(xp, inner, shape, target.rtol**2 * spectrum.norm**2 - lost, (), ())
    factors = [xp.matmul(u, v) for u, v in zip(spectrum.factors, inner.factors)]
    result = Truncation(inner.core, factors, inner.values, inner.kind)
    then = f", then {sweeps} sweeps of hooi inside it" if len(shape) > 2 else ""
    return Fit(
        result, lower, upper, f"{found.ran}{then}: the ranks that the tolerance needs are small beside the sizes"
    )


def _fit_directly(ready: Prepared, target: Target, method: Method, rng: Random) -> Fit:
    """Decompose to given ranks, or by the tolerance rule of the method itself."""
    xp, x, squares = ready.xp, ready.x, ready.norm() ** 2
    method, why, quick = _chosen(tuple(x.shape), target.ranks, method, is_differentiated(x))
    if method == "hosvd":
        result = hosvd_of(xp, x, target, squares)
        tails = [tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
        return Fit(result, math.sqrt(max(tails)), math.sqrt(sum(tails)), f"hosvd: {why}")
    if method == "randomized":
        generator = np.random.default_rng(0 if rng is None else rng)
        decompose = matrix_of if len(x.shape) == 2 else randomized_of
        result, products = decompose(xp, x, target.ranks or (), generator, squares)
        error = math.sqrt(max(squares - float_squares("tucker", xp, result.core), 0.0))
        return Fit(result, 0.0, error, f"randomized, {products} products with x: {why}")
    order = cheapest_order(x.shape, target.ranks)
    result = st_hosvd_of(xp, x, target, order, quick=quick, squares=squares)
    tails = [tail(v, u.shape[1]) for v, u in zip(result.values, result.factors)]
    lower, upper = math.sqrt(tails[order[0]]), math.sqrt(sum(tails))
    if method == "st_hosvd" or len(x.shape) <= 2:
        return Fit(result, lower, upper, f"st_hosvd: {why}")
    if is_differentiated(x) or math.prod(x.shape) > _SMALL:
        captured, result = float_squares("tucker", xp, result.core), replace(result, core=None)
        result, sweeps = hooi_of(xp, x, result, MOST_SWEEPS, ENOUGH, squares, captured)
        return Fit(result, lower, upper, f"st_hosvd, then {sweeps} sweeps of hooi: {why}")
    full = hosvd_of(xp, x, target, squares)
    tried = [("st_hosvd", result, None), ("hosvd", full, None), ("hosvd", full, range(len(x.shape)))]
    ends = [(name, *hooi_of(xp, x, start, MOST_SWEEPS, ENOUGH, squares, order=turns)) for name, start, turns in tried]
    best, result, sweeps = max(ends, key=lambda end: float_squares("tucker", xp, end[1].core))
    result, more = hooi_of(xp, x, result, MOST_SWEEPS, _SHARE_OF_ENOUGH * ENOUGH, squares)
    return Fit(result, lower, upper, f"{best}, then {sweeps + more} sweeps of hooi, the best of three runs: {why}")


def _chosen(
    shape: tuple[int, ...], ranks: tuple[int, ...] | None, method: Method, differentiated: bool
) -> tuple[Method, str, bool]:
    """Return the method, why it is that one, and whether the Gram kernel may be tried on float64 data too.

    Picks by the rule of `tucker`, by counts of multiply-adds.
    """
    sizes = () if ranks is None else range_sizes(shape, ranks)
    large = [] if ranks is None else large_modes(shape, sizes)
    if method == "randomized" and differentiated:  # QR has no derivative where the sketch has fewer directions
        return "hooi", "as asked, but x is differentiated", True
    if method == "randomized" and (ranks is None or len(large) < 2):
        return "hooi", "as asked, but fewer than two modes shrink to less than half", True
    if method != "auto" or ranks is None:
        return method, "as asked", method == "randomized"
    if ranks == feasible_ranks(shape, shape):
        return "hosvd", "nothing is cut", False
    cost = _costs(shape, ranks, sizes, large) if len(large) >= 2 and not differentiated else None
    if cost is not None and cost[0] < cost[1]:
        return "randomized", "the ranks are small beside the sizes", True
    if len(shape) <= 2:
        return "st_hosvd", "of a matrix it is the best", True
    return "hooi", "the ranks are not small beside the sizes", True


def _costs(
    shape: tuple[int, ...], ranks: tuple[int, ...], sizes: tuple[int, ...], large: Sequence[int]
) -> tuple[float, float]:
    """Estimate what the randomized and the sequential way cost on a spectrum that decays, in multiply-adds.

    The former takes about five products with X, after each of which half the large modes get new directions. The latter
    forms one Gram matrix after the other, and again in each of two sweeps of HOOI.
    """
    whole, core = math.prod(shape), [s if k in large else r for k, (s, r) in enumerate(zip(sizes, ranks))]

    def basis(rows: int, columns: float) -> float:
        """Count a Gram matrix of the shorter side in float64, and its eigenvectors: about 4 n³ (measured)."""
        short = min(rows, columns)
        return rows * columns * short + 4.0 * short**3

    def rest(kept: Sequence[int], mode: int) -> float:
        return math.prod(kept) / kept[mode]

    # Five times: a product, directions for half of the modes, and two sweeps inside the core.
    sketched = _SMALL_STEPS + 5.0 * whole * (max(sizes[k] for k in large) + _PASS)
    sketched += sum(2.5 * basis(shape[k], rest(core, k)) + 20.0 * basis(core[k], rest(core, k)) for k in large)
    sequential, left = (1.0 + sum(r < n for r, n in zip(ranks, shape))) * _PASS * whole, float(whole)
    for mode in cheapest_order(shape, ranks):
        sequential += basis(shape[mode], left / shape[mode])
        left *= ranks[mode] / shape[mode]
    if len(shape) > 2:
        sequential += 2 * sum(whole * (ranks[k] + _PASS) + basis(shape[k], rest(ranks, k)) for k in large)
    return sketched, sequential


def _truncated(xp: Namespace, x: Array, spectrum: Spectrum, ranks: tuple[int, ...]) -> Truncation:
    """Truncate a full HOSVD; recompute the bases of ``x`` where somebody differentiates through it."""
    if is_differentiated(x):
        return hosvd_of(xp, x, Target(ranks))
    factors = spectrum.leading(ranks)
    if spectrum.core is None:  # not formed
        factors = [xp.asarray(u, copy=True) for u in factors]  # nor is more of the bases to be held from here on
        core = multi_mode_dot(x, factors, transpose=True)
    else:
        core = spectrum.core[tuple(slice(r) for r in ranks)]
    return Truncation(core, factors, list(spectrum.values), "exact")


def _trimmed(
    xp: Namespace,
    result: Truncation,
    shape: Sequence[int],
    spare: float,
    whole: Collection[int],
    kept: tuple[int, ...],
) -> tuple[Truncation, tuple[int, ...]]:
    """Spend what HOOI gained: choose the smallest truncation of the improved core that loses at most ``spare`` more."""
    left = float_squares("tucker", xp, result.core)
    if spare <= 0 or left == 0:
        return result, kept
    inner = _spectrum(Prepared(xp, stop_gradient(result.core), 0, left), 0.0, spare / left)
    chosen = partial_ranks(inner, shape, whole, relative_squares=spare / left)
    if chosen is None or chosen[0] == tuple(result.core.shape):
        return result, kept
    small = _truncated(xp, result.core, inner, chosen[0])
    factors = [xp.matmul(u, v) for u, v in zip(result.factors, small.factors)]
    return Truncation(small.core, factors, result.values, result.kind), chosen[1]


def squared_residual(xp: Namespace, x: Array, result: Truncation, squares: float) -> float:
    """Return ‖X − X̂‖², given ‖X‖²: as ‖X‖² − ‖G‖² where that does not cancel, else as a sum over the residual."""
    lost = squares - float_squares("tucker", xp, result.core)
    if lost > RELIABLE * epsilon(xp, x.dtype) * squares:
        return lost
    fit = TuckerTensor(stop_gradient(result.core), tuple(stop_gradient(u) for u in result.factors))
    return residual_norm(xp, x, fit, math.sqrt(squares)) ** 2


def residual_norm(xp: Namespace, x: Array, fit: TuckerTensor, norm: float) -> float:
    """Return ‖X − X̂‖, slab by slab, in float64 where there is float64 and float32 would not do."""
    if 0 in x.shape or norm == 0.0:
        return 0.0
    host = host_view(x)
    if host is not None and host.dtype in (np.float32, np.float64):
        return host_residual_norm(host, fit.map(lambda array: np.asarray(host_view(array))), norm)
    wide = widest_dtype(xp, x)
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
