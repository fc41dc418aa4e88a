"""What small ranks of a large weight buy, without its full spectra.

Under a budget of a few percent a weight gets a small part of its ranks. Its leading singular vectors cost a fraction of
all of them; if the budget then reaches for more than was looked at, more is looked at.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import array_api_compat
import numpy as np

from flora_tensor._arrays import array_namespace, host_squares, times_power_of_two, to_numpy
from flora_tensor._bases import mode_basis
from flora_tensor._frontiers import Choices, Frontier, n_parameters_of
from flora_tensor._krylov import WORTHWHILE, KrylovSpace, block_width, fill
from flora_tensor._prepared import prepare
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, discarded, rank_grid
from flora_tensor._spectrum import Spectrum
from flora_tensor._typing import Array
from flora_tensor.algebra import fold, multi_mode_dot, unfold
from flora_tensor.noise import edge_squared, projected_edge
from flora_tensor.spectra import cheapest_spectrum

__all__ = ["Look", "Reach", "full_look", "leading_look", "reach_of"]

# Modes with fewer singular values than this are decomposed in full.
_LARGE = 512

# A weight is looked at up to so many times its share of the budget, farther where its full HOSVD is taken anyway; each
# time that this is not enough, so much farther, and after so many times in full.
_MARGINS, _FURTHER, _MOST_WIDENINGS = (1.5, 4), 4, 2

# A Krylov space grows until this share of the ranks looked at has settled: such errors exceed the least ones by what
# `WORTHWHILE` says.
_SETTLED = 5 / 6

# Rank tuples of a tensor that are compared at most, before those that store too much are left out.
_MOST_TUPLES = 1 << 20


class Reach(NamedTuple):
    """How far the ranks of an arrangement are looked at: how much they may store, and mode by mode.

    Without ``ranks`` the full HOSVD is cheap enough, and only the list is shortened. Vectors are sought a share
    ``at_a_time`` of the ranks; what takes less than ``price`` off the squared error for a number is not waited for.
    """

    most: int
    ranks: tuple[int, ...] | None
    at_a_time: float = 1.0
    price: float = 0.0


class Look(NamedTuple):
    """What ranks buy, and up to where that is known.

    From ``end`` numbers on there may be better choices than those in the frontier; ``None``: there are none that count.
    ``caps`` are the ranks above which there is only noise, where they were found; ``values`` the singular values that
    were found of some unfoldings, by their modes. ``bounds`` say for each choice which relative error no tensor of its
    ranks can go below; they are not known where singular values are estimates. ``bases`` are leading left singular
    vectors, (n_k, w), of some unfoldings, as good as a decomposition's.
    """

    frontier: Frontier
    end: int | None
    caps: tuple[int, ...] | None
    values: Mapping[int, FloatArray]
    bounds: Sequence[float] = ()
    bases: Mapping[int, Array] = MappingProxyType({})

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


def reach_of(
    shape: tuple[int, ...],
    share: float | None,
    widening: int,
    known: int = 0,
    *,
    price: float = 0.0,
    is_stack: bool = False,
) -> Reach | None:
    """Return how far an arrangement is to be looked at, or ``None`` for all of it.

    ``share`` is the budget as a share of all dense numbers; each ``widening`` looks four times farther, but no farther
    than what a number takes off the squared error is worth its ``price``. So many leading singular values of a matrix
    are ``known``. A stack that pays only where it is large must be looked at so far.
    """
    size = math.prod(shape)
    if share is None or len(shape) < 2:
        return None
    near, far = (math.ceil(margin * _FURTHER**widening * share * size) for margin in _MARGINS)
    near = far if is_stack else near
    at_a_time = _FURTHER**-widening if price > 0 else 1.0
    if len(shape) == 2:
        short, long = sorted(shape)
        rank, cheap = math.ceil(near / (short + long)), max(_most_by_krylov(short, long), known if known < short else 0)
        if price > 0 and widening <= _MOST_WIDENINGS:
            rank = min(rank, cheap)
        if 0 < rank <= cheap and rank * (short + long) < size:
            return Reach(rank * (short + long), (rank, rank), at_a_time, price)
        return None
    available = [min(n, size // n) for n in shape]
    large = [k for k, n in enumerate(available) if n >= _LARGE]
    ranks = _in_proportion(shape, large, min(near, size))
    if near < size and large and all(2 * ranks[k] <= available[k] for k in large):
        return Reach(near, ranks, at_a_time, price)
    return Reach(far, None) if far < size else None


def _most_by_krylov(rows: int, columns: int) -> int:
    """Return up to which rank a Krylov space costs less than a Gram matrix in float64 and its eigenvectors (measured).

    None is where the whole Gram matrix is cheap.
    """
    short, long = sorted((rows, columns))
    return int(short * (0.1 + 0.12 * short / long)) if short >= _LARGE else 0


def _in_proportion(shape: tuple[int, ...], large: list[int], most: int) -> tuple[int, ...]:
    """Return the ranks that store about ``most`` numbers, the same share of each large mode and the others whole."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        ranks = [share * n if k in large else n for k, n in enumerate(shape)]
        stored = math.prod(ranks) + sum(shape[k] * ranks[k] for k in large)
        low, high = (share, high) if stored <= most else (low, share)
    return tuple(math.ceil(low * n) if k in large else n for k, n in enumerate(shape))


def full_look(x: Array, noise: float | None, most: int | None, values: FloatArray | None = None, kept: int = 0) -> Look:
    """Return what all ranks buy that store at most ``most`` numbers; ``values`` are a matrix's, where they are known.

    The bases of unfoldings are for choices of at most ``kept`` numbers.
    """
    shape = tuple(x.shape)
    spectrum, factors = _spectrum(x, values, kept)
    caps = None if noise is None else projected_edge(spectrum, noise)[0]
    if most is None or len(shape) == 2:
        frontier = spectrum.frontier(max_ranks=caps, max_parameters=most, partial=True, one_whole=True)
    else:
        frontier = _short_list(spectrum, most, caps)
    known = {k: to_numpy(v) for k, v in enumerate(spectrum.values)}
    if caps == spectrum.max_ranks:
        caps = None
    bounds = _lower_bounds(spectrum, frontier.ranks)
    look = Look(frontier, None, caps, known) if most is None else Look.of(frontier, shape, most, caps, known)
    return look._replace(bounds=bounds, bases=_bases_of_unfoldings(shape, frontier, factors, kept))


def _spectrum(x: Array, values: FloatArray | None, kept: int) -> tuple[Spectrum, Mapping[int, Array]]:
    """Return the exact spectrum and singular vectors of its unfoldings, for choices of at most ``kept`` numbers.

    Of a matrix those of its shorter side alone.
    """
    shape = tuple(x.shape)
    if len(shape) != 2 or (values is None and not kept):
        spectrum = cheapest_spectrum("extract", x)
        return spectrum, dict(enumerate(spectrum.factors)) if kept else {}
    if values is not None:
        return Spectrum((values, values), None, (), float(np.linalg.norm(values)), shape), {}
    ready = prepare("extract", x)
    short = 0 if shape[0] <= shape[1] else 1
    basis = mode_basis(ready.xp, ready.x, short, 0.0, min(shape[short], kept // sum(shape)))
    values = times_power_of_two(basis.values, ready.exponent)
    norm = math.ldexp(ready.norm(), ready.exponent)
    return Spectrum((values, values), None, (), norm, shape), {short: basis.vectors}


def _bases_of_unfoldings(
    shape: tuple[int, ...], frontier: Frontier, factors: Mapping[int, Array], kept: int
) -> dict[int, Array]:
    """Return the singular vectors that choices with one mode cut need; of a matrix those of either side will do."""
    ranks = frontier.ranks[(frontier.n_parameters > 0) & (frontier.n_parameters <= kept)]
    cut = ranks < np.asarray(shape)
    alone = cut & (cut.sum(axis=1, keepdims=True) == 1)
    most = [int(ranks[rows, k].max(initial=0)) for k, rows in enumerate(alone.T)]
    most = [max(most)] * 2 if len(shape) == 2 else most
    return {k: factor[:, : most[k]] for k, factor in factors.items() if most[k]}


def _short_list(spectrum: Spectrum, most: int, caps: tuple[int, ...] | None) -> Frontier:
    """List what `Spectrum.frontier` would, of tuples that store at most so many numbers.

    The rank r of a mode cannot exceed the product of the others: with a factor it takes r² + I r numbers at least. One
    table lists the tuples up to there. Others leave a mode m whole: since it is long, or the others do not carry so
    many directions, so that r < I_m. Beside it (I_m + I) r numbers are stored at least, or I_m I. So the tables are
    small, and no tuple is left out.
    """
    shape, core, exponent = spectrum.shape, to_numpy(spectrum.core), spectrum.exponent
    choices = Choices(shape, most, partial=True)
    ends = [min(m, (math.isqrt(n * n + 4 * most) - n) // 2) for m, n in zip(core.shape, shape)]
    listed = [choices.feasible(_table_within(core, exponent, ends))]
    for mode, size in enumerate(shape):
        bound = size - 1 if ends[mode] == size else most
        beside = [min(m, bound, n if size * n <= most else most // (size + n)) for m, n in zip(core.shape, shape)]
        beside[mode] = core.shape[mode]
        if min(beside) > 0:
            listed.append(choices.one_whole(_table_within(core, exponent, beside, mode), mode))
    unit = math.ldexp(1.0, 2 * exponent)
    return choices.frontier(listed, unit=unit, max_ranks=caps, available=spectrum.max_ranks, one_whole=True)


def _table_within(core: FloatArray, exponent: int, ends: list[int], whole: int | None = None) -> ErrorTable:
    """Return the errors of truncating a full core to ranks up to ``ends``; of a mode left whole as one entry."""
    inside = core[tuple(slice(end) for end in ends)]
    missed = discarded(core, exponent, tuple(ends))
    if whole is not None:
        inside = np.sqrt(np.sum(np.square(inside, dtype=np.float64), axis=whole, keepdims=True))
    table = ErrorTable.of_core(inside, exponent, rank_grid(inside.shape, _MOST_TUPLES))
    return ErrorTable(table.errors + missed, table.grid, table.total + missed)


def _lower_bounds(spectrum: Spectrum, ranks: IntArray) -> list[float]:
    """Return the relative error that no tensor of each of these rank tuples, shape (K, N), can go below.

    A tensor of rank r_n in mode n has an unfolding of that rank, so its error is at least what Eckart and Young leave
    of the unfolding: √(max_n Σ_{i≥r_n} σ_i²).
    """
    left = [t[np.minimum(r, len(t) - 1)] / (t[0] or 1.0) for t, r in zip(spectrum.squared_tails, ranks.T)]
    return np.sqrt(np.max(left, axis=0)).tolist()


def leading_look(
    x: Array,
    reach: Reach,
    norm: float,
    noise: float | None,
    values: FloatArray | None = None,
    rivals: Sequence[Frontier] = (),
) -> Look:
    """Return what the ranks of a matrix or tensor buy, as far as ``reach.ranks`` and ``reach.most`` go.

    The errors are those of orthogonal projections that exist, so that what is promised can be kept; they exceed the
    least ones by as much as the leading subspaces of the unfoldings are missed. ``noise`` is the standard deviation of
    the noise in an entry, where it is known, and so are ``values`` of a matrix. ``rivals`` are what other arrangements
    buy: one that stays behind them at every size is not looked at to the end.
    """
    # In units of a power of two near the norm, so that nothing over- or underflows.
    exponent = math.frexp(norm)[1] if abs(math.frexp(norm)[1]) >= 60 else 0
    unit = math.ldexp(1.0, exponent)
    x = x * math.ldexp(1.0, -exponent) if exponent else x
    noise = None if noise is None else noise / unit
    reach = reach._replace(price=reach.price / unit / unit)
    if len(x.shape) == 2:
        values = None if values is None else values / unit
        found = _look_at_matrix(x, reach, norm / unit, noise, values, _least(rivals, x.shape, unit))
    else:
        found = _look_at_tensor(x, reach, norm / unit, noise)
    f = found.frontier
    errors = f.error_squared * unit * unit
    frontier = Frontier(f.n_parameters, errors, f.ranks, float(errors[0]), f.n_entries)
    return found._replace(frontier=frontier, values={k: v * unit for k, v in found.values.items()})


def _least(rivals: Sequence[Frontier], shape: tuple[int, ...], unit: float) -> FloatArray:
    """Return the least squared errors of other arrangements for what each rank of a matrix stores; rank 0 left out."""
    stored = sum(shape) * np.arange(1, min(shape) + 1)
    least = np.full(len(stored), np.inf)
    for f in rivals:
        least = np.minimum(least, f.error_squared[np.searchsorted(f.n_parameters, stored, side="right") - 1])
    return least / unit / unit


def _look_at_matrix(
    x: Array, reach: Reach, norm: float, noise: float | None, values: FloatArray | None, least: FloatArray
) -> Look:
    assert reach.ranks is not None
    rows, columns = x.shape
    edge = 0.0 if noise is None else noise**2 * edge_squared(rows, columns)
    bases: dict[int, Array] = {}
    if values is None:
        short = 0 if rows <= columns else 1
        found = _leading(x, short, reach, norm**2, max(edge, reach.price * (rows + columns)), least)
        squares, bases = found.squares, {short: found.vectors[:, : found.settled]}
    else:
        squares = values[: reach.ranks[0]] ** 2
    above = len(squares) if noise is None else int(np.count_nonzero(squares > edge))
    caps = None if above == len(squares) else (above, above)
    errors = np.maximum(norm**2 - np.concatenate([[0.0], np.cumsum(squares[:above])]), 0.0)
    ranks = np.arange(len(errors))
    # As in a truncated SVD: the second mode is left whole.
    pairs = np.stack([ranks, np.where(ranks > 0, columns, 0)], axis=1)
    choices = Choices((rows, columns), partial=True)
    frontier = choices.frontier([(pairs, errors)], unit=1.0, max_ranks=caps, one_whole=True)
    look = Look.of(frontier, (rows, columns), reach.most, caps, {0: np.sqrt(squares)})
    return look._replace(bases=bases)


def _look_at_tensor(x: Array, reach: Reach, norm: float, noise: float | None) -> Look:
    """Look at the truncations of a HOSVD of which only some leading vectors of the large modes are known.

    With G = X ×₁ U₁ᵀ … for orthonormal U_n, truncating to ranks r has the error ‖X‖² − ‖G[:r]‖², which is what the full
    table says of G and ‖X‖² − ‖G‖² more. Tuples that leave a large mode whole see a projection without that mode; where
    it is the only large one, they are left out.
    """
    assert reach.ranks is not None
    shape = tuple(x.shape)
    large = [k for k, (r, n) in enumerate(zip(reach.ranks, shape)) if r < n]
    found = {
        k: _leading(unfold(x, k), 0, reach._replace(ranks=reach.ranks[k:]), norm**2, reach.price * shape[k])
        for k in large
    }
    projected = {k: fold(f.projected, k, _with(shape, k, len(f.squares))) for k, f in found.items()}
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
    at_end = np.logical_or.reduce([frontier.ranks[:, k] == len(found[k].squares) for k in large])
    ends = [*frontier.n_parameters[at_end].tolist(), *([] if look.end is None else [look.end])]
    return look._replace(end=min(ends, default=None), bases={k: f.vectors[:, : f.settled] for k, f in found.items()})


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
    """Leading singular vectors U (n, r) of an unfolding, squared singular values (r,) from below, and Uᵀ X.

    Of the vectors the first ``settled`` are as good as a decomposition's.
    """

    vectors: Array
    squares: FloatArray
    projected: Array
    settled: int


def _leading(
    x: Array, mode: int, reach: Reach, total: float, floor: float = 0.0, rival: FloatArray | None = None
) -> _Leading:
    """Find leading singular vectors by Rayleigh and Ritz, in a block Krylov space that nearly holds them.

    As many as the first of ``reach.ranks``, but only one whose square does not exceed ``floor``. Where the space would
    not be small, they are taken from the unfolding's Gram matrix. ``total`` is ‖X‖²; for ``rival`` see `fill`.
    """
    assert reach.ranks is not None
    xp, rank = array_namespace("extract", x), reach.ranks[0]
    if rank > _most_by_krylov(x.shape[mode], math.prod(x.shape) // x.shape[mode]):
        vectors, values = mode_basis(xp, x, mode, 1.0, rank)
        squares = host_squares(values[:rank])
        return _Leading(vectors, squares, multi_mode_dot(x, [vectors], modes=[mode], transpose=True), rank)
    generator = np.random.default_rng(0)  # equal input gives equal bits
    space = KrylovSpace(xp, x, mode, block_width(reach.at_a_time * rank), generator)
    gram = fill(space, math.ceil(_SETTLED * rank), total, floor, rival).total
    squares, vectors = np.linalg.eigh(gram)
    rank = min(rank, int(np.count_nonzero(squares > floor)) + 1)
    squares, vectors = np.maximum(squares[::-1][:rank], 0.0), vectors[:, ::-1][:, :rank]
    turn = xp.astype(xp.asarray(np.ascontiguousarray(vectors), device=array_api_compat.device(x)), x.dtype)
    inside = xp.concat(space.rows, axis=mode)
    projected = multi_mode_dot(inside, [turn], modes=[mode], transpose=True)
    return _Leading(xp.matmul(space.basis, turn), squares, projected, _settled(gram, space.block, squares, total))


def _settled(gram: FloatArray, block: int, squares: FloatArray, total: float) -> int:
    """Count the ranks that the last block gained hardly anything for."""
    earlier = np.linalg.eigvalsh(gram[:-block, :-block])[::-1][: len(squares)]
    captured, before = np.cumsum(squares), np.cumsum(np.append(earlier, np.zeros(len(squares) - len(earlier))))
    still = captured - before > WORTHWHILE * np.maximum(total - captured, 0.0) + 1e-7 * total
    return int(np.argmax(still)) if still.any() else len(squares)
