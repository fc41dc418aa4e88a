"""The randomized decomposition: HOOI that multiplies the tensor as few times as it can.

Where two modes or more shrink much, nearly all the work is in products of the tensor with thin matrices. So every
product is made to tell as much as it can:

* The large modes fall into two sides. A product with X projects one side onto bases wider than the ranks
  (`range_sizes`), and all that follows until the next product works on what is left: for each mode of the other side
  the leading directions given the present factors, which is an update of HOOI but wider, and HOOI *within* the small
  core that all bases leave, to convergence.
* A side of one mode keeps the bases of earlier rounds and multiplies X by the new directions alone.

The wider bases contain the present factors, so the error falls from round to round. Of a matrix the two sides would be
those of one Krylov space: see `_krylov`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import array_api_compat
import numpy as np

from flora_tensor._algorithms import (
    ENOUGH,
    MOST_SWEEPS,
    Target,
    Truncation,
    by_shrinkage,
    cheapest_order,
    hooi_of,
    st_hosvd_of,
)
from flora_tensor._arrays import epsilon, float_squares, hermitian
from flora_tensor._bases import all_mode_values, complement, gaussian, leading_basis, orthonormal_columns
from flora_tensor._checks import feasible_ranks
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import multi_mode_dot, unfold

# Directions that a basis holds beyond the rank, at least; half the rank where that is more. A product with 32 columns
# costs little more than one with 16, as both read the tensor once.
_OVERSAMPLING = 16

# A side keeps the directions of earlier rounds while basis and product hold at most this share of the tensor's numbers.
_KEPT = 1 / 10

# Products with the tensor, at least: what rounding hides of a very small error is found by doing, not by measuring.
_FEWEST_PRODUCTS = 4

# Products end when those to come are expected to take less than this share off the squared error.
_WORTHWHILE = 1.5e-3

# Products with the tensor, at most.
_MOST_PRODUCTS = 60


def range_sizes(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return how many directions a basis holds of each mode; all of a mode that is not much larger."""
    wished = [r + max(_OVERSAMPLING, r // 2) for r in ranks]
    return feasible_ranks([s if 2 * s <= n else n for s, n in zip(wished, shape)], shape)


def large_modes(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the modes that `range_sizes` shrinks, the one that shrinks most first."""
    return [k for k in by_shrinkage(shape, sizes) if 0 < sizes[k] < shape[k]]


@dataclass(frozen=True, eq=False)
class _Side:
    """Some of the large modes: an orthonormal basis (n_k, w_k) of each, and X projected onto them."""

    bases: dict[int, Array]
    product: Array

    @classmethod
    def of(cls, x: Array, bases: dict[int, Array]) -> "_Side":
        modes = list(bases)
        return cls(bases, multi_mode_dot(x, [bases[k] for k in modes], modes=modes, transpose=True))

    def grown(self, xp: Namespace, x: Array, directions: dict[int, Array], factors: list[Array]) -> "_Side":
        """Add directions to the basis of the only mode; where it would grow too wide keep only its factor and them."""
        ((mode, new),) = directions.items()
        old, product = self.bases[mode], self.product
        if old.shape[1] + new.shape[1] > _most_kept(x, mode):
            kept = _coordinates(xp, self, mode, factors[mode])
            old, product = xp.matmul(old, kept), multi_mode_dot(product, [kept], modes=[mode], transpose=True)
        new = complement(xp, old, new)
        added = multi_mode_dot(x, [new], modes=[mode], transpose=True)
        return _Side({mode: xp.concat([old, new], axis=1)}, xp.concat([product, added], axis=mode))


def _most_kept(x: Array, mode: int) -> float:
    """Return how many directions of a mode may be kept, their product with ``x`` included."""
    size = math.prod(x.shape)
    return _KEPT * size / (x.shape[mode] + size / x.shape[mode])


def _grows(x: Array, modes: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]) -> bool:
    """Tell whether the side of ``modes`` keeps the directions of earlier rounds."""
    return len(modes) == 1 and ranks[modes[0]] + sizes[modes[0]] <= _most_kept(x, modes[0])


def randomized_of(
    xp: Namespace, x: Array, ranks: tuple[int, ...], generator: np.random.Generator, squares: float
) -> tuple[Truncation, int]:
    """Decompose from a random start; return the result and how many products with ``x`` it took.

    ``squares`` is ‖X‖². There are three modes or more, and at least two must be large.
    """
    sizes = range_sizes(x.shape, ranks)
    large = large_modes(x.shape, sizes)
    here, there = large[0::2], large[1::2]
    sketch = _Side.of(x, {k: gaussian(xp, x, (x.shape[k], sizes[k]), generator) for k in there}).product
    bases = {k: _range(xp, sketch, k, sizes[k], generator) for k in here}
    del sketch  # as large as a side
    sides: list[_Side | None] = [_Side.of(x, bases), None]
    factors: list[Array | None] = [None] * len(ranks)
    captured, products, gains = 0.0, 2, list[float]()
    while True:
        side = sides[products % 2]
        assert side is not None
        inside = [
            u if u is None or k not in side.bases else _coordinates(xp, side, k, u) for k, u in enumerate(factors)
        ]
        directions = _directions(xp, side, there, inside, ranks, sizes, generator)
        core = multi_mode_dot(side.product, list(directions.values()), modes=list(directions), transpose=True)
        inner = _inner(xp, core, directions, inside, ranks, squares)
        bases = side.bases | directions
        earlier = factors
        factors = [xp.matmul(bases[k], u) if k in bases else u for k, u in enumerate(inner.factors)]
        before, captured = captured, float_squares("randomized", xp, inner.core)
        if products > 2:
            gains.append(captured - before)
        left = max(squares - captured, 0.0)
        enough = products >= _FEWEST_PRODUCTS and (
            max(gains[-2:]) <= epsilon(xp, x.dtype) * squares or _gain_to_come(gains) <= _WORTHWHILE * left
        )
        if enough or products == _MOST_PRODUCTS:
            break
        if not _grows(x, here, ranks, sizes):
            side = sides[products % 2] = None  # frees its product with x before the next is made
        products += 1
        grown = sides[products % 2]
        sides[products % 2] = _Side.of(x, directions) if grown is None else grown.grown(xp, x, directions, earlier)
        here, there = there, here
    values = all_mode_values(xp, core)
    return Truncation(inner.core, factors, values, "leading"), products


def _gain_to_come(gains: Sequence[float]) -> float:
    """Estimate what all further products will gain at most, given what those after the second did.

    On flat spectra gains fall like 1/k² (measured), so that after k products k times the last is to come. As one side
    may have much to gain where the other has little, the last gain is the mean of two, but where they fall steadily.
    """
    ratios = [b / a if a > 0 else math.inf for a, b in itertools.pairwise(gains[-3:])]
    steady = len(gains) > 2 and max(ratios) < 1 / 2
    return (gains[-1] if steady else (gains[-2] + gains[-1]) / 2) * (len(gains) + 2)


def _directions(
    xp: Namespace,
    side: _Side,
    modes: list[int],
    inside: list[Array | None],
    ranks: tuple[int, ...],
    sizes: tuple[int, ...],
    generator: np.random.Generator,
) -> dict[int, Array]:
    """Return for each of ``modes`` a wide basis, given X projected onto the bases of the other ``side``.

    ``inside`` are the factors, those of the side in its bases. Where there are any yet, the leading directions of what
    they leave of the tensor: those of HOOI, and more.
    """
    if inside[modes[0]] is None:
        return {k: _range(xp, side.product, k, sizes[k], generator) for k in modes}
    inside = list(inside)
    found: dict[int, Array] = {}
    for mode in modes:
        others = [k for k in range(len(ranks)) if k != mode]
        partial = multi_mode_dot(side.product, [inside[k] for k in others], modes=others, transpose=True)
        basis = leading_basis(xp, partial, mode, ranks[mode], sizes[mode])
        inside[mode] = basis[:, : ranks[mode]]
        if basis.shape[1] < sizes[mode]:
            # The factors leave fewer directions than wanted: more are seen through the widest basis of the other side.
            others.remove(max(side.bases, key=lambda k: side.bases[k].shape[1]))
            partial = multi_mode_dot(side.product, [inside[k] for k in others], modes=others, transpose=True)
            seen = multi_mode_dot(partial, [basis], modes=[mode], transpose=True)
            partial = partial - multi_mode_dot(seen, [basis], modes=[mode])
            more = sizes[mode] - basis.shape[1]
            basis = xp.concat([basis, complement(xp, basis, leading_basis(xp, partial, mode, more, more))], axis=1)
        found[mode] = basis
    return found


def _inner(
    xp: Namespace,
    core: Array,
    directions: dict[int, Array],
    inside: list[Array | None],
    ranks: tuple[int, ...],
    squares: float,
) -> Truncation:
    """Decompose the core that all bases leave: from the present factors, or anew where there are none yet."""
    if any(u is None for u in inside):
        start = st_hosvd_of(xp, core, Target(ranks), cheapest_order(core.shape, ranks), quick=True)
    else:
        inner = [_leading(xp, core, k, ranks) if k in directions else u for k, u in enumerate(inside)]
        start = Truncation(multi_mode_dot(core, inner, transpose=True), inner, [], "leading")
    return hooi_of(xp, core, start, MOST_SWEEPS, ENOUGH, squares)[0]


def _coordinates(xp: Namespace, side: _Side, mode: int, factor: Array) -> Array:
    """Express a factor in its side's basis, whose span holds it; QR takes away what rounding added."""
    return orthonormal_columns(xp, xp.matmul(hermitian(xp, side.bases[mode]), factor))


def _leading(xp: Namespace, core: Array, mode: int, ranks: tuple[int, ...]) -> Array:
    """Return the first columns of the identity: the leading ones of a basis in its own coordinates."""
    eye = xp.eye(core.shape[mode], dtype=core.dtype, device=array_api_compat.device(core))
    return eye[:, : ranks[mode]]


def _range(xp: Namespace, x: Array, mode: int, size: int, generator: np.random.Generator) -> Array:
    """Return an orthonormal basis (n, ≤ size) that nearly holds the leading directions of an unfolding.

    A random combination of its columns and one power step.
    """
    matrix = unfold(x, mode)
    columns = matrix.shape[1]
    if columns > size:
        drawn = xp.matmul(matrix, gaussian(xp, x, (columns, size), generator))
        matrix = xp.matmul(matrix, xp.matmul(hermitian(xp, matrix), drawn))
    return orthonormal_columns(xp, matrix)
