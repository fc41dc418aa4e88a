"""What an extraction has finished, kept beside its output while it runs: `OUT.partial`.

Two files grow in it: `results.bin`, the outcomes' bytes, and `journal.jsonl`, one line an outcome with what it was
computed from and its SHA-256. A run that is killed at any moment loses the outcomes in the making and no others: a line
is written after the bytes that it speaks of, and neither is trusted when it is read again.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Generator
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._errors import ResourceError
from flora_tensor._files import canonical_json, write_at

__all__ = ["Journal", "partial_path"]

_HEAD = {"format": "flora_tensor.partial", "version": 1}


def partial_path(target: Path) -> Path:
    """Return where the outcomes of an unfinished run to ``target`` are kept."""
    return target.parent / f"{target.name}.partial"


@dataclass(frozen=True)
class _Line:
    """One finished task: what it was, the digests of its inputs and options, and where its outcome lies."""

    task: str
    name: str
    inputs: str
    options: str
    start: int
    n_bytes: int
    sha256: str


class Journal:
    """The outcomes of a run, on disk.

    Parameters
    ----------
    directory : Path
        `OUT.partial`, which exists.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        self._lines = os.open(directory / "journal.jsonl", flags, 0o666)
        self._data = os.open(directory / "results.bin", flags, 0o666)
        self._known: dict[tuple[str, str, str], _Line] = {}
        self._position = self._end = 0
        self._read()

    def __len__(self) -> int:
        return len(self._known)

    def close(self) -> None:
        """Close both files."""
        os.close(self._lines)
        os.close(self._data)

    def inputs_of(self, task: str, name: str, options: str) -> str:
        """Return the digest of the inputs that a task's kept outcome was computed from; "" where none is kept whole."""
        line = self._known.get((task, name, options))
        if line is None:
            return ""
        return line.inputs if hashlib.sha256(self._bytes(line).data).hexdigest() == line.sha256 else ""

    def load(self, task: str, name: str, options: str) -> np.ndarray:
        """Return the bytes of an outcome that is kept, as uint8."""
        return self._bytes(self._known[task, name, options])

    def add(self, task: str, name: str, options: str, inputs: str, payload: bytes) -> None:
        """Keep an outcome; its line is written when its bytes are."""
        line = _Line(task, name, inputs, options, self._end, len(payload), hashlib.sha256(payload).hexdigest())
        write_at(self._data, payload, self._end, self.directory / "results.bin")
        self._end += len(payload)
        self._write(asdict(line))
        self._known[task, name, options] = line

    def _write(self, line: object) -> None:
        text = canonical_json(line).encode() + b"\n"
        write_at(self._lines, text, self._position, self.directory / "journal.jsonl")
        self._position += len(text)

    def _bytes(self, line: _Line) -> np.ndarray:
        data = np.zeros(line.n_bytes, np.uint8)
        done = 0
        while done < line.n_bytes and (count := os.preadv(self._data, [data.data[done:]], line.start + done)):
            done += count
        return data

    def _read(self) -> None:
        """Take over the lines of an earlier run, up to the first that is torn, and forget what stands behind."""
        text = os.pread(self._lines, os.fstat(self._lines).st_size, 0)
        head, *lines = text.split(b"\n") if text else [b""]
        if _parsed(head) == _HEAD:
            self._position = len(head) + 1
            for raw in lines[:-1]:  # what follows the last newline was never finished
                line = _line(_parsed(raw), os.fstat(self._data).st_size)
                if line is None:
                    break
                self._known[line.task, line.name, line.options] = line
                self._position += len(raw) + 1
        self._end = max((line.start + line.n_bytes for line in self._known.values()), default=0)
        os.ftruncate(self._lines, self._position)
        if not self._position:
            self._write(_HEAD)

    @classmethod
    @contextlib.contextmanager
    def beside(cls, where: str, target: Path, *, resume: bool, overwrite: bool) -> "Generator[Journal]":
        """Open the journal of a run to ``target``; remove it when the run ends, unless it can be continued.

        It stays after an interrupt, when memory or a worker gave out, and when the system failed in any way but a full
        disk or a limit on files; not where the inputs or the options are refused, as the same would happen again.
        """
        directory = partial_path(target)
        if os.path.lexists(directory) and not resume:
            if not overwrite:
                message = (
                    f"{where}: keeps what an unfinished run has done; continue it with resume=True (--resume), or "
                    "begin again with overwrite=True (--overwrite)"
                )
                raise FileExistsError(errno.EEXIST, message, str(directory))
            _remove(directory)
        is_new = not os.path.lexists(directory)
        directory.mkdir(exist_ok=True)
        try:
            journal = cls(directory)
        except BaseException:
            if is_new:
                _remove(directory)
            raise
        try:
            yield journal
        except BaseException as error:
            journal.close()
            if len(journal) and _can_continue(error):
                kept = f"{len(journal)} finished {'task is' if len(journal) == 1 else 'tasks are'} kept in {directory}"
                error.add_note(f"{kept}; continue with resume=True (--resume)")
            else:
                _remove(directory)
            raise
        journal.close()
        _remove(directory)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _line(entry: dict[str, Any], size: int) -> _Line | None:
    """Return the line that a table stands for, or ``None`` where it is none of ours or speaks of bytes that are not."""
    kinds = dict.fromkeys(("task", "name", "inputs", "options", "sha256"), str) | {"start": int, "n_bytes": int}
    if {key: type(value) for key, value in entry.items()} != kinds:
        return None
    line = _Line(**entry)
    return line if 0 <= line.start <= line.start + line.n_bytes <= size else None


def _remove(directory: Path) -> None:
    """Remove a directory of ours, and nothing in it that is not."""
    for name in ("journal.jsonl", "results.bin"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _can_continue(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return not isinstance(error, Exception) or isinstance(error, ResourceError | MemoryError | BrokenExecutor)
