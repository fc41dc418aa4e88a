"""Files that appear whole or not at all, and JSON that is read strictly.

The recipe for every output: build it under another name in the same directory, flush it to the disk, read it back,
rename it, flush the directory. Whatever happens between, the old output stays until the new one is complete.
"""

import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._checks import size_text
from flora_tensor._errors import InputError

__all__ = [
    "canonical_json",
    "check_free_space",
    "check_target",
    "create_exclusive",
    "locked",
    "naming",
    "open_regular",
    "parse_json",
    "read_json",
    "staged_directory",
    "staged_file",
    "sync_directory",
    "write_at",
    "write_file",
]

MAX_JSON_BYTES = 100_000_000


def canonical_json(value: Any) -> str:
    """Write a value as JSON in one way only: keys sorted, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON table; duplicate keys, NaN, deep nesting and text that is not UTF-8 are refused."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates cannot be written again
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON table is needed, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the key {name[:100]!r} stands twice")
        table[name] = value
    return table


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of at most 100 MB."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path}: more than {MAX_JSON_BYTES} bytes; a file of this kind is smaller")
    return parse_json(data, str(path))


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor; pipes, devices and directories are refused."""
    # Without O_NONBLOCK a named pipe would block for ever.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path}: not a regular file")
    return fd


def create_exclusive(path: Path) -> int:
    """Create a file that must not exist, with the permissions of the user's umask, and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def write_at(fd: int, data: "bytes | np.ndarray", position: int, path: Path) -> None:
    """Write all of ``data``, bytes or contiguous uint8, at a position of an open file, whose path an error names."""
    view, done = data.data if isinstance(data, np.ndarray) else memoryview(data), 0
    with naming(path):
        while done < len(view):
            done += os.pwrite(fd, view[done : done + (1 << 30)], position + done)


@contextlib.contextmanager
def naming(path: Path) -> Generator[None]:
    """Name the file in what the system says of its descriptor."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_file(path: Path, data: bytes) -> None:
    """Create a file with this content and flush it to the disk."""
    fd = create_exclusive(path)
    try:
        write_at(fd, data, 0, path)
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # pragma: no cover - some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def check_free_space(where: str, target: Path, n_bytes: int) -> None:
    """Refuse to begin work whose result, with a margin of 1 % and 1 MiB, does not fit on the disk."""
    need = n_bytes + n_bytes // 100 + (1 << 20)
    free = shutil.disk_usage(_existing_parent(target)).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{where}: the result takes {size_text(need)}, but the disk has {size_text(free)} free; "
            "make room, or write elsewhere",
            str(target),
        )


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def locked(where: str, target: Path) -> Generator[None]:
    """Hold the lock on an output, ``.NAME.lock`` beside it, so that two runs cannot write it at once.

    The operating system releases the lock when its holder dies, so a killed run never blocks the next one.
    """
    import fcntl

    lock = _hidden(target, "lock")
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(lock) and os.path.samestat(os.fstat(fd), lock.stat()):
                break
            os.close(fd)  # the holder before us removed the file between our two calls
        except BlockingIOError:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip()
            os.close(fd)
            message = f"{where}: process {holder or 'unknown'} is writing {target}; wait for it to end"
            raise BlockingIOError(errno.EAGAIN, message) from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def _hidden(target: Path, what: str) -> Path:
    """Return the name of a file that stands beside an output while it is written."""
    name = target.name
    if len(os.fsencode(name)) > 200:  # a file system's names end at 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.parent / f".{name}.{what}"


@contextlib.contextmanager
def staged_directory(
    where: str, target: Path, *, overwrite: bool, owned: Collection[str], lock: bool = True
) -> Generator[Path]:
    """Yield an empty directory that becomes ``target`` if the block succeeds, and vanishes if it does not.

    With ``overwrite`` an existing directory is replaced only if all that it holds are regular files matching the globs
    ``owned``: a mistyped path must not cost the user other files. ``lock=False`` is for who holds the lock already.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(where, target) if lock else contextlib.nullcontext():
        check_target(where, target, overwrite=overwrite, owned=owned)
        _remove_leftovers(target)
        stage = _hidden(target, f"partial-{secrets.token_hex(6)}")
        stage.mkdir()
        try:
            yield stage
            sync_directory(stage)
            _swap_in(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        sync_directory(target.parent)


def check_target(where: str, target: Path, *, overwrite: bool, owned: Collection[str]) -> None:
    """Refuse an output directory that exists and must not be replaced; an empty one may always be."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(errno.EEXIST, f"{where}: a file is in the way; choose another directory", str(target))
    entries = list(target.iterdir())
    if entries and not overwrite:
        message = f"{where}: the directory exists; choose another one, or pass overwrite=True (--overwrite)"
        raise FileExistsError(errno.EEXIST, message, str(target))
    foreign = sorted(e.name for e in entries if not _is_owned(e, owned))
    if foreign:
        message = f"{where}: holds {foreign[0]!r}, which is not of its making; remove it yourself or choose another one"
        raise FileExistsError(errno.EEXIST, message, str(target))


def _is_owned(entry: Path, owned: Collection[str]) -> bool:
    return stat.S_ISREG(entry.lstat().st_mode) and any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in owned)


def _remove_leftovers(target: Path) -> None:
    """Clear what killed runs left; the lock proves that none of them is alive."""
    for entry in target.parent.iterdir():
        if entry.name.startswith(_hidden(target, "partial-").name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _swap_in(stage: Path, target: Path) -> None:
    """Give the finished directory its name, in one step where the system has one."""
    if not target.exists() or not any(target.iterdir()):
        stage.rename(target)
    elif _exchange(stage, target):
        shutil.rmtree(stage, ignore_errors=True)  # now the old one
    else:
        _swap_in_two_steps(stage, target)


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories trade names atomically; ``False`` where the system cannot (it can on Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # pragma: no cover - not Linux
        return False
    current_directory, exchange = -100, 2
    return rename(current_directory, os.fsencode(a), current_directory, os.fsencode(b), exchange) == 0


def _swap_in_two_steps(stage: Path, target: Path) -> None:
    """Replace a directory that holds files: the old one steps aside, and comes back if the new one cannot enter."""
    aside = _hidden(target, f"old-{secrets.token_hex(6)}")
    target.rename(aside)
    try:
        stage.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def staged_file(where: str, target: Path, *, overwrite: bool) -> Generator[Path]:
    """Yield a path whose file becomes ``target`` if the block succeeds, and vanishes if it does not.

    A link is followed, so that the file it points to is replaced and the link stays; an old file's permissions are
    kept.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(where, target):
        old_mode = check_target_file(where, target, overwrite=overwrite)
        _remove_leftovers(target)
        stage = _hidden(target, f"partial-{secrets.token_hex(6)}")
        try:
            yield stage
            if old_mode is not None:
                stage.chmod(old_mode)
            stage.replace(target)
        except BaseException:
            stage.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)


def check_target_file(where: str, target: Path, *, overwrite: bool) -> int | None:
    """Refuse an output file that must not be replaced; return the permissions of the one that is."""
    if not os.path.lexists(target):
        return None
    status = target.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(errno.EEXIST, f"{where}: not a regular file; choose another path", str(target))
    if not overwrite:
        message = f"{where}: the file exists; choose another one, or pass overwrite=True (--overwrite)"
        raise FileExistsError(errno.EEXIST, message, str(target))
    return stat.S_IMODE(status.st_mode)
