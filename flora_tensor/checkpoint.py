"""Checkpoints on disk, one tensor at a time: safetensors files, sharded or not, read strictly.

Nothing is mapped into memory and no model is ever held: `Checkpoint.read` reads one tensor by position. Pickle files
(``.bin``, ``.pt``) are refused unless the caller allows them. `flora_tensor.checkpoint_writer` writes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from flora_tensor._checks import size_text, some_names
from flora_tensor._errors import InputError
from flora_tensor._files import read_json
from flora_tensor._safetensors import FLOATS, READABLE, TensorInfo, decode, read_span
from flora_tensor._stored_files import PICKLE_SUFFIXES, SafetensorsFile, StackedFile, StoredFile, open_stored_file
from flora_tensor._typing import PathLike

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

# What transformers and diffusers call a model's weights; both look for the single file first.
STEMS = ("model", "diffusion_pytorch_model")
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The table of contents of a diffusers pipeline: several models, each in a folder of its own.
PIPELINE_NAME = "model_index.json"


@dataclass(frozen=True, repr=False)
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
    folders : tuple of str
        The folders of a pipeline's models, which the names of their tensors begin with; empty for a single model.

    Notes
    -----
    Every header has been checked when the object exists. Each read makes sure that the file is still the one that
    was checked.

    References
    ----------
    The safetensors format, https://github.com/huggingface/safetensors, section "Format".
    """

    path: Path
    files: "tuple[StoredFile, ...]"
    aliases: Mapping[str, str]
    _home: Mapping[str, StoredFile | StackedFile] = field(repr=False)
    folders: tuple[str, ...] = ()
    _original: "Checkpoint | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, path: Path, files: Sequence[StoredFile], folders: Sequence[str] = ()) -> "Checkpoint":
        """Put files together.

        Parameters
        ----------
        path : Path
            What the user named: the name of the whole.
        files : sequence of open files
            The shards, each with its tensors and metadata.
        folders : sequence of str
            The folders of a pipeline's models.

        Returns
        -------
        Checkpoint
            All tensors under one roof.

        Raises
        ------
        InputError
            If two files hold a tensor of the same name.
        """
        home: dict[str, StoredFile] = {}
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
        return cls(path, tuple(files), aliases, home, tuple(folders))

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
        return replace(Checkpoint.of(self.path, files, self.folders), _original=self.original)

    def stacked(self, name: str, members: Sequence[str]) -> "Checkpoint":
        """Add a tensor that is several others of one type and shape side by side; nothing is read for it yet.

        Parameters
        ----------
        name : str
            What it is called; no tensor has this name.
        members : sequence of str
            The tensors, in the order of its first axis.

        Returns
        -------
        Checkpoint
            The same files, with one tensor more.

        Raises
        ------
        KeyError
            If there is no such tensor.
        """
        parts = [(self._file(member), member) for member in members]
        return replace(self, _home={**self._home, name: StackedFile.of(self.path, name, parts)})

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors that are stored, in file order."""
        return tuple(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home or name in self.aliases

    def __len__(self) -> int:
        return len(self._home)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {size_text(self.n_bytes)})"

    @property
    def n_bytes(self) -> int:
        """How many bytes all tensors take."""
        return sum(info.n_bytes for file in self.files for info in file.tensors.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata that is the same in all files."""
        first = self.files[0].metadata if self.files else {}
        return {key: text for key, text in first.items() if all(file.metadata.get(key) == text for file in self.files)}

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

    def folder_of(self, name: str) -> str:
        """Return the folder of a pipeline that a tensor lies in; empty for a single model.

        Parameters
        ----------
        name : str
            The tensor's name.

        Returns
        -------
        str
            The folder's name, which the tensor's begins with.
        """
        return name.partition(".")[0] if self.folders else ""

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

    def _file(self, name: str) -> StoredFile | StackedFile:
        try:
            return self._home[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r}") from None


def _cropped(info: TensorInfo, rows: int | None) -> TensorInfo:
    if rows is None or rows == info.shape[0]:
        return info
    return replace(info, shape=(rows, *info.shape[1:]), stop=info.start + info.n_bytes // info.shape[0] * rows)


def _sampled(file: StoredFile | StackedFile, info: TensorInfo) -> Iterator[np.ndarray]:
    if not isinstance(file, SafetensorsFile):
        data = file.raw(info.name)
        yield from (data[at : at + 64] for at in _sample_points(info.n_bytes))
        return
    with file.opened() as fd:
        for at in _sample_points(info.n_bytes):
            yield read_span(fd, info.start + at, min(64, info.n_bytes - at), file.path)


def _sample_points(n_bytes: int) -> list[int]:
    last = max(0, n_bytes - 64)
    return sorted({0, last // 3, 2 * last // 3, last}) if n_bytes else []


def open_checkpoint(path: PathLike, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint and check every header, without reading its data.

    Parameters
    ----------
    path : path
        A safetensors file, a ``*.safetensors.index.json`` file, or a directory that holds one of them; or the directory
        of a diffusers pipeline, whose models' tensors are named by their folders: ``unet.conv_in.weight``.
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
    >>> from safetensors.numpy import save_file
    >>> save_file({"w": np.array([1, 2], np.float32)}, path)
    >>> open_checkpoint(path).read("w")
    array([1., 2.], dtype=float32)
    """
    given = Path(path)
    if not given.is_dir():
        return Checkpoint.of(given, _opened(given, allow_pickle))
    file = _find(given)
    if file is not None:
        return Checkpoint.of(given, _opened(file, allow_pickle))
    models = _pipeline(given)
    files = [file.under(folder) for folder, path in models.items() for file in _opened(path, allow_pickle)]
    return Checkpoint.of(given, files, tuple(models))


def _opened(file: Path, allow_pickle: bool) -> list[StoredFile]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; pass a safetensors file, its index, or a model's directory")
    if file.name.endswith(".json"):
        return open_shards(file, allow_pickle)
    return [open_stored_file(file, allow_pickle)]


def _find(directory: Path) -> Path | None:
    """Return the file or index that a model's directory means, in the order in which transformers looks, if any."""
    for name in (f"{stem}{ending}" for stem in STEMS for ending in (".safetensors", ".safetensors.index.json")):
        if (directory / name).exists():
            return directory / name
    for pattern in (
        "*.safetensors.index*.json",  # diffusers writes a variant's name before the last dot
        "*.safetensors",
        "*.bin.index.json",
        *(f"*{s}" for s in PICKLE_SUFFIXES),
    ):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{directory}: holds {len(found)} files {pattern} and no index; pass one of them")
    return None


def _pipeline(directory: Path) -> dict[str, Path]:
    """Return the folders of a pipeline that hold weights, each with the file or index that it means."""
    if not (directory / PIPELINE_NAME).exists():
        raise InputError(
            f"{directory}: holds no {SINGLE_NAME} and no {INDEX_NAME}; pass a model's directory or file"
            f"{_weights_below(directory)}"
        )
    listed = read_json(directory / PIPELINE_NAME)
    # A folder's name is the first word of its tensors' names.
    folders = [name for name in listed if name.isidentifier() and (directory / name).is_dir()]
    found = {name: file for name in folders if (file := _find(directory / name)) is not None}
    if not found:
        raise InputError(
            f"{directory}: no folder of those in {PIPELINE_NAME} holds weights; download the pipeline again"
        )
    return found


def _weights_below(directory: Path) -> str:
    """Return an ending for an error message: the folders inside that hold weights."""
    holding = {file.parent.name for pattern in ("*/*.safetensors", "*/*.bin") for file in directory.glob(pattern)}
    return f", such as its folder {some_names(sorted(holding))}" if holding else ""


def open_shards(index: Path, allow_pickle: bool | None) -> list[StoredFile]:
    """Open the shards that an index names, and hold both to what the other says; as for `open_stored_file`."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map must be a table from tensor names to file names")
    promised: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        promised.setdefault(shard, []).append(name)
    files: list[StoredFile] = []
    for shard, names in promised.items():
        file = open_stored_file(_shard_path(index, shard), allow_pickle)
        if absent := [name for name in names if name not in file.tensors]:
            raise InputError(f"{index}: {shard} lacks {some_names(absent)}, which the index promises")
        if extra := sorted(set(file.tensors) - set(names)):
            raise InputError(f"{index}: {shard} holds {some_names(extra)}, which the index does not know")
        files.append(file)
    return files


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


def same_bits(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Tell whether tensors of two checkpoints, or of one, agree in type, shape and every bit."""
    x, y = a.info(name), b.info(other)
    return (x.dtype, x.shape) == (y.dtype, y.shape) and np.array_equal(a.read_raw(name), b.read_raw(other))


def is_float(info: TensorInfo) -> bool:
    """Tell whether a tensor's type is one that can be decomposed: F64, F32, F16, BF16 or an 8-bit float."""
    return info.dtype in FLOATS
