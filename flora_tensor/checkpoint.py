"""Checkpoints on disk, one tensor at a time: safetensors files, sharded or not, read strictly and written whole.

Nothing is mapped into memory and no model is ever held: `Checkpoint.read` reads one tensor by position, and
`CheckpointWriter` writes one. Pickle files (``.bin``, ``.pt``) are refused unless the caller allows them.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import numpy as np

from flora_tensor._errors import InputError
from flora_tensor._files import read_json, staged_directory, staged_file, write_file
from flora_tensor._safetensors import (
    BITS,
    FLOATS,
    READABLE,
    SafetensorsWriter,
    TensorInfo,
    decode,
    read_header,
    read_into,
    read_span,
)

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "open_checkpoint", "write_checkpoint"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What overwriting a checkpoint directory may remove: nothing that `CheckpointWriter` does not write.
OWNED_NAMES = ("*.safetensors", "*.safetensors.index.json", "merge_report.json")
Layout = Mapping[str, Sequence[TensorInfo]]


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors on disk, read one at a time; made by `open_checkpoint`.

    Attributes
    ----------
    path : Path
        What was opened.
    files : tuple
        The files that hold the tensors, in the order of the index.
    aliases : mapping of str to str
        Names that stand for a stored tensor: tied weights, as safetensors' ``save_model`` records them. They are read
        like stored ones; `names` does not list them.

    Notes
    -----
    Every header has been checked when the object exists. Each read makes sure that the file is still the one that
    was checked.

    References
    ----------
    The safetensors format, https://github.com/huggingface/safetensors, section "Format".
    """

    path: Path
    files: "tuple[_File, ...]"
    aliases: Mapping[str, str]
    _home: "Mapping[str, _File]" = field(repr=False)
    _original: "Checkpoint | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, path: Path, files: "Sequence[_File]") -> "Checkpoint":
        """Put files together.

        Parameters
        ----------
        path : Path
            What the user named: the name of the whole.
        files : sequence of open files
            The shards, each with its tensors and metadata.

        Returns
        -------
        Checkpoint
            All tensors under one roof.

        Raises
        ------
        InputError
            If two files hold a tensor of the same name.
        """
        home: dict[str, _File] = {}
        for file in files:
            for name in file.tensors:
                if name in home:
                    raise InputError(f"{path}: tensor {name!r} is in {home[name].path.name} and in {file.path.name}")
                home[name] = file
        aliases = {
            alias: name
            for file in files
            for alias, name in file.metadata.items()
            if name in file.tensors and alias not in home
        }
        return cls(path, tuple(files), aliases, home)

    @property
    def original(self) -> "Checkpoint":
        """The checkpoint as it is on the disk, where this one is a part of it (see `cropped`)."""
        return self._original or self

    def cropped(self, rows: Mapping[str, int]) -> "Checkpoint":
        """Leave out the last rows of some tensors, as if they were not in the file.

        Parameters
        ----------
        rows : mapping of str to int
            How many entries of the first axis a tensor keeps, at most as many as it has.

        Returns
        -------
        Checkpoint
            The same files, read as if these tensors were shorter.

        Raises
        ------
        KeyError
            If there is no such tensor.
        """
        for name in rows:
            self.info(name)
        files = [
            replace(file, tensors={n: _cropped(i, rows.get(n)) for n, i in file.tensors.items()}) for file in self.files
        ]
        return replace(Checkpoint.of(self.path, files), _original=self.original)

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors that are stored, in file order."""
        return tuple(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home or name in self.aliases

    def __len__(self) -> int:
        return len(self._home)

    @property
    def n_bytes(self) -> int:
        """How many bytes all tensors take."""
        return sum(info.n_bytes for file in self.files for info in file.tensors.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata of the first file, which for shards is the same in all."""
        return dict(self.files[0].metadata) if self.files else {}

    def info(self, name: str) -> TensorInfo:
        """Look up a tensor's type and shape.

        Parameters
        ----------
        name : str
            The tensor's name, or an alias of it.

        Returns
        -------
        TensorInfo
            The type, the shape and where in its file the tensor lies.

        Raises
        ------
        KeyError
            If there is no such tensor.
        """
        name = self.aliases.get(name, name)
        return self._file(name).tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor as an array; 16-bit floats come as float32, which holds each of their values.

        Parameters
        ----------
        name : str
            The tensor.

        Returns
        -------
        numpy array, of the tensor's shape
            A fresh array: float64 for F64, float32 for the smaller floats, integers and booleans as they are.

        Raises
        ------
        KeyError
            If the tensor is not stored.
        InputError
            If its type has no NumPy counterpart, or the file changed since it was opened.
        """
        info = self.info(name)
        if info.dtype not in READABLE:
            raise InputError(f"{self.path}: tensor {name!r} is of type {info.dtype}, which can only be copied")
        return decode(self.read_raw(name), info.dtype, info.shape)

    def read_raw(self, name: str) -> np.ndarray:
        """Read one tensor's bytes as they are stored.

        Parameters
        ----------
        name : str
            The tensor's name, or an alias of it.

        Returns
        -------
        numpy array of uint8, shape (n_bytes,)
            The bytes.

        Raises
        ------
        KeyError
            If there is no such tensor.
        InputError
            If the file ends before the tensor does, or was changed since it was opened.
        """
        name = self.aliases.get(name, name)
        return self._file(name).raw(name)

    @contextmanager
    def reader(self, name: str) -> "Generator[Callable[[int, np.ndarray], None]]":
        """Open one tensor to be read piece by piece, without ever holding it whole.

        Parameters
        ----------
        name : str
            The tensor's name, or an alias of it.

        Yields
        ------
        callable
            ``read(start, buffer)`` fills ``buffer``, a contiguous numpy array of uint8 and shape (n,), with the n bytes
            of the tensor from ``start`` on.

        Raises
        ------
        KeyError
            If there is no such tensor.
        InputError
            If the file ends before the tensor does, or was changed since it was opened.
        """
        name = self.aliases.get(name, name)
        with self._file(name).reader(name) as read:
            yield read

    def prefetch(self, name: str) -> None:
        """Ask the system to begin reading a tensor that will be wanted soon; does nothing where it cannot.

        Parameters
        ----------
        name : str
            The tensor's name, or an alias of it.
        """
        name = self.aliases.get(name, name)
        self._file(name).prefetch(name)

    def shard_of(self, name: str) -> Path:
        """Look up the file that holds a tensor.

        Parameters
        ----------
        name : str
            The tensor's name, or an alias of it.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        KeyError
            If there is no such tensor.
        """
        return self._file(self.aliases.get(name, name)).path

    def check_unchanged(self) -> None:
        """Refuse with an InputError if a file was replaced, written to or removed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def fingerprint(self) -> str:
        """Return a digest of all names, types, shapes and of sampled values, to recognize the same checkpoint again.

        Four spans of 64 bytes a tensor are read, so that it takes milliseconds; it is no proof that every number
        agrees.
        """
        digest = hashlib.sha256()
        for name in sorted(self._home):
            info = self.info(name)
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for piece in _sampled(self._file(name), info):
                digest.update(piece.data)
        return digest.hexdigest()

    def _file(self, name: str) -> "_File":
        try:
            return self._home[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r}") from None


def _cropped(info: TensorInfo, rows: int | None) -> TensorInfo:
    if rows is None or rows == info.shape[0]:
        return info
    return replace(info, shape=(rows, *info.shape[1:]), stop=info.start + info.n_bytes // info.shape[0] * rows)


def _sampled(file: "_File", info: TensorInfo) -> Iterator[np.ndarray]:
    if not isinstance(file, _SafetensorsFile):
        data = file.raw(info.name)
        yield from (data[at : at + 64] for at in _sample_points(info.n_bytes))
        return
    with file.opened() as fd:
        for at in _sample_points(info.n_bytes):
            yield read_span(fd, info.start + at, min(64, info.n_bytes - at), file.path)


def _sample_points(n_bytes: int) -> list[int]:
    last = max(0, n_bytes - 64)
    return sorted({0, last // 3, 2 * last // 3, last}) if n_bytes else []


@dataclass(frozen=True)
class _SafetensorsFile:
    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "_SafetensorsFile":
        fd = _open_regular(path)
        try:
            header = read_header(fd, path)
            return cls(path, header.tensors, header.metadata, _identity(os.fstat(fd)))
        finally:
            os.close(fd)

    @contextmanager
    def opened(self) -> Generator[int]:
        """Open the file for one read, and prove that it is the one whose header was checked."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            if _identity(os.fstat(fd)) != self.identity:
                raise InputError(f"{self.path}: changed while it was being read; run again when nobody writes to it")
            yield fd
        finally:
            os.close(fd)

    def raw(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        with self.opened() as fd:
            return read_span(fd, info.start, info.n_bytes, self.path)

    @contextmanager
    def reader(self, name: str) -> Generator[Callable[[int, np.ndarray], None]]:
        info = self.tensors[name]
        with self.opened() as fd:
            yield lambda start, buffer: read_into(fd, info.start + start, buffer, self.path)

    def prefetch(self, name: str) -> None:
        info, advise = self.tensors[name], getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError), self.opened() as fd:
                advise(fd, info.start, info.n_bytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        with self.opened():
            pass


def _open_regular(path: Path) -> int:
    # Without O_NONBLOCK a named pipe would block for ever.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path}: not a regular file")
    return fd


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class _PickleFile:
    """A file of ``torch.save``, restricted to tensors by ``weights_only=True``, which never runs code from the file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    values: Mapping[str, Any]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "_PickleFile":
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"{path}: reading a pickle file needs PyTorch; pip install 'flora-tensor[torch]'"
            ) from None
        os.close(_open_regular(path))
        identity = _identity(path.stat())
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{path}: cannot be read with weights_only=True: {reason[0][:200]}") from None
        if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
            values = values["state_dict"]
        if not isinstance(values, Mapping) or not all(
            isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in values.items()
        ):
            raise InputError(f"{path}: not a table of tensors by name; save the model's state_dict()")
        return cls(path, {n: _torch_info(path, n, v) for n, v in values.items()}, {}, dict(values), identity)

    def raw(self, name: str) -> np.ndarray:
        import torch

        tensor = self.values[name].detach().contiguous().reshape(-1)
        data = tensor.view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return data[: self.tensors[name].n_bytes]

    @contextmanager
    def reader(self, name: str) -> Generator[Callable[[int, np.ndarray], None]]:
        data = self.raw(name)

        def read(start: int, buffer: np.ndarray) -> None:
            buffer[...] = data[start : start + buffer.nbytes]

        yield read

    def prefetch(self, name: str) -> None:
        """Do nothing: the file is mapped by torch."""

    def check_unchanged(self) -> None:
        if _identity(self.path.stat()) != self.identity:
            raise InputError(f"{self.path}: changed while it was being read; run again when nobody writes to it")


_TORCH_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def _torch_info(path: Path, name: str, tensor: Any) -> TensorInfo:
    code = _TORCH_CODES.get(str(tensor.dtype).rsplit(".", maxsplit=1)[-1])
    if code is None or tensor.is_sparse or tensor.is_quantized:
        raise InputError(f"{path}: tensor {name!r} is of a type that safetensors does not have ({tensor.dtype})")
    n_bytes = tensor.numel() * BITS[code] // 8
    return TensorInfo(name, code, tuple(tensor.shape), 0, n_bytes)


_File: TypeAlias = _SafetensorsFile | _PickleFile


def open_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint and check every header, without reading its data.

    Parameters
    ----------
    path : path
        A safetensors file, a ``*.safetensors.index.json`` file, or a directory that holds one of them.
    allow_pickle : bool, default False
        Whether files of ``torch.save`` are read, with ``weights_only=True`` and only so. The default refuses them:
        a pickle can run any code, and its reader is no match for a strict format's.

    Returns
    -------
    Checkpoint
        The tensors, each to be read when asked for.

    Raises
    ------
    InputError
        If a file is damaged, the index and its shards contradict each other, a shard lies outside the model's
        directory, or a pickle file is not allowed. It is a ValueError.
    OSError
        If a file does not exist or cannot be read.

    References
    ----------
    The safetensors format, https://github.com/huggingface/safetensors, section "Format"; the sharded index is the
    one of Hugging Face transformers.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> with write_checkpoint(path, {"": [TensorInfo("w", "F32", (2,), 0, 8)]}) as writer:
    ...     writer.write("w", np.array([1, 2], np.float32).view(np.uint8))
    >>> open_checkpoint(path).read("w")
    array([1., 2.], dtype=float32)
    """
    given = Path(path)
    file = _find(given) if given.is_dir() else given
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; pass a safetensors file, its index, or a model's directory")
    if file.name.endswith(".json"):
        return Checkpoint.of(given, _open_shards(file, allow_pickle))
    return Checkpoint.of(given, [_open_file(file, allow_pickle)])


def _find(directory: Path) -> Path:
    """Return the file or index that a model's directory means, in the order in which transformers looks."""
    for name in (SINGLE_NAME, INDEX_NAME):
        if (directory / name).exists():
            return directory / name
    for pattern in (
        "*.safetensors.index.json",
        "*.safetensors",
        "*.bin.index.json",
        *(f"*{s}" for s in PICKLE_SUFFIXES),
    ):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{directory}: holds {len(found)} files {pattern} and no index; pass one of them")
    raise InputError(f"{directory}: holds no {SINGLE_NAME} and no {INDEX_NAME}; pass a model's directory or file")


def _open_file(path: Path, allow_pickle: bool) -> _File:
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        return _SafetensorsFile.open(path)
    if not allow_pickle:
        raise InputError(
            f"{path}: a pickle file, which can run code when it is read; convert it to safetensors, or pass "
            "allow_pickle=True (--allow-pickle) to read it with weights_only=True"
        )
    return _PickleFile.open(path)


def _open_shards(index: Path, allow_pickle: bool) -> list[_File]:
    """Open the shards that an index names, and hold both to what the other says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map must be a table from tensor names to file names")
    promised: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        promised.setdefault(shard, []).append(name)
    files: list[_File] = []
    for shard, names in promised.items():
        file = _open_file(_shard_path(index, shard), allow_pickle)
        if absent := [name for name in names if name not in file.tensors]:
            raise InputError(f"{index}: {shard} lacks {_some(absent)}, which the index promises")
        if extra := sorted(set(file.tensors) - set(names)):
            raise InputError(f"{index}: {shard} holds {_some(extra)}, which the index does not know")
        files.append(file)
    return files


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + rest


def _shard_path(index: Path, shard: str) -> Path:
    """Return the path of a shard that an index names, proved to stay inside the model.

    A link is legal where the Hugging Face cache makes one: from ``snapshots/<revision>/`` into the same model's
    ``blobs/``.
    """
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    if not shard or "\0" in shard or "\\" in shard or ".." in posix.parts or posix.is_absolute() or windows.drive:
        raise InputError(f"{index}: the shard name {shard[:200]!r} leaves the model's directory; it is refused")
    root = Path(os.path.realpath(index.parent))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(Path(os.path.realpath(root.parent.parent / "blobs")))
    path = root / shard
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(directory) for directory in allowed):
        raise InputError(
            f"{index}: the shard {shard!r} is a link to {real}, outside the model's directory; it is refused"
        )
    if not real.exists():
        raise InputError(f"{index}: the shard {shard!r} does not exist; download the model again")
    return path


def plan_shards(
    tensors: Iterable[TensorInfo], *, like: Checkpoint | None, max_shard_size: int | None
) -> dict[str, list[TensorInfo]]:
    """Spread tensors over files: into as many as ``like`` has, or by size; one file is called `model.safetensors`.

    Parameters
    ----------
    tensors : iterable of TensorInfo
        The tensors, in the order to write.
    like : Checkpoint, optional
        A checkpoint whose shards, and their names, are kept where no size is given.
    max_shard_size : int, optional
        The most bytes of data in a file; a larger tensor has a file of its own.

    Returns
    -------
    dict of str to list of TensorInfo
        The tensors of each file.

    Raises
    ------
    ValueError
        If ``max_shard_size`` is below 1.

    References
    ----------
    The file names are those of Hugging Face transformers.

    Examples
    --------
    >>> a, b = TensorInfo("a", "F32", (2,), 0, 8), TensorInfo("b", "F32", (2,), 0, 8)
    >>> list(plan_shards([a, b], like=None, max_shard_size=8))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    infos = list(tensors)
    if max_shard_size is None:
        if like is None or len(like.files) < 2:
            return {SINGLE_NAME: infos}
        groups: dict[str, list[TensorInfo]] = {}
        for info in infos:
            groups.setdefault(str(like.shard_of(info.name)), []).append(info)
        names = [Path(path).name for path in groups]
        if len(set(names)) == len(names) and all(name.endswith(".safetensors") for name in names):
            return dict(zip(names, groups.values()))
        return _numbered(list(groups.values()))
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; pass at least 1 byte")
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.n_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.n_bytes
    return _numbered(shards)


def _numbered(shards: list[list[TensorInfo]]) -> dict[str, list[TensorInfo]]:
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards)}


class CheckpointWriter:
    """Write a checkpoint tensor by tensor, in any order; made by `write_checkpoint`.

    A shard is flushed, read back and compared as soon as its last tensor is written, so that few files are open at
    once.

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
        self._writer(file).write(name, data)
        self._waiting[file].discard(name)
        if not self._waiting[file]:
            self._open.pop(file).finish()

    def finish(self) -> None:
        """Complete files that hold no tensor, and refuse a checkpoint that lacks one."""
        for file, names in self._waiting.items():
            if names:
                raise ValueError(f"CheckpointWriter: {_some(sorted(names))} not written")
            if not self._layout[file]:
                self._writer(file).finish()

    def close(self) -> None:
        """Close what is open; what is incomplete stays incomplete."""
        for writer in self._open.values():
            writer.close()

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._open:
            layout = [(info.name, info.dtype, info.shape) for info in self._layout[file]]
            self._open[file] = SafetensorsWriter(self._paths[file], layout, self._metadata)
        return self._open[file]


@contextmanager
def write_checkpoint(
    out: str | os.PathLike[str], layout: Layout, *, metadata: Mapping[str, str] | None = None, overwrite: bool = False
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
    >>> out = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> with write_checkpoint(out, {"model.safetensors": [TensorInfo("w", "F32", (2,), 0, 8)]}) as writer:
    ...     writer.write("w", np.zeros(8, np.uint8))
    >>> open_checkpoint(out).names()
    ('w',)
    """
    target = Path(out)
    if target.suffix == ".safetensors":
        if len(layout) != 1:
            raise ValueError(f"write_checkpoint: {len(layout)} shards for the file {target}; pass a directory")
        with (
            staged_file("write_checkpoint", target, overwrite=overwrite) as stage,
            _finished(dict.fromkeys(layout, stage), layout, metadata) as writer,
        ):
            yield writer
        return
    with staged_directory("write_checkpoint", target, overwrite=overwrite, owned=OWNED_NAMES) as stage:
        with _finished({file: stage / file for file in layout}, layout, metadata) as writer:
            yield writer
        if len(layout) > 1:
            write_file(stage / INDEX_NAME, _index(layout))


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
    weight_map = {info.name: file for file, infos in layout.items() for info in infos}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def is_float(info: TensorInfo) -> bool:
    """Tell whether a tensor's type is one that can be decomposed: F64, F32, F16, BF16 or an 8-bit float."""
    return info.dtype in FLOATS
