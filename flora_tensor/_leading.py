"""What small ranks of a large matrix buy, without its full spectrum.

Under a budget of a few percent a weight gets a small part of its ranks. Its largest singular values cost a fraction of
all of them; if the budget then reaches for more than was looked at, more is looked at.
"""

import math

import numpy as np

from flora_tensor._arrays import array_namespace, to_numpy
from flora_tensor._typing import Array
from flora_tensor.noise import edge_squared
from flora_tensor.spectra import Frontier

__all__ = ["leading_frontier", "listed_ranks"]

# Matrices with fewer rows or columns than this are decomposed in full.
_LARGE = 512

# A weight is looked at up to so many times the rank that is its share of the budget.
_MARGIN = 4

# Power iterations. After two, the squared errors of the first quarter of what is looked at exceed the least ones by
# less than 1e-4 where the spectrum falls, and by 0.1 % where all but a few values are noise (measured).
_SWEEPS = 2


def listed_ranks(shape: tuple[int, ...], share: float | None, widening: int) -> int | None:
    """Return up to which rank a matrix is to be looked at, or ``None`` for all of it.

    ``share`` is the budget as a share of all dense numbers; each ``widening`` looks four times further.
    """
    if share is None or len(shape) != 2 or min(shape) < _LARGE:
        return None
    short, long = sorted(shape)
    rank = math.ceil(_MARGIN ** (1 + widening) * share * short * long / (short + long))
    # Twelve products with so many columns and two QR, against a Gram matrix in float64 and its eigenvalues, in measured
    # rates: below this the estimate costs less than half.
    return rank if rank * long <= short * (0.05 * long + 0.3 * short) else None


def leading_frontier(x: Array, rank: int, norm: float, noise: float | None) -> tuple[Frontier, int | None]:
    """Return the errors of the ranks 0 to ``rank`` of a matrix, and how many of them stand above the noise.

    The errors are those of orthogonal projections that exist, so that what is promised can be kept; they exceed the
    least ones by as much as the subspaces of a randomized power iteration miss (Halko, Martinsson and Tropp, *Finding
    structure with randomness*, SIAM Review 53, 2011, algorithm 4.4). The count is ``None`` where all ranks that were
    looked at do, or no noise is known.
    """
    rows, columns = x.shape
    # In units of a power of two near the norm, so that nothing over- or underflows.
    exponent = math.frexp(norm)[1]
    squares = _leading_squares(x if abs(exponent) < 60 else x * math.ldexp(1.0, -exponent), rank)
    unit = math.ldexp(1.0, 0 if abs(exponent) < 60 else exponent)
    total = (norm / unit) ** 2
    errors = np.maximum(total - np.concatenate([[0.0], np.cumsum(squares)]), 0.0)
    above = None
    if noise is not None:
        count = int(np.count_nonzero(squares > (noise / unit) ** 2 * edge_squared(rows, columns)))
        above = count if count < len(squares) else None
    ranks = np.arange(len(errors) if above is None else above + 1)
    lower = np.concatenate([[True], np.diff(errors[: len(ranks)]) < 0])
    ranks, errors = ranks[lower], errors[: len(ranks)][lower]
    counts = ranks * (rows + columns)  # as in a truncated SVD: the second mode is left whole
    pairs = np.stack([ranks, np.where(ranks > 0, columns, 0)], axis=1)
    if above is None:  # the change itself is a choice too, so that no budget finds nothing to spend on
        counts, errors = np.append(counts, rows * columns), np.append(errors, 0.0)
        pairs = np.vstack([pairs, (rows, columns)])
    return Frontier(counts, errors * unit * unit, pairs, float(total * unit * unit), rows * columns), above


def _leading_squares(x: Array, rank: int) -> np.ndarray:
    """Estimate the largest squared singular values of a matrix from below, in decreasing order."""
    xp = array_namespace("extract", x)
    generator = np.random.default_rng(0)  # equal input gives equal bits
    transposed = xp.permute_dims(x, (1, 0))
    drawn = generator.standard_normal((x.shape[1], rank + 8), dtype=np.float32)
    sketch = xp.matmul(x, xp.astype(xp.asarray(drawn, device=x.device), x.dtype))
    for _ in range(_SWEEPS):
        sketch = xp.matmul(x, xp.matmul(transposed, xp.linalg.qr(sketch)[0]))
    inside = to_numpy(xp.matmul(transposed, xp.linalg.qr(sketch)[0]))
    gram = np.zeros((rank + 8, rank + 8))
    for start in range(0, inside.shape[0], 4096):  # in float64, which a difference of squares needs
        part = inside[start : start + 4096].astype(np.float64)
        gram += part.T @ part
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)[:rank]
