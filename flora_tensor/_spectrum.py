"""The nouns of rank analysis: singular values of all modes, and a full HOSVD with the error of every truncation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flora_tensor._arrays import suffix_sums, to_numpy
from flora_tensor._checks import as_int, as_sequence
from flora_tensor._frontiers import Choices, Frontier
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, discarded, grid_within, rank_grid
from flora_tensor._typing import Array

__all__ = ["ModeSpectra", "Spectrum"]

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

    def leading(self, ranks: Sequence[int]) -> list[Array]:
        """Return the leading left singular vectors of every mode.

        Parameters
        ----------
        ranks : sequence of int
            How many, one number a mode.

        Returns
        -------
        list of array, shape (I_k, r_k)
            Orthonormal columns: the factors of the truncation to these ranks.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), theorem 2.
        """
        return [u[:, :r] for u, r in zip(self.factors, ranks)]

    @cached_property
    def exponent(self) -> int:
        """The power of two near ‖X‖; squares are kept in units of 4**exponent, whatever the magnitude of the data."""
        return math.frexp(self.norm)[1] if self.norm > 0 else 0

    @cached_property
    def table(self) -> ErrorTable:
        """The errors of all rank tuples (on a grid where the whole table would not fit), as relative squares."""
        return self._table_on(rank_grid(self.max_ranks))

    def table_within(self, low: Sequence[int], high: Sequence[int]) -> ErrorTable | None:
        """Compute the errors of the rank tuples within bounds only, where that is a small part of all.

        Parameters
        ----------
        low, high : sequence of int
            The least and the greatest rank of each mode.

        Returns
        -------
        ErrorTable or None
            The exact errors from ``low`` to ``high``, and of rank 0; None where there are as good as all.

        References
        ----------
        The errors are those of `error_table`.
        """
        grid = grid_within(low, high, self.max_ranks)
        return None if grid is None else self._table_on(grid).up_to(high)

    def _table_on(self, grid: tuple[IntArray, ...]) -> ErrorTable:
        return ErrorTable.of_core(to_numpy(self.core), self.exponent, grid)

    def table_around(self, ranks: Sequence[int], coarse: ErrorTable) -> ErrorTable:
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
        return self._table_on(coarse.grid_around(ranks, self.max_ranks))

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
        given = self._checked("Spectrum.error", ranks)
        for mode, (rank, most) in enumerate(zip(given, self.max_ranks)):
            if not 0 <= rank <= most:
                raise ValueError(f"Spectrum.error: rank {rank} for mode {mode}; pass a number from 0 to {most}")
        if len(given) <= 2:  # the core is diagonal
            tail = self.squared_tails[0]
            return math.sqrt(float(tail[min(given)]) / float(tail[0])) if tail[0] > 0 else 0.0
        total = self._total
        return math.sqrt(discarded(to_numpy(self.core), self.exponent, given) / total) if total > 0 else 0.0

    def _checked(self, where: str, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return one rank a mode."""
        given = tuple(as_int(where, f"ranks[{k}]", r) for k, r in enumerate(as_sequence(where, "ranks", ranks)))
        if len(given) != len(self.shape):
            raise ValueError(f"{where}: {len(given)} ranks for {len(self.shape)} modes; pass one a mode")
        return given

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

        Raises
        ------
        ValueError
            If a rank is negative or their number is not the tensor's order.
        TypeError
            If ``ranks`` is one number, or a rank no integer.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10.
        """
        return self._bound("Spectrum.lower_bound", ranks, max)

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

        Raises
        ------
        ValueError, TypeError
            As for `lower_bound`.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10.
        """
        return self._bound("Spectrum.upper_bound", ranks, sum)

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
            If ``max_ranks`` does not name one bound a mode, or ‖X‖² is beyond the range of float64.

        References
        ----------
        The errors are those of `error_table`; the frontier is their lower envelope.
        """
        if max_ranks is not None:
            max_ranks = as_sequence("Spectrum.frontier", "max_ranks", max_ranks)
            if len(max_ranks) != len(self.shape):
                message = f"Spectrum.frontier: {len(max_ranks)} bounds for {len(self.shape)} modes; pass one a mode"
                raise ValueError(message)
        if self.exponent >= 512:
            raise ValueError(
                f"Spectrum.frontier: the norm is {self.norm:.3g}, whose square is beyond float64; pass x scaled down"
            )
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
    def _frontier_table(self) -> ErrorTable:
        return self._table_on(rank_grid(self.max_ranks, _MAX_FRONTIER))

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

    def _bound(self, where: str, ranks: Sequence[int], combine: Any) -> float:
        ranks = self._checked(where, ranks)
        if min(ranks, default=0) < 0:
            raise ValueError(f"{where}: ranks is {ranks}; pass none below 0")
        total = float(self.squared_tails[0][0])
        if total == 0:
            return 0.0
        return math.sqrt(combine(float(t[min(r, len(t) - 1)]) for t, r in zip(self.squared_tails, ranks)) / total)

    def __repr__(self) -> str:
        return f"Spectrum(shape={self.shape}, max_ranks={self.max_ranks}, norm={self.norm:.6g})"
