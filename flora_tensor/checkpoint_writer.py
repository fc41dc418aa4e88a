"""Checkpoints written whole or not at all: which tensor goes into which file, and the files themselves."""

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from flora_tensor._checks import check_shard_size, some_names
from flora_tensor._files import staged_directory, staged_file, sync_directory, write_file
from flora_tensor._safetensors import SafetensorsWriter, TensorInfo
from flora_tensor._typing import PathLike
from flora_tensor.checkpoint import STEMS, Checkpoint

__all__ = ["CheckpointWriter", "plan_shards", "write_checkpoint", "write_files"]

# What overwriting a checkpoint directory may remove: nothing that `CheckpointWriter` does not write.
OWNED_NAMES = ("*.safetensors", "*.safetensors.index.json", "merge_report.json")
Layout: TypeAlias = Mapping[str, Sequence[TensorInfo]]


def plan_shards(
    tensors: Iterable[TensorInfo], *, like: Checkpoint | None, max_shard_size: int | None, stem: str = "model"
) -> dict[str, list[TensorInfo]]:
    """Spread tensors over files: into as many as ``like`` has, or by size; one file is called `STEM.safetensors`.

    Parameters
    ----------
    tensors : iterable of TensorInfo
        The tensors, in the order to write.
    like : Checkpoint, optional
        A checkpoint whose shards, and their names, are kept where no size is given. Of a pipeline, the folders are kept
        in any case.
    max_shard_size : int, optional
        The most bytes of data in a file; a larger tensor has a file of its own.
    stem : str, default "model"
        What the names of the files begin with.

    Returns
    -------
    dict of str to list of TensorInfo
        The tensors of each file, ``FOLDER/FILE`` in a pipeline.

    Raises
    ------
    ValueError
        If ``max_shard_size`` is below 1.

    References
    ----------
    The file names are those of Hugging Face transformers and diffusers.

    Examples
    --------
    >>> a, b = TensorInfo("a", "F32", (2,), 0, 8), TensorInfo("b", "F32", (2,), 0, 8)
    >>> list(plan_shards([a, b], like=None, max_shard_size=8))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    infos = list(tensors)
    check_shard_size("plan_shards", max_shard_size)
    if like is None or not like.folders:
        return _plan_model(infos, like, max_shard_size, stem)
    planned: dict[str, list[TensorInfo]] = {}
    for folder in like.folders:
        own = [info for info in infos if like.folder_of(info.name) == folder]
        plan = _plan_model(own, like, max_shard_size, stem)
        planned |= {f"{folder}/{file}": group for file, group in plan.items()}
    return planned


def _plan_model(
    infos: list[TensorInfo], like: Checkpoint | None, max_shard_size: int | None, stem: str
) -> dict[str, list[TensorInfo]]:
    """Spread the tensors of one model; its files begin with what `from_pretrained` looks for in one like it."""
    if like is not None and infos:
        known = like.shard_of(infos[0].name).name
        stem = next((own for own in STEMS if known.startswith(own)), stem)
    if max_shard_size is None:
        groups: dict[str, list[TensorInfo]] = {}
        for info in infos:
            groups.setdefault("" if like is None else str(like.shard_of(info.name)), []).append(info)
        if len(groups) < 2:
            return _numbered([infos], stem)
        names = [Path(path).name for path in groups]
        if len(set(names)) == len(names) and all(name.endswith(".safetensors") for name in names):
            return dict(zip(names, groups.values()))
        return _numbered(list(groups.values()), stem)
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.n_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.n_bytes
    return _numbered(shards, stem)


def _numbered(shards: list[list[TensorInfo]], stem: str) -> dict[str, list[TensorInfo]]:
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards)}


class CheckpointWriter:
    """Write a checkpoint tensor by tensor, in any order; made by `write_checkpoint`.

    A shard is flushed, read back and compared as soon as its last tensor is written, so that few files are open at
    once. In a folder's file, names lack the folder's, as `open_checkpoint` puts it there.

    Parameters
    ----------
    paths : mapping of str to Path
        Where each file of the layout is written.
    layout : mapping of str to sequence of TensorInfo
        The tensors of each file.
    metadata : mapping of str to str
        Text to store in each file.

    References
    ----------
    The safetensors format, https://github.com/huggingface/safetensors, section "Format".
    """

    def __init__(self, paths: Mapping[str, Path], layout: Layout, metadata: Mapping[str, str]) -> None:
        self._paths, self._layout, self._metadata = paths, layout, metadata
        self._home = {info.name: file for file, infos in layout.items() for info in infos}
        self._waiting = {file: {info.name for info in infos} for file, infos in layout.items()}
        self._open: dict[str, SafetensorsWriter] = {}

    def write(self, name: str, data: np.ndarray) -> None:
        """Write the bytes of one tensor, uint8 and contiguous, of the type that the layout gives it.

        Parameters
        ----------
        name : str
            The tensor, one of the layout's.
        data : numpy array of uint8, shape (n_bytes,)
            Its bytes.

        Raises
        ------
        KeyError
            If the layout has no such tensor.
        ValueError
            If the bytes are too many, too few, or written a second time.
        """
        file = self._home[name]
        if name not in self._waiting[file]:
            raise ValueError(f"CheckpointWriter: {name!r} was written before; write each tensor once")
        self._writer(file).write(_name_in(file, name), data)
        self._waiting[file].discard(name)
        if not self._waiting[file]:
            self._open.pop(file).finish()

    def finish(self) -> None:
        """Complete files that hold no tensor, and refuse a checkpoint that lacks one."""
        for file, names in self._waiting.items():
            if names:
                raise ValueError(f"CheckpointWriter: {some_names(sorted(names))} not written")
            if not self._layout[file]:
                self._writer(file).finish()

    def close(self) -> None:
        """Close what is open; what is incomplete stays incomplete."""
        for writer in self._open.values():
            writer.close()

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._open:
            layout = [(_name_in(file, info.name), info.dtype, info.shape) for info in self._layout[file]]
            self._open[file] = SafetensorsWriter(self._paths[file], layout, self._metadata)
        return self._open[file]


def _name_in(file: str, name: str) -> str:
    """Return the name that a tensor has in its file, which may lie in a pipeline's folder."""
    folder, slash, _ = file.rpartition("/")
    return name.removeprefix(f"{folder}.") if slash else name


@contextmanager
def write_checkpoint(
    out: PathLike,
    layout: Layout,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    beside: Mapping[str, Path] = MappingProxyType({}),
    where: str = "write_checkpoint",
) -> Generator[CheckpointWriter]:
    """Open a checkpoint for writing; it appears when the block ends, and not at all if the block fails.

    Parameters
    ----------
    out : path
        A file, where the name ends in ``.safetensors`` (then the layout must have one entry, whose name is not
        used), otherwise a directory. The directory gets an index where the layout has several files.
    layout : mapping of str to sequence of TensorInfo
        The tensors of each file; `plan_shards` makes one. Only names, types and shapes matter.
    metadata : mapping of str to str, optional
        Text to store in each file.
    overwrite : bool, default False
        Whether an existing file, or a directory that holds nothing but a checkpoint, is replaced.
    beside : mapping of str to Path
        Files to copy into the directory, by what they are called there; a directory that is replaced may hold them.
    where : str, default "write_checkpoint"
        The function or command that errors name.

    Yields
    ------
    CheckpointWriter
        To write every tensor to, once.

    Raises
    ------
    ValueError
        If a tensor was not written, or a layout of several files is to go into one file.
    FileExistsError
        If the output exists and may not be replaced.
    OSError
        If the disk is full or cannot be written to.

    References
    ----------
    The safetensors format, https://github.com/huggingface/safetensors, section "Format".

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from flora_tensor import open_checkpoint
    >>> out = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> with write_checkpoint(out, {"model.safetensors": [TensorInfo("w", "F32", (2,), 0, 8)]}) as writer:
    ...     writer.write("w", np.zeros(8, np.uint8))
    >>> open_checkpoint(out).names()
    ('w',)
    """
    target = Path(out)
    if target.suffix == ".safetensors":
        if len(layout) != 1:
            raise ValueError(f"{where}: {len(layout)} shards for the file {target}; pass a directory")
        with (
            staged_file(where, target, overwrite=overwrite) as stage,
            _finished(dict.fromkeys(layout, stage), layout, metadata) as writer,
        ):
            yield writer
        return
    with (
        staged_directory(where, target, overwrite=overwrite, owned=(*OWNED_NAMES, *beside)) as stage,
        write_files(stage, layout, metadata=metadata) as writer,
    ):
        for name, file in beside.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(stage / name, file.read_bytes())
        yield writer


@contextmanager
def write_files(
    directory: Path, layout: Layout, *, metadata: Mapping[str, str] | None = None, stem: str = "model"
) -> Generator[CheckpointWriter]:
    """Write the files of a layout into a directory in the making, and their index where there are several.

    Parameters
    ----------
    directory : Path
        Where the files go; none of them exists there.
    layout : mapping of str to sequence of TensorInfo
        The tensors of each file.
    metadata : mapping of str to str, optional
        Text to store in each file.
    stem : str, default "model"
        What the index is called: `STEM.safetensors.index.json`.

    Yields
    ------
    CheckpointWriter
        To write every tensor to, once.

    Raises
    ------
    ValueError
        If a tensor was not written.
    OSError
        If the disk is full or cannot be written to.

    References
    ----------
    The index is the one of Hugging Face transformers.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> here = pathlib.Path(tempfile.mkdtemp())
    >>> layout = {f"part-{k}.safetensors": [TensorInfo(k, "U8", (1,), 0, 1)] for k in ("a", "b")}
    >>> with write_files(here, layout, stem="part") as writer:
    ...     for name in ("a", "b"):
    ...         writer.write(name, np.zeros(1, np.uint8))
    >>> sorted(file.name for file in here.iterdir())
    ['part-a.safetensors', 'part-b.safetensors', 'part.safetensors.index.json']
    """
    folders: dict[Path, dict[str, Sequence[TensorInfo]]] = {}
    for file, infos in layout.items():
        folders.setdefault((directory / file).parent, {})[file] = infos
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with _finished({file: directory / file for file in layout}, layout, metadata) as writer:
        yield writer
    for folder, files in folders.items():
        if len(files) > 1:
            known = Path(next(iter(files))).name
            own = next((own for own in STEMS if known.startswith(own)), stem)
            write_file(folder / f"{own}.safetensors.index.json", _index(files))
        sync_directory(folder)


@contextmanager
def _finished(
    paths: Mapping[str, Path], layout: Layout, metadata: Mapping[str, str] | None
) -> Generator[CheckpointWriter]:
    writer = CheckpointWriter(paths, layout, metadata or {})
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


def _index(layout: Layout) -> bytes:
    total = sum(info.n_bytes for infos in layout.values() for info in infos)
    weight_map = {_name_in(file, info.name): Path(file).name for file, infos in layout.items() for info in infos}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
