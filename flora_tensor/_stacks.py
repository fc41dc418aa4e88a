"""Stacks in an extraction: which tensors form one, whether they are better stored together, and what each becomes.

The members of a stack are looked at one by one like all others, then once more as one tensor, whose layers are a mode.
The budget decides between the two. A stack is read as a whole: the memory rule counts it as the one tensor that it is.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flora_tensor._execution import Run
from flora_tensor._settings import Settings
from flora_tensor._survey import Weight, predicted_row
from flora_tensor._tasks import Task
from flora_tensor.adapter_file import tensor_key
from flora_tensor.checkpoint import Checkpoint, is_float
from flora_tensor.report import TensorRow

__all__ = ["find_stacks", "look_at_stacks", "settled", "stacked_rows"]


def find_stacks(
    base: Checkpoint, tuned: Checkpoint, candidates: Sequence[str], settings: Settings
) -> dict[str, tuple[str, ...]]:
    """Return for each pattern the names that match it, in the order of the numbers in them, from the headers alone."""
    stacks: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for pattern in settings.stack:
        where = f"extract: the stack {pattern!r}"
        members = sorted(fnmatch.filter(candidates, pattern), key=_natural)
        if pattern in base or pattern in tuned:
            raise ValueError(f"{where} is a tensor's own name; pass a pattern, as 'layers.*.weight'")
        if not members:
            near = difflib.get_close_matches(pattern.replace("*", ""), candidates, n=3, cutoff=0.4) or candidates[:3]
            raise ValueError(f"{where} matches no tensor to compare; there are {', '.join(near)}")
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


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def look_at_stacks(run: Run, stacks: Mapping[str, tuple[str, ...]], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """List what each stack buys as one tensor; members that did not change are no part of it."""
    changed = {name: tuple(m for m in members if m in weights) for name, members in stacks.items()}
    tasks = [Task(name, members=members) for name, members in changed.items() if len(members) > 1]
    found = run.do("reading", tasks)
    return {name: outcome.weight for name, outcome in found.items() if outcome.weight is not None}


def settled(
    weights: Mapping[str, Weight], rows: Mapping[str, TensorRow]
) -> tuple[dict[str, Weight], dict[str, TensorRow]]:
    """Leave out the stacks that the budget did not choose, and the members of those that it did; the latter's rows."""
    chosen = {member: name for name, weight in weights.items() if any(weight.ranks) for member in weight.members}
    left = {n: w for n, w in weights.items() if n not in chosen and (not w.members or any(w.ranks))}
    return left, {member: replace(rows[member], stack=name) for member, name in chosen.items()}


def stacked_rows(weight: Weight | None, rows: Mapping[str, TensorRow], *, dry_run: bool) -> dict[str, TensorRow]:
    """Return the rows of a stack's members: the stack's form, each member's share of the numbers and its own error."""
    assert weight is not None
    row = predicted_row(weight) if dry_run else weight.row
    share, more = divmod(row.n_parameters, len(weight.members))
    told: dict[str, TensorRow] = {}
    for k, member in enumerate(weight.members):
        norm = rows[member].delta_norm or 1.0
        told[member] = replace(
            rows[member],
            arrangement=row.arrangement,
            modes=row.modes,
            ranks=row.ranks,
            n_parameters=share + (k < more),
            relative_error=row.relative_error if dry_run else weight.member_errors[k] / norm,
        )
    return told
