"""From two checkpoints to an adapter: the change of every weight, decomposed under one budget.

Two passes, one tensor at a time. The first reads each pair, subtracts, and lists what every choice of ranks would
buy; then one budget is spread over all weights; the second reads each pair again, decomposes it at its ranks and
measures the error of what is stored. Where the ranks are given, one pass does it all. Each tensor is a task, done here
or by an executor; its outcome is kept in a journal beside the output, from which a run that was interrupted goes on.
Neither model is ever in memory.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flora_tensor._checks import check_choice, check_shard_size, some_names
from flora_tensor._deltas import check_distinct, checked_device
from flora_tensor._errors import InputError
from flora_tensor._execution import Run
from flora_tensor._files import check_target, locked, staged_directory, write_file
from flora_tensor._journal import Journal
from flora_tensor._progress import Progress, silent
from flora_tensor._resized import NEW_ROWS, crop, new_rows, resized_between, with_resized
from flora_tensor._settings import (
    STORED,
    RanksOption,
    Settings,
    arrangement_option,
    checked_budget,
    globs,
    heads_option,
    noise_option,
    stack_option,
)
from flora_tensor._stacks import (
    find_stacks,
    look_at_stacks,
    noise_prices,
    settled,
    summed_error,
    tasks_of,
    with_stacks,
)
from flora_tensor._storing import Stored, check_space, write_adapter
from flora_tensor._survey import Weight, choose, expected_weights, predicted_row, rank_zero_row, share_of, survey
from flora_tensor._tasks import Job, Outcome, Task
from flora_tensor._typing import PathLike
from flora_tensor._warnings import warn_user
from flora_tensor._weighting import Calibration
from flora_tensor.adapter_file import OWNED_NAMES, REPORT_NAME
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, open_checkpoint
from flora_tensor.moments import Moments
from flora_tensor.report import ExtractionReport, TensorRow

__all__ = ["extract"]


def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike | None,
    *,
    ranks: RanksOption | None = None,
    rtol: float | None = None,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    max_bytes: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    arrangements: str | Arrangement = "auto",
    stack: str | Sequence[str] | None = None,
    heads: int | Literal["auto"] | None = "auto",
    calibration: PathLike | Moments | None = None,
    weights: Literal["norm", "uniform"] = "norm",
    vectors: Literal["keep", "skip", "error"] = "keep",
    on_mismatch: Literal["error", "skip"] = "error",
    resized: Literal["error", "pad", "skip"] = "error",
    allow_missing: bool = False,
    noise_floor: float | Literal["auto"] | None = "auto",
    device: Any = None,
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32",
    max_shard_size: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    max_memory: int | None = None,
    resume: bool = False,
    executor: Executor | None = None,
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
        Ranks instead of a budget, lowered to what each weight can have. A change of which they truncate nothing is
        stored as it is.
    rtol : float, optional
        The relative error of all changes together to stay within, with as few numbers as possible. With
        ``weights="uniform"`` it is the root mean square of their relative errors.
    max_parameters : int, optional
        How many numbers to store in all Tucker tensors together.
    max_ratio : float, optional
        The same as a share of the numbers in the dense changes, in (0, 1]; 0.05 where nothing else is given.
    max_bytes : int, optional
        The same in bytes of ``dtype``, whole tensors and file headers not counted.
    include, exclude : str or sequence of str, optional
        Globs of names, each of which must match a tensor; only what matches ``include`` and does not match ``exclude``
        is looked at.
    arrangements : "auto", pattern or Arrangement
        Which axes form a mode. ``"auto"`` chooses per weight under a budget and takes the weight's own axes with
        ``ranks``. A pattern counts for the weights it fits; the others keep their own axes.
    stack : str or sequence of str, optional
        Globs of names, such as ``"layers.*.fc.weight"``, each for weights of one shape. Where that is smaller at the
        budget, all that match one and have changed are stored as one tensor ``layer o i`` (their other arrangements
        likewise), sorted by the numbers in their names: the layers then share their factors, and each has a core of its
        own. They are read as one tensor, which ``max_memory`` must hold, and once more than without. At a budget that
        chooses stacks everything is decomposed without them too, and what ends with the smaller error is kept.
        Not with ``ranks``.
    heads : "auto", int or None
        How many heads the attentions have. Where ``arrangements`` is ``"auto"``, query, key, value and output
        projections may then be decomposed with the heads as a mode, such as ``(heads d) i -> heads d i``. ``"auto"``
        reads the numbers from the `config.json` beside a checkpoint; ``None`` leaves heads alone.
    calibration : path or Moments, optional
        The second moments of the weights' inputs, from `flora_torch.collect_moments`. The error that is minimized,
        and that budget and tolerance refer to, is then that of the layers' *outputs*, ‖(ΔW − stored) C^½‖. The moment
        of a convolution's channels (axes ``i``) goes with every arrangement; that of whole patches (``i h w``) needs
        ``o (i h w)``, which is taken. Weights without a moment count by their plain error. Eigenvalues of C below a
        thousandth of their mean are raised to that. A stack counts by the error of all its members' outputs, each with
        its own moment: it is decomposed scaled by the root of their mean, and without, its core fitted to that error,
        and the better one stored. The cap of ``noise_floor`` does not apply to calibrated weights.
    weights : {"norm", "uniform"}
        What a budget minimizes: the summed squared error of all changes, or the sum of their squared *relative* errors,
        so that weights that changed little are kept as well as others; a stack is then decomposed with its slices
        divided by their norms.
    vectors : {"keep", "skip", "error"}
        Changed tensors of at most one axis (biases, norms): store them whole, leave them out, or refuse.
    on_mismatch : {"error", "skip"}
        What to do about a tensor whose shape differs.
    resized : {"error", "pad", "skip"}
        What to do about one whose first axis only differs, such as the embedding of a vocabulary that grew: with
        ``"pad"`` the rows in common are compared, new rows are stored whole, and merging gives the tuned shape.
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
    max_shard_size : int, optional
        The most bytes of tensors in a file; more are split into `adapter_model-00001-of-0000N.safetensors`, … with an
        index, as Hugging Face does for models. One file by default: PEFT itself reads no adapter in several.
    dry_run : bool, default False
        Do everything but the decomposition and the writing.
    overwrite : bool, default False
        Whether an adapter directory that exists is replaced.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.
    max_memory : int, optional
        How many bytes one tensor's work may take; what the machine has free by default.
    resume : bool, default False
        Whether to continue a run that was interrupted, from what it left in `OUT.partial`. Inputs and options are
        compared tensor by tensor, what no longer fits is done again, and the result has the same bytes as without the
        interruption.
    executor : concurrent.futures.Executor, optional
        Where to do the tensors' work, such as a ``ProcessPoolExecutor`` or the executor of a Dask client; here, one
        after the other, by default. Workers must find the checkpoints under the same paths. The result has the same
        bytes where workers compute with as many threads.
    progress : callable, optional
        Called as ``progress(phase, done, total, name)`` before each tensor; with ``executor`` after each.

    Returns
    -------
    ExtractionReport
        A row for every tensor of both checkpoints; also written as `extraction_report.json`.

    Raises
    ------
    ValueError
        If an option is out of its range, a stack's pattern does not match two weights or more of one shape or shares
        one with another, or the budget holds nothing.
    InputError
        If a checkpoint is damaged, the two do not fit each other, a number is not finite, or nothing changed.
    ResourceError
        If a tensor would need more memory than there is, or the executor lost its workers.
    OSError
        If the output exists, is being written by another run or was left unfinished by one, or does not fit on the
        disk.

    Warns
    -----
    FloraWarning
        If rounding to ``dtype`` takes the error above ``rtol``.

    Notes
    -----
    Under a budget, modes of 512 entries or more are judged by estimates of their leading singular vectors where that is
    cheaper, with up to 1.5 times a weight's share of the budget, and further where the budget reaches for it. What is
    promised can be kept, as it is the error of projections that exist; it exceeds the least one by 0.1 % at most in the
    cases measured. ``lower_bound`` is a bound over the choices that were looked at, and thus as much above the bound of
    exact spectra.

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
    ((1, 8), 16, 64)
    """
    if out is None and not dry_run:
        raise ValueError("extract: out is None; pass a directory, or dry_run=True")
    where = "extract"
    budget = {"rtol": rtol, "max_parameters": max_parameters, "max_ratio": max_ratio, "max_bytes": max_bytes}
    settings = Settings(
        budget=checked_budget(budget, ranks),
        ranks=ranks,
        include=globs(include),
        exclude=globs(exclude),
        arrangement=arrangement_option(arrangements),
        calibration=None if calibration is None else Calibration.of(calibration),
        weights=check_choice(where, "weights", weights, ("norm", "uniform")),
        vectors=check_choice(where, "vectors", vectors, ("keep", "skip", "error")),
        on_mismatch=check_choice(where, "on_mismatch", on_mismatch, ("error", "skip")),
        resized=check_choice(where, "resized", resized, ("error", "pad", "skip")),
        allow_missing=allow_missing,
        dtype=STORED[check_choice(where, "dtype", dtype, tuple(STORED))],
        device=checked_device(device),
        max_memory=max_memory,
        noise_floor=noise_option(noise_floor),
        dry_run=dry_run,
        max_shard_size=check_shard_size(where, max_shard_size),
    )
    before, after = (open_checkpoint(path, allow_pickle=allow_pickle) for path in (base, tuned))
    settings, before, after = _fitted(settings, before, after, heads=heads, stack=stack)
    run = Run(before, after, Job.of(before, after, settings, allow_pickle), None, executor, progress or silent)
    return _warned(rtol, _begun(run, out, resume=resume, overwrite=overwrite), settings)


def _fitted(
    settings: Settings, base: Checkpoint, tuned: Checkpoint, *, heads: Any, stack: str | Sequence[str] | None
) -> tuple[Settings, Checkpoint, Checkpoint]:
    """Settle the options that depend on the checkpoints, and crop these to what both have where that was asked for."""
    found = {"heads": heads_option(heads, base, tuned), "share": share_of(settings.budget, base)}
    settings = replace(settings, **found, stack=stack_option(stack, settings))
    return settings, *crop(base, tuned, settings)


def _warned(rtol: float | None, report: ExtractionReport, settings: Settings) -> ExtractionReport:
    """Return the report, with a warning where rounding to the stored type broke the promise of a tolerance."""
    reached = report.relative_error if report.weighted_error is None else report.weighted_error
    if rtol is not None and settings.weights == "norm" and reached > rtol + 1e-5:
        stored = settings.options()["dtype"]
        message = f"extract: stored as {stored} the error is {reached:.3g}, above rtol {rtol}"
        warn_user(f"{message}; pass dtype='float32' or 'float64'")
    return report


def _warn_of_types(rows: Iterable[TensorRow]) -> None:
    """Warn of what changed and cannot be stored, which nobody asked to leave out: the adapter lacks that change."""
    lost = [row.name for row in rows if row.changed and row.reason.startswith(("type ", "a scale of "))]
    if lost:
        warn_user(
            f"extract: {some_names(lost)} changed and cannot be stored, for reasons in the report; "
            "convert quantized checkpoints to bfloat16 first"
        )


def _begun(run: Run, out: PathLike | None, *, resume: bool, overwrite: bool) -> ExtractionReport:
    """Run under the lock of the output, with a journal beside it; a dry run needs neither."""
    if out is not None:
        check_distinct("extract", out, run.base, run.tuned)
    if out is None or run.job.settings.dry_run:
        return _extracted(run, None, overwrite)
    target = Path(os.path.realpath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked("extract", target):
        check_target("extract", target, overwrite=overwrite, owned=OWNED_NAMES)
        with Journal.beside("extract", target, resume=resume, overwrite=overwrite) as journal:
            return _extracted(replace(run, journal=journal), target, overwrite)


def _extracted(run: Run, target: Path | None, overwrite: bool) -> ExtractionReport:
    """Look at every tensor, choose the ranks, decompose, and put the directory together; or promise to."""
    settings, base, tuned = run.job.settings, run.base, run.tuned
    rows, candidates = survey(base, tuned, settings)
    stacks = find_stacks("extract", base, tuned, candidates, settings.stack)
    if target is not None and settings.in_one_pass:
        check_space(target, tuned, expected_weights(base, tuned, candidates, settings), (), settings.dtype)
    tasks = [Task(name) for name in candidates]
    found = run.do("decomposing" if settings.in_one_pass else "reading", tasks)
    rows |= {name: outcome.row for name, outcome in found.items()}
    whole = [name for name, row in rows.items() if row.status == "whole"]
    resized = resized_between(base, tuned)
    rows = with_resized(rows, tuned, resized)
    _warn_of_types(rows.values())
    if not any(row.changed for row in rows.values()):
        raise InputError(
            f"extract: nothing to extract: no selected tensor differs between {base.path} and {tuned.path}"
        )
    weights = {name: outcome.weight for name, outcome in found.items() if outcome.weight is not None}
    _check_calibration(settings, weights.values())
    joint, told_stacks = look_at_stacks(run, stacks, weights), ()
    lower_bound, curve, chosen = _chosen(run, weights | joint, rows, keep_going=bool(whole or resized))
    if target is None:
        told = rows | {name: predicted_row(weight) for name, weight in chosen.items()}
        rows, told_stacks = with_stacks(told, chosen, weights)
        return _totals(with_resized(rows, tuned, resized), base, tuned, settings, lower_bound, curve, told_stacks)
    if not settings.in_one_pass:
        check_space(target, tuned, [weight for weight in chosen.values() if any(weight.ranks)], whole, settings.dtype)
        chosen, found = _decomposed(run, chosen, weights, rows)
        tasks = tasks_of(chosen)
        rows |= {name: rank_zero_row(weight) for name, weight in chosen.items() if not any(weight.ranks)}
        rows |= {name: outcome.row for name, outcome in found.items()}
        done = {name: outcome.weight for name, outcome in found.items() if outcome.weight}
        rows, told_stacks = with_stacks(rows, done, weights)
    report = _totals(with_resized(rows, tuned, resized), base, tuned, settings, lower_bound, curve, told_stacks)
    stored = {task.name: _stored(run, task, outcome) for task in tasks if (outcome := found[task.name]).weight}
    if not (stored or whole or new_rows(tuned, resized)):
        raise InputError("extract: nothing to extract: no tensor that changed can be stored; see a dry run for why")
    with staged_directory("extract", target, overwrite=overwrite, owned=OWNED_NAMES, lock=False) as stage:
        write_adapter(base, tuned, stage, stored, whole, settings, resized)
        write_file(stage / REPORT_NAME, (report.to_json() + "\n").encode())
        base.check_unchanged()
        tuned.check_unchanged()
    return report


def _chosen(
    run: Run, weights: dict[str, Weight], rows: dict[str, TensorRow], *, keep_going: bool
) -> tuple[float | None, tuple[tuple[int, float], ...], dict[str, Weight]]:
    """Choose the ranks; where the budget reaches for more than was looked at, look further and choose again.

    Return the bound, what other budgets would buy, and the weights at their ranks: stacks or their members.
    """
    chosen = choose(weights, run.job.settings, keep_going=keep_going)
    while short := {name: weight for name, weight in weights.items() if weight.is_short}:
        # What a number buys where the budget ends changes little when there is more to choose from.
        tasks = [Task(name, None, "", w.widening + 1, 0.75 * w.margin, w.members) for name, w in short.items()]
        for name, outcome in run.do("reading", tasks).items():
            assert outcome.weight is not None
            rows[name], weights[name] = outcome.row, outcome.weight
        chosen = choose(weights, run.job.settings, keep_going=keep_going)
    return *chosen, settled(weights)


def _decomposed(
    run: Run, chosen: dict[str, Weight], apart: dict[str, Weight], rows: dict[str, TensorRow]
) -> tuple[dict[str, Weight], dict[str, Outcome]]:
    """Decompose the weights; where stacks were chosen, without them too, if that ends nearer at the same budget.

    The choice was made by truncated HOSVDs; the sweeps that follow gain more on some tensors than on others.
    """
    found = run.do("decomposing", tasks_of(chosen))
    if "rtol" in run.job.settings.budget or not any(weight.members for weight in chosen.values()):
        return chosen, found
    other = _chosen(run, apart, rows, keep_going=True)[2]
    alone = run.do("decomposing", tasks_of(other))
    prices = noise_prices(chosen)
    return min(((chosen, found), (other, alone)), key=lambda result: summed_error(*result, prices, run.job.settings))


def _check_calibration(settings: Settings, weights: Iterable[Weight]) -> None:
    if settings.calibration and weights and not any(weight.is_weighted for weight in weights):
        raise InputError(
            f"extract: the calibration ({settings.calibration.told}) has no moment that fits a changed weight; collect "
            "the moments of this model, with patches=False if the arrangement is not o (i h w)"
        )


def _stored(run: Run, task: Task, outcome: Outcome) -> Stored:
    """Describe a weight for the writer, which asks for its parts when their turn comes."""
    assert outcome.weight is not None
    return Stored(outcome.weight, outcome.scale, lambda: run.stored(task).parts)


def _totals(
    found: Mapping[str, TensorRow],
    base: Checkpoint,
    tuned: Checkpoint,
    settings: Settings,
    lower_bound: float | None,
    curve: tuple[tuple[int, float], ...],
    stacks: tuple[TensorRow, ...],
) -> ExtractionReport:
    rows = tuple(found[name] for name in dict.fromkeys((*base.names(), *tuned.names())))
    decomposed = [row for row in rows if row.delta_norm is not None]
    grown = {n.removesuffix(NEW_ROWS): s for n, s in new_rows(tuned, resized_between(base, tuned)).items()}
    plain = [(row.delta_norm or 0.0, row.relative_error) for row in decomposed]
    weighted = [(row.weighted_norm or 0.0, row.weighted_error) for row in decomposed]
    if lower_bound is not None and "rtol" not in settings.budget:
        # Decompositions may end below what estimates or rounding promised, and are choices like all others.
        # An error that is not known (NaN) changes nothing.
        counted = weighted if settings.calibration else plain
        alone = [(float(norm > 0), error) for norm, error in counted]
        lower_bound = min(lower_bound, _combined(alone if settings.weights == "uniform" else counted))
    aliases = {**base.aliases, **tuned.aliases}
    return ExtractionReport(
        rows=rows,
        dense_parameters=sum(math.prod(row.shape) for row in decomposed),
        n_parameters=sum(row.n_parameters for row in rows if row.status == "tucker"),
        whole_parameters=sum(row.n_parameters for row in rows if row.status == "whole")
        + sum(math.prod(shape) for name, shape in grown.items() if found[name].status == "tucker"),
        relative_error=_combined(plain),
        lower_bound=lower_bound,
        options=settings.options() | ({"aliases": aliases} if aliases else {}),
        dry_run=settings.dry_run,
        weighted_error=_combined(weighted) if settings.calibration else None,
        curve=curve,
        stacks=stacks,
    )


def _combined(parts: Sequence[tuple[float, float | None]]) -> float:
    """Return √(Σ norm² error² / Σ norm²); not a number where an error is not known."""
    # Norms are scaled by the largest one, so that squares neither overflow nor vanish.
    largest = max((norm for norm, _ in parts), default=0.0) or 1.0
    total = sum((norm / largest) ** 2 for norm, _ in parts)
    left = sum((norm / largest * (math.nan if error is None else error)) ** 2 for norm, error in parts)
    return math.sqrt(left / total) if total else 0.0
