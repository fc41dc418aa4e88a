"""Singular values of the unfoldings, and the exact error of every choice of ranks.

The truncated HOSVD that keeps the leading r_k singular vectors of every mode has the error

    E(r) = ‖X − X_r‖² = ‖G‖² − ‖G[:r_0, …, :r_{N-1}]‖²,

where G is the core of the full HOSVD: one table over the core holds the exact error of every rank tuple. The difference
cancels; `error_table` sums the discarded part itself instead.
"""

import math
from collections.abc import Iterable

import numpy as np

from flora_tensor._arrays import (
    conjugate,
    epsilon,
    host_numbers,
    largest_magnitude,
    stop_gradient,
    times_power_of_two,
)
from flora_tensor._bases import (
    Basis,
    all_mode_values,
    mode_bases,
    mode_basis,
    mode_values,
    orthonormal_columns,
    safe_inverse,
    with_fixed_signs,
)
from flora_tensor._checks import check_tensor
from flora_tensor._frontiers import Frontier
from flora_tensor._prepared import Prepared, prepare
from flora_tensor._rank_errors import FloatArray, table_of
from flora_tensor._spectrum import ModeSpectra, Spectrum
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import fold, multi_mode_dot, unfold

__all__ = ["Frontier", "ModeSpectra", "Spectrum", "error_table", "hosvd_spectrum", "mode_spectra"]


def mode_spectra(x: Array) -> ModeSpectra:
    """Compute the singular values of every unfolding of a tensor.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.

    Returns
    -------
    ModeSpectra
        One vector of min(I_k, ∏_{j≠k} I_j) singular values per mode, decreasing, each with absolute error of order
        eps · σ_1 as LAPACK's SVD gives them; in float32 for 16-bit input.

    Raises
    ------
    ValueError
        If ``x`` has no axes, holds NaN or infinity, or has singular values beyond the range of its type.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *A multilinear singular value decomposition*, SIMAX 21 (2000).

    Examples
    --------
    >>> import numpy as np
    >>> spectra = mode_spectra(np.diag([3.0, 2.0]))
    >>> [v.round(12).tolist() for v in spectra.values]
    [[3.0, 2.0], [3.0, 2.0]]
    """
    ready = prepare("mode_spectra", x)
    xp, scaled, k = ready.xp, ready.x, ready.exponent
    norm = math.ldexp(ready.norm(), k)
    if len(x.shape) == 2:  # both sides have the same: take the shorter one's
        short = 0 if x.shape[0] <= x.shape[1] else 1
        values = _unscaled(ready, (mode_values(xp, scaled, short),)) * 2
    else:
        values = _unscaled(ready, all_mode_values(xp, scaled))
    return ModeSpectra(values, norm, tuple(x.shape))


def _unscaled(ready: Prepared, values: Iterable[Array]) -> tuple[Array, ...]:
    """Undo the scaling of singular values; those that leave the range of their type are refused."""
    with np.errstate(over="ignore"):  # NumPy would warn of what is refused in the next lines
        found = tuple(times_power_of_two(v, ready.exponent) for v in values)
    largest = max((largest_magnitude(ready.xp, v) or 0.0 for v in found), default=0.0)
    if not math.isfinite(largest):
        raise ValueError(
            f"{ready.where}: the largest singular value, about 2**{ready.exponent}, is beyond the range of "
            f"{found[0].dtype}; pass x in a wider type, or scaled"
        )
    return found


def hosvd_spectrum(x: Array) -> Spectrum:
    """Compute the full HOSVD of a tensor, from which the error of every truncation follows.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor, N ≥ 1. 16-bit floats are computed in float32, integers are promoted.

    Returns
    -------
    Spectrum
        Singular values, core and factors of the full HOSVD, in the type that the work was done in (float32 for 16-bit
        input).

    Raises
    ------
    ValueError
        If ``x`` has no axes, holds NaN or infinity, or has singular values beyond the range of its type.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *A multilinear singular value decomposition*, SIMAX 21 (2000), theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> spectrum = hosvd_spectrum(np.diag([3.0, 4.0]))
    >>> spectrum.error((1, 1)), spectrum.frontier().n_parameters.tolist()
    (0.6, [0, 5, 12])
    """
    return spectrum_of(prepare("hosvd_spectrum", stop_gradient(x)))


def matrix_spectrum(where: str, x: Array) -> Spectrum:
    """Compute a matrix's `Spectrum` without core and factors, which errors, bounds and the frontier do not need.

    Singular values alone cost a fraction of a full HOSVD: no vectors, and one side only.
    """
    ready = prepare(where, stop_gradient(x))
    short = 0 if x.shape[0] <= x.shape[1] else 1
    (values,) = _unscaled(ready, (mode_values(ready.xp, ready.x, short),))
    return Spectrum((values, values), None, (), math.ldexp(ready.norm(), ready.exponent), tuple(x.shape))


def cheapest_spectrum(where: str, x: Array) -> Spectrum:
    """Compute what frontiers and bounds need of a tensor: its full HOSVD, or a matrix's singular values alone."""
    if len(x.shape) == 2:
        return matrix_spectrum(where, x)
    entries = math.prod(x.shape)
    tall = next((mode for mode, n in enumerate(x.shape) if n * n > entries), None)
    return hosvd_spectrum(x) if tall is None else _tall_spectrum(prepare(where, stop_gradient(x)), tall)


def _tall_spectrum(ready: Prepared, tall: int) -> Spectrum:
    """Compute a `Spectrum` without an SVD of the unfolding A = U Σ Vᵀ of a mode longer than all others together.

    V comes from the shorter side, and the other modes see the small tensor Uᵀ A = Σ Vᵀ as they see A. The factor is
    A V Σ⁻¹: it lacks directions whose singular values vanish, and is as orthonormal as these stand above rounding.
    """
    xp, x, k = ready.xp, ready.x, ready.exponent
    others = [mode for mode in range(len(x.shape)) if mode != tall]
    sizes = tuple(x.shape[mode] for mode in others)
    short = xp.reshape(xp.permute_dims(x, (*others, tall)), (math.prod(sizes), x.shape[tall]))  # Aᵀ
    side = mode_basis(xp, short, 0)
    inverse = safe_inverse(xp, side.values, epsilon(xp, x.dtype) ** 2 * side.values[0])
    factor = xp.matmul(xp.permute_dims(short, (1, 0)), conjugate(xp, side.vectors) * inverse[None, :])
    projected = xp.permute_dims(side.vectors, (1, 0)) * side.values[:, None]
    inside = fold(projected, tall, (*x.shape[:tall], math.prod(sizes), *x.shape[tall + 1 :]))
    bases = {mode: mode_basis(xp, inside, mode) for mode in others}
    core = multi_mode_dot(inside, [bases[mode].vectors for mode in others], modes=others, transpose=True)
    bases[tall] = Basis(factor, side.values)
    return Spectrum(
        values=_unscaled(ready, (bases[mode].values for mode in range(len(x.shape)))),
        core=times_power_of_two(core, k),
        factors=tuple(bases[mode].vectors for mode in range(len(x.shape))),
        norm=math.ldexp(ready.norm(), k),
        shape=tuple(x.shape),
    )


def spectrum_of(ready: Prepared, accuracy: float = 0.0) -> Spectrum:
    """Compute the `Spectrum` of a prepared tensor, with singular values right down to ``accuracy`` of the largest."""
    xp, x, k = ready.xp, ready.x, ready.exponent
    norm = math.ldexp(ready.norm(), k)  # first, as it refuses a symbol
    if len(x.shape) == 2:
        bases, core = _matrix_bases(xp, x, accuracy)
    else:
        bases = mode_bases(xp, x, accuracy)
        core = multi_mode_dot(x, [b.vectors for b in bases], transpose=True)
    return Spectrum(
        values=_unscaled(ready, (b.values for b in bases)),
        core=times_power_of_two(core, k),
        factors=tuple(b.vectors for b in bases),
        norm=norm,
        shape=tuple(x.shape),
    )


def _matrix_bases(xp: Namespace, x: Array, accuracy: float) -> tuple[list[Basis], Array]:
    """Compute both bases of a matrix from its shorter side.

    Projected onto the left vectors its rows are orthogonal and in decreasing order, so QR gives the right ones: no
    second SVD.
    """
    short, long = (0, 1) if x.shape[0] <= x.shape[1] else (1, 0)
    first = mode_basis(xp, x, short, accuracy)
    projected = multi_mode_dot(x, [first.vectors], modes=[short], transpose=True)
    second = Basis(with_fixed_signs(xp, orthonormal_columns(xp, unfold(projected, long))), first.values)
    core = multi_mode_dot(projected, [second.vectors], modes=[long], transpose=True)
    return ([first, second] if short == 0 else [second, first]), core


def error_table(core: Array) -> FloatArray:
    """Compute the exact squared error of every rank tuple from the core of a full HOSVD.

    Parameters
    ----------
    core : array, shape (m_0, …, m_{N-1})
        The core G of a Tucker tensor with orthonormal factors, as `hosvd_spectrum` gives it.

    Returns
    -------
    numpy array of float64, shape (m_0 + 1, …, m_{N-1} + 1)
        Entry (r_0, …, r_{N-1}) is ‖G‖² − ‖G[:r_0, …, :r_{N-1}]‖², the squared error of keeping these ranks. It is a sum
        of non-negative terms: errors far below eps · ‖G‖² keep their relative accuracy.

    Raises
    ------
    ValueError
        If ``core`` has no axes, holds NaN or infinity, or its squared norm is beyond the range of float64.

    Notes
    -----
    The discarded entries fall into N disjoint boxes: box k keeps i_j < r_j for the modes j before k, discards i_k ≥ r_k
    and leaves the later modes free. A box's sum is a suffix sum along mode k and prefix sums along the modes before it,
    of the squares summed over the modes behind it.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), property 10; the split into boxes avoids its cancellation.

    Examples
    --------
    >>> import numpy as np
    >>> error_table(np.diag([2.0, 1.0]))
    array([[5., 5., 5.],
           [5., 1., 1.],
           [5., 1., 0.]])
    """
    check_tensor("error_table", core)
    with np.errstate(over="ignore", invalid="ignore"):
        table = table_of(host_numbers("error_table", core))
    if not math.isfinite(table.flat[0]):
        raise ValueError("error_table: the core's squared norm is beyond the range of float64; pass it scaled down")
    return table
