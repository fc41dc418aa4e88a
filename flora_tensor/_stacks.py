"""Stacks in an extraction: which tensors form one, whether they are better stored together, and what each becomes.

The members of a stack are looked at one by one like all others, then once more as one tensor, whose layers are a mode.
The budget decides between the two. A stack is read as a whole: the memory rule counts it as the one tensor that it is.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flora_tensor._adapter_keys import tensor_key
from flora_tensor._checks import feasible_ranks
from flora_tensor._execution import Run
from flora_tensor._layer_grid import natural_key
from flora_tensor._settings import Settings, nearest
from flora_tensor._survey import Weight
from flora_tensor._tasks import Outcome, Task
from flora_tensor.checkpoint import Checkpoint, is_float
from flora_tensor.report import TensorRow
from flora_tensor.stacking import member_arrangement

__all__ = [
    "find_stacks",
    "look_at_stacks",
    "noise_prices",
    "settled",
    "summed_error",
    "tasks_of",
    "with_stacks",
]


def find_stacks(
    whose: str, base: Checkpoint, tuned: Checkpoint, candidates: Sequence[str], patterns: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return for each pattern the names that match it, in the order of the numbers in them, from the headers alone."""
    stacks: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for pattern in patterns:
        where = f"{whose}: the stack {pattern!r}"
        members = sorted(fnmatch.filter(candidates, pattern), key=natural_key)
        if pattern in base or pattern in tuned:
            raise ValueError(f"{where} is a tensor's own name; pass a pattern, as 'layers.*.weight'")
        if not members:
            raise ValueError(f"{where} matches no tensor to compare; {nearest(pattern.replace('*', ''), candidates)}")
        if len(members) < 2:
            raise ValueError(f"{where} matches only {members[0]!r}; pass a pattern that matches two tensors or more")
        _check_alike(where, base, tuned, members)
        for member in members:
            if member in owner:
                raise ValueError(f"{where} and {owner[member]!r} both match {member!r}; a tensor can be in one stack")
            owner[member] = pattern
        tensor_key(pattern, "core")
        stacks[pattern] = tuple(members)
    return stacks


def _check_alike(where: str, base: Checkpoint, tuned: Checkpoint, members: Sequence[str]) -> None:
    first = members[0]
    for member in members:
        for side in (base, tuned):
            one, other = side.info(first), side.info(member)
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"{where} matches {first!r}, {one.dtype} of shape {one.shape}, and {member!r}, {other.dtype} of "
                    f"shape {other.shape}; pass a pattern for each kind"
                )
            if len(one.shape) < 2 or not is_float(one):
                raise ValueError(
                    f"{where} matches {first!r}, {one.dtype} of shape {one.shape}; pass a pattern of weights with two "
                    "axes or more, of floats"
                )


def look_at_stacks(run: Run, stacks: Mapping[str, tuple[str, ...]], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """List what each stack buys as one tensor; members that did not change are no part of it."""
    changed = {name: tuple(m for m in members if m in weights) for name, members in stacks.items()}
    tasks = [Task(name, members=members) for name, members in changed.items() if len(members) > 1]
    found = run.do("reading", tasks)
    return {name: outcome.weight for name, outcome in found.items() if outcome.weight is not None}


def settled(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Leave out the stacks that the budget did not choose, the members of those that it did, and all curves."""
    members = {member for weight in weights.values() if any(weight.ranks) for member in weight.members}
    kept = ((n, w) for n, w in weights.items() if n not in members and (not w.members or any(w.ranks)))
    return {name: replace(weight, frontiers=[], bounds=()) for name, weight in kept}


def tasks_of(weights: Mapping[str, Weight]) -> list[Task]:
    """Return the tasks of decomposing weights and stacks."""
    return [Task(name, weight, members=weight.members) for name, weight in weights.items() if any(weight.ranks)]


def noise_prices(weights: Mapping[str, Weight]) -> dict[str, float]:
    """Return for stacks, and for their members, what a number must gain at least: see `worth_storing`."""
    stacks = {name: weight for name, weight in weights.items() if weight.members}
    return {n: 2 * (w.floor or 0.0) ** 2 for name, w in stacks.items() for n in (name, *w.members)}


def summed_error(
    weights: Mapping[str, Weight], found: Mapping[str, Outcome], prices: Mapping[str, float], settings: Settings
) -> float:
    """Sum the squared errors of what is stored, and the prices of numbers that would gain no more than noise."""
    total = 0.0
    for name, weight in weights.items():
        row, done = (found[name].row, found[name].weight) if name in found else (weight.row, None)
        norm, left = row.delta_norm or 0.0, row.relative_error or 0.0
        if row.weighted_norm is not None:  # what a calibration counts
            norm, left = row.weighted_norm, row.weighted_error or 0.0
        if done is not None and done.units:
            errors = done.member_outputs or done.member_errors
            error = math.hypot(*(lost / unit for lost, unit in zip(errors, done.units)))
        else:
            error = (1.0 if settings.weights == "uniform" else norm) * (left if name in found else 1.0)
        total += error * error + prices.get(name, 0.0) * row.n_parameters
    return total


def with_stacks(
    rows: Mapping[str, TensorRow], weights: Mapping[str, Weight], apart: Mapping[str, Weight]
) -> tuple[dict[str, TensorRow], tuple[TensorRow, ...]]:
    """Tell in the rows of stacks' members of the stack: its form, each one's share of its numbers and its own error.

    Return the stacks' own rows beside them. ``apart`` are the members as they were looked at one by one.
    """
    told, joint = dict(rows), list[TensorRow]()
    for name, weight in weights.items():
        if not weight.members:
            continue
        row = told.pop(name)
        # Under relative weights what was bounded is the mean of the slices' squared relative errors, which no row has.
        joint.append(replace(row, lower_bound=None) if weight.units else row)
        share, more = divmod(row.n_parameters, len(weight.members))
        for k, member in enumerate(weight.members):
            own = told[member]
            error, output = row.relative_error, row.weighted_error
            if weight.member_errors:
                error = weight.member_errors[k] / (own.delta_norm or 1.0)
                outputs = weight.member_outputs or weight.member_errors
                output = outputs[k] / (own.weighted_norm or 1.0) if own.weighted_norm is not None else None
            told[member] = replace(
                told[member],
                stack=name,
                arrangement=row.arrangement,
                modes=row.modes,
                ranks=row.ranks,
                n_parameters=share + (k < more),
                relative_error=error,
                weighted_error=output,
                lower_bound=_slice_bound(weight, apart[member]),
            )
    return told, tuple(joint)


def _slice_bound(stack: Weight, member: Weight) -> float | None:
    """Return what the error of a member cannot go below in a stack, or ``None`` where that is not known.

    A slice of a tensor of ranks (r_0, r_1, …) is a tensor of ranks (r_1, …) at most, whose error is bounded by the
    member's own singular values. The bounds of the ranks that were listed for it are known, and bounds fall as ranks
    grow: those of all listed ranks that are as large hold.
    """
    assert stack.arrangement is not None
    own = member_arrangement(stack.arrangement)
    if own not in member.arrangements or not any(stack.ranks):
        return None
    at = member.arrangements.index(own)
    ranks = feasible_ranks(stack.ranks[1:], own.shape(member.row.shape))
    bounds = [bound for bound, listed in zip(member.bounds[at], member.frontiers[at].ranks) if (listed >= ranks).all()]
    return max(bounds, default=None)
