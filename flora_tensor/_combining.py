"""Linear combinations of Tucker tensors of one weight, arranged alike or not, exactly and without SVD."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from flora_tensor._frontiers import n_parameters_of
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.arrangement import Arrangement, side_text
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Combination", "Term", "combine"]

# An axis of the weight that no arrangement splits further: (number of the weight's axis, number within it).
_Atom: TypeAlias = tuple[int, int]
_Group: TypeAlias = tuple[_Atom, ...]


class Term(NamedTuple):
    """One summand: a number times an arranged Tucker tensor of NumPy arrays in float64."""

    coefficient: float
    tensor: TuckerTensor
    arrangement: Arrangement


class Combination(NamedTuple):
    """A sum, how it is arranged, and what there is to say about it."""

    tensor: TuckerTensor
    arrangement: Arrangement
    notes: tuple[str, ...] = ()


def combine(terms: Sequence[Term], shape: tuple[int, ...]) -> Combination:
    """Add the terms up exactly, to rounding: factors side by side, cores on a block diagonal.

    A mode whose ranks add up to its size or more is left whole, which stores less; so is a mode that only one of two
    arrangements has. What would store more than the dense tensor is that tensor.
    """
    notes: tuple[str, ...] = ()
    arrangement = terms[0].arrangement
    if any(term.arrangement != arrangement for term in terms):
        common = _Refinement.of([term.arrangement for term in terms], shape)
        patterns = " and ".join(dict.fromkeys(repr(term.arrangement.pattern) for term in terms))
        if common is None:
            return _dense(terms, shape, f"{patterns} have no mode in common: stored dense")
        arrangement, notes = common.arrangement, (f"{patterns} meet in {common.arrangement.pattern!r}",)
        terms = [Term(t.coefficient, common.refine(t.tensor, k), arrangement) for k, t in enumerate(terms)]
    total = _block_sum([(t.coefficient, t.tensor) for t in terms])
    if total is None:
        return _dense(terms, shape, "the ranks add up to more than the dense tensor: stored dense")
    return Combination(total, arrangement, notes)


def _dense(terms: Sequence[Term], shape: tuple[int, ...], note: str) -> Combination:
    native = Arrangement.native(len(shape))
    total = np.zeros(shape)
    for coefficient, tensor, arrangement in terms:
        total += coefficient * arrangement.restore(tensor.to_tensor(), shape)
    return Combination(TuckerTensor(total, (None,) * len(shape)), native, (note,))


def _block_sum(terms: Sequence[tuple[float, TuckerTensor]]) -> TuckerTensor | None:
    """Add tensors of one shape; ``None`` where the dense tensor stores less."""
    shape = terms[0][1].shape
    kinds, factors = zip(*(_joined([t.factors[mode] for _, t in terms], size) for mode, size in enumerate(shape)))
    ranks = [n if u is None else u.shape[1] for n, u in zip(shape, factors)]
    if int(n_parameters_of(ranks, shape, partial=True)) > math.prod(shape):
        return None
    core = np.zeros(ranks)
    at = [0] * len(shape)
    for coefficient, tensor in terms:
        whole = [u if kind == "whole" else None for u, kind in zip(tensor.factors, kinds)]
        block = multi_mode_dot(tensor.core, whole)
        place = [slice(a, a + n) if kind == "beside" else slice(None) for a, n, kind in zip(at, block.shape, kinds)]
        core[tuple(place)] += coefficient * block
        at = [a + n for a, n in zip(at, block.shape)]
    return TuckerTensor(core, factors)


def _joined(given: Sequence[np.ndarray | None], size: int) -> tuple[str, np.ndarray | None]:
    """Decide what becomes of a mode's factors: one for all, side by side, or multiplied into the cores."""
    present = [u for u in given if u is not None]
    if len(present) < len(given):
        return "whole", None
    shared = all(u is present[0] or np.array_equal(u, present[0]) for u in present[1:])
    kept = present[:1] if shared else present
    if sum(u.shape[1] for u in kept) >= size:
        return "whole", None
    return ("shared", present[0]) if shared else ("beside", np.concatenate(present, axis=1))


@dataclass(frozen=True)
class _Refinement:
    """The modes that several arrangements of one weight share, and the single axes of the rest."""

    arrangement: Arrangement
    groups: tuple[_Group, ...]  # of the refinement
    given: tuple[tuple[_Group, ...], ...]  # of each arrangement
    sizes: dict[_Atom, int]

    @classmethod
    def of(cls, arrangements: Sequence[Arrangement], shape: tuple[int, ...]) -> "_Refinement | None":
        """Find what the arrangements share; ``None`` where that is nothing, or they split one axis differently."""
        splits: list[list[int]] = []
        for axis in range(len(shape)):
            found = [[a.axis_sizes(shape)[name] for name in a.left[axis]] for a in arrangements]
            finest = max(found, key=len)
            if any(len(sizes) > 1 and sizes != finest for sizes in found):
                return None
            splits.append(finest)
        sizes = {(axis, k): n for axis, split in enumerate(splits) for k, n in enumerate(split)}
        given = tuple(_groups(a, splits) for a in arrangements)
        shared = set(given[0]).intersection(*given[1:])
        if not shared:
            return None
        single = {(atom,) for atom in sizes if not any(atom in group for group in shared)}
        groups = tuple(sorted(shared | single))
        for arrangement, own in zip(arrangements, given):
            if own == groups:
                return cls(arrangement, groups, given, sizes)
        return cls(_arrangement(groups, splits), groups, given, sizes)

    def refine(self, tensor: TuckerTensor, index: int) -> TuckerTensor:
        """Write a tensor of the arrangement number ``index`` in the common one: other modes are multiplied out."""
        own = self.given[index]
        core = multi_mode_dot(tensor.core, [None if g in self.groups else u for g, u in zip(own, tensor.factors)])
        labels: list[_Group] = []
        sizes: list[int] = []
        for group, rank in zip(own, core.shape):
            split = [group] if group in self.groups else [(atom,) for atom in group]
            labels += split
            sizes += [rank] if len(split) == 1 else [self.sizes[label[0]] for label in split]
        order = [labels.index(group) for group in self.groups]
        factors = {group: u for group, u in zip(own, tensor.factors) if group in self.groups}
        return TuckerTensor(core.reshape(sizes).transpose(order), tuple(factors.get(group) for group in self.groups))


def _groups(arrangement: Arrangement, splits: Sequence[Sequence[int]]) -> tuple[_Group, ...]:
    """Name an arrangement's modes by atoms; an axis that only others split stands for all of its atoms."""
    atoms: dict[str, list[_Atom]] = {}
    for axis, names in enumerate(arrangement.left):
        if len(names) == 1:
            atoms[names[0]] = [(axis, k) for k in range(len(splits[axis]))]
        else:
            atoms |= {name: [(axis, k)] for k, name in enumerate(names)}
    return tuple(tuple(atom for name in group for atom in atoms[name]) for group in arrangement.right)


def _arrangement(groups: Sequence[_Group], splits: Sequence[Sequence[int]]) -> Arrangement:
    """Write a refinement as a pattern, with the standard names of the axes and numbers for their parts."""
    native = Arrangement.native(len(splits))
    if list(groups) == [((axis, 0),) for axis in range(len(splits))] and all(len(s) == 1 for s in splits):
        return native
    names = {
        (axis, k): native.left[axis][0] if len(split) == 1 else f"{native.left[axis][0]}x{k}"
        for axis, split in enumerate(splits)
        for k in range(len(split))
    }

    left = [tuple((axis, k) for k in range(len(split))) for axis, split in enumerate(splits)]
    sides = [side_text([[names[atom] for atom in group] for group in side]) for side in (left, groups)]
    sizes = {names[axis, k]: n for axis, split in enumerate(splits) if len(split) > 1 for k, n in enumerate(split)}
    return Arrangement(" -> ".join(sides), sizes)
