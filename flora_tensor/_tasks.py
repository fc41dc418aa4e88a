"""One tensor's work as a task: what a worker is told, what it gives back, and how that is written down."""

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from flora_tensor._deltas import read_change, read_digest
from flora_tensor._errors import InputError
from flora_tensor._files import canonical_json, parse_json
from flora_tensor._memory import naming_tensor
from flora_tensor._safetensors import decode, encode
from flora_tensor._settings import Settings
from flora_tensor._storing import Part, decompose
from flora_tensor._survey import Weight, scan
from flora_tensor._version import __version__
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, open_checkpoint
from flora_tensor.report import TensorRow
from flora_tensor.spectra import Frontier

__all__ = ["Job", "Outcome", "Task", "pack", "perform", "perform_job", "unpack"]


@dataclass(frozen=True)
class Task:
    """What is to be done with one tensor: look at it, or decompose it as ``weight`` says.

    ``known`` is the digest of the inputs whose outcome is kept already, ``widening`` how often to look further,
    ``price`` what a number takes off the squared error at least where it is worth storing, and ``members`` are the
    tensors of a stack, whose name is then no tensor's. ``bases`` are what looking at it found of
    the chosen arrangement: leading left singular vectors of some unfoldings, by their modes.
    """

    name: str
    weight: Weight | None = None
    known: str = ""
    widening: int = 0
    price: float = 0.0
    members: tuple[str, ...] = ()
    bases: Mapping[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])

    @property
    def kind(self) -> str:
        """Which of the two it is."""
        return "look" if self.weight is None else "decompose"

    @property
    def n_bytes(self) -> int:
        """How much of ``bases`` there is."""
        return sum(basis.nbytes for basis in self.bases.values())

    @property
    def look(self) -> "Task":
        """The task that found the weight."""
        weight = self.weight
        return self if weight is None else Task(self.name, None, "", weight.widening, weight.price, weight.members)

    def with_bases(self, parts: Mapping[str, Part]) -> "Task":
        """Return the task with what its look kept of the chosen arrangement."""
        if self.weight is None or self.weight.arrangement is None:
            return self
        chosen = self.weight.arrangements.index(self.weight.arrangement)
        kept = {
            k: parts[key] for k in range(self.weight.arrangement.n_modes) if (key := _basis_key(chosen, k)) in parts
        }
        return replace(self, bases={k: decode(part.data, part.dtype, part.shape) for k, part in kept.items()})

    def options(self, settings: Settings) -> str:
        """Return a digest of everything beside the inputs that the outcome depends on."""
        chosen = None if self.weight is None else _weight_fields(self.weight)
        looked = [self.widening, self.price, self.members]
        content = [__version__, np.__version__, self.kind, settings.of_a_task(), chosen, *looked]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """What became of a tensor: its row; where it is to be stored its weight, and if decomposed the parts to store."""

    row: TensorRow
    weight: Weight | None = None
    scale: float = 1.0
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])


@dataclass(frozen=True)
class Source:
    """A checkpoint by its path, so that a worker can open it, and the sizes and times that its files must have.

    ``rows`` lists tensors that are cropped.
    """

    path: str
    allow_pickle: bool
    files: tuple[tuple[str, int, int], ...]
    rows: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, allow_pickle: bool) -> "Source":
        """Describe a checkpoint that is open."""
        files = tuple((str(f.path), f.identity[0], f.identity[1]) for f in checkpoint.files)
        whole = checkpoint.original
        shapes = ((n, checkpoint.info(n).shape) for n in (checkpoint.names() if whole is not checkpoint else ()))
        rows = tuple((n, shape[0]) for n, shape in shapes if shape != whole.info(n).shape)
        return cls(str(checkpoint.path), allow_pickle, files, rows)


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common; all of it can be pickled."""

    base: Source
    tuned: Source
    settings: Settings

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint, settings: Settings, allow_pickle: bool) -> "Job":
        """Describe a run on two checkpoints that are open."""
        sides = [Source.of(checkpoint, allow_pickle=allow_pickle) for checkpoint in (base, tuned)]
        return cls(sides[0], sides[1], settings)


@functools.lru_cache(maxsize=4)
def _opened(source: Source) -> Checkpoint:
    checkpoint = open_checkpoint(source.path, allow_pickle=source.allow_pickle)
    if all(name in checkpoint for name, _ in source.rows):
        checkpoint = checkpoint.cropped(dict(source.rows))
    if Source.of(checkpoint, allow_pickle=source.allow_pickle) != source:
        raise InputError(f"{source.path}: a worker does not find the files that the run began with")
    return checkpoint


def perform_job(job: Job, task: Task) -> Outcome | None:
    """Do a task in a worker; the checkpoints are opened once in each."""
    return perform(_opened(job.base), _opened(job.tuned), job.settings, task)


def perform(base: Checkpoint, tuned: Checkpoint, settings: Settings, task: Task) -> Outcome | None:
    """Do a task; ``None`` where its outcome is known and the inputs are still the same."""
    with naming_tensor("extract", task.name):
        return _performed(base, tuned, settings, task)


def _performed(base: Checkpoint, tuned: Checkpoint, settings: Settings, task: Task) -> Outcome | None:
    if task.members:
        base, tuned = (side.stacked(task.name, task.members) for side in (base, tuned))
    if task.known and read_digest(base, tuned, task.name) == task.known:
        return None
    if task.weight is not None:
        change = read_change(base, tuned, task.name)
        if change is None or change.digest != task.weight.digest:
            raise InputError(f"{tuned.path}: changed while it was being read; run again when nobody writes to it")
        return Outcome(*_decomposed(task.weight, change.values, settings, task.bases))
    found = scan(base, tuned, task.name, settings, task.widening, task.price, task.members)
    if isinstance(found, TensorRow):
        return Outcome(found)
    weight, delta = found
    if not settings.in_one_pass:
        kept = {} if settings.dry_run else _kept(weight)
        return Outcome(weight.row, replace(weight, bases=[], has_bases=bool(kept)), parts=kept)
    return Outcome(*_decomposed(weight, delta, settings, {}))


def _decomposed(
    weight: Weight, delta: np.ndarray, settings: Settings, bases: Mapping[int, np.ndarray]
) -> tuple[TensorRow, Weight, float, dict[str, Part]]:
    scale, done, parts = decompose(weight, delta, settings, bases)
    return done.row, done, scale, parts


def _kept(weight: Weight) -> dict[str, Part]:
    """Return what a look found that decomposing goes on from, as arrays to keep."""
    found = {_basis_key(n, k): u for n, bases in enumerate(weight.bases) for k, u in bases.items() if u.size}
    codes = {key: "F64" if u.dtype == np.float64 else "F32" for key, u in found.items()}
    return {key: Part(codes[key], u.shape, encode(u, codes[key])) for key, u in found.items()}


def _basis_key(arrangement: int, mode: int) -> str:
    return f"basis_{arrangement}_{mode}"


# An outcome as bytes: one line of JSON, then the arrays that it lists, one after the other.


def pack(outcome: Outcome) -> bytes:
    """Write an outcome down; `unpack` gives back equal values, floats to the last bit."""
    arrays: list[np.ndarray] = []

    def listed(array: np.ndarray) -> list[Any]:
        arrays.append(np.ascontiguousarray(array))
        return [array.dtype.str, list(array.shape)]

    def plain(value: Any) -> Any:  # hexadecimal: JSON has no word for infinity
        return listed(value) if isinstance(value, np.ndarray) else value.hex() if isinstance(value, float) else value

    frontiers = outcome.weight.frontiers if outcome.weight else ()
    content = {
        "row": _plain_fields(outcome.row),
        "weight": None if outcome.weight is None else _weight_fields(outcome.weight),
        "frontiers": [[plain(getattr(frontier, f.name)) for f in fields(Frontier)] for frontier in frontiers],
        "scale": outcome.scale,
        "parts": [[name, part.dtype, list(part.shape), listed(part.data)] for name, part in outcome.parts.items()],
    }
    return b"".join([canonical_json(content).encode(), b"\n", *(array.tobytes() for array in arrays)])


def unpack(payload: np.ndarray) -> Outcome:
    """Read an outcome that `pack` wrote."""
    data = payload.tobytes()
    position = data.index(b"\n") + 1
    content = parse_json(data[: position - 1], "journal")

    def taken(entry: list[Any]) -> np.ndarray:  # in the order in which `pack` listed them
        nonlocal position
        dtype, shape = np.dtype(entry[0]), tuple(entry[1])
        start, position = position, position + dtype.itemsize * math.prod(shape)
        return np.frombuffer(data[start:position], dtype).reshape(shape)

    def rich(value: Any) -> Any:
        return taken(value) if isinstance(value, list) else float.fromhex(value) if isinstance(value, str) else value

    frontiers = [Frontier(*(rich(value) for value in entry)) for entry in content["frontiers"]]
    parts = {name: Part(dtype, tuple(shape), taken(entry)) for name, dtype, shape, entry in content["parts"]}
    row = TensorRow(**_with_tuples(content["row"]))
    weight = None if content["weight"] is None else _weight(content["weight"], row, frontiers)
    return Outcome(row, weight, content["scale"], parts)


def _weight_fields(weight: Weight) -> dict[str, Any]:
    content = {k: v for k, v in _plain_fields(weight).items() if k not in ("frontiers", "bases")}
    chosen = weight.arrangement
    return content | {
        "row": _plain_fields(weight.row),
        "arrangements": [[a.pattern, dict(a.sizes)] for a in weight.arrangements],
        "arrangement": None if chosen is None else [chosen.pattern, dict(chosen.sizes)],
    }


def _plain_fields(value: Weight | TensorRow) -> dict[str, Any]:
    """Do what `dataclasses.asdict` does for fields that hold no dataclass, without its copies of all they hold."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _weight(content: dict[str, Any], row: TensorRow, frontiers: list[Frontier]) -> Weight:
    chosen = content["arrangement"]
    known: dict[str, Any] = {
        "row": row,
        "arrangements": tuple(Arrangement(*a) for a in content["arrangements"]),
        "arrangement": None if chosen is None else Arrangement(*chosen),
        "frontiers": frontiers,
    }
    return Weight(**(_with_tuples(content) | known))


def _with_tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
