"""An adapter put into a checkpoint, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._base_notes import VerifyBase, check_verify_base, noted_names
from flora_tensor._checks import check_shard_size, prefix_between, some_names
from flora_tensor._code_names import naming_hint
from flora_tensor._deltas import check_distinct
from flora_tensor._errors import InputError
from flora_tensor._files import check_free_space
from flora_tensor._memory import require_memory
from flora_tensor._progress import Progress, silent
from flora_tensor._reporting import Report
from flora_tensor._resized import NEW_ROWS, read_resized
from flora_tensor._safetensors import READABLE, decode, encode
from flora_tensor._scaled import scale_of
from flora_tensor._stored_files import PICKLE_SUFFIXES
from flora_tensor._typing import PathLike
from flora_tensor._version import __version__
from flora_tensor._warnings import warn_user
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_file import as_adapter
from flora_tensor.checkpoint import Checkpoint, TensorInfo, is_float, open_checkpoint, same_bits
from flora_tensor.checkpoint_writer import plan_shards, write_checkpoint
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["MergeReport", "merge_checkpoint"]


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """What a merge did to each tensor; made by `merge_checkpoint`.

    Attributes
    ----------
    merged : tuple of str
        Weights that a Tucker tensor was added to.
    replaced : tuple of str
        Tensors that got the value stored in the adapter.
    copied : tuple of str
        Tensors copied bit for bit.
    files : tuple of str
        The names of the files written, ``FOLDER/FILE`` in a pipeline.
    beside : tuple of str
        The names of the files that were copied from the base's directory.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, equation 5: W = W_0 + s · ΔW.
    """

    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    copied: tuple[str, ...]
    files: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {"flora_tensor_version": __version__, **{key: list(value) for key, value in vars(self).items()}}

    def to_table(self) -> str:
        """Return the counts, as one line of text."""
        counts = f"{len(self.merged)} tensors merged, {len(self.replaced)} replaced, {len(self.copied)} copied"
        return f"{counts}: {', '.join(self.files)}{' beside ' if self.beside else ''}{', '.join(self.beside)}"


def merge_checkpoint(
    base: PathLike,
    adapter: PathLike | Mapping[str, TuckerTensor],
    out: PathLike,
    *,
    max_shard_size: int | None = None,
    verify_base: VerifyBase = "warn",
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the checkpoint W + s · ΔW.

    The sum is formed in float64 and rounded once, to the base's type. Tensors that the adapter stores whole get
    its value; where the types agree, its bits. All others are copied bit for bit. The output appears whole or not
    at all. A weight that is tied in the model that the adapter was trained on is changed under each of its names.

    Parameters
    ----------
    base : path
        The checkpoint that the adapter was made for.
    adapter : path or Adapter
        The adapter directory, or what `load_adapter` gave.
    out : path
        A file, if the name ends in ``.safetensors``, else a directory. If the base is a directory too, what lies in it
        beside the weights (configuration, tokenizer) is copied, so that `from_pretrained` loads the result; of a
        pipeline, with its folders.
    max_shard_size : int, optional
        The most bytes of data in a file; the base's own division into files by default.
    verify_base : {"warn", "error", "ignore"}
        What to do where the adapter's record says that it was made for another base.
    overwrite : bool, default False
        Whether an output that exists is replaced.
    allow_pickle : bool, default False
        Whether a pickle file is read as the base, with ``weights_only=True``. The output is safetensors in any case.
    progress : callable, optional
        Called as ``progress(phase, done, total, name)`` before each tensor.

    Returns
    -------
    MergeReport
        Which tensors were merged, replaced and copied.

    Raises
    ------
    InputError
        If the base lacks a tensor of the adapter or has it in another shape or a type that is not a float, or a
        sum is not finite.
    ValueError
        If an option is out of its range, the output is the input, or is named as a pickle file is.
    OSError
        If the output exists or does not fit on the disk.

    Warns
    -----
    FloraWarning
        If the adapter was made for another base, and ``verify_base="warn"``; if the base's `config.json` is copied
        though the adapter changes a tensor's number of rows, as that of a vocabulary.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, equation 5.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> here = pathlib.Path(tempfile.mkdtemp())
    >>> save_file({"fc.weight": np.zeros((2, 2), np.float32)}, here / "base.safetensors")
    >>> change = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    >>> report = merge_checkpoint(here / "base.safetensors", {"fc.weight": change}, here / "merged.safetensors")
    >>> load_file(here / "merged.safetensors")["fc.weight"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    check_verify_base("merge", verify_base)
    check_shard_size("merge", max_shard_size)
    if Path(out).suffix in PICKLE_SUFFIXES:
        raise ValueError(f"merge: {out} is no name of a safetensors file; pass one, or a directory")
    source = open_checkpoint(base, allow_pickle=allow_pickle)
    check_distinct("merge", out, source)
    change = _for_all_names(as_adapter(adapter), source)
    resized = read_resized(change.config, source, change.whole, "merge")
    source = source.cropped({name: min(sizes) for name, sizes in resized.items()})
    _check_fit(source, change, resized)
    _check_base(source.original, change, verify_base)
    infos = [_info(source, name, resized) for name in source.names()]
    is_file = Path(out).suffix == ".safetensors"
    if is_file and source.folders:
        raise ValueError(f"merge: {base} is a pipeline of {', '.join(source.folders)}; pass a directory to write it to")
    layout = plan_shards(
        infos, like=None if is_file and max_shard_size is None else source, max_shard_size=max_shard_size
    )
    check_free_space("merge", Path(out), sum(info.n_bytes for info in infos))
    metadata = source.metadata or {"format": "pt"}
    beside, say = {} if is_file else _beside(source.original), progress or silent
    _check_sizes_told(source, beside, resized)
    with write_checkpoint(out, layout, metadata=metadata, overwrite=overwrite, beside=beside, where="merge") as writer:
        for done, info in enumerate(infos):
            say("merging", done, len(infos), info.name)
            writer.write(info.name, _merged(source, info, change))
        source.check_unchanged()
    return MergeReport(
        tuple(i.name for i in infos if i.name in change),
        tuple(i.name for i in infos if i.name in change.whole or (i.name in resized and i.name not in change)),
        tuple(i.name for i in infos if not {i.name, f"{i.name}{NEW_ROWS}"} & {*change, *change.whole}),
        (Path(out).name,) if is_file else tuple(layout),
        tuple(beside),
    )


def _beside(base: Checkpoint) -> dict[str, Path]:
    """List what a model's directory holds beside its weights, and what is needed to use them.

    Of a pipeline it is what lies in its folders too, those without weights (tokenizers, the scheduler) included.
    """
    if not base.path.is_dir():
        return {}
    kinds = {".jinja", ".json", ".model", ".py", ".tiktoken", ".txt"}
    inside = [base.path, *(entry for entry in base.path.iterdir() if base.folders and entry.is_dir())]
    found = [file for folder in inside for file in folder.iterdir() if file.suffix in kinds or file.stem == "LICENSE"]
    return {
        file.relative_to(base.path).as_posix(): file
        for file in sorted(found)
        if file.is_file() and not file.match("*.index*.json")
    }


def _check_sizes_told(base: Checkpoint, beside: Mapping[str, Path], resized: Mapping[str, tuple[int, int]]) -> None:
    """Warn where the base's configuration, which is copied, tells other numbers of rows than the result has.

    Which of its entries do so (vocab_size, and others in models of several parts) no adapter records.
    """
    changed = [name for name, (before, after) in resized.items() if before != after]
    config = beside.get(f"{base.folder_of(changed[0])}/config.json".removeprefix("/")) if changed else None
    if config is not None:
        before, after = resized[changed[0]]
        warn_user(
            f"merge: {config} is copied as it is, but {changed[0]!r} has {after} rows now, not {before}; put the "
            "tuned model's config.json and tokenizer in its place, or mend its sizes, such as vocab_size"
        )


def _info(base: Checkpoint, name: str, resized: Mapping[str, tuple[int, int]]) -> TensorInfo:
    """Return what a tensor of the result is: as in the base, but for its number of rows."""
    info = base.info(name)
    if name not in resized:
        return info
    rows = resized[name][1]
    return TensorInfo(name, info.dtype, (rows, *info.shape[1:]), 0, info.n_bytes // info.shape[0] * rows)


def _for_all_names(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Give the change of a tied weight to every name that the base holds it under; only the model knows that it is one.

    A state dict has a tied weight as often as it has names, and what `save_pretrained` wrote once, under any of them.
    Under another name it is the same weight if it has the same bits.
    """
    stored = set(base.names()) - {*adapter, *adapter.whole}
    copies: dict[str, str] = {}
    for name in adapter:
        for other in noted_names(adapter.config, name):
            if other in stored and (name not in base or same_bits(base, name, base, other)):
                copies[other] = name
    if not copies:
        return adapter
    stacked = {member for stack in adapter.stacks.values() for member in stack.members}
    gone = {name for name in copies.values() if name not in base and name not in stacked}

    def table(own: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in own.items() if name not in gone}
        return kept | {other: own[name] for other, name in copies.items() if name in own}

    options = ("tensors", "arrangements", "scales", "shapes", "dtypes", "magnitudes", "channels")
    return replace(adapter, **{option: table(getattr(adapter, option)) for option in options})


def _check_fit(base: Checkpoint, adapter: Adapter, resized: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that does not fit, before anything is written."""
    new = {f"{name}{NEW_ROWS}" for name, (before, after) in resized.items() if after > before}
    names = [*adapter, *(name for name in adapter.whole if name not in new)]
    stored = set(base.names())
    if missing := [name for name in names if name not in stored]:
        prefix = prefix_between(missing, base.names())
        why = f"; one side's names begin with {prefix!r}" if prefix else ""
        raise InputError(
            f"merge: {base.path} lacks {some_names(missing)}, which the adapter changes{why}; "
            f"{_instead(base, missing[0])}"
        )
    for name in names:
        info = base.info(name)
        shape = tuple(adapter.whole[name].shape) if name in adapter.whole else adapter.shapes[name]
        if shape != info.shape:
            raise InputError(f"merge: {name!r} has shape {info.shape} in {base.path}, but the adapter changes {shape}")
        if name in adapter and not is_float(info):
            raise InputError(
                f"merge: {name!r} is of type {info.dtype} in {base.path}; a change can be added to floats only"
            )
        if scale := scale_of(base, name):
            raise InputError(
                f"merge: {name!r} is of type {info.dtype} in {base.path} and scaled by {scale!r}; merge into the base "
                "before it is quantized, or convert it to bfloat16 first"
            )
        if name in adapter.whole and info.dtype not in READABLE:
            raise InputError(f"merge: {name!r} is of type {info.dtype} in {base.path}, which cannot be replaced")


def _instead(base: Checkpoint, name: str) -> str:
    """Say what to do about a weight that the base lacks."""
    module, _, parameter = name.rpartition(".")
    if f"{module}.parametrizations.{parameter}.original0" in base:
        return (
            "the model computes it from other tensors, as by weight normalization: merge the model (flora_torch.merge)"
        )
    if hint := naming_hint("adapter", [name], base.names()):
        return hint
    folder = next((folder for folder in base.folders if f"{folder}.{name}" in base), None)
    return "pass the base it was made for" if folder is None else f"pass the folder of its model, {base.path / folder}"


def _check_base(base: Checkpoint, adapter: Adapter, verify: str) -> None:
    recorded = adapter.config.get("base_fingerprint")
    if verify == "ignore" or not isinstance(recorded, str) or recorded == base.fingerprint():
        return
    message = f"merge: {base.path} is not the checkpoint that the adapter was extracted from: their fingerprints differ"
    if verify == "error":
        raise InputError(f"{message}; pass the original, or verify_base='warn'")
    warn_user(f"{message}; the result is W + s·ΔW with other weights W")


def _merged(base: Checkpoint, result: TensorInfo, adapter: Adapter) -> np.ndarray:
    """Return the bytes of one tensor of the result, rows that the base did not have at its end."""
    info = base.info(result.name)
    common = _summed(base, info, adapter)
    if result.n_bytes <= common.nbytes:
        return common
    rows = to_numpy(adapter.whole[f"{result.name}{NEW_ROWS}"])
    return np.concatenate([common, _rounded(base, replace(info, shape=rows.shape), rows, "the new rows")])


def _summed(base: Checkpoint, info: TensorInfo, adapter: Adapter) -> np.ndarray:
    """Return the bytes of the rows that the base has."""
    name = info.name
    raw = base.read_raw(name)
    if name in adapter.whole:
        return _rounded(base, info, to_numpy(adapter.whole[name]), "the stored value")
    if name not in adapter:
        return raw
    # The bytes and their decoding; ΔW and what it is formed from, and a magnitude's W + ΔW, in float64.
    require_memory("merge", name, info.shape, 2 * info.n_bytes + 24 * info.n_elements)
    weight = decode(raw, info.dtype, info.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        total = adapter.change(name, weight, dtype=np.float64)
        total += weight
    return _rounded(base, info, total, "the sum")


def _rounded(base: Checkpoint, info: TensorInfo, value: np.ndarray, what: str) -> np.ndarray:
    data = encode(value, info.dtype)
    if is_float(info) and not np.isfinite(decode(data, info.dtype, info.shape)).all():
        raise InputError(
            f"merge: {what} of {info.name!r} is not finite as {info.dtype}; is {base.path} the right base?"
        )
    if not is_float(info) and not np.array_equal(decode(data, info.dtype, info.shape), value):
        raise InputError(f"merge: {what} of {info.name!r} cannot be written as {info.dtype}, the type of {base.path}")
    return data
