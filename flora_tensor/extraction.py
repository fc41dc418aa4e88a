"""From two checkpoints to an adapter: the change of every weight, decomposed under one budget.

Two passes, one tensor at a time. The first reads each pair, subtracts, and lists what every choice of ranks would
buy; then one budget is spread over all weights; the second reads each pair again, decomposes it at its ranks,
measures the error of what is stored and writes it. Neither model is ever in memory.
"""

import difflib
import fnmatch
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias
from warnings import warn

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import as_int, check_fraction, check_tolerance, feasible_ranks
from flora_tensor._errors import InputError, ResourceError
from flora_tensor._files import check_free_space, staged_directory, write_file
from flora_tensor._safetensors import READABLE, SafetensorsWriter, decode, encode, round_to
from flora_tensor._typing import Array
from flora_tensor._warnings import FloraWarning
from flora_tensor.adapter_file import (
    CONFIG_NAME,
    MAX_SCALE,
    METADATA,
    MODEL_NAME,
    OWNED_NAMES,
    REPORT_NAME,
    config_of,
    tensor_key,
    whole_key,
    write_config,
)
from flora_tensor.allocation import allocate_ranks
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, is_float, open_checkpoint
from flora_tensor.decomposition import tucker
from flora_tensor.noise import projected_edge, rounding_noise, worth_storing
from flora_tensor.report import ExtractionReport, TensorRow
from flora_tensor.spectra import Frontier, cheapest_spectrum, hosvd_spectrum, n_parameters_of
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["extract"]

PathLike: TypeAlias = str | os.PathLike[str]
Progress: TypeAlias = Callable[[str, int, int, str], None]
RanksOption: TypeAlias = int | Sequence[int] | Mapping[str, int | Sequence[int]]
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Binary exponents of a core's largest entry that a type stores well. Outside them a power of two moves into the
# scale, exactly.
_EXPONENTS = {"F64": (-900, 900), "F32": (-100, 100), "BF16": (-100, 100), "F16": (-2, 14)}
_DEFAULT_RATIO = 0.05


@dataclass(frozen=True)
class _Settings:
    """The options of `extract`, checked."""

    budget: dict[str, Any]
    ranks: RanksOption | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    arrangement: Arrangement | None
    vectors: str
    on_mismatch: str
    allow_missing: bool
    dtype: str
    device: Any
    max_memory: int | None
    noise_floor: float | Literal["auto"] | None
    dry_run: bool
    progress: Progress

    def options(self) -> dict[str, Any]:
        """Return what shaped the result, for the report."""
        ranks = self.ranks
        if isinstance(ranks, Mapping):
            ranks = {pattern: r if isinstance(r, int) else list(r) for pattern, r in ranks.items()}
        elif ranks is not None and not isinstance(ranks, int):
            ranks = list(ranks)
        return {
            **({"ranks": ranks} if ranks is not None else self.budget),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "arrangements": self.arrangement.pattern if self.arrangement else "auto",
            "vectors": self.vectors,
            "noise_floor": self.noise_floor,
            "dtype": {code: name for name, code in _CODES.items()}[self.dtype],
        }

    def selects(self, name: str) -> bool:
        """Tell whether a tensor is asked for."""
        return matches(name, self.include, self.exclude)

    def arrangements(self, shape: tuple[int, ...]) -> tuple[Arrangement, ...]:
        """Return the arrangements to try for a weight of this shape."""
        native = Arrangement.native(len(shape))
        if self.arrangement is None:
            return (native,) if self.ranks is not None else Arrangement.candidates(len(shape))
        try:
            self.arrangement.shape(shape)
        except ValueError:
            return (native,)
        return (self.arrangement,)

    def ranks_of(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ranks asked for and the feasible ones, for the arranged shape of a weight."""
        ranks = self.ranks
        if isinstance(ranks, Mapping):
            found = [r for pattern, r in ranks.items() if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"extract: ranks has no pattern for {name!r}; add one, or '*' for all others")
            ranks = found[0]
        asked = [ranks] * len(shape) if isinstance(ranks, int) else list(ranks or ())
        asked = [as_int("extract", "ranks", r) for r in asked]
        if len(asked) != len(shape):
            raise ValueError(
                f"extract: {len(asked)} ranks for {name!r}, which has {len(shape)} modes; pass one integer for all, "
                "or a mapping from name patterns to ranks"
            )
        if min(asked) < 1:
            raise ValueError(f"extract: rank {min(asked)} for {name!r}; pass at least 1")
        return tuple(asked), feasible_ranks(asked, shape)


@dataclass
class _Weight:
    """A changed weight between the two passes."""

    row: TensorRow
    arrangements: tuple[Arrangement, ...]
    frontiers: list[Frontier] = field(default_factory=list[Frontier])
    arrangement: Arrangement | None = None
    ranks: tuple[int, ...] = ()
    predicted: float | None = None

    @property
    def arranged_shape(self) -> tuple[int, ...]:
        assert self.arrangement is not None
        return self.arrangement.shape(self.row.shape)


def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike | None,
    *,
    ranks: RanksOption | None = None,
    rtol: float | None = None,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    arrangements: str | Arrangement = "auto",
    vectors: Literal["keep", "skip", "error"] = "keep",
    on_mismatch: Literal["error", "skip"] = "error",
    allow_missing: bool = False,
    noise_floor: float | Literal["auto"] | None = "auto",
    device: Any = None,
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32",
    dry_run: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Turn the difference of two checkpoints into an adapter directory.

    The budget or tolerance counts for the whole model: the numbers go where they lower the summed squared error
    most, and each weight gets the arrangement of its axes that does best with its share. The error in the report
    is measured on the stored bits, tensor by tensor. The directory appears whole or not at all.

    Parameters
    ----------
    base, tuned : path
        The two checkpoints: safetensors files, index files or directories (see `open_checkpoint`).
    out : path or None
        The adapter directory to write; may be ``None`` in a dry run.
    ranks : int, sequence of int, or mapping of glob to either, optional
        Ranks instead of a budget, lowered to what each weight can have.
    rtol : float, optional
        The relative error of all changes together to stay within, with as few numbers as possible.
    max_parameters : int, optional
        How many numbers to store in all Tucker tensors together.
    max_ratio : float, optional
        The same as a share of the numbers in the dense changes, in (0, 1]; 0.05 where nothing else is given.
    include, exclude : str or sequence of str, optional
        Globs of names; only what matches ``include`` and does not match ``exclude`` is looked at.
    arrangements : "auto", pattern or Arrangement
        Which axes form a mode. ``"auto"`` chooses per weight under a budget and takes the weight's own axes with
        ``ranks``. A pattern counts for the weights it fits; the others keep their own axes.
    vectors : {"keep", "skip", "error"}
        Changed tensors of at most one axis (biases, norms): store them whole, leave them out, or refuse.
    on_mismatch : {"error", "skip"}
        What to do about a tensor whose shape differs.
    allow_missing : bool, default False
        Whether tensors that only one checkpoint has are left out; the default refuses.
    noise_floor : "auto", float or None
        The standard deviation of noise in the entries of the changes; ranks that would only store noise are not spent.
        ``"auto"`` takes the rounding noise of the types that the checkpoints are stored in, where a budget is given: a
        tolerance is a promise and is kept. ``None`` turns the cap off. It does not apply to ``ranks``.
    device : optional
        A PyTorch device to compute on, such as ``"cuda"``; NumPy on the CPU by default.
    dtype : {"float32", "bfloat16", "float16", "float64"}
        The type to store cores and factors in.
    dry_run : bool, default False
        Do everything but the decomposition and the writing.
    overwrite : bool, default False
        Whether an adapter directory that exists is replaced.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.
    max_memory : int, optional
        How many bytes one tensor's work may take; what the machine has free by default.
    progress : callable, optional
        Called as ``progress(phase, done, total, name)`` before each tensor.

    Returns
    -------
    ExtractionReport
        A row for every tensor of both checkpoints; also written as `extraction_report.json`.

    Raises
    ------
    ValueError
        If an option is out of its range, or the budget holds nothing.
    InputError
        If a checkpoint is damaged, the two do not fit each other, a number is not finite, or nothing changed.
    ResourceError
        If a tensor would need more memory than there is.
    OSError
        If the output exists, is being written by another run, or does not fit on the disk.

    Warns
    -----
    FloraWarning
        If rounding to ``dtype`` takes the error above ``rtol``.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, equation 5, for the form of the change; De Lathauwer, De Moor and Vandewalle
    (2000) for the decomposition; the budget is spread by `allocate_ranks`.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from safetensors.numpy import save_file
    >>> here = pathlib.Path(tempfile.mkdtemp())
    >>> weight, step = np.eye(8, dtype=np.float32), np.ones((8, 8), np.float32)
    >>> save_file({"fc.weight": weight}, here / "base.safetensors")
    >>> save_file({"fc.weight": weight + step}, here / "tuned.safetensors")
    >>> report = extract(here / "base.safetensors", here / "tuned.safetensors", here / "adapter", rtol=1e-3)
    >>> report["fc.weight"].ranks, report.n_parameters, report.dense_parameters
    ((1, 1), 17, 64)
    """
    if out is None and not dry_run:
        raise ValueError("extract: out is None; pass a directory, or dry_run=True")
    budget = {"rtol": rtol, "max_parameters": max_parameters, "max_ratio": max_ratio}
    settings = _Settings(
        _checked_budget(budget, ranks),
        ranks,
        _globs(include),
        _globs(exclude),
        _arrangement_option(arrangements),
        _choice("vectors", vectors, ("keep", "skip", "error")),
        _choice("on_mismatch", on_mismatch, ("error", "skip")),
        allow_missing,
        _CODES[_choice("dtype", dtype, tuple(_CODES))],
        device,
        max_memory,
        _noise_option(noise_floor),
        dry_run,
        progress or _silent,
    )
    before = open_checkpoint(base, allow_pickle=allow_pickle)
    after = open_checkpoint(tuned, allow_pickle=allow_pickle)
    if out is not None:
        check_distinct("extract", out, before, after)
    stage = (
        nullcontext(None)
        if dry_run or out is None
        else staged_directory("extract", Path(out), overwrite=overwrite, owned=OWNED_NAMES)
    )
    with stage as directory:
        report = _run(before, after, directory, settings)
        before.check_unchanged()
        after.check_unchanged()
    if rtol is not None and report.relative_error > rtol + 1e-5:
        message = f"extract: stored as {dtype} the error is {report.relative_error:.3g}, above rtol {rtol}"
        warn(f"{message}; pass dtype='float32' or 'float64'", FloraWarning, 2)
    return report


def _run(base: Checkpoint, tuned: Checkpoint, directory: Path | None, settings: _Settings) -> ExtractionReport:
    rows, candidates = _survey(base, tuned, settings)
    weights: dict[str, _Weight] = {}
    for done, name in enumerate(candidates):
        settings.progress("reading", done, len(candidates), name)
        found = _scan(base, tuned, name, settings)
        if isinstance(found, _Weight):
            weights[name] = found
            found = found.row
        rows[name] = found
    if not any(row.changed for row in rows.values()):
        raise InputError(
            f"extract: nothing to extract: no selected tensor differs between {base.path} and {tuned.path}"
        )
    lower_bound = _choose(weights, settings, keep_going=any(row.status == "whole" for row in rows.values()))
    if directory is None:
        rows |= {name: _predicted_row(weight) for name, weight in weights.items()}
    else:
        rows |= _write(base, tuned, directory, rows, weights, settings)
    names = dict.fromkeys((*base.names(), *tuned.names()))
    report = _totals(tuple(rows[name] for name in names), base, tuned, lower_bound, settings, directory is None)
    if directory is not None:
        write_file(directory / REPORT_NAME, (report.to_json() + "\n").encode())
    return report


def _totals(
    rows: tuple[TensorRow, ...],
    base: Checkpoint,
    tuned: Checkpoint,
    lower_bound: float | None,
    settings: _Settings,
    dry_run: bool,
) -> ExtractionReport:
    # Norms are scaled by the largest one, so that squares neither overflow nor vanish.
    decomposed = [row for row in rows if row.delta_norm is not None]
    largest = max((row.delta_norm or 0.0 for row in decomposed), default=0.0) or 1.0
    total = sum(((row.delta_norm or 0.0) / largest) ** 2 for row in decomposed)
    left = sum(((row.delta_norm or 0.0) / largest * (row.relative_error or 0.0)) ** 2 for row in decomposed)
    aliases = {**base.aliases, **tuned.aliases}
    return ExtractionReport(
        rows=rows,
        dense_parameters=sum(math.prod(row.shape) for row in decomposed),
        n_parameters=sum(row.n_parameters for row in rows if row.status == "tucker"),
        whole_parameters=sum(row.n_parameters for row in rows if row.status == "whole"),
        relative_error=math.sqrt(left / total) if total else 0.0,
        lower_bound=lower_bound,
        options=settings.options() | ({"aliases": aliases} if aliases else {}),
        dry_run=dry_run,
    )


def _survey(base: Checkpoint, tuned: Checkpoint, settings: _Settings) -> tuple[dict[str, TensorRow], list[str]]:
    """Sort all names, by what the headers alone tell, into rows that are done and tensors to read."""
    rows: dict[str, TensorRow] = {}
    candidates: list[str] = []
    missing: list[str] = []
    mismatched: list[str] = []
    names = tuple(dict.fromkeys((*base.names(), *tuned.names())))
    _check_globs(settings, names)
    for name in names:
        sides = [side for side in (base, tuned) if name in side]
        row = TensorRow(name, "left out", shape=sides[0].info(name).shape, dtype=_dtypes(sides, name))
        if not settings.selects(name):
            rows[name] = replace(row, reason="excluded by name")
        elif len(sides) == 1:
            missing.append(name)
            rows[name] = replace(row, reason=f"missing in {'tuned' if name in base else 'base'}")
        elif base.info(name).shape != tuned.info(name).shape:
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
    parts = [
        f"{len(group)} only in {side.path} ({', '.join(repr(n) for n in group[:3])}{', …' if len(group) > 3 else ''})"
        for group, side in ((lost, base), (new, tuned))
        if group
    ]
    return f"extract: tensors are {' and '.join(parts)}; pass allow_missing=True (--allow-missing) to leave them out"


def _mismatch_message(base: Checkpoint, tuned: Checkpoint, names: list[str]) -> str:
    name = names[0]
    a, b = base.info(name).shape, tuned.info(name).shape
    hint = "; has the vocabulary been resized? " if len(a) == len(b) == 2 and a[1] == b[1] else "; "
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"extract: {name!r} has shape {a} in {base.path} and {b} in {tuned.path}{more}{hint}"
        "pass on_mismatch='skip' (--on-mismatch skip) to leave such tensors out"
    )


def _check_globs(settings: _Settings, names: Sequence[str]) -> None:
    for pattern in settings.include:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.4) or list(names[:3])
            raise ValueError(f"extract: include pattern {pattern!r} matches no tensor; there are {', '.join(near)}")


def _scan(base: Checkpoint, tuned: Checkpoint, name: str, settings: _Settings) -> TensorRow | _Weight:
    """Look at one tensor in the first pass."""
    a, b = base.info(name), tuned.info(name)
    row = TensorRow(name, "left out", shape=a.shape, dtype=_dtypes((base, tuned), name))
    is_vector = len(a.shape) < 2
    if not (is_float(a) and is_float(b)) or is_vector:
        return _scan_whole(base, tuned, row, settings, decomposable=False if not is_vector else None)
    check_memory("extract", base, tuned, name, settings.max_memory)
    delta = read_delta(base, tuned, name)
    if delta is None:
        return replace(row, reason="unchanged", changed=False)
    norm = _norm(delta)
    if norm == 0.0:
        return replace(row, reason="unchanged in value, the bits differ", changed=False)
    notes = ["types differ"] if a.dtype != b.dtype else []
    zeros = 1 - np.count_nonzero(delta) / delta.size
    if zeros >= 0.5:
        notes.append(f"update below storage precision: {100 * zeros:.0f} % of the entries did not change")
    row = replace(row, status="tucker", changed=True, delta_norm=norm, notes=tuple(notes))
    weight = _Weight(row, settings.arrangements(a.shape))
    floor = _noise_floor(base, tuned, name, delta, settings)
    for arrangement in weight.arrangements if settings.ranks is None else ():
        arranged = _on_device(arrangement.arrange(delta), settings.device)
        spectrum = cheapest_spectrum("extract", arranged)
        caps = None if floor is None else projected_edge(spectrum, floor)[0]
        weight.frontiers.append(spectrum.frontier(max_ranks=caps, partial=True))
        if caps is not None and caps != spectrum.max_ranks and arrangement.is_native:
            weight.row = replace(weight.row, notes=(*weight.row.notes, _noise_note(caps)))
    if floor is not None and weight.frontiers:
        weight.frontiers = worth_storing(weight.frontiers, floor)
    if settings.ranks is not None:
        _take_ranks(weight, delta, settings)
    return weight


def _noise_floor(
    base: Checkpoint, tuned: Checkpoint, name: str, delta: np.ndarray, settings: _Settings
) -> float | None:
    """Return the standard deviation of the noise in a change, or ``None`` where no cap is wanted."""
    if settings.ranks is not None or settings.noise_floor != "auto":
        return settings.noise_floor if isinstance(settings.noise_floor, float) else None
    if "rtol" in settings.budget:
        return None
    types = {code: dtype for dtype, code in _CODES.items()}
    sides = [side for side in (base, tuned) if side.info(name).dtype in types]
    stored = max((rounding_noise(side.read(name), types[side.info(name).dtype]) for side in sides), default=0.0)
    # The subtraction rounds too; beside the rounding of a shorter storage type that vanishes.
    return math.hypot(stored, rounding_noise(delta, delta.dtype.name))


def _noise_note(caps: Sequence[int]) -> str:
    if not any(caps):
        return "the change does not stand above the rounding noise of its storage type"
    return f"ranks above {tuple(caps)} would store rounding noise"


def _scan_whole(
    base: Checkpoint, tuned: Checkpoint, row: TensorRow, settings: _Settings, *, decomposable: bool | None
) -> TensorRow:
    """Look at a vector, or at a tensor of a type that cannot be decomposed (``decomposable=False``)."""
    a, b = base.info(row.name), tuned.info(row.name)
    if a.dtype == b.dtype and np.array_equal(base.read_raw(row.name), tuned.read_raw(row.name)):
        return replace(row, reason="unchanged", changed=False)
    row = replace(row, changed=True)
    if decomposable is False:
        return replace(row, reason=f"type {row.dtype} cannot be decomposed")
    if a.dtype not in READABLE or b.dtype not in READABLE or "C64" in (a.dtype, b.dtype):
        return replace(row, reason=f"type {row.dtype} cannot be stored")
    _check_finite(base.path, row.name, base.read(row.name))
    _check_finite(tuned.path, row.name, tuned.read(row.name))
    if settings.vectors == "error":
        raise InputError(
            f"extract: the vector {row.name!r} changed; pass vectors='keep' (--vectors keep) to store it "
            "whole, or 'skip' to leave it out"
        )
    if settings.vectors == "skip":
        return replace(row, reason="vector, skipped as asked")
    return replace(row, status="whole", n_parameters=math.prod(row.shape), relative_error=0.0)


def read_delta(base: Checkpoint, tuned: Checkpoint, name: str) -> np.ndarray | None:
    """Read how a tensor changed, or ``None`` where its bits did not: float64 where either side is, else float32."""
    a, b = base.info(name), tuned.info(name)
    raw_a, raw_b = base.read_raw(name), tuned.read_raw(name)
    if a.dtype == b.dtype and np.array_equal(raw_a, raw_b):
        return None
    work = np.float64 if "F64" in (a.dtype, b.dtype) else np.float32
    old = decode(raw_a, a.dtype, a.shape).astype(work, copy=False)
    del raw_a
    new = decode(raw_b, b.dtype, b.shape).astype(work, copy=False)
    del raw_b
    _check_finite(base.path, name, old)
    _check_finite(tuned.path, name, new)
    with np.errstate(over="ignore"):
        delta = np.subtract(new, old, out=new)
    if not np.isfinite(delta).all():
        raise InputError(f"extract: the change of {name!r} overflows {np.dtype(work).name}; store the inputs as F64")
    return delta


def _check_finite(path: Path, name: str, x: np.ndarray) -> None:
    # Before any SVD: LAPACK's can loop for ever on a single infinity.
    finite = np.isfinite(x)
    if not finite.all():
        first = tuple(int(i[0]) for i in np.nonzero(~finite)) if x.ndim else ()
        count = int(x.size - np.count_nonzero(finite))
        raise InputError(f"{path}: {name!r} has {count} entries that are NaN or infinite, the first at {first}")


def _norm(x: np.ndarray) -> float:
    """Take the Frobenius norm in float64, whatever the magnitude."""
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    flat, total = x.reshape(-1), 0.0
    for start in range(0, flat.size, 1 << 20):  # in pieces: no second copy of the whole in float64
        scaled = np.ldexp(flat[start : start + (1 << 20)].astype(np.float64), -exponent)
        total += float(scaled @ scaled)
    return math.ldexp(math.sqrt(total), exponent)


def _on_device(x: np.ndarray, device: Any) -> Array:
    if device is None:
        return x
    try:
        import torch
    except ImportError:
        raise ImportError("extract: device needs PyTorch; pip install 'flora-tensor[torch]'") from None
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


def _take_ranks(weight: _Weight, delta: np.ndarray, settings: _Settings) -> None:
    """Give a weight the ranks that the user asked for, as far as it can have them."""
    weight.arrangement = weight.arrangements[0]
    asked, weight.ranks = settings.ranks_of(weight.row.name, weight.arranged_shape)
    if weight.ranks != asked and not isinstance(settings.ranks, int):
        note = f"ranks {asked} lowered to {weight.ranks}"
        weight.row = replace(weight.row, notes=(*weight.row.notes, note))
    if settings.dry_run:
        arranged = _on_device(weight.arrangement.arrange(delta), settings.device)
        weight.predicted = hosvd_spectrum(arranged).error(weight.ranks)


def _choose(weights: dict[str, _Weight], settings: _Settings, *, keep_going: bool) -> float | None:
    """Spread the budget over the weights and free their frontiers; return what no other choice could beat."""
    if settings.ranks is not None or not weights:
        return None
    allocation = allocate_ranks({name: weight.frontiers for name, weight in weights.items()}, **settings.budget)
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
    for name, choice in allocation.choices.items():
        weight = weights[name]
        weight.arrangement = weight.arrangements[choice.option]
        weight.ranks = choice.ranks
        total = weight.frontiers[choice.option].norm_squared
        weight.predicted = math.sqrt(choice.error_squared / total) if total else 0.0
        weight.frontiers = []
    return allocation.lower_bound


def _predicted_row(weight: _Weight) -> TensorRow:
    """Return the row of a dry run."""
    if not any(weight.ranks):
        return _rank_zero_row(weight)
    assert weight.arrangement is not None
    return replace(
        weight.row,
        arrangement=weight.arrangement.pattern,
        ranks=weight.ranks,
        n_parameters=_n_parameters(weight.arranged_shape, weight.ranks),
        relative_error=weight.predicted,
    )


def _rank_zero_row(weight: _Weight) -> TensorRow:
    noise = any(note == _noise_note((0,)) for note in weight.row.notes)
    reason = "below the rounding noise of its storage type" if noise else "rank 0 under this budget"
    return replace(weight.row, status="left out", reason=reason, relative_error=1.0)


def _n_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    return int(n_parameters_of(ranks, shape, partial=True))


def _write(
    base: Checkpoint,
    tuned: Checkpoint,
    directory: Path,
    rows: Mapping[str, TensorRow],
    weights: Mapping[str, _Weight],
    settings: _Settings,
) -> dict[str, TensorRow]:
    """Decompose and write everything that is to be stored: the second pass."""
    stored = {name: weight for name, weight in weights.items() if any(weight.ranks)}
    whole = [name for name, row in rows.items() if row.status == "whole"]
    layout = list(_layout(tuned, stored, whole, settings.dtype))
    check_free_space("extract", directory, sum(_n_bytes(dtype, shape) for _, dtype, shape in layout))
    result = {name: _rank_zero_row(weight) for name, weight in weights.items() if name not in stored}
    scales: dict[str, float] = {}
    with SafetensorsWriter(directory / MODEL_NAME, layout, METADATA) as writer:
        for done, (name, weight) in enumerate(stored.items()):
            settings.progress("decomposing", done, len(stored), name)
            delta = read_delta(base, tuned, name)
            if delta is None:
                raise InputError(f"{tuned.path}: changed while it was being read; run again when nobody writes to it")
            scales[name], result[name] = _decompose(writer, weight, delta, settings)
        for name in whole:
            writer.write(whole_key(name), tuned.read_raw(name))
        writer.finish()
    config = config_of(
        ranks={name: weight.ranks for name, weight in stored.items()},
        scales=scales,
        arrangements={name: weight.arrangement for name, weight in stored.items() if weight.arrangement},
        shapes={name: weight.row.shape for name, weight in stored.items()},
        whole=whole,
        extra={"base_model_name_or_path": str(base.path), "base_fingerprint": base.fingerprint()},
    )
    write_config(directory / CONFIG_NAME, config)
    return result


def _layout(
    tuned: Checkpoint, stored: Mapping[str, _Weight], whole: Sequence[str], dtype: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for name, weight in stored.items():
        yield tensor_key(name, "core"), dtype, weight.ranks
        for mode, (size, rank) in enumerate(zip(weight.arranged_shape, weight.ranks)):
            if rank < size:  # a mode of full rank is left whole
                yield tensor_key(name, f"factor_{mode}"), dtype, (size, rank)
    for name in whole:
        yield whole_key(name), tuned.info(name).dtype, tuned.info(name).shape


def _n_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 8)


def _decompose(
    writer: SafetensorsWriter, weight: _Weight, delta: np.ndarray, settings: _Settings
) -> tuple[float, TensorRow]:
    """Decompose one change at its ranks, write it, and measure the error of the stored bits."""
    assert weight.arrangement is not None
    name, dtype = weight.row.name, settings.dtype
    arranged = weight.arrangement.arrange(delta)
    fitted = _fit(_on_device(arranged, settings.device), weight, settings).map(to_numpy)
    core, exponent = _fitting_core(name, fitted.core, dtype)
    scale = math.ldexp(1.0, exponent)
    factors = [(f"factor_{k}", u) for k, u in enumerate(fitted.factors) if u is not None]
    for part, array in [("core", core), *factors]:
        writer.write(tensor_key(name, part), encode(to_numpy(array), dtype))
    stored = TuckerTensor(core, fitted.factors).map(lambda array: round_to(array, dtype).astype(np.float64))
    # What `load_adapter` gives and `merge_checkpoint` adds, in float64: the difference is the error and nothing else.
    difference = np.ldexp(stored.to_tensor(), exponent)
    difference -= arranged
    norm = weight.row.delta_norm or 0.0
    row = replace(
        weight.row,
        arrangement=weight.arrangement.pattern,
        ranks=weight.ranks,
        n_parameters=stored.n_parameters,
        relative_error=_norm(difference) / norm,
    )
    return scale, row


def _fit(arranged: Array, weight: _Weight, settings: _Settings) -> TuckerTensor:
    """Decompose at the chosen ranks; under a tolerance at least as well as the spectrum promised."""
    ranks = tuple(None if rank == size else rank for rank, size in zip(weight.ranks, arranged.shape))
    if not any(ranks):  # all modes whole: the change itself
        return TuckerTensor(arranged, (None,) * len(ranks))
    fit = tucker(arranged, ranks)
    if (
        "rtol" in settings.budget
        and weight.predicted is not None
        and fit.relative_error > weight.predicted * (1 + 1e-6)
    ):
        # The promise is the truncated HOSVD's; fast ways come within a hair, and that hair counts for a tolerance.
        fit = min(fit, tucker(arranged, ranks, method="hosvd"), key=lambda f: f.relative_error)
    return fit.tucker


def _fitting_core(name: str, core: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return the core times 2**-k, and k, so that the storage type neither overflows nor loses digits; mostly k = 0."""
    exponent = math.frexp(float(np.max(np.abs(core), initial=0.0)))[1]
    low, high = _EXPONENTS[dtype]
    if low <= exponent <= high:
        return core, 0
    if not math.ldexp(1.0, min(exponent, 1000)) < MAX_SCALE:
        raise ValueError(f"extract: the change of {name!r} reaches 2^{exponent}; pass dtype='float64' to store it")
    return np.ldexp(core, -exponent), exponent


def _checked_budget(budget: Mapping[str, Any], ranks: RanksOption | None) -> dict[str, Any]:
    """Return the one criterion that was given; 5 % of the dense size where none was."""
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) + (ranks is not None) > 1:
        names = [*given, *(["ranks"] if ranks is not None else [])]
        raise TypeError(f"extract: got {' and '.join(names)}; pass one of ranks, rtol, max_parameters and max_ratio")
    if "max_ratio" in given:
        check_fraction("extract", "max_ratio", given["max_ratio"])
    if "rtol" in given:
        check_tolerance("extract", given["rtol"])
    if "max_parameters" in given and as_int("extract", "max_parameters", given["max_parameters"]) < 1:
        raise ValueError(f"extract: max_parameters is {given['max_parameters']}; pass at least 1")
    if isinstance(ranks, Mapping):
        return {}
    for rank in ranks if isinstance(ranks, Sequence) else [ranks] if ranks is not None else []:
        if as_int("extract", "ranks", rank) < 1:
            raise ValueError(f"extract: rank {rank}; pass at least 1")
    return given or {"max_ratio": _DEFAULT_RATIO}


def matches(name: str, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> bool:
    """Tell whether a name fits one of the globs ``include``, or there are none, and none of ``exclude``."""
    wanted, unwanted = _globs(include), _globs(exclude)
    is_wanted = not wanted or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    return is_wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)


def _globs(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _choice(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"extract: {name} is {value!r}; pass one of {', '.join(map(repr, allowed))}")
    return value


def _noise_option(given: Any) -> float | Literal["auto"] | None:
    if given is None or given == "auto":
        return given
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"extract: noise_floor is {given!r}; pass 'auto', None, or a finite number of at least 0")
    return value


def _arrangement_option(given: str | Arrangement) -> Arrangement | None:
    if isinstance(given, Arrangement):
        return given
    return None if given == "auto" else Arrangement(given)


def _silent(phase: str, done: int, total: int, name: str) -> None:
    """Show no progress."""


def check_distinct(where: str, out: PathLike, *inputs: Checkpoint) -> None:
    """Refuse an output that is an input, or the directory that an input lies in."""
    target = Path(os.path.realpath(out))
    for checkpoint in inputs:
        paths = {Path(os.path.realpath(checkpoint.path)), *(Path(os.path.realpath(f.path)) for f in checkpoint.files)}
        if any(target == path or target in path.parents for path in paths):
            raise ValueError(
                f"{where}: the output {target} is or holds the input {checkpoint.path}; choose another one"
            )


def check_memory(where: str, base: Checkpoint, tuned: Checkpoint, name: str, max_memory: int | None) -> None:
    """Refuse a tensor whose work does not fit, before anything large is allocated."""
    shape = base.info(name).shape
    size, item = math.prod(shape), 8 if "F64" in (base.info(name).dtype, tuned.info(name).dtype) else 4
    bases = sum(n * min(n, size // n) for n in shape)
    # Two sides, an unfolding and the core; squares and error table in float64; singular vectors and their workspace.
    need = size * (4 * item + 16) + 3 * item * bases
    free = max_memory if max_memory is not None else _available_memory()
    if free is not None and need > free:
        raise ResourceError(
            f"{where}: {name!r} of shape {shape} needs about {need / 2**30:.2g} GiB, but {free / 2**30:.2g} GiB are "
            "allowed; exclude it, or use a machine with more memory"
        )


def _available_memory() -> int | None:
    """Return how many bytes the machine has free, where it tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # pragma: no cover - not Linux
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
