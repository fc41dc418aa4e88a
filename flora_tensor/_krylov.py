"""Block Krylov spaces: orthonormal bases that grow towards the leading directions of an unfolding.

A block of directions Q is multiplied by X once, which gives the next rows of the projected tensor B = Qᴴ X, and X times
an orthonormal basis of these rows gives the next directions. All blocks together hold far better approximations of the
leading singular vectors than the last one does, which is all that a power iteration keeps: so narrow blocks will do.
"""

import math
from dataclasses import replace
from typing import Any

import array_api_compat
import numpy as np

from flora_tensor._algorithms import Target, Truncation, cheapest_order, st_hosvd_of
from flora_tensor._arrays import conjugate, epsilon, hermitian, is_complex, to_numpy, widest_dtype
from flora_tensor._bases import Basis, below_reach, complement, gaussian, orthonormal_columns
from flora_tensor._gram import column_blocks
from flora_tensor._rank_errors import FloatArray
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import contract, multi_mode_dot, unfold

# Columns of the unfolding that are worked on at a time, in numbers: at least this many, or a 16th of the tensor.
_AT_A_TIME = 1 << 17

# A block holds this share of the wanted ranks and about so many directions more, in all a multiple of `_STEP`, which
# fills registers: wider ones need fewer of them, but more arithmetic (measured). One of a matrix's space holds all of
# ranks up to `_WHOLE`: a product with so many columns costs hardly more than reading the matrix.
_SHARE, _MORE, _WHOLE, _STEP = 1 / 4, 8, 16, 8

# Blocks of a matrix's space: at least, as what rounding hides of a very small error is found by doing, not by
# measuring; and at most, so that a spectrum without an end stays within memory.
_FEWEST_BLOCKS, _MOST_BLOCKS = 4, 24

# A block that takes less than this share off the squared error was the last. What more of them would take off falls
# fast where the spectrum decays, and on white noise is at most three times as much (measured): 0.1 % of the error.
WORTHWHILE, _TO_COME = 7e-4, 3

# Columns this near to orthonormal are so to rounding after one more step; so many steps are made at most, and columns
# whose lengths, orthogonal to one another, differ more than this are left to reflections.
_NEARLY, _MOST_ROUNDS, _DEPENDENT = 1e-2, 4, 1e-5

# Singular values that are no shorter than this share of the largest.
_SHORT = 32

# Rows of a tall matrix whose products are summed at a time, in float64.
_ROWS = 1 << 11


class KrylovSpace:
    """A growing basis of one mode, and X projected onto it.

    Musco and Musco, *Randomized block Krylov methods for stronger and faster approximate singular value decomposition*,
    NeurIPS 2015, algorithm 2, every block made orthogonal to those before: else small singular values drown in
    rounding.
    """

    def __init__(self, xp: Namespace, x: Array, mode: int, block: int, generator: np.random.Generator) -> None:
        self.xp, self.x, self.mode, self.block = xp, x, mode, block
        self.generator = generator
        self.basis: Array = None
        # X projected onto the blocks of the basis, without the first ones that were dropped.
        self.rows: list[Array] = []
        self.products = 0

    @property
    def width(self) -> int:
        """How many directions the basis holds."""
        return 0 if self.basis is None else self.basis.shape[1]

    def grow(self, *, fresh: bool = False) -> None:
        """Add a block of directions; ``fresh`` ones do not follow from those before."""
        xp, x, mode = self.xp, self.x, self.mode
        if self.basis is None or fresh:
            columns = math.prod(x.shape) // x.shape[mode]
            across = gaussian(xp, x, (columns, self.block), self.generator)
        else:
            across = orthonormal_rows(xp, unfold(self.rows[-1], mode))
        new = _extension(xp, self.basis, times_rest(xp, x, mode, across))
        self.basis = new if self.basis is None else xp.concat([self.basis, new], axis=1)
        self.rows.append(contract(xp, x, hermitian(xp, new), mode))
        self.products += 2

    def joined(self) -> Array:
        """Return X projected onto the whole basis, of which no block is held any longer."""
        rows, self.rows = self.rows, [self.rows[-1]]
        here = (slice(None),) * self.mode
        if not array_api_compat.is_numpy_array(self.x):
            first = self.basis[:, : self.width - self.block * len(rows)]
            known = [multi_mode_dot(self.x, [first], modes=[self.mode], transpose=True)] if first.shape[1] else []
            return self.xp.concat([*known, *rows], axis=self.mode)
        whole = np.empty([self.width if k == self.mode else n for k, n in enumerate(self.x.shape)], self.x.dtype)
        stop = self.width
        while rows:
            part = rows.pop()  # free once it is copied
            whole[(*here, slice(stop - self.block, stop))] = part
            stop -= self.block
        if stop:
            whole[(*here, slice(stop))] = multi_mode_dot(
                self.x, [self.basis[:, :stop]], modes=[self.mode], transpose=True
            )
        return whole


def orthonormal_rows(xp: Namespace, rows: Array) -> Array:
    """Return orthonormal columns (p, b) that span the conjugate transpose of rows (b, p).

    Products with these, not with the rows themselves: they would square the singular values of what is sought, and lose
    those below √ε of the largest.
    """
    columns = hermitian(xp, rows)
    across = _normalized(columns)[0] if isinstance(columns, np.ndarray) else None
    return orthonormal_columns(xp, columns) if across is None else across


def _extension(xp: Namespace, basis: Array | None, new: Array) -> Array:
    """Return orthonormal columns, orthogonal to those of a basis, that with it span what ``new`` does."""
    wide = new
    for _ in range(_MOST_ROUNDS if isinstance(new, np.ndarray) else 0):
        inside = None if basis is None else hermitian(xp, basis) @ wide
        wide = wide if inside is None else wide - basis @ inside
        found, deviation = _normalized(wide)
        if found is None:
            break
        wide, leak = found, 0.0 if inside is None else float(np.abs(inside).max())
        if max(deviation, leak) < _NEARLY:  # twice is enough
            return wide
    new = orthonormal_columns(xp, new)
    return new if basis is None else complement(xp, basis, new)


def _normalized(matrix: Any) -> tuple[Any | None, float]:
    """Make a tall host matrix's columns orthonormal, or ``None``; and tell how far from it they were.

    A Gram matrix A Aᴴ = L Lᴴ gives A L⁻ᴴ at the speed of products, where reflections work column by column. What
    rounding leaves grows with the condition: a second time mends it (Yamamoto et al., *Roundoff error analysis of the
    CholeskyQR2 algorithm*, ETNA 44, 2015).
    """
    size = matrix.shape[1]
    gram = np.zeros((size, size), np.result_type(matrix.dtype, np.float64))
    for start in range(0, matrix.shape[0], _ROWS):
        part = matrix[start : start + _ROWS].astype(gram.dtype)
        gram += part.conj().T @ part
    try:
        triangle = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None, math.inf
    gram.reshape(-1)[:: size + 1] -= 1.0
    deviation, lengths = float(np.abs(gram).max()), np.diagonal(triangle).real
    if not lengths.min() > _DEPENDENT * lengths.max():
        return None, deviation
    return matrix @ np.linalg.inv(triangle).conj().T.astype(matrix.dtype), deviation


def block_width(rank: float) -> int:
    """Return how many directions a block holds where so many in all are sought."""
    return _STEP * round((_SHARE * rank + _MORE) / _STEP)


def matrix_of(
    xp: Namespace, x: Array, ranks: tuple[int, ...], generator: np.random.Generator, squares: float
) -> tuple[Truncation, int]:
    """Truncate a matrix within a Krylov space of its shorter side; return the result and how many products it took.

    ``squares`` is ‖X‖².
    """
    mode = 0 if x.shape[0] <= x.shape[1] else 1
    rank = min(ranks)
    width = max(block_width(rank), min(rank, _WHOLE))
    space = KrylovSpace(xp, x, mode, width, generator)
    gram = fill(space, rank, squares)
    inside = space.joined()
    inner = _svd_by_gram(xp, inside, mode, rank, gram)
    if inner is None:
        inner = st_hosvd_of(xp, inside, Target(ranks), cheapest_order(inside.shape, ranks), quick=True)
    factors = [xp.matmul(space.basis, u) if k == mode else u for k, u in enumerate(inner.factors)]
    return replace(inner, factors=factors, kind="leading"), space.products


def _svd_by_gram(xp: Namespace, inside: Array, mode: int, rank: int, gram: "Gram") -> Truncation | None:
    """Truncate B = U Σ Vᴴ, whose short side's Gram matrix is known; ``None`` where that one does not resolve B.

    The rows of Uᴴ B = Σ Vᴴ are orthogonal. Where none is short, dividing by their lengths is as good as QR.
    """
    squares, vectors = np.linalg.eigh(gram.total)
    lengths = np.sqrt(np.maximum(squares[::-1], 0.0))
    values, short = _like(xp, inside, lengths), _like(xp, inside, vectors[:, ::-1][:, :rank])
    if rank > len(lengths) or below_reach(xp, Basis(short, values), rank):
        return None
    images = xp.matmul(hermitian(xp, unfold(inside, mode)), short)
    if _SHORT * lengths[rank - 1] > lengths[0]:
        long = images / values[None, :rank]
        core = xp.eye(rank, dtype=inside.dtype, device=array_api_compat.device(inside)) * values[None, :rank]
    else:
        long = orthonormal_columns(xp, images)
        core = xp.matmul(hermitian(xp, images), long)
    other = conjugate(xp, long)  # B = U Σ Vᴴ is U G Wᵀ with W the conjugate of V
    core, factors = (core, [short, other]) if mode == 0 else (xp.permute_dims(core, (1, 0)), [other, short])
    return Truncation(core, factors, [values, values], "leading")


def _like(xp: Namespace, x: Array, host: Any) -> Array:
    """Return a host array in the precision of ``x``, where ``x`` lies."""
    dtype = x.dtype if np.iscomplexobj(host) or not is_complex(xp, x.dtype) else xp.real(x[:1, :1]).dtype
    return xp.astype(xp.asarray(np.ascontiguousarray(host), device=array_api_compat.device(x)), dtype)


def fill(space: KrylovSpace, rank: int, squares: float, floor: float = 0.0, rival: FloatArray | None = None) -> "Gram":
    """Grow a space until another block hardly lowers what a rank leaves of a matrix; return B Bᴴ.

    ``squares`` is ‖X‖². The squared singular values of B are those of X from below (Rayleigh and Ritz), so that their
    sum tells. Directions whose squares do not exceed ``floor`` are not waited for, nor ranks 1, 2, … that will hardly
    leave less than the squared errors in ``rival``.
    """
    gram, fresh, captured = Gram(space.xp), False, np.zeros(0)
    rounding = epsilon(space.xp, space.x.dtype) * squares
    most = min(_MOST_BLOCKS * space.block, space.x.shape[space.mode])
    while space.width + space.block <= most:
        space.grow(fresh=fresh)
        gram.add(unfold(space.rows[-1], space.mode))
        if len(space.rows) < _FEWEST_BLOCKS - 1:
            continue
        values = gram.values()[:rank]
        before, captured = captured, np.cumsum(np.where(values > floor, values, 0.0))
        if len(space.rows) < _FEWEST_BLOCKS or (len(values) < rank and values[-1] > floor):
            continue
        if len(before) < len(captured):
            before = np.pad(before, (0, len(captured) - len(before)), mode="edge")
        gains, left = captured - before, squares - captured
        settled = gains <= np.maximum(WORTHWHILE * left, rounding)
        if settled[-1] and (fresh or space.block >= rank):
            break
        if rival is not None and np.all(settled | (left - _TO_COME * gains > rival[: len(left)])):
            break
        # Of a singular value that comes more often than a block is wide the space never sees the rest.
        fresh = bool(settled[-1])
    return gram


class Gram:
    """B Bᴴ in the widest type, block by block."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp
        self.parts: list[Array] = []
        self.total: Any = np.zeros((0, 0))

    def add(self, rows: Array) -> None:
        """Add a block of rows (b, p)."""
        xp = self.xp
        self.parts.append(xp.astype(rows, widest_dtype(xp, rows), copy=False))
        across = hermitian(xp, self.parts[-1])
        new = np.concatenate([to_numpy(xp.matmul(part, across)) for part in self.parts])
        old, width = self.total.shape[0], new.shape[0]
        total = np.zeros((width, width), dtype=new.dtype)
        total[:old, :old], total[:, old:], total[old:, :] = self.total, new, new.conj().T
        self.total = total

    def values(self) -> FloatArray:
        """Return the eigenvalues, the largest first."""
        return np.linalg.eigvalsh(self.total)[::-1].astype(np.float64, copy=False)


def columns_at_a_time(x: Array, mode: int) -> int:
    """Return how many columns of an unfolding are worked on at a time."""
    return max(1, max(_AT_A_TIME, math.prod(x.shape) // 16) // x.shape[mode])


def times_rest(xp: Namespace, x: Array, mode: int, matrix: Array) -> Array:
    """Multiply an unfolding (n, p) by a matrix (p, b) from the right, without copying the unfolding."""
    if mode == 0 or (mode == len(x.shape) - 1 and isinstance(x, np.ndarray)):  # a view
        return xp.matmul(unfold(x, mode), matrix)
    total, at = None, 0
    for part in column_blocks(xp, x, mode, columns_at_a_time(x, mode)):
        product = xp.matmul(part, matrix[at : at + part.shape[1], :])
        total, at = product if total is None else total + product, at + part.shape[1]
    return total
