"""The norm in which a stack is decomposed: its slices scaled before, and what is stored of them scaled back.

Under relative weights slice l is divided by its norm: the squared error of the whole is then the sum of the members'
squared relative errors. Scaling a slice scales a row of the layers' factor, so that a Tucker tensor remains one.

Under a calibration every member has a second moment C_l of its own, and what counts is the error of all outputs,

    E² = Σ_l w_l² ‖(ΔW_l − ΔŴ_l) C_l^½‖²,        w_l = 1, or under relative weights 1/‖ΔW_l C_l^½‖.

Layers that were scaled by their own C_l^½, decomposed and scaled back would share no factor of the input any more. All
are therefore scaled by one root: T_l = w_l √c_l ΔW_l P, with c_l = tr C_l / I and P² = mean_l C_l / c_l. With T̂ = the
decomposition of T, scaled back to ΔŴ_l = T̂_l P⁻¹ / (w_l √c_l), the error that counts is

    E² = Σ_l tr (T_l − T̂_l) N_l (T_l − T̂_l)ᵀ,        N_l = P⁻¹ C_l P⁻¹ / c_l,        mean_l N_l = 1.

Where the moments are multiples of one another all N_l are 1 and E² is the plain error of T: nothing is lost. Elsewhere
λ_min(N_l) ≤ E²/‖T − T̂‖² ≤ λ_max(N_l); but E² itself is known of every truncation (`output_errors`), so that it, and not
a bound, is what ranks are chosen by; and the core that is best for given factors is a least-squares problem, whose
Hessian is near 1 (`best_core`). Truncations of the stack scaled by w_l alone are judged beside: at no ranks is the
result above the uncalibrated truncation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from flora_tensor._arrays import to_numpy
from flora_tensor._deltas import frobenius_norm
from flora_tensor._errors import InputError
from flora_tensor._frontiers import Choices
from flora_tensor._leading import Look, reach_of
from flora_tensor._rank_errors import ErrorTable, FloatArray, IntArray, rank_grid
from flora_tensor._weighting import Calibration, Weighting, times
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.arrangement import Arrangement
from flora_tensor.spectra import hosvd_spectrum
from flora_tensor.tucker_algebra import orthogonalize
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Outputs", "StackMoments", "StackNorm", "output_looks"]

# Roots of the moments are kept from one pass over the members to the next as long as they take no more bytes than this.
_KEPT = 1 << 27

# Multiply-adds that the errors of all truncations may take before fewer ranks of the layers' mode are tried.
_WORK = 1e12

# Rank tuples that are listed at most.
_MOST = 1 << 20

# Steps of conjugate gradients toward the best core, and the residual, relative to the right side, that ends them.
_STEPS, _ENOUGH = 12, 1e-7


@dataclass(frozen=True, eq=False)
class StackNorm:
    """What each slice of a stack is divided by before it is decomposed, and what all are multiplied by.

    Parameters
    ----------
    units : tuple of float
        One positive number a slice.
    root : Weighting, optional
        The common factor along the input axes of a member.
    """

    units: tuple[float, ...]
    root: Weighting | None = None

    @classmethod
    def relative(cls, stack: np.ndarray) -> "StackNorm":
        """Take the slices' own norms."""
        return cls(tuple(frobenius_norm(x) or 1.0 for x in stack))

    def scale_(self, stack: np.ndarray) -> np.ndarray:
        """Scale the slices, in place; in float64, as a norm may be outside the range of float32."""
        for x, unit in zip(stack, self.units):
            scaled = x if self.root is None else self.root.scale(x)
            np.divide(scaled, unit, out=x, dtype=np.float64, casting="same_kind")
        return stack

    def unscale(self, tucker: TuckerTensor, arrangement: Arrangement) -> TuckerTensor:
        """Scale a decomposition of the scaled and arranged stack back, and make its factors orthonormal again."""
        core, factors = to_numpy(tucker.core), [None if u is None else to_numpy(u) for u in tucker.factors]
        units = np.asarray(self.units)
        if factors[0] is None:  # the mode is whole: the core has it
            core = (core * units.reshape(-1, *(1,) * (core.ndim - 1))).astype(core.dtype, copy=False)
        else:
            factors[0] = (factors[0] * units[:, None]).astype(core.dtype, copy=False)
        tucker = TuckerTensor(core, tuple(factors))
        return orthogonalize(tucker) if self.root is None else self.root.of_slices().unscale(tucker, arrangement)


@dataclass(frozen=True, eq=False)
class StackMoments:
    """The second moments of the inputs of a stack's members, each as that of a single weight; read one at a time.

    A member without a moment counts by its plain error: its moment is 1.
    """

    calibration: Calibration
    members: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()  # of a member

    @classmethod
    def of(
        cls, calibration: Calibration, name: str, members: tuple[str, ...], shape: tuple[int, ...]
    ) -> "StackMoments | None":
        """Find the moments of a stack's members; ``None`` where no member has one."""
        found = cls(calibration, members, shape)
        axes = {root.axes: member for root, member in zip(found.roots(), members) if root is not None}
        if len(axes) > 1:
            told = " and ".join(f"{member!r} over the axes {places}" for places, member in axes.items())
            raise InputError(f"extract: the stack {name!r} has moments of {told}; collect them alike")
        return replace(found, axes=next(iter(axes))) if axes else None

    def fits(self, arrangement: Arrangement) -> bool:
        """Tell whether the axes lie in one mode of an arrangement of the stack, at its head."""
        return self._joint.fits(arrangement)

    def mode_of(self, arrangement: Arrangement) -> int:
        """Return that mode of each slice."""
        return self._joint.mode_of(arrangement) - 1

    @property
    def _joint(self) -> Weighting:
        return Weighting(self.axes, np.ones(1), np.ones(1)).of_slices()

    @cached_property
    def _roots(self) -> dict[int, Weighting | None]:
        return {}

    def root(self, k: int) -> Weighting | None:
        """Return C^½ of a member."""
        if k in self._roots:
            return self._roots[k]
        found = self.calibration.weighting(self.members[k], self.shape)
        if found is None or 2 * found.root.nbytes * len(self.members) <= _KEPT:
            self._roots[k] = found
        return found

    def roots(self) -> Iterator[Weighting | None]:
        """Give C^½ of one member after the other."""
        return (self.root(k) for k in range(len(self.members)))

    def lengths(self, stack: np.ndarray) -> tuple[float, ...]:
        """Return ‖ΔW_l C_l^½‖ of every slice."""
        return tuple(frobenius_norm(x if r is None else r.scale(x)) for x, r in zip(stack, self.roots()))

    def norms(self, units: Sequence[float]) -> "Iterator[Outputs]":
        """Give the two norms to decompose in: with the common root, and with none; w_l = 1 / units_l."""
        sizes: list[float] = []
        mean: FloatArray = np.zeros(math.prod(self.shape[axis] for axis in self.axes))
        for root in self.roots():
            moment = np.ones_like(mean[0]) if root is None else _squared(root.root)
            sizes.append(float(np.mean(moment if moment.ndim < 2 else np.diagonal(moment))))
            mean = _added(mean, moment / (sizes[-1] * len(self.members)))
        pooled = tuple(unit / math.sqrt(size) for unit, size in zip(units, sizes))
        yield Outputs(self, tuple(units), StackNorm(pooled, Weighting.of(mean, self.axes)))
        yield Outputs(self, tuple(units), StackNorm(tuple(units)))


@dataclass(frozen=True, eq=False)
class _Slice:
    """What the error of one slice is made of, a quadratic form in its core K: ‖T‖²_N − 2⟨J, K⟩ + ⟨K ×_k M, K⟩."""

    squares: float
    core: FloatArray  # T itself on the factors
    linear: FloatArray
    form: Callable[[FloatArray], FloatArray]
    matrix: FloatArray | None  # M, where the input's mode has a factor


@dataclass(frozen=True, eq=False)
class Outputs:
    """The error of the outputs, of decompositions of a stack in one norm."""

    moments: StackMoments
    units: tuple[float, ...]  # 1 / w_l
    norm: StackNorm

    def metric(self, k: int) -> FloatArray:
        """Return N_l, (I, I) or its diagonal."""
        root, factor = self.moments.root(k), (self.norm.units[k] / self.units[k]) ** 2
        inverse = None if self.norm.root is None else self.norm.root.inverse
        if root is None and inverse is None:
            return np.full(1, factor)
        turned = _product(*(m for m in (inverse, None if root is None else root.root) if m is not None))
        return factor * (turned * turned if turned.ndim == 1 else turned @ turned.T)

    def slices(
        self, scaled: np.ndarray, factors: Sequence[np.ndarray | None], arrangement: Arrangement
    ) -> Iterator[_Slice]:
        """Project each slice of the scaled and arranged stack onto its modes' factors, None where one is whole."""
        at = self.moments.mode_of(arrangement)
        bases = [None if u is None else u.astype(np.float64) for u in factors[1:]]
        others = [j for j, u in enumerate(bases) if u is not None and j != at]
        for k, x in enumerate(scaled):
            metric, basis, x = self.metric(k), bases[at], x.astype(np.float64)
            squares = float(np.vdot(x, _along(metric, x, at)))
            inside = multi_mode_dot(x, [bases[j] for j in others], modes=others, transpose=True)
            if basis is None:
                yield _Slice(squares, inside, _along(metric, inside, at), lambda y, m=metric: _along(m, y, at), None)
                continue
            turned = _along(metric, basis, 0)
            matrix = basis.T @ turned
            linear = multi_mode_dot(inside, [turned], modes=[at], transpose=True)
            core = multi_mode_dot(inside, [basis], modes=[at], transpose=True)
            yield _Slice(squares, core, linear, lambda y, m=matrix: multi_mode_dot(y, [m], modes=[at]), matrix)

    def output_errors(self, scaled: np.ndarray, factors: Sequence[np.ndarray], arrangement: Arrangement) -> ErrorTable:
        """Return E² of the truncations of a full HOSVD, whose factors are given, at all ranks of a grid.

        With K_l the core of slice l for R of the layers' directions, E² is Σ_l ‖T_l‖² plus the sum over the leading
        block of −2 J∘K + K∘(2 K ×_k triu(M, 1) + K ×_k diag M): each entry stands for the pairs of input directions of
        which it is the later one, so that prefix sums give the form of every leading block.
        """
        at, layers = self.moments.mode_of(arrangement), factors[0].astype(np.float64)
        parts = list(self.slices(scaled, factors, arrangement))
        cores, most = np.stack([part.core for part in parts]), [u.shape[1] for u in factors]
        work = cores.size * cores.shape[at + 1]
        few = _spread(most[0], min(16, max(2, int(_WORK / work))))
        grid = (few, *rank_grid(most[1:], _MOST // len(few)))
        total = sum(part.squares for part in parts)
        errors = np.full([len(points) for points in grid], total)
        for i, rank in enumerate(grid[0][1:], 1):
            gains = np.zeros(cores.shape[1:])
            for part, own in zip(parts, _mixed(layers, rank, cores)):
                assert part.matrix is not None
                once = 2 * np.triu(part.matrix, 1) + np.diag(np.diagonal(part.matrix))
                gains += own * (multi_mode_dot(own, [once.T], modes=[at]) - 2 * part.linear)
            for mode, points in enumerate(grid[1:]):
                gains = np.take(np.cumsum(gains, axis=mode), points[1:] - 1, axis=mode)
            errors[(i, *(slice(1, None),) * gains.ndim)] += gains
        return ErrorTable(np.maximum(errors, 0.0), grid, total)

    def best_core(
        self, scaled: np.ndarray, tucker: TuckerTensor, arrangement: Arrangement
    ) -> tuple[TuckerTensor, float]:
        """Improve the core of a decomposition of the scaled and arranged stack; return E too.

        Conjugate gradients for the least-squares problem: no step raises E, however few are taken.
        """
        factors = [None if u is None else to_numpy(u) for u in tucker.factors]
        parts = list(self.slices(scaled, factors, arrangement))
        layers = np.eye(len(scaled)) if factors[0] is None else factors[0].astype(np.float64)

        def hessian(core: FloatArray) -> FloatArray:
            own = np.tensordot(layers, core, 1)
            return np.tensordot(layers.T, np.stack([part.form(x) for part, x in zip(parts, own)]), 1)

        wanted = np.tensordot(layers.T, np.stack([part.linear for part in parts]), 1)
        core = _conjugate_gradients(hessian, wanted, to_numpy(tucker.core).astype(np.float64))
        core = core.astype(to_numpy(tucker.core).dtype)
        own = np.tensordot(layers, core.astype(np.float64), 1)
        squares = sum(p.squares + float(np.vdot(x, p.form(x) - 2 * p.linear)) for p, x in zip(parts, own))
        return TuckerTensor(core, tuple(factors)), math.sqrt(max(squares, 0.0))


def output_looks(
    stack: np.ndarray,
    arrangements: Sequence[Arrangement],
    moments: StackMoments,
    units: Sequence[float],
    share: float | None,
    widening: int,
) -> list[Look]:
    """List what the ranks of each arrangement buy of the outputs, as far as a budget may reach."""
    lists: list[list[tuple[IntArray, FloatArray]]] = [[] for _ in arrangements]
    choices: list[Choices] = []
    for outputs in moments.norms(units):
        scaled, choices = outputs.norm.scale_(stack.copy()), []
        for listed, arrangement in zip(lists, arrangements):
            x = arrangement.arrange(scaled)
            reach = reach_of(x.shape, share, widening, is_stack=True)
            choices.append(Choices(x.shape, None if reach is None else reach.most, partial=True))
            table = outputs.output_errors(x, [to_numpy(u) for u in hosvd_spectrum(x).factors], arrangement)
            wholes = (choices[-1].one_whole(table, mode) for mode in range(x.ndim))
            listed += [choices[-1].feasible(table), *wholes]
    looks: list[Look] = []
    for listed, choice in zip(lists, choices):
        frontier = choice.frontier(listed, unit=1.0, one_whole=True)
        look = Look(frontier, None, None, {})
        looks.append(look if choice.most is None else Look.of(frontier, choice.shape, choice.most, None, {}))
    return looks


def _mixed(layers: FloatArray, rank: int, cores: FloatArray) -> FloatArray:
    """Project the slices' cores onto so many directions of the layers."""
    leading = layers[:, :rank]
    return np.tensordot(leading @ leading.T, cores, 1)


def _spread(most: int, count: int) -> IntArray:
    """Return 0, 1 and up to so many ranks, at equal ratios, of which ``most`` is the last."""
    return np.unique([0, *np.geomspace(1, most, count).round(), *range(1, min(count, most + 1))]).astype(np.int64)


def _conjugate_gradients(hessian: Callable[[FloatArray], FloatArray], wanted: FloatArray, x: FloatArray) -> FloatArray:
    residual = wanted - hessian(x)
    direction, squares = residual, float(np.vdot(residual, residual))
    least = _ENOUGH**2 * float(np.vdot(wanted, wanted))
    for _ in range(_STEPS):
        if squares <= least:
            break
        image = hessian(direction)
        step = squares / float(np.vdot(direction, image))
        x, residual = x + step * direction, residual - step * image
        squares, before = float(np.vdot(residual, residual)), squares
        direction = residual + squares / before * direction
    return x


def _along(metric: FloatArray, x: npt.NDArray[np.float64], mode: int) -> FloatArray:
    """Multiply by a symmetric matrix, or a diagonal, or a number, along the head of a mode."""
    if len(metric) == 1:
        return metric[0] * x if metric.ndim == 1 else metric[0, 0] * x
    return times(metric, x.reshape(math.prod(x.shape[:mode]), len(metric), -1)).reshape(x.shape)


def _squared(root: FloatArray) -> FloatArray:
    return root * root if root.ndim == 1 else root @ root


def _product(a: FloatArray, b: FloatArray | None = None) -> FloatArray:
    """Multiply two matrices, either of which may be a diagonal."""
    if b is None:
        return a
    if b.ndim == 1:
        return a * b
    return a[:, None] * b if a.ndim == 1 else a @ b


def _added(a: FloatArray, b: FloatArray) -> FloatArray:
    """Add two matrices, either of which may be a diagonal."""
    if a.ndim == b.ndim:
        return a + b
    return a + np.diag(b) if a.ndim == 2 else np.diag(a) + b
