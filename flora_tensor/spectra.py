"""Singular values of the unfoldings, and the exact error of every choice of ranks.

The truncated HOSVD that keeps the leading r_k singular vectors of every mode has the error

    E(r) = ‖X − X_r‖² = ‖G‖² − ‖G[:r_0, …, :r_{N-1}]‖²,

where G is the core of the full HOSVD: one table over the core holds the exact error of every rank tuple. The difference
cancels; `error_table` sums the discarded part itself instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flora_tensor._arrays import (
    array_namespace,
    conjugate,
    epsilon,
    float_squares,
    power_of_two,
    result_dtype,
    squared_norm,
    stop_gradient,
    suffix_sums,
    times_power_of_two,
    to_numpy,
    working_dtype,
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
from flora_tensor._checks import as_int, check_tensor
from flora_tensor._frontiers import Choices, Frontier
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, discarded, rank_grid, table_of
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import fold, multi_mode_dot, unfold

__all__ = ["Frontier", "ModeSpectra", "Spectrum", "error_table", "hosvd_spectrum", "mode_spectra"]

# A frontier is listed over at most this many rank tuples; a geometric grid thins the modes beyond it.
_MAX_FRONTIER = 1 << 20


@dataclass(frozen=True, eq=False)
class ModeSpectra:
    """The singular values of a tensor's unfoldings.

    Attributes
    ----------
    values : tuple of arrays, shape (m_k,)
        One vector of singular values per mode, in decreasing order, in the units of the tensor. Mode k has at most
        m_k = min(I_k, ∏_{j≠k} I_j) of them.
    norm : float
        The tensor's Frobenius norm ‖X‖; Σ σ² = ‖X‖² in every mode where all singular values are listed.
    shape : tuple of int
        The tensor's shape.
    kind : str
        ``"exact"``: all singular values of X. ``"sequential"``: of the tensors that ST-HOSVD meets, mode by mode, each
        already truncated in the modes before; exact in the first mode, below the exact ones in the others.
        ``"leading"``: the largest ones, as bases that hold nearly all of them see them, from below.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *A multilinear singular value decomposition*, SIMAX 21 (2000), definition 4.
    """

    values: tuple[Array, ...]
    norm: float
    shape: tuple[int, ...]
    kind: str = "exact"

    def tails(self) -> tuple[FloatArray, ...]:
        """Return for each mode t with t[r] = Σ_{i≥r} σ_i², the squared norm that rank r leaves out; length m + 1."""
        return tuple(suffix_sums(to_numpy(v)) for v in self.values)

    def __repr__(self) -> str:
        counts = tuple(int(v.shape[0]) for v in self.values)
        return f"ModeSpectra(shape={self.shape}, kind={self.kind!r}, counts={counts}, norm={self.norm:.6g})"


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A full HOSVD and, through it, the exact error of every truncation; made by `hosvd_spectrum`.

    Attributes
    ----------
    values : tuple of arrays
        The singular values of each unfolding, decreasing, shape (m_k,) with m_k = min(I_k, ∏_{j≠k} I_j).
    core : array, shape (m_0, …, m_{N-1})
        The core of the full HOSVD, all-orthogonal.
    factors : tuple of arrays
        The left singular vectors of each unfolding, shape (I_k, m_k).
    norm : float
        ‖X‖.
    shape : tuple of int
        The tensor's shape.
    """

    values: tuple[Array, ...]
    core: Array
    factors: tuple[Array, ...]
    norm: float
    shape: tuple[int, ...]

    @property
    def max_ranks(self) -> tuple[int, ...]:
        """The multilinear ranks that the table covers: the core's shape."""
        return tuple(self.core.shape) if self.core is not None else tuple(int(v.shape[0]) for v in self.values)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that the numbers were computed in, as NumPy's."""
        return to_numpy(self.values[0] if self.core is None else self.core).dtype

    @cached_property
    def exponent(self) -> int:
        """The power of two near ‖X‖; squares are kept in units of 4**exponent, whatever the magnitude of the data."""
        return math.frexp(self.norm)[1] if self.norm > 0 else 0

    @cached_property
    def table(self) -> "ErrorTable":
        """The errors of all rank tuples (on a grid where the whole table would not fit), as relative squares."""
        return ErrorTable.of_core(to_numpy(self.core), self.exponent, rank_grid(self.max_ranks))

    def table_around(self, ranks: Sequence[int], coarse: "ErrorTable") -> "ErrorTable":
        """Compute the errors on a grid that is finer between the neighbors of ``ranks`` on a coarse one.

        Parameters
        ----------
        ranks : sequence of int
            One rank a mode, on the coarse grid.
        coarse : ErrorTable
            The errors on the coarse grid.

        Returns
        -------
        ErrorTable
            Exact errors at the points of the finer grid.

        References
        ----------
        The errors are those of `error_table`.
        """
        return ErrorTable.of_core(to_numpy(self.core), self.exponent, coarse.grid_around(ranks, self.max_ranks))

    def error(self, ranks: Sequence[int]) -> float:
        """Return the exact relative error ‖X − X_r‖ / ‖X‖ of the HOSVD truncated to ``ranks``.

        Parameters
        ----------
        ranks : sequence of int
            One rank a mode, each from 0 to the mode's number of singular values.

        Returns
        -------
        float
            The relative error, free of cancellation; 0 for a zero tensor.

        Raises
        ------
        ValueError
            If a rank is out of range or their number is not the tensor's order.
        TypeError
            If ``ranks`` is one number, or a rank no integer.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10, as an identity on the core.
        """
        if not hasattr(ranks, "__iter__"):
            raise TypeError(f"Spectrum.error: ranks is {ranks!r}; pass one rank a mode, {len(self.max_ranks)} in all")
        given = tuple(as_int("Spectrum.error", f"ranks[{k}]", r) for k, r in enumerate(ranks))
        if len(given) != len(self.max_ranks):
            raise ValueError(f"Spectrum.error: {len(given)} ranks for {len(self.max_ranks)} modes; pass one a mode")
        for mode, (rank, most) in enumerate(zip(given, self.max_ranks)):
            if not 0 <= rank <= most:
                raise ValueError(f"Spectrum.error: rank {rank} for mode {mode}; pass a number from 0 to {most}")
        if len(given) <= 2:  # the core is diagonal
            tail = self.squared_tails[0]
            return math.sqrt(float(tail[min(given)]) / float(tail[0])) if tail[0] > 0 else 0.0
        total = self._total
        return math.sqrt(discarded(to_numpy(self.core), self.exponent, given) / total) if total > 0 else 0.0

    @cached_property
    def _total(self) -> float:
        """‖core‖², in units of 4**exponent."""
        return discarded(to_numpy(self.core), self.exponent, (0,) * len(self.shape))

    def lower_bound(self, ranks: Sequence[int]) -> float:
        """Return max_k tail_k: no tensor of multilinear ranks ``ranks`` has a smaller relative error.

        Parameters
        ----------
        ranks : sequence of int
            One rank a mode.

        Returns
        -------
        float
            √(max_k Σ_{i≥r_k} σ_i²) / ‖X‖; 0 for a zero tensor.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10.
        """
        return self._bound(ranks, max)

    def upper_bound(self, ranks: Sequence[int]) -> float:
        """Return √(Σ_k tail_k) / ‖X‖, which no HOSVD truncated to ``ranks`` exceeds and which is ≤ √N times the best.

        Parameters
        ----------
        ranks : sequence of int
            One rank a mode.

        Returns
        -------
        float
            The bound; 0 for a zero tensor.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10.
        """
        return self._bound(ranks, sum)

    def frontier(
        self,
        *,
        max_ranks: Sequence[int] | None = None,
        max_parameters: int | None = None,
        partial: bool = False,
        one_whole: bool = False,
    ) -> Frontier:
        """List the rank tuples that no other beats in both parameters and error.

        Parameters
        ----------
        max_ranks : sequence of int, optional
            Bounds on the ranks, one a mode; 0 in every mode leaves only "nothing kept".
        max_parameters : int, optional
            List only what stores at most so many numbers, and with ``partial`` the dense tensor, which takes a fraction
            of the time.
        partial : bool
            Count a mode of full rank as stored whole, without its factor (see `TuckerTensor`), and list the dense
            tensor itself as the last point, all modes whole, in place of what would store more.
        one_whole : bool
            With ``partial``: list also tuples that leave one mode whole though the other ranks could not carry so
            many directions. A matrix of rank r then stores r (m + n) numbers, as a truncated SVD does.

        Returns
        -------
        Frontier
            From nothing kept (0 parameters) to the exact tensor, or to ``max_ranks``. All tuples are compared where
            there are at most 2²⁰; beyond that a geometric grid of ranks is, whose errors are exact.

        Raises
        ------
        ValueError
            If ``max_ranks`` does not name one bound a mode.

        References
        ----------
        The errors are those of `error_table`; the frontier is their lower envelope.
        """
        if max_ranks is not None and len(max_ranks) != len(self.shape):
            raise ValueError(f"Spectrum.frontier: {len(max_ranks)} bounds for {len(self.shape)} modes; pass one a mode")
        entries = math.prod(self.shape)
        if self.norm == 0.0 or entries == 0:
            none = np.zeros((1, len(self.shape)), dtype=np.int64)
            return Frontier(none[:, 0], np.zeros(1), none, 0.0, entries)
        choices = Choices(self.shape, max_parameters, partial)
        if len(self.shape) > 2:
            table = self._frontier_table
            found = [choices.feasible(table)]
            found += [choices.one_whole(table, mode) for mode in range(len(self.shape)) if one_whole]
        else:
            found = [self.feasible_errors()]
            if one_whole and len(self.shape) == 2:
                one = np.arange(1, self.max_ranks[0] + 1)
                found.append((np.stack([one, np.full_like(one, self.shape[1])], axis=1), self.squared_tails[0][1:]))
        return choices.frontier(
            found,
            unit=2.0 ** (2 * self.exponent),
            max_ranks=max_ranks,
            available=self.max_ranks,
            one_whole=one_whole,
        )

    @cached_property
    def _frontier_table(self) -> "ErrorTable":
        return ErrorTable.of_core(to_numpy(self.core), self.exponent, rank_grid(self.max_ranks, _MAX_FRONTIER))

    def feasible_errors(self) -> tuple[IntArray, FloatArray]:
        """List the rank tuples that `frontier` compares, and their squared errors.

        Returns
        -------
        ranks : numpy array of int64, shape (K, N)
            Rank tuples that a decomposition can have, and (0, …, 0).
        errors : numpy array of float64, shape (K,)
            ‖X − X_r‖² in units of 4**exponent.

        References
        ----------
        The errors are those of `error_table`.
        """
        if len(self.shape) <= 2:
            one = np.arange(self.max_ranks[0] + 1)  # the core is diagonal, so only equal ranks can be best
            return np.stack([one] * len(self.shape), axis=1), self.squared_tails[0]
        return Choices(self.shape).feasible(self._frontier_table)

    @cached_property
    def squared_tails(self) -> tuple[FloatArray, ...]:
        """For each mode the vector Σ_{i≥r} σ_i², r = 0, …, m_k, in units of a power of four near ‖X‖²."""
        return tuple(suffix_sums(np.ldexp(to_numpy(v).astype(np.float64), -self.exponent)) for v in self.values)

    def _bound(self, ranks: Sequence[int], combine: Any) -> float:
        total = float(self.squared_tails[0][0])
        if total == 0:
            return 0.0
        return math.sqrt(combine(float(t[min(r, len(t) - 1)]) for t, r in zip(self.squared_tails, ranks)) / total)

    def __repr__(self) -> str:
        return f"Spectrum(shape={self.shape}, max_ranks={self.max_ranks}, norm={self.norm:.6g})"


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
        eps · σ_1 as LAPACK's SVD gives them.

    Raises
    ------
    ValueError
        If ``x`` has no axes, or holds NaN or infinity.

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
    if len(x.shape) == 2:  # both sides have the same: take the shorter one's
        short = 0 if x.shape[0] <= x.shape[1] else 1
        values = (times_power_of_two(mode_values(xp, scaled, short), k),) * 2
    else:
        values = tuple(times_power_of_two(v, k) for v in all_mode_values(xp, scaled))
    dtype = result_dtype(xp, x.dtype)
    real = values[0].dtype if dtype == working_dtype(xp, x.dtype) else dtype
    norm = math.ldexp(ready.norm(), k)
    return ModeSpectra(tuple(xp.astype(v, real, copy=False) for v in values), norm, tuple(x.shape))


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
        If ``x`` has no axes, or holds NaN or infinity.

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
    values = times_power_of_two(mode_values(ready.xp, ready.x, short), ready.exponent)
    return Spectrum((values, values), None, (), math.ldexp(ready.norm(), ready.exponent), tuple(x.shape))


def cheapest_spectrum(where: str, x: Array) -> Spectrum:
    """Compute what frontiers and bounds need of a tensor: its full HOSVD, or a matrix's singular values alone."""
    if len(x.shape) == 2:
        return matrix_spectrum(where, x)
    entries = math.prod(x.shape)
    tall = next((mode for mode, n in enumerate(x.shape) if n * n > entries), None)
    return hosvd_spectrum(x) if tall is None else _tall_spectrum(prepare(where, stop_gradient(x)), tall)


def _tall_spectrum(ready: "Prepared", tall: int) -> Spectrum:
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
        values=tuple(times_power_of_two(bases[mode].values, k) for mode in range(len(x.shape))),
        core=times_power_of_two(core, k),
        factors=tuple(bases[mode].vectors for mode in range(len(x.shape))),
        norm=math.ldexp(ready.norm(), k),
        shape=tuple(x.shape),
    )


def spectrum_of(ready: "Prepared", accuracy: float = 0.0) -> Spectrum:
    """Compute the `Spectrum` of a prepared tensor, with singular values right down to ``accuracy`` of the largest."""
    xp, x, k = ready.xp, ready.x, ready.exponent
    if len(x.shape) == 2:
        bases, core = _matrix_bases(xp, x, accuracy)
    else:
        bases = mode_bases(xp, x, accuracy)
        core = multi_mode_dot(x, [b.vectors for b in bases], transpose=True)
    return Spectrum(
        values=tuple(times_power_of_two(b.values, k) for b in bases),
        core=times_power_of_two(core, k),
        factors=tuple(b.vectors for b in bases),
        norm=math.ldexp(ready.norm(), k),
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


class Prepared(NamedTuple):
    """A checked tensor in its working type and at magnitudes near 1."""

    xp: Namespace
    x: Array  # the tensor, times 2**-exponent
    exponent: int
    squares: float | None  # ‖x‖² of the scaled tensor; None where it is only a symbol

    def norm(self) -> float:
        """Return ‖x‖ of the scaled tensor, where the numbers are known."""
        return math.sqrt(float_squares("norm", self.xp, self.x) if self.squares is None else self.squares)


def prepare(where: str, x: Array, squares: float | None = None) -> Prepared:
    """Check a tensor and bring it to the working type and to magnitudes near 1; ``squares`` is ‖x‖² where it is known.

    One pass over the data does for nearly all: Σ x² in float64 tells whether float32 numbers are finite, how large they
    are, and what their norm is. Only where it leaves the range of float64 are the entries looked at.
    """
    xp = array_namespace(where, x)
    if len(x.shape) == 0:
        check_tensor(where, x)
    work = xp.astype(x, working_dtype(xp, x.dtype), copy=False)
    if squares is None:
        with np.errstate(over="ignore", invalid="ignore"):
            squares = squared_norm(xp, work)
    if squares is None:
        return Prepared(xp, work, 0, None)
    if 1e-200 < squares < 1e200:
        k = math.frexp(squares)[1] // 2
        if abs(k) <= 16:  # nothing can overflow or vanish, and scaling would only copy. The bits agree either way.
            return Prepared(xp, work, 0, squares)
        return Prepared(xp, times_power_of_two(work, -k), k, math.ldexp(squares, -2 * k))
    check_tensor(where, x)
    k = power_of_two(xp, work)
    work = times_power_of_two(work, -k)
    return Prepared(xp, work, k, squared_norm(xp, work))


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
        If ``core`` has no axes, or holds NaN or infinity.

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
    return table_of(to_numpy(core))
