"""What small ranks of a large weight buy, without its full spectra.

Under a budget of a few percent a weight gets a small part of its ranks. Its leading singular vectors cost a fraction of
all of them; if the budget then reaches for more than was looked at, more is looked at.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import array_api_compat
import numpy as np

from flora_tensor._arrays import array_namespace, hermitian, to_numpy
from flora_tensor._bases import mode_basis
from flora_tensor._frontiers import Choices, Frontier, n_parameters_of
from flora_tensor._krylov import KrylovSpace
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, rank_grid
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import fold, multi_mode_dot, unfold
from flora_tensor.noise import edge_squared, projected_edge
from flora_tensor.spectra import Spectrum, cheapest_spectrum

__all__ = ["Look", "Reach", "full_look", "leading_look", "reach_of"]

# Modes with fewer singular values than this are decomposed in full.
_LARGE = 512

# A weight is looked at up to so many times its share of the budget.
_MARGIN = 4

# The blocks of the Krylov space, and which share of the wanted rank each of them holds. The squared errors of the first
# quarter of the ranks then exceed the least ones by less than 1e-5 where the spectrum falls, and by 0.03 % where all
# but a few values are noise (measured), for half the arithmetic of two power iterations with all columns at once.
_BLOCKS, _SHARE = 6, 1 / 4

# Rank tuples of a tensor that are compared at most, before those that store too much are left out.
_MOST_TUPLES = 1 << 20


class Reach(NamedTuple):
    """How far the ranks of an arrangement are looked at: how much they may store, and mode by mode.

    Without ``ranks`` the full HOSVD is cheap enough, and only the list is shortened.
    """

    most: int
    ranks: tuple[int, ...] | None


class Look(NamedTuple):
    """What ranks buy, and up to where that is known.

    From ``end`` numbers on there may be better choices than those in the frontier; ``None``: there are none that count.
    ``caps`` are the ranks above which there is only noise, where they were found; ``values`` the singular values that
    were found of some unfoldings, by their modes. ``bounds`` say for each choice which relative error no tensor of its
    ranks can go below; they are not known where singular values are estimates.
    """

    frontier: Frontier
    end: int | None
    caps: tuple[int, ...] | None
    values: Mapping[int, FloatArray]
    bounds: Sequence[float] = ()

    @classmethod
    def of(
        cls,
        frontier: Frontier,
        shape: tuple[int, ...],
        most: int,
        caps: tuple[int, ...] | None,
        values: Mapping[int, FloatArray],
    ) -> "Look":
        """Tell where a list of choices that was cut at ``most`` numbers ends."""
        dense = frontier.ranks[-1].tolist() == list(shape)
        cut = n_parameters_of(caps, shape, partial=True) > most if caps is not None else dense
        last = frontier.n_parameters[-2 if dense else -1]
        return cls(frontier, int(last) if cut and len(frontier) > 1 else None, caps, values)


def reach_of(shape: tuple[int, ...], share: float | None, widening: int, known: int = 0) -> Reach | None:
    """Return how far an arrangement is to be looked at, or ``None`` for all of it.

    ``share`` is the budget as a share of all dense numbers; each ``widening`` looks four times further. So many leading
    singular values of a matrix are ``known``.
    """
    size = math.prod(shape)
    if share is None or len(shape) < 2:
        return None
    most = math.ceil(_MARGIN ** (1 + widening) * share * size)
    if most >= size:
        return None
    if len(shape) == 2:
        short, long = sorted(shape)
        rank = math.ceil(most / (short + long))
        # Three products with so many columns, and QR of their parts, against a Gram matrix in float64 and its
        # eigenvalues, in measured rates.
        cheap = short >= _LARGE and rank * long <= short * (0.1 * long + 0.25 * short)
        return Reach(rank * (short + long), (rank, rank)) if cheap or rank <= known < short else None
    available = [min(n, size // n) for n in shape]
    large = [k for k, n in enumerate(available) if n >= _LARGE]
    ranks = _in_proportion(shape, large, most)
    return Reach(most, ranks if large and all(2 * ranks[k] <= available[k] for k in large) else None)


def _in_proportion(shape: tuple[int, ...], large: list[int], most: int) -> tuple[int, ...]:
    """Return the ranks that store about ``most`` numbers, the same share of each large mode and the others whole."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        ranks = [share * n if k in large else n for k, n in enumerate(shape)]
        stored = math.prod(ranks) + sum(shape[k] * ranks[k] for k in large)
        low, high = (share, high) if stored <= most else (low, share)
    return tuple(math.ceil(low * n) if k in large else n for k, n in enumerate(shape))


def full_look(x: Array, noise: float | None, most: int | None, values: FloatArray | None = None) -> Look:
    """Return what all ranks buy that store at most so many numbers; ``values`` are a matrix's, where they are known."""
    shape = tuple(x.shape)
    if values is None or len(shape) > 2:
        spectrum = cheapest_spectrum("extract", x)
    else:
        spectrum = Spectrum((values, values), None, (), float(np.linalg.norm(values)), shape)
    caps = None if noise is None else projected_edge(spectrum, noise)[0]
    frontier = spectrum.frontier(max_ranks=caps, max_parameters=most, partial=True, one_whole=True)
    known = {k: to_numpy(v) for k, v in enumerate(spectrum.values)}
    if caps == spectrum.max_ranks:
        caps = None
    bounds = _lower_bounds(spectrum, frontier.ranks)
    if most is None:
        return Look(frontier, None, caps, known, bounds)
    return Look.of(frontier, shape, most, caps, known)._replace(bounds=bounds)


def _lower_bounds(spectrum: Spectrum, ranks: IntArray) -> list[float]:
    """Return the relative error that no tensor of each of these rank tuples, shape (K, N), can go below.

    A tensor of rank r_n in mode n has an unfolding of that rank, so its error is at least what Eckart and Young leave
    of the unfolding: √(max_n Σ_{i≥r_n} σ_i²).
    """
    left = [t[np.minimum(r, len(t) - 1)] / (t[0] or 1.0) for t, r in zip(spectrum.squared_tails, ranks.T)]
    return np.sqrt(np.max(left, axis=0)).tolist()


def leading_look(x: Array, reach: Reach, norm: float, noise: float | None, values: FloatArray | None = None) -> Look:
    """Return what the ranks of a matrix or tensor buy, as far as ``reach.ranks`` and ``reach.most`` go.

    The errors are those of orthogonal projections that exist, so that what is promised can be kept; they exceed the
    least ones by as much as the leading subspaces of the unfoldings are missed. ``noise`` is the standard deviation of
    the noise in an entry, where it is known, and so are ``values`` of a matrix.
    """
    # In units of a power of two near the norm, so that nothing over- or underflows.
    exponent = math.frexp(norm)[1] if abs(math.frexp(norm)[1]) >= 60 else 0
    unit = math.ldexp(1.0, exponent)
    x = x * math.ldexp(1.0, -exponent) if exponent else x
    noise = None if noise is None else noise / unit
    if len(x.shape) == 2:
        found = _look_at_matrix(x, reach, norm / unit, noise, None if values is None else values / unit)
    else:
        found = _look_at_tensor(x, reach, norm / unit, noise)
    f = found.frontier
    errors = f.error_squared * unit * unit
    frontier = Frontier(f.n_parameters, errors, f.ranks, float(errors[0]), f.n_entries)
    return found._replace(frontier=frontier, values={k: v * unit for k, v in found.values.items()})


def _look_at_matrix(x: Array, reach: Reach, norm: float, noise: float | None, values: FloatArray | None) -> Look:
    assert reach.ranks is not None
    rows, columns = x.shape
    squares = _leading_squares(x, reach.ranks[0]) if values is None else values[: reach.ranks[0]] ** 2
    above = len(squares) if noise is None else int(np.count_nonzero(squares > noise**2 * edge_squared(rows, columns)))
    caps = None if above == len(squares) else (above, above)
    errors = np.maximum(norm**2 - np.concatenate([[0.0], np.cumsum(squares[:above])]), 0.0)
    ranks = np.arange(len(errors))
    # As in a truncated SVD: the second mode is left whole.
    pairs = np.stack([ranks, np.where(ranks > 0, columns, 0)], axis=1)
    choices = Choices((rows, columns), partial=True)
    frontier = choices.frontier([(pairs, errors)], unit=1.0, max_ranks=caps, one_whole=True)
    return Look.of(frontier, (rows, columns), reach.most, caps, {0: np.sqrt(squares)})


def _look_at_tensor(x: Array, reach: Reach, norm: float, noise: float | None) -> Look:
    """Look at the truncations of a HOSVD of which only some leading vectors of the large modes are known.

    With G = X ×₁ U₁ᵀ … for orthonormal U_n, truncating to ranks r has the error ‖X‖² − ‖G[:r]‖², which is what the full
    table says of G and ‖X‖² − ‖G‖² more. Tuples that leave a large mode whole see a projection without that mode; where
    it is the only large one, they are left out.
    """
    assert reach.ranks is not None
    shape = tuple(x.shape)
    large = [k for k, (r, n) in enumerate(zip(reach.ranks, shape)) if r < n]
    found = {k: _krylov(unfold(x, k), reach.ranks[k]) for k in large}
    projected = {k: fold(f.projected, k, _with(shape, k, reach.ranks[k])) for k, f in found.items()}
    # The other modes' bases see the tensor through one large mode: all directions are kept, in nearly the same order.
    inside = projected[large[0]]
    bases = {k: mode_basis(array_namespace("extract", x), inside, k, 1.0).vectors for k in _rest(shape, large)}
    bases |= {k: f.vectors for k, f in found.items()}
    core = to_numpy(_onto(inside, bases, {large[0]}))
    choices, table = Choices(shape, reach.most, partial=True), _table(core, norm**2)
    listed = [choices.feasible(table), *(choices.one_whole(table, k) for k in _rest(shape, large))]
    for mode, other in itertools.islice(itertools.permutations(large, 2), len(large)):
        rest = to_numpy(_onto(projected[other], bases, {mode, other}))
        lengths = np.sqrt(np.sum(np.square(rest, dtype=np.float64), axis=mode, keepdims=True))
        listed.append(choices.one_whole(_table(lengths, norm**2), mode))
    values = {k: np.sqrt(f.squares) for k, f in found.items()}
    caps = None if noise is None else _noise_caps(core, bases, values, shape, norm, noise)
    available = tuple(min(n, math.prod(shape) // n) for n in shape)
    frontier = choices.frontier(listed, unit=1.0, max_ranks=caps, available=available, one_whole=True)
    look = Look.of(frontier, shape, reach.most, None if caps == available else caps, values)
    # Where a choice takes all directions that were found, more of them may be better.
    at_end = np.logical_or.reduce([frontier.ranks[:, k] == reach.ranks[k] for k in large])
    ends = [*frontier.n_parameters[at_end].tolist(), *([] if look.end is None else [look.end])]
    return look._replace(end=min(ends, default=None))


def _rest(shape: tuple[int, ...], modes: list[int]) -> list[int]:
    return [k for k in range(len(shape)) if k not in modes]


def _with(shape: tuple[int, ...], mode: int, size: int) -> tuple[int, ...]:
    return tuple(size if k == mode else n for k, n in enumerate(shape))


def _onto(x: Array, bases: dict[int, Array], done: set[int]) -> Array:
    """Project all modes but those that are ``done``."""
    modes = [k for k in bases if k not in done]
    return multi_mode_dot(x, [bases[k] for k in modes], modes=modes, transpose=True)


def _table(core: FloatArray, total: float) -> ErrorTable:
    """Return the errors of truncating a tensor of squared norm ``total`` to sub-blocks of its projection ``core``."""
    table = ErrorTable.of_core(core, 0, rank_grid(core.shape, _MOST_TUPLES))
    return ErrorTable(table.errors + max(total - table.total, 0.0), table.grid, total)


def _noise_caps(
    core: FloatArray,
    bases: dict[int, Array],
    values: Mapping[int, FloatArray],
    shape: tuple[int, ...],
    norm: float,
    noise: float,
) -> tuple[int, ...]:
    """Return the ranks above which there is only noise; the full one where it may go on beyond what was looked at."""
    modes = range(core.ndim)
    lengths = [np.sqrt(np.sum(np.square(core, dtype=np.float64), axis=tuple(_rest(core.shape, [k])))) for k in modes]
    known = tuple(values.get(k, lengths[k]) for k in modes)
    ranks = projected_edge(Spectrum(known, core, tuple(bases[k] for k in modes), norm, shape), noise)[0]
    return tuple(min(n, math.prod(shape) // n) if r == size else r for r, size, n in zip(ranks, core.shape, shape))


class _Leading(NamedTuple):
    """Leading left singular vectors U (n, r), squared singular values (r,) from below, and Uᵀ A (r, p)."""

    vectors: Array
    squares: FloatArray
    projected: Array


def _krylov(matrix: Array, rank: int) -> _Leading:
    """Find leading singular vectors by Rayleigh and Ritz."""
    xp = array_namespace("extract", matrix)
    basis, inside = _krylov_space(xp, matrix, rank)
    squares, vectors = np.linalg.eigh(_gram(to_numpy(inside)))
    turn = xp.asarray(np.ascontiguousarray(vectors[:, ::-1][:, :rank]), device=array_api_compat.device(matrix))
    turn = xp.astype(turn, matrix.dtype)
    squares = np.maximum(squares[::-1][:rank], 0.0)
    return _Leading(xp.matmul(basis, turn), squares, xp.matmul(hermitian(xp, turn), inside))


def _leading_squares(matrix: Array, rank: int) -> FloatArray:
    """Find the squares of leading singular values alone."""
    inside = _krylov_space(array_namespace("extract", matrix), matrix, rank)[1]
    return np.maximum(np.linalg.eigvalsh(_gram(to_numpy(inside)))[::-1][:rank], 0.0)


def _krylov_space(xp: Namespace, matrix: Array, rank: int) -> tuple[Array, Array]:
    """Return an orthonormal basis Q of a block Krylov space that nearly holds the leading left vectors, and Qᵀ A."""
    generator = np.random.default_rng(0)  # equal input gives equal bits
    space = KrylovSpace(xp, matrix, 0, math.ceil(_SHARE * rank) + 8, generator)
    for _ in range(_BLOCKS):
        space.grow()
    return space.basis, xp.concat(space.rows, axis=0)


def _gram(rows: FloatArray) -> FloatArray:
    """Return A Aᵀ in float64, which differences of squares need."""
    gram = np.zeros((rows.shape[0], rows.shape[0]))
    for start in range(0, rows.shape[1], 2048):
        part = rows[:, start : start + 2048].astype(np.float64)
        gram += part @ part.T
    return gram
