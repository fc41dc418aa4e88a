"""The algorithms behind the public decompositions: HOSVD, ST-HOSVD, HOOI.

They take tensors that `_prepared.prepare` has checked and scaled, and hand each other a `Truncation`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import array_api_compat
import numpy as np

from flora_tensor._arrays import (
    conjugate,
    epsilon,
    float_squares,
    hermitian,
    host_squares,
    host_view,
    is_differentiated,
    squared_norm,
    stop_gradient,
    suffix_sums,
    to_numpy,
)
from flora_tensor._bases import Basis, Keep, below_reach, by_gram, grams_of, mode_bases, mode_basis, phases_of
from flora_tensor._checks import feasible_ranks
from flora_tensor._gram import SHORT, is_long_pass
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import LARGE, contract, multi_mode_dot

# HOOI stops when the sweeps to come are expected to take less than this share off the squared error …
ENOUGH = 3e-4
# … and after this many in any case.
MOST_SWEEPS = 100

# A product of a large tensor with a factor is not held where it and a Gram matrix in float64 take more than this share
# of the tensor's memory.
_MUCH = 0.4


@dataclass(frozen=True, eq=False)
class Truncation:
    """Factors (orthonormal), core, and what is known of the singular values that were cut.

    ``values`` are those of the unfoldings that the factors were taken from: ``kind`` "exact" for the tensor itself,
    "sequential" for the tensors of ST-HOSVD, "leading" for the largest ones only, as a range finder estimates them from
    below.
    """

    core: Array
    factors: list[Array]  # None: the mode was left whole, after everything else was done
    values: list[Array]
    kind: str


@dataclass(frozen=True)
class Target:
    """What a caller asked for, checked: one of ranks, a tolerance and a number of parameters."""

    ranks: tuple[int, ...] | None = None
    rtol: float = 0.0
    max_parameters: int | None = None

    @property
    def accuracy(self) -> float:
        """The share of the largest singular value down to which they must be right to meet a tolerance."""
        return 0.0 if self.ranks is not None else self.rtol / 100


def hosvd_of(xp: Namespace, x: Array, target: Target, squares: float | None = None) -> Truncation:
    """Truncate every unfolding of ``x`` itself; ``squares`` is ‖X‖² where the caller knows it."""
    keep: Sequence[Keep] | None = target.ranks
    if keep is None:
        allowed = target.rtol**2 * _known(squares, "hosvd", xp, x) / len(x.shape)
        keep = [lambda values: rank_within(values, allowed)] * len(x.shape)
    bases = mode_bases(xp, x, target.accuracy, keep)
    factors = [b.vectors for b in bases]
    core = multi_mode_dot(x, factors, transpose=True)
    ranks = tuple(core.shape)
    result = Truncation(core, factors, [b.values for b in bases], "exact")
    return result if ranks == feasible_ranks(ranks, ranks) else all_orthogonal(xp, result)


def st_hosvd_of(
    xp: Namespace,
    x: Array,
    target: Target,
    order: Sequence[int],
    *,
    quick: bool = False,
    squares: float | None = None,
) -> Truncation:
    """Truncate one unfolding after the other, each of the tensor that the ones before left.

    ``quick`` takes the cheap kernel for float64 too where the ranks do not reach singular values that it cannot
    resolve.
    """
    factors: list[Array] = [None] * len(order)
    values: list[Array] = [None] * len(order)
    left = target.rtol**2 * _known(squares, "st_hosvd", xp, x) if target.ranks is None else 0.0
    rest = _Rest(xp, x)
    for step, mode in enumerate(order):
        if target.ranks is None:
            allowed = left / (len(order) - step)
            basis = rest.basis(mode, target.accuracy, lambda values, a=allowed: rank_within(values, a))
            left -= tail(basis.values, basis.vectors.shape[1])
        elif quick:
            basis = _quick_basis(rest, mode, target.ranks[mode])
        else:
            basis = rest.basis(mode, target.accuracy, target.ranks[mode])
        factors[mode], values[mode] = basis
        rest.truncate(mode, basis.vectors)
    core = rest.formed()
    result = Truncation(core, factors, values, "sequential" if len(order) > 1 else "exact")
    ranks = tuple(core.shape)
    return result if ranks == feasible_ranks(ranks, ranks) else all_orthogonal(xp, result)


class _Rest:
    """A product with factors, as ST-HOSVD and HOOI meet it, formed where that is worth its memory.

    Short modes shrink it by little: by their factors it is multiplied along with that of the next long mode, and until
    then only its Gram matrices are summed. So they are where the product is too large to be held beside one of them: it
    is then made twice, in parts.
    """

    def __init__(self, xp: Namespace, x: Array) -> None:
        self.xp, self.x = xp, x
        self.waiting: dict[int, Array] = {}
        self.grams = grams_of(x)

    def basis(self, mode: int, accuracy: float, keep: Keep) -> Basis:
        """Return the leading left singular vectors of an unfolding."""
        if self.x.shape[mode] ** 2 > self._size() or not by_gram(self.xp, self.x, mode, accuracy):
            self.formed()
        return mode_basis(self.xp, self.x, mode, accuracy, keep, self.grams)

    def truncate(self, mode: int, factor: Array) -> None:
        """Multiply by the conjugate transpose of a factor, now or later."""
        self._await({mode: factor})

    def times(self, factors: Mapping[int, Array], *, shared: bool) -> "_Rest":
        """Return the product with the conjugate transposes of factors; one ``shared`` by several modes is formed."""
        product = _Rest(self.xp, self.formed())
        product._await(factors)
        if shared:
            product.formed()
        return product

    def formed(self) -> Array:
        """Return the tensor, multiplied by all factors."""
        if self.waiting:
            self.x = multi_mode_dot(self.x, list(self.waiting.values()), modes=list(self.waiting), transpose=True)
            self.waiting, self.grams = {}, grams_of(self.x)
        return self.x

    def _await(self, factors: Mapping[int, Array]) -> None:
        self.waiting |= factors
        if self.grams is None or not self._may_wait(self.grams.x):
            self.formed()
            return
        for mode, factor in factors.items():
            self.grams = self.grams.after(mode, np.asarray(host_view(factor)))

    def _size(self) -> int:
        return math.prod(self.waiting[k].shape[1] if k in self.waiting else n for k, n in enumerate(self.x.shape))

    def _may_wait(self, host: np.ndarray) -> bool:
        if not is_long_pass(host) or is_differentiated(self.x):
            return False
        long = [u for u in self.waiting.values() if u.shape[0] > SHORT]
        if not long:
            return all(4 * u.shape[1] > u.shape[0] for u in self.waiting.values())
        side = max((n for k, n in enumerate(host.shape) if k not in self.waiting), default=0)
        held = self._size() * host.itemsize + side**2 * np.result_type(host, np.float64).itemsize
        return len(long) == 1 and host.size >= LARGE and held > _MUCH * host.nbytes  # of two the product is small


def _known(squares: float | None, where: str, xp: Namespace, x: Array) -> float:
    return float_squares(where, xp, x) if squares is None else squares


def _quick_basis(rest: _Rest, mode: int, rank: int) -> Basis:
    """Try the Gram kernel, and take the exact one where what is kept or what is cut lies below the former's reach."""
    basis = rest.basis(mode, 1.0, rank)
    return rest.basis(mode, 0.0, rank) if below_reach(rest.xp, basis, rank) else basis


def hooi_of(
    xp: Namespace,
    x: Array,
    start: Truncation,
    most: int,
    enough: float,
    squares: float | None = None,
    captured: float | None = None,
    order: Sequence[int] | None = None,
) -> tuple[Truncation, int]:
    """Sweep until the squared error ‖X‖² − ‖G‖² stops falling; return the result and the number of sweeps.

    Between sweeps the bases go on in the direction that the last one took; one that loses by that is taken back.
    ``squares`` is ‖X‖² where the caller knows it, ``captured`` ‖G‖² of the start, whose core may then be missing: it is
    not to be held beside its successors. ``order`` is a sweep's; by default the tensor shrinks early.
    """
    factors, core = list(start.factors), start.core
    ranks = tuple(u.shape[1] for u in factors)
    if len(ranks) < 2 or 0 in x.shape or ranks == tuple(x.shape):
        most = 0
    squares = squared_norm(xp, x) if squares is None else squares
    if squares is None:  # only a symbol under a trace: nothing to decide by
        most, squares = min(most, 5), math.inf
    captured = float_squares("hooi", xp, core) if captured is None and most and math.isfinite(squares) else captured
    error = math.inf if captured is None else squares - captured
    # A mode of full rank has nothing to improve, and turning the tensor along it changes no other mode's basis: it is
    # left as it is.
    full = [k for k, r in enumerate(ranks) if r == x.shape[k]]
    modes = [k for k in order or _taking_turns(by_shrinkage(x.shape, ranks)) if k not in full]
    accepted, streak, ahead, last_gain, sweeps = list(factors), 0, False, math.inf, 0
    while sweeps < most:
        core = None  # no two are held
        core, sweeps = _sweep(_Rest(xp, x), modes, factors).formed(), sweeps + 1
        if math.isfinite(squares):
            left = max(squares - float_squares("hooi", xp, core), 0.0)
            if ahead and left > error:  # the step went too far: back, and on without one
                factors, streak, ahead = list(accepted), 0, False
                continue
            gain, error = error - left, left
            if gain <= epsilon(xp, x.dtype) * squares or gain_to_come(gain, last_gain, sweeps) <= enough * error:
                break
            last_gain = gain
        now, streak, ahead = list(factors), streak + 1, sweeps < most - 1  # what the last sweep finds is returned
        for k in modes if ahead else ():
            factors[k] = _beyond(xp, accepted[k], now[k], streak / (streak + 3))
        accepted = now
    if sweeps:
        for k in full:
            factors[k] = xp.eye(x.shape[k], dtype=x.dtype, device=array_api_compat.device(x))
    elif core is None:
        core = multi_mode_dot(x, factors, transpose=True)
    return replace(start, core=core, factors=factors), sweeps


def _beyond(xp: Namespace, before: Array, now: Array, step: float) -> Array:
    """Go on, by a share of the way, from the span of one basis to that of another; return a basis of where it leads.

    Sweeps with Nesterov's steps k/(k + 3) between them need half as many where the spectrum is flat (measured).
    """
    outside = now - xp.matmul(before, xp.matmul(hermitian(xp, before), now))
    wide = now + step * outside  # singular values from 1 to 1 + step, so that Cholesky's factor makes it orthonormal
    triangle = xp.linalg.cholesky(xp.matmul(hermitian(xp, wide), wide))
    return xp.matmul(wide, hermitian(xp, xp.linalg.inv(triangle)))


def _sweep(rest: _Rest, modes: list[int], factors: list[Array]) -> _Rest:
    """Update the factors of ``modes`` in place and return what the last of them leaves: the core.

    ``rest`` is X multiplied by the transposed factors of all other modes. Each half of the modes is updated from
    ``rest`` times the factors of the other half, so products are shared along a binary tree: two products with X a
    sweep, not N.
    """
    if len(modes) == 1:
        (mode,) = modes
        factors[mode] = rest.basis(mode, 0.0, factors[mode].shape[1]).vectors
        rest.waiting[mode] = factors[mode]
        return rest
    first, second = modes[: (len(modes) + 1) // 2], modes[(len(modes) + 1) // 2 :]
    _sweep(rest.times({m: factors[m] for m in second}, shared=len(first) > 1), first, factors)
    return _sweep(rest.times({m: factors[m] for m in first}, shared=len(second) > 1), second, factors)


def _taking_turns(modes: Sequence[int]) -> list[int]:
    """Return the order of a sweep whose halves, and halves of halves, each take the modes in turns."""
    return list(modes) if len(modes) < 2 else _taking_turns(modes[0::2]) + _taking_turns(modes[1::2])


def gain_to_come(gain: float, last_gain: float, sweeps: int) -> float:
    """Estimate what all further sweeps will gain after so many, given the gains of the last two.

    Where the spectrum decays gains fall by a nearly constant ratio ρ: to come is gain · ρ/(1 − ρ). On flat spectra they
    fall at least like 1/k² (measured; 1/k³ would be Nesterov's rate): to come is at most gain · Σ_{j>k} k²/j² ≈ gain ·
    k, though the first ones fall much faster. The larger of the two is expected; of a first gain, or one after none, at
    most ten times itself (measured, where ST-HOSVD is nearly stationary).
    """
    if not 0 < last_gain < math.inf:
        return 10 * gain
    ratio = min(max(gain, 0.0) / last_gain, 0.99)
    return gain * max(ratio / (1 - ratio), sweeps)


def all_orthogonal(xp: Namespace, result: Truncation) -> Truncation:
    """Rotate the factors so that the core is all-orthogonal, and drop directions that the core cannot use; exact."""
    if 0 in result.core.shape:
        return result
    if _is_diagonal(result.core):
        return with_fixed_factors(xp, result)
    inner = [basis.vectors for basis in mode_bases(xp, result.core)]
    factors = [xp.matmul(u, v) for u, v in zip(result.factors, inner)]
    # Signs are fixed before the core is made: no third one is held.
    phases = [None if 0 in u.shape else phases_of(xp, stop_gradient(u))[None, :] for u in factors]
    inner, factors = ([u if p is None else u * p for u, p in zip(each, phases)] for each in (inner, factors))
    return replace(result, core=multi_mode_dot(result.core, inner, transpose=True), factors=factors)


def _is_diagonal(core: Array) -> bool:
    """Tell whether a matrix on the host has its singular values on the diagonal, and nothing else."""
    if not isinstance(core, np.ndarray) or core.ndim != 2 or core.shape[0] != core.shape[1]:
        return False
    values = np.diagonal(core)
    sorted_ = not np.iscomplexobj(core) and bool((values[1:] <= values[:-1]).all()) and values[-1] > 0
    return sorted_ and np.count_nonzero(core) == len(values)


def with_fixed_factors(xp: Namespace, result: Truncation) -> Truncation:
    """Make the entry of largest magnitude in each column of a factor positive, as in a HOSVD; exact."""
    core, factors = result.core, list(result.factors)
    for mode, factor in enumerate(factors):
        if factor is None or 0 in factor.shape:
            continue
        phases = phases_of(xp, stop_gradient(factor))
        factors[mode] = factor * phases[None, :]
        core = core * xp.reshape(conjugate(xp, phases), tuple(-1 if k == mode else 1 for k in range(len(core.shape))))
    return replace(result, core=core, factors=factors)


def left_whole(xp: Namespace, result: Truncation, modes: Iterable[int]) -> Truncation:
    """Multiply the factors of ``modes`` back into the core: these modes store no factor; exact."""
    core, factors = result.core, list(result.factors)
    for mode in modes:
        core, factors[mode] = contract(xp, core, factors[mode], mode), None
    return replace(result, core=core, factors=factors)


def by_shrinkage(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Order modes by how much they shrink, most first.

    Taken in turn, either half of a sweep's tree begins with a product that shrinks the tensor much.
    """
    return sorted(range(len(shape)), key=lambda k: (-shape[k] / max(ranks[k], 1), k))


def cheapest_order(shape: Sequence[int], ranks: Sequence[int] | None) -> list[int]:
    """Order the modes of ST-HOSVD by arithmetic.

    Mode k costs I_k · s on a tensor of s elements and leaves s · r_k/I_k. Comparing "a before b" with "b before a", a
    goes first iff I_a / (1 − r_a/I_a) < I_b / (1 − r_b/I_b): sorting by that key is optimal. Without ranks the smallest
    mode goes first.
    """

    def key(mode: int) -> tuple[float, int]:
        size = shape[mode]
        rank = ranks[mode] if ranks is not None else 0
        return (size / (1 - rank / size) if rank < size else math.inf, mode)

    return sorted(range(len(shape)), key=key)


def rank_within(values: Array, allowed: float) -> int:
    """Return the smallest rank ≥ 1 whose discarded squares stay within ``allowed``."""
    tails = suffix_sums(to_numpy(stop_gradient(values)))
    return max(1, int(np.argmax(tails <= allowed))) if len(tails) > 1 else 0


def tail(values: Array, rank: int) -> float:
    """Return Σ_{i≥rank} σ_i², summed from the smallest up."""
    return float(np.sum(host_squares(values)[rank:][::-1]))
