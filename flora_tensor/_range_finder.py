"""An adaptive range finder: the leading part of a HOSVD, for tolerances and budgets that need no more of it.

One mode's basis grows block by block, as a block Krylov space with full orthogonalization: a block of directions Q is
multiplied by X once, which gives the next rows of the projected tensor B = Qᴴ X, and X times an orthonormal basis of
these rows gives the next directions. The other long modes get theirs from B. Of what the bases capture, the core C, a
full HOSVD is taken.

Since all bases are orthonormal, a truncation of C's HOSVD to ranks r has the exact error ‖X‖² − ‖C‖² + E_C(r), E_C
being the table of C: what is promised of it is kept, whatever the bases miss. That nothing which they miss would have
been the better choice is seen from the errors beyond them, which are bounded from below (`PartialSpectrum`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flora_tensor._arrays import epsilon, float_squares, suffix_sums, to_numpy
from flora_tensor._bases import gaussian, orthonormal_columns
from flora_tensor._gram import column_blocks
from flora_tensor._krylov import KrylovSpace, columns_at_a_time, orthonormal_rows, times_rest
from flora_tensor._prepared import Prepared
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, rank_grid
from flora_tensor._spectrum import Spectrum
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import multi_mode_dot, unfold
from flora_tensor.spectra import spectrum_of

# Directions that are added at a time: this many, or the mode's 32nd part where that is more.
_BLOCK = 16

# The basis grows up to this share of its mode. Beyond it, Gram matrices and the full HOSVD cost less (measured).
_WIDEST = 1 / 4

# A rank is trusted up to this share of its basis: the last directions of a Krylov space are not yet the leading ones.
_TRUSTED = 1 / 2

# A squared error is taken as a difference of squares down to so many ε ‖X‖², else the residual itself is summed.
_CANCELS = 1e3


@dataclass(frozen=True, eq=False)
class PartialSpectrum(Spectrum):
    """The HOSVD of what some bases capture of a tensor, and the errors of truncating *the tensor* by it.

    ``core`` is smaller than a full HOSVD's. Up to its shape errors are exact. Beyond it they are bounds from below: one
    direction more takes at most the square of a singular value in the middle of those found off the error, as
    singular values decrease, and all together at most ``missed``. So a choice of ranks within the core that is best
    by this table is the best of all.

    Attributes
    ----------
    missed : float
        ‖X‖² − ‖core‖².
    """

    missed: float = 0.0

    @property
    def max_ranks(self) -> tuple[int, ...]:
        """The multilinear ranks that a full HOSVD would have."""
        return tuple(min(n, math.prod(self.shape) // n) for n in self.shape)

    @cached_property
    def table(self) -> ErrorTable:
        """The errors of all rank tuples within the core, and of some beyond it."""
        beyond = [self._beyond(mode, most) for mode, most in enumerate(self.max_ranks)]
        grid, room = rank_grid(self.core.shape), [len(points) for points, _ in beyond]
        # Filled in place: nothing beside the core is as large.
        inside = ErrorTable.of_core(to_numpy(self.core), self.exponent, grid, room)
        errors, total, sizes = inside.errors, inside.total + self._missed, [len(points) for points in grid]
        grid = tuple(np.concatenate([g, points]) for g, (points, _) in zip(grid, beyond))
        here = [slice(size) for size in sizes]
        errors[tuple(here)] += self._missed
        for mode, (size, (_, gains)) in enumerate(zip(sizes, beyond)):
            last = errors[(*here[:mode], slice(size - 1, size), *here[mode + 1 :])]
            shape = [-1 if k == mode else 1 for k in range(errors.ndim)]
            np.subtract(last, gains.reshape(shape), out=errors[(*here[:mode], slice(size, None), *here[mode + 1 :])])
            here[mode] = slice(None)
        return ErrorTable(np.maximum(errors, 0.0, out=errors), grid, total)

    def table_within(self, low: Sequence[int], high: Sequence[int]) -> None:
        """Return nothing: beyond the core bounds on errors are no errors."""
        del low, high

    def table_around(self, ranks: Sequence[int], coarse: ErrorTable) -> ErrorTable:
        """Return the same table: it is complete within the core."""
        del ranks
        return coarse

    @cached_property
    def squared_tails(self) -> tuple[FloatArray, ...]:
        """For each mode the least squared error that its rank leaves; see `Spectrum.squared_tails`."""
        found: list[FloatArray] = []
        for mode, (tail, most) in enumerate(zip(self._core_tails, self.max_ranks)):
            beyond = np.arange(1, most - len(tail) + 2) * self._step(mode)
            found.append(np.concatenate([tail + self._missed, np.maximum(self._missed - beyond, 0.0)]))
        return tuple(found)

    def lower_bound(self, ranks: Sequence[int]) -> float:
        """Return √(max_k tail_k) / ‖X‖ over the core's tails: those of the tensor are no smaller."""
        total = self._missed + float(self._core_tails[0][0])
        return math.sqrt(max(float(t[r]) for t, r in zip(self._core_tails, ranks)) / total) if total > 0 else 0.0

    def upper_bound(self, ranks: Sequence[int]) -> float:
        """Return √(‖X‖² − ‖C‖² + Σ_k tail_k) / ‖X‖ over the core's tails, which the truncation's error stays within."""
        total = self._missed + float(self._core_tails[0][0])
        tails = sum(float(t[r]) for t, r in zip(self._core_tails, ranks))
        return math.sqrt((self._missed + tails) / total) if total > 0 else 0.0

    @cached_property
    def _missed(self) -> float:
        """``missed``, in units of 4**exponent."""
        return math.ldexp(self.missed, -2 * self.exponent)

    @cached_property
    def _core_tails(self) -> tuple[FloatArray, ...]:
        return tuple(suffix_sums(np.ldexp(to_numpy(v).astype(np.float64), -self.exponent)) for v in self.values)

    def _step(self, mode: int) -> float:
        """Bound what one direction more takes off the squared error, in units of 4**exponent."""
        tail = self._core_tails[mode]
        middle = (len(tail) - 1) // 2
        return float(tail[middle] - tail[middle + 1]) if len(tail) > 1 else 0.0

    def _beyond(self, mode: int, most: int) -> tuple[IntArray, FloatArray]:
        """Return ranks beyond the core and by how much they may lower the squared error, those up to the next too."""
        size = self.core.shape[mode]
        if size >= most:
            return np.zeros(0, np.int64), np.zeros(0)
        points = np.unique(np.minimum(size + 2 ** np.arange(most.bit_length()), most))
        until = np.append(points[1:] - 1, most)
        return points, np.minimum((until - size) * self._step(mode), self._missed)


@dataclass(frozen=True)
class Found:
    """Ranks, the spectrum that they were chosen from, and how many directions and products it took."""

    spectrum: PartialSpectrum
    ranks: tuple[int, ...]
    directions: int
    products: int

    @property
    def ran(self) -> str:
        """What it took, in words."""
        return f"adaptive range finder ({self.directions} directions, {self.products} products with x)"


def find_range(
    ready: Prepared,
    accuracy: float,
    allowed: float | None,
    pick: Callable[[Spectrum], tuple[int, ...]],
    generator: np.random.Generator,
) -> Found | None:
    """Find the leading part of the HOSVD that a choice of ranks needs, or ``None`` where that is not a small part.

    Parameters
    ----------
    ready : Prepared
        The tensor.
    accuracy : float
        The share of the largest singular value down to which they must be right.
    allowed : float, optional
        The squared error to stay within; without it there is a budget.
    pick : callable
        Chooses ranks by a spectrum.
    generator : numpy.random.Generator
        Draws the first directions.

    Returns
    -------
    Found or None
        ``None`` where the basis of the longest mode would have to hold more than a quarter of its directions.
    """
    shape = tuple(ready.x.shape)
    carried = [min(n, math.prod(shape) // n) if n else 0 for n in shape]
    mode = max(range(len(shape)), key=lambda k: carried[k])
    block, widest = max(_BLOCK, carried[mode] // 32), int(_WIDEST * carried[mode])
    if widest < 2 * block or len(shape) < 2:
        return None
    space = _Space(ready, mode, block, generator)
    widths = [2 * max(_BLOCK, n // 32) for n in carried]
    wanted = float(2 * block)
    while wanted <= widest:
        while space.width < wanted:
            space.grow()
        if space.surely_misses(allowed):
            wanted = max(space.width + block, space.needs(allowed))
            continue
        spectrum = _spectrum(ready, space, widths, accuracy, generator)
        ranks = pick(spectrum)
        narrow = [k for k, r in enumerate(ranks) if not _is_trusted(spectrum, k, r)]
        if not narrow:
            return Found(spectrum, ranks, space.width, space.products)
        if mode in narrow:
            wanted = ranks[mode] / _TRUSTED
            wanted = max(space.width + block, wanted if 2 * space.width > widest else min(wanted, 2 * space.width))
        del spectrum  # before the next one, beside its table, is there
        for k in narrow:
            widths[k] = max(widths[k], min(2 * widths[k], math.ceil(ranks[k] / _TRUSTED)))
    return None


def _is_trusted(spectrum: PartialSpectrum, mode: int, rank: int) -> bool:
    size = spectrum.core.shape[mode]
    return rank <= _TRUSTED * size or size == spectrum.factors[mode].shape[0]


class _Space(KrylovSpace):
    """A Krylov space that knows how much of a tensor it must hold."""

    def __init__(self, ready: Prepared, mode: int, block: int, generator: np.random.Generator) -> None:
        super().__init__(ready.xp, ready.x, mode, block, generator)
        self.squares = ready.norm() ** 2
        self.captured = self.last = 0.0

    def grow(self, *, fresh: bool = False) -> None:
        super().grow(fresh=fresh)
        self.last = float_squares("tucker", self.xp, self.rows[-1])
        self.captured += self.last

    def surely_misses(self, allowed: float | None) -> bool:
        """Tell, without a product, whether what is missed is more than ``allowed``."""
        return allowed is not None and max(self.squares - self.captured - self._blur, self.last) > allowed

    def needs(self, allowed: float | None) -> float:
        """Estimate how wide the basis must be, if blocks to come capture as much as the last one."""
        too_much = self.squares - self.captured - self._blur - (allowed or 0.0)
        if allowed is None or too_much <= 0:
            return 0.0
        return self.width + self.block * too_much / self.last if self.last > 0 else math.inf

    @property
    def _blur(self) -> float:
        return _CANCELS * epsilon(self.xp, self.x.dtype) * self.squares


def _spectrum(
    ready: Prepared, space: _Space, widths: Sequence[int], accuracy: float, generator: np.random.Generator
) -> PartialSpectrum:
    """Take the HOSVD of what the space, and bases of the other modes of given widths, capture."""
    xp, x, mode = ready.xp, ready.x, space.mode
    core = space.joined()
    missed = _outside(xp, x, mode, space.basis, core, space.squares)
    bases: dict[int, Array] = {mode: space.basis}
    for k in sorted(range(len(core.shape)), key=lambda k: -core.shape[k]):
        if k == mode or 2 * widths[k] >= core.shape[k]:
            continue
        bases[k] = _leading_range(xp, core, k, widths[k], generator)
        projected = multi_mode_dot(core, [bases[k]], modes=[k], transpose=True)
        missed += _outside(xp, core, k, bases[k], projected, space.squares)
        core = projected
    inner = spectrum_of(Prepared(xp, core, 0, float_squares("tucker", xp, core)), accuracy)
    factors = tuple(xp.matmul(bases[k], u) if k in bases else u for k, u in enumerate(inner.factors))
    return PartialSpectrum(inner.values, inner.core, factors, ready.norm(), tuple(x.shape), missed)


def _outside(xp: Namespace, x: Array, mode: int, basis: Array, projected: Array, squares: float) -> float:
    """Return ‖X − Q Qᴴ X‖², given Qᴴ X; ``squares`` is the scale that it is to be exact on."""
    difference = float_squares("tucker", xp, x) - float_squares("tucker", xp, projected)
    if difference > _CANCELS * epsilon(xp, x.dtype) * squares:
        return difference
    width = columns_at_a_time(x, mode)
    parts = zip(column_blocks(xp, x, mode, width), column_blocks(xp, projected, mode, width))
    return sum(float_squares("tucker", xp, part - xp.matmul(basis, inside)) for part, inside in parts)


def _leading_range(xp: Namespace, x: Array, mode: int, size: int, generator: np.random.Generator) -> Array:
    """Return an orthonormal basis that nearly holds the leading left singular vectors of an unfolding.

    Halko, Martinsson and Tropp, *Finding structure with randomness*, SIAM Review 53 (2011), algorithm 4.4.
    """
    columns = math.prod(x.shape) // x.shape[mode]
    if columns <= size:
        return orthonormal_columns(xp, unfold(x, mode))
    basis = orthonormal_columns(xp, times_rest(xp, x, mode, gaussian(xp, x, (columns, size), generator)))
    for _ in range(2):
        across = orthonormal_rows(xp, unfold(multi_mode_dot(x, [basis], modes=[mode], transpose=True), mode))
        basis = orthonormal_columns(xp, times_rest(xp, x, mode, across))
    return basis
