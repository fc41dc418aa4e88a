"""One file of a checkpoint, opened and checked: safetensors, or `torch.save`'s where the caller allows it.

Both kinds hand out a tensor's bytes by name, and prove at every read that the file is still the one that was checked.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flora_tensor._errors import InputError
from flora_tensor._files import open_regular
from flora_tensor._safetensors import BITS, CODES, TensorInfo, read_header, read_into, read_span

__all__ = ["PICKLE_SUFFIXES", "PickleFile", "SafetensorsFile", "StackedFile", "StoredFile", "open_stored_file"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header was checked; every read opens it anew, so that no descriptor is kept."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        fd = open_regular(path)
        try:
            header = read_header(fd, path)
            return cls(path, header.tensors, header.metadata, _identity(os.fstat(fd)))
        finally:
            os.close(fd)

    @contextmanager
    def opened(self) -> Generator[int]:
        """Open the file for one read, and prove that it is the one whose header was checked."""
        fd = open_regular(self.path)
        try:
            if _identity(os.fstat(fd)) != self.identity:
                raise InputError(f"{self.path}: changed while it was being read; run again when nobody writes to it")
            yield fd
        finally:
            os.close(fd)

    def under(self, folder: str) -> "SafetensorsFile":
        """Name the tensors as parts of what holds them."""
        return replace(self, tensors=_renamed(self.tensors, folder), metadata=_aliases(self, folder))

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


def _renamed(tensors: Mapping[str, TensorInfo], folder: str) -> dict[str, TensorInfo]:
    return {f"{folder}.{name}": replace(info, name=f"{folder}.{name}") for name, info in tensors.items()}


def _aliases(file: SafetensorsFile, folder: str) -> dict[str, str]:
    """Return a file's metadata with the names of tensors in it, those that stand for one another, renamed too."""
    own = file.tensors
    return {f"{folder}.{k}" if v in own else k: f"{folder}.{v}" if v in own else v for k, v in file.metadata.items()}


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class PickleFile:
    """A file of ``torch.save``, restricted to tensors by ``weights_only=True``, which never runs code from the file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    values: Mapping[str, Any]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "PickleFile":
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"{path}: reading a pickle file needs PyTorch; pip install 'flora-tensor[torch]'"
            ) from None
        # Before 2.6, tensors alone could be made to run code (CVE-2025-32434).
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
            raise InputError(
                f"{path}: reading a pickle file is safe from PyTorch 2.6 on, and this is {torch.__version__}; upgrade "
                "it, or convert the file to safetensors"
            )
        os.close(open_regular(path))
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

    def under(self, folder: str) -> "PickleFile":
        """Name the tensors as parts of what holds them."""
        values = {f"{folder}.{name}": value for name, value in self.values.items()}
        return replace(self, tensors=_renamed(self.tensors, folder), values=values)

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


@dataclass(frozen=True)
class StackedFile:
    """Tensors of one type and shape, in whatever files they are, as one tensor: their bytes one after the other."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    parts: "tuple[tuple[StoredFile | StackedFile, str], ...]"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, path: Path, name: str, parts: "Sequence[tuple[StoredFile | StackedFile, str]]") -> "StackedFile":
        infos = [file.tensors[part] for file, part in parts]
        first = infos[0]
        assert all((info.dtype, info.shape) == (first.dtype, first.shape) for info in infos)
        info = TensorInfo(name, first.dtype, (len(infos), *first.shape), 0, len(infos) * first.n_bytes)
        return cls(path, {name: info}, tuple(parts))

    def raw(self, name: str) -> np.ndarray:
        assert name in self.tensors
        return np.concatenate([file.raw(part) for file, part in self.parts])

    @contextmanager
    def reader(self, name: str) -> Generator[Callable[[int, np.ndarray], None]]:
        size = self.tensors[name].n_bytes // len(self.parts)
        with ExitStack() as opened:
            at, current = -1, None  # one part is open at a time: they are read in their order

            def read(start: int, buffer: np.ndarray) -> None:
                nonlocal at, current
                done = 0
                while done < len(buffer):
                    part, offset = divmod(start + done, size)
                    count = min(size - offset, len(buffer) - done)
                    if part != at or current is None:
                        opened.close()
                        file, name = self.parts[part]
                        at, current = part, opened.enter_context(file.reader(name))
                    current(offset, buffer[done : done + count])
                    done += count

            yield read

    def prefetch(self, name: str) -> None:
        assert name in self.tensors
        for file, part in self.parts:
            file.prefetch(part)

    def check_unchanged(self) -> None:
        for file, _ in self.parts:
            file.check_unchanged()


_TORCH_CODES = {
    **CODES,
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


def _torch_info(path: Path, name: str, tensor: Any) -> TensorInfo:
    code = _TORCH_CODES.get(str(tensor.dtype).rsplit(".", maxsplit=1)[-1])
    if code is None or tensor.is_sparse or tensor.is_quantized:
        raise InputError(f"{path}: tensor {name!r} is of a type that safetensors does not have ({tensor.dtype})")
    n_bytes = tensor.numel() * BITS[code] // 8
    return TensorInfo(name, code, tuple(tensor.shape), 0, n_bytes)


StoredFile: TypeAlias = SafetensorsFile | PickleFile


def open_stored_file(path: Path, allow_pickle: bool | None) -> StoredFile:
    """Open a file by what its name says that it is; pickle files only where they are allowed.

    ``None`` refuses them where no option could allow them.
    """
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        return SafetensorsFile.open(path)
    if allow_pickle is None:
        raise InputError(f"{path}: a pickle file, which can run code when it is read; convert it to safetensors")
    if not allow_pickle:
        raise InputError(
            f"{path}: a pickle file, which can run code when it is read; convert it to safetensors, or pass "
            "allow_pickle=True (--allow-pickle) to read it with weights_only=True"
        )
    return PickleFile.open(path)
