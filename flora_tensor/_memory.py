"""How much memory a process may still take: what the machine has free, within the limits of its container."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flora_tensor._checks import size_text
from flora_tensor._errors import ResourceError

__all__ = ["available_memory", "naming_tensor", "require_memory"]

# Less than this is not asked for: the system's tables take longer to read than a small tensor's whole work.
_LITTLE = 1 << 22

_CACHES = ("active_file", "inactive_file", "total_active_file", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes are left, as machine, container and ``ulimit -v`` tell; ``None`` where none of them does.

    What files keep in a container's cache counts as free: the system drops it when memory is asked for.
    """
    return min([*_of_machine(root), *_of_container(root), *_of_process()], default=None)


def require_memory(where: str, name: str, shape: Sequence[int], need: int, limit: int | None = None) -> None:
    """Refuse work on a tensor that needs more bytes than ``limit``, or than are left, before any of them is taken."""
    if limit is None and need < _LITTLE:
        return
    free = limit if limit is not None else available_memory()
    if free is not None and need > free:
        raise ResourceError(
            f"{where}: {name!r} of shape {tuple(shape)} needs about {size_text(need)} of memory, but {size_text(free)} "
            "are allowed; exclude it, or use a machine with more memory"
        )


@contextmanager
def naming_tensor(where: str, name: str) -> Generator[None]:
    """Say which tensor it was where memory gives out though the estimate fitted, NumPy's or a device's."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:200] or "not enough memory"
        raise ResourceError(f"{where}: {name!r}: {reason}; exclude it, or use a machine with more memory") from None


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _of_container(root: Path) -> Iterator[int]:
    """Give what each control group of this process, from its own to the outermost, has left of its limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        top = root / "sys/fs/cgroup" / ("memory" if version == 1 else "")
        names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_number(directory / name) for name in names)
            if limit is not None and used is not None:
                yield max(0, limit - used + _cached(directory / "memory.stat"))
            if directory == top:
                break


def _cached(stat: Path) -> int:
    pairs = dict(line.split()[:2] for line in _lines(stat) if len(line.split()) > 1)
    # Version 1 has its own and, as totals, those of the groups below it: only the latter count.
    names = [name for name in _CACHES if name in pairs]
    return sum(int(pairs[name]) for name in names[-2:] if pairs[name].isdigit())


def _of_process() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = _lines(Path("/proc/self/statm"))
        yield max(0, limit - (int(pages[0].split()[0]) * resource.getpagesize() if pages else 0))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
