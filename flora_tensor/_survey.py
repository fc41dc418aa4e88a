"""The first pass of an extraction: what changed, what each choice of ranks would buy, and the choice."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import feasible_ranks, prefix_between
from flora_tensor._deltas import Change, check_memory, check_stored_finite, frobenius_norm, on_device, read_change
from flora_tensor._errors import InputError
from flora_tensor._frontiers import Frontier, n_parameters_of
from flora_tensor._leading import Look, full_look, leading_look, reach_of
from flora_tensor._rank_errors import FloatArray
from flora_tensor._resized import is_resized
from flora_tensor._safetensors import READABLE
from flora_tensor._scaled import scale_of, weight_of
from flora_tensor._settings import Settings, check_globs
from flora_tensor._stack_norms import StackMoments, StackNorm, output_looks
from flora_tensor.allocation import (
    allocate_ranks,
    allocate_with_stacks,
    budget_curve,
    grouped_frontiers,
    stack_scales,
)
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, is_float, same_bits
from flora_tensor.noise import worth_storing
from flora_tensor.report import TensorRow
from flora_tensor.spectra import hosvd_spectrum
from flora_tensor.stacking import stacked_arrangement

# Singular vectors are kept for the second pass up to so many times a weight's share of the budget.
_KEPT = 2

__all__ = ["Weight", "choose", "expected_weights", "predicted_row", "rank_zero_row", "scan", "share_of", "survey"]


@dataclass
class Weight:
    """A changed weight between the two passes."""

    row: TensorRow
    arrangements: tuple[Arrangement, ...]
    frontiers: list[Frontier] = field(default_factory=list[Frontier])
    arrangement: Arrangement | None = None
    ranks: tuple[int, ...] = ()
    predicted: float | None = None  # in the norm that the budget minimizes
    digest: str = ""  # of the bits of both sides
    ends: tuple[int | None, ...] = ()  # the numbers from which on a frontier may lack better choices; None: nowhere
    is_weighted: bool = False
    members: tuple[str, ...] = ()  # of a stack, in whose case the rest is about all of them as one tensor
    member_errors: tuple[float, ...] = ()  # ‖change − stored‖ of each, not relative
    member_outputs: tuple[float, ...] = ()  # the same of their outputs, where a calibration says what that is
    units: tuple[float, ...] = ()  # what each slice of a stack is divided by, where slices count relative to them
    floor: float | None = None  # the noise in an entry, where that bounds the ranks
    bounds: tuple[Sequence[float], ...] = ()  # for each point of each frontier; none where it is an estimate
    bound: float | None = None  # no tensor of the chosen ranks has a smaller error, in the same norm
    widening: int = 0  # how often it was looked at further
    price: float = 0.0  # what a number had to take off the squared error to be looked at
    margin: float = 0.0  # what it takes off, in the weight's units, where the budget ends
    # For each arrangement the leading left singular vectors of some unfoldings, by their modes; and whether such are
    # kept beside the weight.
    bases: list[Mapping[int, np.ndarray]] = field(default_factory=list[Mapping[int, np.ndarray]])
    has_bases: bool = False

    @property
    def is_short(self) -> bool:
        """Whether the budget reached for more than some frontier lists."""
        spent = _n_parameters(self.arranged_shape, self.ranks) if any(self.ranks) else 0
        return any(end is not None and spent >= end for end in self.ends)

    @property
    def is_listed(self) -> bool:
        """Whether the chosen arrangement was judged by all of its singular values."""
        return any(bounds for a, bounds in zip(self.arrangements, self.bounds) if a == self.arrangement)

    @property
    def arranged_shape(self) -> tuple[int, ...]:
        assert self.arrangement is not None
        return self.arrangement.shape(self.row.shape)


def survey(base: Checkpoint, tuned: Checkpoint, settings: Settings) -> tuple[dict[str, TensorRow], list[str]]:
    """Sort all names, by what the headers alone tell, into rows that are done and tensors to read."""
    rows: dict[str, TensorRow] = {}
    candidates: list[str] = []
    missing: list[str] = []
    mismatched: list[str] = []
    names = tuple(dict.fromkeys((*base.names(), *tuned.names())))
    check_globs("extract", names, settings.include, settings.exclude)
    for name in names:
        sides = [side for side in (base, tuned) if name in side]
        row = TensorRow(name, "left out", shape=sides[0].info(name).shape, dtype=_dtypes(sides, name))
        if not settings.selects(name):
            rows[name] = replace(row, reason="excluded by name")
        elif len(sides) == 1:
            missing.append(name)
            rows[name] = replace(row, reason=f"missing in {'tuned' if name in base else 'base'}")
        elif base.info(name).shape != tuned.info(name).shape:
            if settings.resized != "skip" or not is_resized(base, tuned, name):
                mismatched.append(name)
            rows[name] = replace(row, reason=f"shape differs: {row.shape} and {tuned.info(name).shape}", changed=True)
        elif 0 in row.shape:
            rows[name] = replace(row, reason="zero-size", changed=False)
        else:
            candidates.append(name)
    if missing and not settings.allow_missing:
        raise InputError(_missing_message(base, tuned, missing))
    if mismatched and settings.on_mismatch == "error":
        raise InputError(_mismatch_message(base, tuned, mismatched))
    return rows, candidates


def _dtypes(sides: Sequence[Checkpoint], name: str) -> str:
    return " → ".join(dict.fromkeys(side.info(name).dtype for side in sides))


def _missing_message(base: Checkpoint, tuned: Checkpoint, names: list[str]) -> str:
    lost = [n for n in names if n in base]
    new = [n for n in names if n in tuned]
    for side, group in ((base, lost), (tuned, new)):
        if group and all(name.startswith("base_model.model.") for name in group):
            return (
                f"extract: {side.path} holds an adapter, not a model's weights ({group[0]!r}, …); merge it into its "
                "model first (flora-tensor merge, or PEFT's merge_and_unload), or convert it (flora-tensor convert)"
            )
    parts = [
        f"{len(group)} only in {side.path} ({', '.join(repr(n) for n in group[:3])}{', …' if len(group) > 3 else ''})"
        for group, side in ((lost, base), (new, tuned))
        if group
    ]
    way_out = "pass allow_missing=True (--allow-missing) to leave them out"
    if prefix := prefix_between(lost, new):
        way_out = f"one side's names begin with {prefix!r}: save both from the same class of model, or {way_out}"
    return f"extract: tensors are {' and '.join(parts)}; {way_out}"


def _mismatch_message(base: Checkpoint, tuned: Checkpoint, names: list[str]) -> str:
    name = names[0]
    a, b = base.info(name).shape, tuned.info(name).shape
    skip = "pass on_mismatch='skip' (--on-mismatch skip)"
    if is_resized(base, tuned, name):
        pad = "has the vocabulary been resized? pass resized='pad' (--resized pad) to keep its new rows"
        skip = f"{pad}, or on_mismatch='skip'"
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"extract: {name!r} has shape {a} in {base.path} and {b} in {tuned.path}{more}; "
        f"{skip} to leave such tensors out"
    )


def scan(
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    settings: Settings,
    widening: int = 0,
    price: float = 0.0,
    members: tuple[str, ...] = (),
) -> TensorRow | tuple[Weight, np.ndarray]:
    """Look at one tensor in the first pass; one that is to be decomposed comes with its change.

    ``widening`` counts how often the budget reached for more than was listed; what takes less than ``price`` off the
    squared error for a number is not worth looking at; ``members`` are those of a stack.
    """
    a, b = base.info(name), tuned.info(name)
    row = TensorRow(name, "left out", shape=a.shape, dtype=_dtypes((base, tuned), name))
    if why := _undecomposable(base, tuned, row):
        return _left_out(base, tuned, row, why)
    if len(a.shape) < 2:
        return _scan_whole(base, tuned, row, settings)
    check_memory("extract", base, tuned, name, settings.max_memory)
    change = read_change(base, tuned, name, noise=settings.caps_noise)
    if change is None:
        return replace(row, reason="unchanged", changed=False)
    if change.norm == 0.0:
        return replace(row, reason="unchanged in value, the bits differ", changed=False)
    notes = ["types differ"] if a.dtype != b.dtype else []
    zeros = change.unchanged / change.values.size
    if zeros >= 0.5:
        notes.append(f"update below storage precision: {100 * zeros:.0f} % of the entries did not change")
    row = replace(row, status="tucker", changed=True, delta_norm=change.norm, notes=tuple(notes))
    arrangements = settings.arrangements(members[0] if members else name, a.shape[1:] if members else a.shape)
    arrangements = tuple(map(stacked_arrangement, arrangements)) if members else arrangements
    weight = Weight(row, arrangements, digest=change.digest, members=members, widening=widening, price=price)
    return weight, _look(weight, change, settings)


def _look(weight: Weight, change: Change, settings: Settings) -> np.ndarray:
    """List what ranks buy, or take those that are asked for; return the change that is to be decomposed."""
    delta, floor = change.values, change.noise if settings.caps_noise else settings.noise_floor
    if weight.members and _list_outputs(weight, delta, settings):
        return delta
    if weight.members and settings.weights == "uniform":
        delta, floor = _relative(weight, delta, floor)
    weighted = _weighted(weight, delta, settings)
    if settings.ranks is not None:
        _take_ranks(weight, weighted, settings)
        return delta
    # Scaled along the input, rounding noise is white no more: the rules for its edge do not hold.
    weight.floor = floor if isinstance(floor, float) and not weight.is_weighted else None
    _list(weight, weighted, settings)
    if weight.floor is not None:
        weight.frontiers = worth_storing(weight.frontiers, weight.floor)
    return delta


def _list(weight: Weight, weighted: np.ndarray, settings: Settings) -> None:
    """List what the ranks of every arrangement buy, as far as the budget may reach."""
    norm = weight.row.weighted_norm if weight.is_weighted else weight.row.delta_norm
    norm = math.sqrt(len(weight.units)) if weight.units else norm
    looks: dict[Arrangement, Look] = {}
    known: dict[frozenset[int], FloatArray] = {}
    # Tensors first: a matrix that is one of their unfoldings has the same singular values.
    for arrangement in sorted(weight.arrangements, key=lambda a: a.n_modes == 2):
        arranged = on_device(arrangement.arrange(weighted), settings.device)
        values = known.get(arrangement.rows(0) or frozenset())
        reach = reach_of(
            tuple(arranged.shape),
            settings.share,
            weight.widening,
            0 if values is None else len(values),
            price=weight.price,
            is_stack=bool(weight.members),
        )
        if reach is not None and reach.ranks is not None:
            enough = values is not None and len(values) >= reach.ranks[0]
            rivals = [other.frontier for other in looks.values()]
            look = leading_look(arranged, reach, norm or 0.0, weight.floor, values if enough else None, rivals)
        else:
            enough = values is not None and len(values) == min(arranged.shape)
            most = None if reach is None else reach.most
            kept = math.ceil(_KEPT * (settings.share or 0.0) * weighted.size)
            look = full_look(arranged, weight.floor, most, values if enough else None, kept)
        known |= {rows: v for k, v in look.values.items() if (rows := arrangement.rows(k)) is not None}
        looks[arrangement] = look
    _note(weight, [looks[arrangement] for arrangement in weight.arrangements])
    weight.bases = _shared_bases(looks, weight.arrangements)
    for arrangement, look in looks.items():
        if look.caps is not None and arrangement.is_native:
            weight.row = replace(weight.row, notes=(*weight.row.notes, _noise_note(look.caps)))


def _note(weight: Weight, looks: Sequence[Look]) -> None:
    """Note what was found of each arrangement."""
    weight.frontiers = [look.frontier for look in looks]
    weight.ends = tuple(look.end for look in looks)
    weight.bounds = tuple(look.bounds for look in looks)


def _shared_bases(
    looks: Mapping[Arrangement, Look], arrangements: Sequence[Arrangement]
) -> list[Mapping[int, np.ndarray]]:
    """Return the bases that were found of each arrangement's unfoldings, those that another one shares included."""
    own = [(a, k, to_numpy(u)) for a, look in looks.items() for k, u in look.bases.items()]
    known = {a.right[k]: u for a, k, u in own if all((name,) in a.left for name in a.right[k])}
    found: list[Mapping[int, np.ndarray]] = []
    for arrangement in arrangements:
        shared = {k: known[names] for k, names in enumerate(arrangement.right) if names in known}
        found.append(shared | {k: u for a, k, u in own if a is arrangement})
    return found


def _undecomposable(base: Checkpoint, tuned: Checkpoint, row: TensorRow) -> str | None:
    """Say why a change cannot be stored, neither decomposed nor whole, whatever the options; ``None`` if it can."""
    for side in (base, tuned):
        if scale := scale_of(side, row.name):
            return f"type {row.dtype} is scaled by {scale!r}: convert the checkpoint first"
        if weight := weight_of(side, row.name):
            return f"a scale of {weight!r}, which is left out"
    infos = [side.info(row.name) for side in (base, tuned)]
    if len(row.shape) > 1 and not all(map(is_float, infos)):
        return f"type {row.dtype} cannot be decomposed"
    if any(info.dtype not in READABLE or info.dtype == "C64" for info in infos):
        return f"type {row.dtype} cannot be stored"
    return None


def _left_out(base: Checkpoint, tuned: Checkpoint, row: TensorRow, reason: str) -> TensorRow:
    if same_bits(base, row.name, tuned, row.name):
        return replace(row, reason="unchanged", changed=False)
    return replace(row, reason=reason, changed=True)


def _weighted(weight: Weight, delta: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the change in the norm that counts: scaled by its input's second moment, where there is one that fits."""
    if settings.calibration is None:
        return delta
    weighting = settings.calibration.weighting(weight.row.name, delta.shape)
    fitting = tuple(a for a in weight.arrangements if weighting is not None and weighting.fits(a))
    if weighting is None or not fitting:
        why = "no moment of its input" if weighting is None else "its input is no mode of the arrangement"
        notes = (*weight.row.notes, f"{why}: the plain error counts")
        weight.row = replace(weight.row, notes=notes, weighted_norm=weight.row.delta_norm)
        return delta
    weighted = weighting.scale(delta)
    weight.arrangements, weight.is_weighted = fitting, True
    weight.row = replace(weight.row, weighted_norm=frobenius_norm(weighted))
    return weighted


def _list_outputs(weight: Weight, delta: np.ndarray, settings: Settings) -> bool:
    """List what the ranks of a stack buy of its members' outputs, where a calibration knows of any."""
    if settings.calibration is None:
        return False
    moments = StackMoments.of(settings.calibration, weight.row.name, weight.members, delta.shape[1:])
    fitting = tuple(a for a in weight.arrangements if moments is not None and moments.fits(a))
    if moments is None or not fitting:
        return False
    lengths = moments.lengths(delta)
    weight.arrangements, weight.is_weighted = fitting, True
    weight.row = replace(weight.row, weighted_norm=math.hypot(*lengths))
    weight.units = lengths if settings.weights == "uniform" else ()
    units = weight.units or (1.0,) * len(lengths)
    _note(weight, output_looks(delta, fitting, moments, units, settings.share, weight.widening))
    return True


def _relative(
    weight: Weight, delta: np.ndarray, floor: float | Literal["auto"] | None
) -> tuple[np.ndarray, float | Literal["auto"] | None]:
    """Divide the slices of a stack by their norms, in place; the noise becomes the root mean square of theirs."""
    norm = StackNorm.relative(delta)
    weight.units = norm.units
    if isinstance(floor, float):
        floor *= math.sqrt(sum(unit**-2.0 for unit in norm.units) / len(norm.units))
    return norm.scale_(delta), floor


def _noise_note(caps: Sequence[int]) -> str:
    if not any(caps):
        return "the change does not stand above the rounding noise of its storage type"
    return f"ranks above {tuple(caps)} would store rounding noise"


def _scan_whole(base: Checkpoint, tuned: Checkpoint, row: TensorRow, settings: Settings) -> TensorRow:
    """Look at a vector."""
    if same_bits(base, row.name, tuned, row.name):
        return replace(row, reason="unchanged", changed=False)
    row = replace(row, changed=True)
    check_stored_finite(base.path, row.name, base.read(row.name))
    check_stored_finite(tuned.path, row.name, tuned.read(row.name))
    if settings.vectors == "error":
        raise InputError(
            f"extract: the vector {row.name!r} changed; pass vectors='keep' (--vectors keep) to store it "
            "whole, or 'skip' to leave it out"
        )
    if settings.vectors == "skip":
        return replace(row, reason="vector, skipped as asked")
    return replace(row, status="whole", n_parameters=math.prod(row.shape), relative_error=0.0)


def expected_weights(base: Checkpoint, tuned: Checkpoint, names: Sequence[str], settings: Settings) -> Iterator[Weight]:
    """Guess from the headers, if every tensor changed, what would be stored at the ranks that were given."""
    for name in names:
        shape = base.info(name).shape
        if len(shape) < 2 or not is_float(base.info(name)) or not is_float(tuned.info(name)):
            continue
        weight = Weight(TensorRow(name, "tucker", shape=shape), settings.arrangements(name, shape))
        weight.arrangement = weight.arrangements[0]
        with suppress(ValueError):  # refused when the tensor is found to have changed, not before
            weight.ranks = settings.ranks_of(name, weight.arranged_shape)[1]
            yield weight


def _take_ranks(weight: Weight, delta: np.ndarray, settings: Settings) -> None:
    """Give a weight the ranks that the user asked for, as far as it can have them."""
    weight.arrangement = weight.arrangements[0]
    asked, weight.ranks = settings.ranks_of(weight.row.name, weight.arranged_shape)
    note = ""
    if weight.ranks == weight.arranged_shape:
        note = f"kept as it is: ranks {asked} truncate nothing"
    elif weight.ranks != asked and not isinstance(settings.ranks, int):
        note = f"ranks {asked} lowered to {weight.ranks}"
    if note:
        weight.row = replace(weight.row, notes=(*weight.row.notes, note))
    if settings.dry_run:
        arranged = on_device(weight.arrangement.arrange(delta), settings.device)
        spectrum, ranks = hosvd_spectrum(arranged), feasible_ranks(weight.ranks, weight.arranged_shape)
        weight.predicted = spectrum.error(ranks)
        weight.bound = spectrum.lower_bound(ranks)


def choose(
    weights: dict[str, Weight], settings: Settings, *, keep_going: bool
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Spread the budget over the weights, of which some can be stacks of others.

    Return what no other choice of truncated HOSVDs could beat, and what other budgets would buy.
    """
    if settings.ranks is not None or not weights:
        return None, ()
    frontiers = {name: weight.frontiers for name, weight in weights.items()}
    stacks = {name: weight.members for name, weight in weights.items() if weight.members}
    if stacks:
        floors = {name: floor for name in stacks if (floor := weights[name].floor) is not None}
        allocation = allocate_with_stacks(
            frontiers, stacks, floors=floors, weights=settings.weights, **settings.limit()
        )
    else:
        allocation = allocate_ranks(frontiers, weights=settings.weights, **settings.limit())
    if not allocation.n_parameters and not keep_going:
        smallest = [int(f.n_parameters[1]) for w in weights.values() for f in w.frontiers if len(f) > 1]
        if not smallest:
            raise InputError(
                "extract: nothing to extract: no change stands above the rounding noise of its storage type; "
                "pass noise_floor=None (--noise-floor none) to extract it all the same"
            )
        least = min(smallest)
        raise ValueError(
            f"extract: the budget {settings.budget} holds nothing: the smallest tensor takes {least} numbers; raise it"
        )
    grouped = grouped_frontiers(frontiers, stacks, weights=settings.weights)
    curve = budget_curve(grouped, weights=stack_scales(grouped, stacks, settings.weights))
    for name, choice in allocation.choices.items():
        weight = weights[name]
        weight.arrangement = weight.arrangements[choice.option]
        weight.ranks = choice.ranks
        total = weight.frontiers[choice.option].norm_squared
        weight.margin = allocation.price * (total if settings.weights == "uniform" else 1.0)
        weight.predicted = math.sqrt(choice.error_squared / total) if total else 0.0
        if bounds := weight.bounds[choice.option]:
            chosen = (weight.frontiers[choice.option].ranks == choice.ranks).all(axis=1)
            weight.bound = bounds[int(np.flatnonzero(chosen)[0])]
    return allocation.lower_bound, curve


def share_of(budget: Mapping[str, Any], base: Checkpoint) -> float | None:
    """Return a budget as a share of the numbers that a checkpoint has to decompose; ``None`` for a tolerance."""
    if "max_parameters" not in budget:
        return budget.get("max_ratio")
    infos = (base.info(name) for name in base.names())
    total = sum(info.n_elements for info in infos if len(info.shape) > 1 and is_float(info))
    return min(1.0, budget["max_parameters"] / total) if total else None


def predicted_row(weight: Weight) -> TensorRow:
    """Return the row of a dry run."""
    if not any(weight.ranks):
        return rank_zero_row(weight)
    assert weight.arrangement is not None
    return replace(
        weight.row,
        arrangement=weight.arrangement.pattern,
        modes=weight.arranged_shape,
        ranks=weight.ranks,
        n_parameters=_n_parameters(weight.arranged_shape, weight.ranks),
        # In a dry run nothing is decomposed: under a calibration only the error that counts is known, and of a stack
        # under relative weights only what it is in the mean.
        relative_error=None if weight.is_weighted or weight.units else weight.predicted,
        weighted_error=None if weight.row.weighted_norm is None or weight.units else weight.predicted,
        lower_bound=weight.bound,
    )


def rank_zero_row(weight: Weight) -> TensorRow:
    noise = any(note == _noise_note((0,)) for note in weight.row.notes)
    reason = "below the rounding noise of its storage type" if noise else "rank 0 under this budget"
    lost = None if weight.row.weighted_norm is None else 1.0
    return replace(weight.row, status="left out", reason=reason, relative_error=1.0, weighted_error=lost)


def _n_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    return int(n_parameters_of(ranks, shape, partial=True))
