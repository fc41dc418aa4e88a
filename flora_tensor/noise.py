"""Rank rules for a signal in noise, and the noise that storing a weight in few bits leaves.

A tensor X = S + τZ, S of low multilinear rank and Z with independent standard normal entries, has unfoldings whose
noise singular values stay below a known edge. What stands above it is signal. The rules here estimate τ too, unless it
is known.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import check_choice, feasible_ranks
from flora_tensor._gram import gram_of, leading_eigenvectors
from flora_tensor._rank_errors import FloatArray
from flora_tensor._typing import Array
from flora_tensor._whiteness import degrees_of_freedom, divided, not_white, unevenness
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.spectra import Frontier, Spectrum, hosvd_spectrum

__all__ = ["rounding_noise"]

# Margin of the edge in units of the Tracy–Widom fluctuation. Measured on pure noise: no false alarm in 300 trials at 3,
# up to two at 2.5.
_EDGE_MARGIN = 3.0

_MOST_ROUNDS = 50
# Rounds of balancing slices of unequal noise.
_MOST_BALANCINGS = 8

# Bits of the significand, hidden one included, and the exponent of the smallest normal number.
FORMATS = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def rounding_noise(stored: Array, dtype: str) -> float:
    """Return the standard deviation of the rounding error that storing a tensor in ``dtype`` leaves in each entry.

    A tuned weight that was rounded to its storage type carries this noise into the difference from its base: singular
    values below the edge of such noise are rounding errors, and more rank only stores those.

    Parameters
    ----------
    stored : array of any shape
        The tuned weight as it was read, in any type that holds its values exactly.
    dtype : str
        The type that it was stored in: "float64", "float32", "float16" or "bfloat16".

    Returns
    -------
    float
        √(mean ulp(|w|)² / 12), in the units of the weight; 0 for an empty tensor. An over-estimate where most of the
        update was lost, that is, where the update is smaller than half a unit in the last place.

    Raises
    ------
    ValueError
        If ``dtype`` is none of the four.

    References
    ----------
    Widrow and Kollár, *Quantization Noise* (2008), chapter 12: the error of rounding is uniform over one unit in the
    last place.

    Examples
    --------
    >>> import numpy as np
    >>> bool(np.isclose(rounding_noise(np.ones(10), "bfloat16"), 2.0**-7 / 12**0.5))
    True
    """
    bits, lowest = FORMATS[check_choice("rounding_noise", "dtype", dtype, tuple(FORMATS))]
    flat = np.ravel(to_numpy(stored))
    total = 0.0
    for start in range(0, flat.size, 1 << 20):
        part = flat[start : start + (1 << 20)]
        exponents = np.frexp(part)[1] - 1  # |w| in [2**e, 2**(e+1))
        units = np.where(part == 0, lowest, np.maximum(exponents, lowest)) - (bits - 1)
        total += float(np.sum(np.exp2(2.0 * units)))
    return math.sqrt(total / flat.size / 12) if flat.size else 0.0


def edge_squared(rows: int, columns: int) -> float:
    """Return the squared singular value that standard normal noise of this shape stays below.

    μ² + c μ (1/√m + 1/√n)^{1/3} with μ = √m + √n: the mean of the largest eigenvalue of a Wishart matrix and its
    Tracy–Widom scale (Johnstone, *On the distribution of the largest eigenvalue in principal components analysis*,
    Annals of Statistics 29, 2001).
    """
    if rows == 0 or columns == 0:
        return 0.0
    mu = math.sqrt(rows) + math.sqrt(columns)
    return mu * mu + _EDGE_MARGIN * mu * (1 / math.sqrt(rows) + 1 / math.sqrt(columns)) ** (1 / 3)


def projected_edge(
    spectrum: Spectrum, deviation: float | None = None, likely: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], float]:
    """Count the directions above the noise edge, mode by mode, each seen through the signal subspaces of the others.

    Projecting the other modes on what is known of the signal shrinks the unfolding from ∏ I_j to ∏ r_j columns: the
    noise falls, the signal stays. Ranks and the noise level are updated in turn until they stand still. The idea is the
    iterative projection of Han, Chen and Zhang, *Rank determination in tensor factor model* (2020), arXiv 2011.07131.

    Without a known deviation the noise need not be equally strong in all slices of a tensor (three modes or more):
    dividing slices by numbers leaves the multilinear ranks as they are, so the slices are balanced until what the model
    leaves over is equally strong in all of them. ``likely`` are the ranks of `bic`, where they are known already.

    Returns the ranks (all zero: no signal) and the standard deviation of the noise, in the units of ``spectrum``.
    """
    spectrum = _occupied(spectrum)
    found = _edge_of(spectrum, deviation)
    if deviation is None and len(spectrum.shape) > 2 and spectrum.norm > 0.0 and spectrum.factors:
        balanced = _balanced_edges(spectrum, found, likely)
        found = min([found, *balanced], key=lambda f: _preference(f, spectrum.shape))
    return found.ranks, found.deviation


def _balanced_edges(spectrum: Spectrum, plain: "_Edge", likely: tuple[int, ...] | None) -> Iterator["_Edge"]:
    """Find ranks with the slices balanced, from two guesses of how uneven the noise is.

    The first is the energy of the slices, right where a few are very loud. The second is what the ranks of least BIC
    leave over, right where the signal is stronger than the noise: that criterion adds no ranks for some louder noise.
    A slice that an over-large model explains would look quiet, so what the plain model leaves over is no third.
    """
    energy = unevenness(_slice_squares(spectrum.core, spectrum.factors), spectrum.shape)
    if energy is None:
        return
    x = multi_mode_dot(spectrum.core, spectrum.factors)
    yield _balance(x, energy)
    likely = bic(spectrum) if likely is None else likely
    if likely == plain.ranks or not any(likely):  # without a model all is left over: that was the first guess
        return
    core = _host_core(spectrum)
    rest = _rest(core, [np.eye(m) for m in core.shape], likely)
    left_over = unevenness(_slice_squares(rest, spectrum.factors), spectrum.shape)
    if left_over is not None:
        yield _balance(x, left_over)


def _balance(x: Array, uneven: list[FloatArray]) -> "_Edge":
    """Divide slices by the strength of their noise, and renew both until they stand still.

    On the way to even noise the model shrinks, or what it leaves over evens out. Where neither happens there is no bulk
    of noise to be found, and further rounds only wander.
    """
    shape = tuple(x.shape)
    weights = [np.ones(n) for n in shape]
    best: _Edge | None = None
    size, spread = math.inf, math.inf
    for _ in range(_MOST_BALANCINGS):
        weights = [w * np.sqrt(u) for w, u in zip(weights, uneven)]
        found = _edge_of(hosvd_spectrum(divided(to_numpy(x), weights)))
        still = unevenness(found.left_over, shape)
        new_size = degrees_of_freedom(found.ranks, shape)
        new_spread = 0.0 if still is None else sum(float(np.var(u)) for u in still)
        if best is not None and new_size >= size and new_spread > 0.9 * spread:
            break
        mean_square = math.prod(float(np.mean(w * w)) for w in weights)
        best = found._replace(deviation=found.deviation * math.sqrt(mean_square))
        if still is None:
            break
        uneven, size, spread = still, new_size, new_spread
    assert best is not None
    return best


def _preference(edge: "_Edge", shape: Sequence[int]) -> tuple[bool, int]:
    """Prefer models that leave noise of one strength; among those the smallest, as all of them explain the tensor."""
    return unevenness(edge.left_over, shape) is not None, degrees_of_freedom(edge.ranks, shape)


class _Edge(NamedTuple):
    """What one level of noise for the whole tensor gives: ranks, that level, and ‖slice‖² of what is left over."""

    ranks: tuple[int, ...]
    deviation: float
    left_over: list[FloatArray]


def _edge_of(spectrum: Spectrum, deviation: float | None = None) -> _Edge:
    shape, entries = spectrum.shape, math.prod(spectrum.shape)
    squares, resolved = float(spectrum.squared_tails[0][0]), _resolved(spectrum)
    unit = math.ldexp(1.0, spectrum.exponent)
    known = None if deviation is None else (deviation / unit) ** 2
    if squares == 0.0 or entries == 0:
        return _Edge((0,) * len(shape), 0.0 if deviation is None else deviation, [])
    variance = squares / entries if known is None else known
    ranks = _start(spectrum, entries, squares, variance, known, resolved)
    if known is not None and (len(shape) <= 2 or ranks == spectrum.max_ranks):
        # A matrix has no other modes to look through, and where all is signal there is nothing to find.
        return _Edge(_feasible_or_nothing(ranks, shape), deviation or 0.0, [])
    if not any(ranks):
        left_over = _slice_squares(spectrum.core, spectrum.factors) if spectrum.factors else []
        return _Edge(ranks, unit * math.sqrt(squares / entries if known is None else known), left_over)
    core = _host_core(spectrum)
    # Two directions a mode to begin with: seen through rank 1 in all the others, no mode could ever show more than one.
    bases = [np.eye(m, min(m, max(r, 2))) for m, r in zip(core.shape, ranks)]
    order = sorted(range(len(shape)), key=lambda k: shape[k])  # the same modes first, however they are numbered
    for _ in range(_MOST_ROUNDS):
        before = ranks
        variance = _variance_left(core, bases, shape, squares) if known is None else known
        updated = {mode: _update(core, bases, mode, shape, variance, resolved) for mode in order}
        ranks = tuple(updated[mode] for mode in range(len(shape)))
        if ranks == before:
            break
    variance = _variance_left(core, bases, shape, squares) if known is None else known
    ranks = _feasible_or_nothing(ranks, shape)
    left_over = _slice_squares(_rest(core, bases, ranks), spectrum.factors) if known is None else []
    return _Edge(ranks, unit * math.sqrt(max(variance, 0.0)), left_over)


def _rest(core: npt.NDArray[Any], bases: Sequence[npt.NDArray[Any]], ranks: Sequence[int]) -> npt.NDArray[Any]:
    """Return the core without what the model explains."""
    explained = core
    for mode, (basis, rank) in enumerate(zip(bases, ranks)):
        kept = basis[:, :rank]
        explained = np.moveaxis(np.tensordot(kept @ kept.conj().T, explained, axes=(1, mode)), 0, mode)
    return core - explained


def _slice_squares(core: Array, factors: Sequence[Array]) -> list[FloatArray]:
    """Return ‖X[i]‖² of every slice along every mode, in units of ‖X‖², from a core of orthonormal factors."""
    host = to_numpy(core)
    host = host / (np.max(np.abs(host), initial=0.0) or 1.0)  # first, as squares could overflow or vanish
    host = host / (float(np.linalg.norm(host)) or 1.0)
    found: list[FloatArray] = []
    for mode, factor in enumerate(factors):
        rows = to_numpy(factor) @ np.moveaxis(host, mode, 0).reshape(host.shape[mode], -1)
        found.append(np.asarray(np.sum(np.abs(rows) ** 2, axis=1, dtype=np.float64)))
    return found


def evbmf(spectrum: Spectrum) -> tuple[int, ...]:
    """Choose each mode's rank by empirical variational Bayes on its unfolding, the noise estimated per mode.

    Nakajima, Sugiyama, Babacan and Tomioka, *Global analytic solution of fully-observed variational Bayesian matrix
    factorization*, JMLR 14 (2013), theorem 9 and corollary 3 (the noise variance minimizes the free energy).
    """
    spectrum = _occupied(spectrum)
    entries = math.prod(spectrum.shape)
    found: list[int] = []
    for squares, size in zip(_squared_values(spectrum), spectrum.shape):
        rows, columns = sorted((size, entries // size if size else 0))
        found.append(1 if _tells_nothing(size, entries) else _evbmf_rank(squares, rows, columns))
    return _feasible_or_nothing(found, spectrum.shape)


def bic(spectrum: Spectrum) -> tuple[int, ...]:
    """Minimize M log(E(r)/M) + d(r) log M over all rank tuples, E from the exact error table.

    Schwarz, *Estimating the dimension of a model*, Annals of Statistics 6 (1978). Models of more than half the entries
    are left out: there the fit of the noise itself is rewarded.
    """
    spectrum = _occupied(spectrum)
    shape, entries = spectrum.shape, math.prod(spectrum.shape)
    if entries == 0 or spectrum.norm == 0.0:
        return (0,) * len(shape)
    ranks, errors = spectrum.feasible_errors()
    free = math.prod(ranks.T) + sum(n * r - r * r for n, r in zip(shape, ranks.T))
    with np.errstate(divide="ignore"):
        score = entries * np.log(np.maximum(errors, 0.0) / entries) + free * math.log(entries)
    score = np.where(2 * free <= entries, score, np.inf)
    return tuple(int(r) for r in ranks[int(np.argmin(score))])


def gavish_donoho(
    spectrum: Spectrum, deviation: float | None = None, likely: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Keep what lowers each unfolding's mean squared error: σ > λ*(β) √n τ, one noise level for all modes.

    Gavish and Donoho, *The optimal hard threshold for singular values is 4/√3*, IEEE TIT 60 (2014), equation 11. With
    the median rule for the noise, a mode of three singular values would take its own signal for noise.
    """
    spectrum = _occupied(spectrum)
    tau = projected_edge(spectrum, likely=likely)[1] if deviation is None else deviation
    entries = math.prod(spectrum.shape)
    found: list[int] = []
    for values, size in zip(spectrum.values, spectrum.shape):
        rows, columns = sorted((size, entries // size if size else 0))
        beta = rows / columns if columns else 1.0
        ratio = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
        above = int(np.count_nonzero(to_numpy(values) > ratio * math.sqrt(columns) * tau))
        found.append(1 if _tells_nothing(size, entries) else above)
    return _feasible_or_nothing(found, spectrum.shape)


def _tells_nothing(size: int, entries: int) -> bool:
    """Tell whether a mode's one singular value is ‖X‖, as of a kernel of size 1: the other modes decide."""
    return size == 1 < entries


def doubts(spectrum: Spectrum, ranks: Sequence[int], *, balanced: bool) -> tuple[str, ...]:
    """Say what tells that which ranks leave over from the white noise that the rules rely on; for `not_white`.

    ``balanced``: the rule allows for noise that is stronger in some slices than in others.
    """
    spectrum = _occupied(spectrum)
    if math.prod(spectrum.shape) == 0 or spectrum.norm == 0.0 or not spectrum.factors:
        return ()
    x = to_numpy(multi_mode_dot(_host_core(spectrum), [to_numpy(u) for u in spectrum.factors]))
    return not_white(x, feasible_ranks(ranks, x.shape) if all(ranks) else ranks, balanced=balanced)


def worth_storing(frontiers: Sequence[Frontier], deviation: float) -> list[Frontier]:
    """Cut frontiers of one weight where more parameters would fit noise of a known deviation rather than signal.

    A parameter that only fits noise lowers the squared error by τ²; the parameters worth having are those that minimize
    E + 2 τ² p over all points of all frontiers (Mallows, *Some comments on C_p*, Technometrics 15, 1973). An
    arrangement that needs more numbers for the same signal is cut before it reaches that signal.
    """
    price = 2 * deviation * deviation
    scores = [f.error_squared + price * f.n_parameters for f in frontiers]
    best = min(range(len(frontiers)), key=lambda k: float(scores[k].min()))
    most = int(frontiers[best].n_parameters[int(np.argmin(scores[best]))])
    kept: list[Frontier] = []
    for f in frontiers:
        end = int(np.searchsorted(f.n_parameters, most, side="right"))
        kept.append(
            replace(f, n_parameters=f.n_parameters[:end], error_squared=f.error_squared[:end], ranks=f.ranks[:end])
        )
    return kept


def _resolved(spectrum: Spectrum) -> float:
    """Return the square below which a singular value shows what rounding leaks from the strong ones, not signal."""
    dtype = to_numpy(spectrum.values[0][:1]).dtype
    return float(spectrum.squared_tails[0][0]) * (4 * float(np.finfo(dtype).eps)) ** 2


def _occupied(spectrum: Spectrum) -> Spectrum:
    """Leave out the slices that hold nothing at all.

    A channel that no input reaches has a change of exactly zero: there is no noise in it, and counted in it would make
    the noise look smaller than it is.
    """
    if 0 in spectrum.shape or spectrum.norm == 0.0 or not spectrum.factors:
        return spectrum
    floor, occupied = _resolved(spectrum), list[npt.NDArray[Any]]()
    for squares, factor in zip(_squared_values(spectrum), spectrum.factors):
        slices = np.abs(to_numpy(factor)) ** 2 @ squares  # ‖X[i]‖² of every slice along the mode
        # An SVD moves a row of zeros by up to about eps ‖X‖ for each of the mode's directions.
        occupied.append(np.flatnonzero(slices > floor * max(1.0, slices.size / 4) ** 2))
    sizes = [rows.size for rows in occupied]
    if tuple(sizes) == spectrum.shape:
        return spectrum
    # As many directions as the slices that are left can have, seen from either side.
    ranks = [min(m, n, math.prod(sizes) // n) for m, n in zip(spectrum.max_ranks, sizes)]
    return Spectrum(
        values=tuple(v[:r] for v, r in zip(spectrum.values, ranks)),
        core=to_numpy(spectrum.core)[tuple(slice(r) for r in ranks)],
        factors=tuple(to_numpy(u)[rows, :r] for u, rows, r in zip(spectrum.factors, occupied, ranks)),
        norm=spectrum.norm,
        shape=tuple(sizes),
    )


def _squared_values(spectrum: Spectrum) -> list[FloatArray]:
    """Return the squared singular values of each mode, in units of 4**exponent."""
    return [np.ldexp(to_numpy(v).astype(np.float64), -spectrum.exponent) ** 2 for v in spectrum.values]


def _host_core(spectrum: Spectrum) -> npt.NDArray[Any]:
    """Return the core in double precision and in units of 2**exponent."""
    core = to_numpy(spectrum.core)
    core = core.astype(np.complex128 if np.iscomplexobj(core) else np.float64)
    half = spectrum.exponent // 2
    core *= 2.0**-half
    core *= 2.0 ** -(spectrum.exponent - half)
    return core


def _start(
    spectrum: Spectrum, entries: int, squares: float, variance: float, known: float | None, resolved: float
) -> tuple[int, ...]:
    """Count singular values of the plain unfoldings above the edge; the noise level falls as signal is found."""
    shape, ranks = spectrum.shape, (0,) * len(spectrum.shape)
    values = _squared_values(spectrum)
    for _ in range(_MOST_ROUNDS):
        edges = [max(resolved, variance * edge_squared(n, entries // n)) for n in shape]
        found = tuple(int(np.count_nonzero(v > e)) for v, e in zip(values, edges))
        if found == ranks:
            break
        ranks = found
        if known is None:
            kept = tuple(max(r, 1) for r in ranks)
            left = max(entries - degrees_of_freedom(kept, shape), 1)
            variance = min(variance, spectrum.error(kept) ** 2 * squares / left)
    return ranks


def _update(
    core: npt.NDArray[Any],
    bases: list[npt.NDArray[Any]],
    mode: int,
    shape: Sequence[int],
    variance: float,
    resolved: float,
) -> int:
    """Renew one mode's basis from the projection on the others; return how many of its directions are signal."""
    projected = core
    for other, basis in enumerate(bases):
        if other != mode and basis.shape[1] < len(basis):  # a whole basis only turns what the mode is seen through
            projected = np.moveaxis(np.tensordot(basis.conj().T, projected, axes=(1, other)), 0, other)
    columns = projected.size // core.shape[mode]
    if core.shape[mode] <= columns:
        gram = gram_of(projected, mode)
        del projected  # it may be as large as the core
        squares, vectors = leading_eigenvectors(gram, len(gram))
    else:
        unfolded = np.moveaxis(projected, mode, 0).reshape(core.shape[mode], -1)
        vectors, values, _ = np.linalg.svd(unfolded, full_matrices=False)
        squares = values * values
    edge = max(resolved, variance * edge_squared(shape[mode], columns))
    rank = int(np.count_nonzero(squares > edge))
    bases[mode] = vectors[:, : max(rank, 1)]
    return rank


def _variance_left(
    core: npt.NDArray[Any], bases: list[npt.NDArray[Any]], shape: Sequence[int], squares: float
) -> float:
    """Estimate τ² from what the present model leaves over, per degree of freedom that it leaves."""
    kept = core
    for mode, basis in enumerate(bases):
        kept = np.moveaxis(np.tensordot(basis.conj().T, kept, axes=(1, mode)), 0, mode)
    ranks = [b.shape[1] for b in bases]
    free = max(math.prod(shape) - degrees_of_freedom(ranks, shape), 1)
    return max(squares - float(np.sum(np.abs(kept) ** 2)), 0.0) / free


def _feasible_or_nothing(ranks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Keep nothing where some mode has no signal; else lower the ranks to what a decomposition can have."""
    return feasible_ranks(ranks, shape) if all(ranks) else (0,) * len(shape)


def _evbmf_rank(squares: FloatArray, rows: int, columns: int) -> int:
    if rows == 0 or not squares.any():
        return 0
    squares = np.concatenate([squares, np.zeros(rows - squares.size)])
    alpha = rows / columns
    shrunk = 2.5129 * math.sqrt(alpha)
    threshold = (1 + shrunk) * (1 + alpha / shrunk)
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    high = float(squares.sum()) / (rows * columns)
    rest = squares[most:]
    low = max(float(rest[0]) / (columns * threshold), float(rest.mean()) / columns, 1e-15 * high)
    variance = _minimize_on_log_scale(
        lambda v: _free_energy(squares, columns, v, alpha, threshold), low, max(high, low)
    )
    return int(np.count_nonzero(squares > columns * variance * threshold))


def _free_energy(squares: FloatArray, columns: int, variance: float, alpha: float, threshold: float) -> float:
    """Evaluate the free energy of EVBMF, up to constants, at a noise variance."""
    x = np.maximum(squares / (columns * variance), 1e-300)
    energy = float(np.sum(x - np.log(x)))
    above = x[x > threshold]
    t = 0.5 * (above - (1 + alpha) + np.sqrt((above - (1 + alpha)) ** 2 - 4 * alpha))
    return energy + float(np.sum(np.log(t + 1) + alpha * np.log(t / alpha + 1) - t))


def _minimize_on_log_scale(function: Any, low: float, high: float) -> float:
    """Minimize over a fine logarithmic grid, then by golden sections between the neighbors of the best point."""
    grid = np.geomspace(low, high, 200) if high > low else np.array([low])
    best = int(np.argmin([function(float(v)) for v in grid]))
    a, b = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    section = (math.sqrt(5) - 1) / 2
    while b - a > 1e-9:
        left, right = b - section * (b - a), a + section * (b - a)
        if function(math.exp(left)) <= function(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)
