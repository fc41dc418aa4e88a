"""Is what a model leaves over white noise? Two tests that the notes of the noise rules rest on.

All rules take the noise for independent normal numbers, of one strength or of one for each slice. Where that fails,
what they return is not to be trusted, and what is left over shows it: heavy tails in its fourth moment, correlation of
its entries in the spectra of its unfoldings.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flora_tensor._algorithms import ENOUGH, Target, cheapest_order, hooi_of, st_hosvd_of
from flora_tensor._arrays import array_namespace
from flora_tensor._rank_errors import FloatArray
from flora_tensor.algebra import unfold

HostArray = npt.NDArray[Any]

# Standard deviations of white noise's own fluctuation that either statistic must exceed: one false alarm in a million.
SIGNIFICANT = 5.0

# Sweeps of HOOI that fit the model. Fewer entries than this tell nothing; nor does a residual of this share of the
# squares, which is rounding.
_SWEEPS, _FEWEST, _ROUNDING = 20, 100, 1e-11

# The least share of the mean noise that a slice is taken to have: one that the model explains whole says nothing about
# its noise. Rounds in which slices are scaled; not beside a model of this share of the degrees of freedom, which takes
# more of the noise from some slices than from others.
LEAST_SHARE, _BALANCINGS, _UNSEEN = 1e-4, 3, 1 / 8


def not_white(x: HostArray, ranks: Sequence[int], *, balanced: bool) -> tuple[str, ...]:
    """Say what tells the residual of the best model of these ranks from white noise; nothing if nothing does.

    ``x`` is the tensor, shape (I_0, …, I_{N-1}), in float64 or complex128 and of moderate magnitude; ranks of zero
    stand for no model. If ``balanced``, noise may be stronger in some slices than in others: they are scaled first.
    """
    if x.size < _FEWEST:
        return ()
    explained = degrees_of_freedom(ranks, x.shape) / x.size
    if explained > 1 / 2:
        return ("it has less than half of the degrees of freedom, no bulk of noise",)
    factors = _model(x, ranks)
    rest = _left_over(x, factors)
    if float(np.sum(np.abs(rest) ** 2)) <= _ROUNDING * float(np.sum(np.abs(x) ** 2)):
        return ()
    for _ in range(_BALANCINGS if balanced and explained < _UNSEEN else 0):
        uneven = unevenness([np.sum(np.abs(unfold(rest, k)) ** 2, axis=1) for k in range(x.ndim)], x.shape)
        if uneven is None:
            break
        x = divided(x, [np.sqrt(u) for u in uneven])
        factors = _model(x, ranks)
        rest = _left_over(x, factors)
    excess = _excess_kurtosis(rest)
    found: list[str] = []
    if _kurtosis_score(rest, excess) > SIGNIFICANT:
        found.append(f"it has heavy tails (excess kurtosis {excess:.3g})")
    directions = [_sphericity_score(x, k, u, excess) for k, u in enumerate(factors)]
    if max(directions) > SIGNIFICANT:
        worst = directions.index(max(directions))
        found.append(f"it is stronger in some directions than in others, most clearly in mode {worst}")
    return tuple(found)


def degrees_of_freedom(ranks: Sequence[int], shape: Sequence[int]) -> int:
    """Return ∏ r + Σ (I_k r_k − r_k²), the dimension of the set of tensors of these multilinear ranks."""
    return math.prod(ranks) + sum(n * r - r * r for n, r in zip(shape, ranks))


def unevenness(slice_squares: Sequence[FloatArray], shape: Sequence[int]) -> list[FloatArray] | None:
    """Return each slice's share of noise relative to the mean of its mode, or None where all are alike.

    For white noise Σ (v_i/v̄ − 1)² · p/2 is χ² with I_k − 1 degrees of freedom, p entries a slice; the slices of a mode
    are alike while it stays within five standard deviations.
    """
    found: list[FloatArray] = []
    for squares, size in zip(slice_squares, shape):
        mean = float(squares.mean())
        relative = squares / mean if mean > 0 else np.ones(size)
        statistic = float(np.sum((relative - 1) ** 2)) * math.prod(shape) / size / 2
        alike = statistic <= size - 1 + SIGNIFICANT * math.sqrt(2 * (size - 1))
        found.append(np.ones(size) if alike else np.maximum(relative, LEAST_SHARE))
    return found if any(float(np.ptp(v)) > 0 for v in found) else None


def divided(x: HostArray, weights: Sequence[FloatArray]) -> HostArray:
    """Divide the slices of every mode by its weights."""
    for mode, weight in enumerate(weights):
        x = x / weight.astype(np.real(x).dtype).reshape([-1 if k == mode else 1 for k in range(x.ndim)])
    return x


def _left_over(x: HostArray, factors: Sequence[HostArray]) -> HostArray:
    return x - _projected(_projected(x, [u.conj().T for u in factors]), factors)


def _model(x: HostArray, ranks: Sequence[int]) -> list[HostArray]:
    """Return the factors (I_n, r_n) of HOOI."""
    if not any(ranks):
        return [np.zeros((n, 0), x.dtype) for n in x.shape]
    xp = array_namespace("select_ranks", x)
    start = st_hosvd_of(xp, x, Target(tuple(ranks)), cheapest_order(x.shape, ranks), quick=True)
    return hooi_of(xp, x, start, _SWEEPS, ENOUGH)[0].factors


def _projected(x: HostArray, matrices: Sequence[HostArray]) -> HostArray:
    for mode, matrix in enumerate(matrices):
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, mode)), 0, mode)
    return x


def _parts(x: HostArray) -> FloatArray:
    """Return real numbers as they are, and complex ones as pairs: of circular noise all are independent."""
    return np.ascontiguousarray(x).view(np.real(x[:1]).dtype).ravel()


def _excess_kurtosis(x: HostArray) -> float:
    squares = _parts(x) ** 2
    return float(np.mean(squares * squares) / np.mean(squares) ** 2 - 3.0)


def _kurtosis_score(x: HostArray, excess: float) -> float:
    """Return how many standard deviations a kurtosis lies above that of normal numbers.

    Anscombe and Glynn, *Distribution of the kurtosis statistic b₂ for normal samples*, Biometrika 70 (1983): a cube
    root makes its distribution, which is skewed up to tens of thousands of entries, nearly normal.
    """
    n = float(_parts(x).size)
    deviation = math.sqrt(24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5)))
    t = (excess + 6 / (n + 1)) / deviation
    skewness = (
        6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    )
    a = 6 + 8 / skewness * (2 / skewness + math.sqrt(1 + 4 / skewness**2))
    ratio = (1 - 2 / a) / max(1 + t * math.sqrt(2 / (a - 4)), 1e-300)
    return (1 - 2 / (9 * a) - ratio ** (1 / 3)) / math.sqrt(2 / (9 * a))


def _sphericity_score(x: HostArray, mode: int, factor: HostArray, excess: float) -> float:
    """Return how many standard deviations an unfolding's spectrum lies above the spread of white noise's.

    With S the Gram matrix of the n × p unfolding, U = n tr S²/(tr S)² − 1 is what its eigenvalues vary beside their
    mean. For white noise n p U/2 is χ² with n(n+1)/2 − 1 degrees of freedom while n stays behind p (John, *Some optimal
    multivariate tests*, Biometrika 58, 1971), and has the same mean and variance in whichever way both grow (Ledoit and
    Wolf, *Some hypothesis tests for the covariance matrix when the dimension is large compared to the sample size*,
    Annals of Statistics 30, 2002). An excess kurtosis κ adds κ to p U (Wang and Yao, *On the sphericity test with
    large-dimensional observations*, EJS 7, 2013).

    The rows are those orthogonal to the model's factor. As that was fitted, it takes as many directions of the columns.
    """
    rank = factor.shape[1]
    rows = np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)
    rows = rows - factor @ (factor.conj().T @ rows)
    n, p = rows.shape[0] - rank, rows.shape[1] - rank
    total = float(np.sum(np.abs(rows) ** 2))
    if n < 2 or p < 2 or total == 0.0:
        return 0.0
    short = rows if rows.shape[0] <= rows.shape[1] else rows.conj().T
    gram = short @ short.conj().T
    spread = n * float(np.sum(np.abs(gram) ** 2)) / total**2 - 1
    complex_ = np.iscomplexobj(x)
    freedom = n * n - 1 if complex_ else n * (n + 1) / 2 - 1
    statistic = n * (p * spread - (excess / 2 if complex_ else excess)) / (1 if complex_ else 2)
    # Wilson and Hilferty's cube root, which is nearly normal from a few degrees of freedom on.
    unit = 2 / (9 * freedom)
    return (math.copysign(abs(statistic / freedom) ** (1 / 3), statistic) - 1 + unit) / math.sqrt(unit)
