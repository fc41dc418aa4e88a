"""How far a long function is: what it calls to say so, and a line on stderr that tells it, with rate and time left."""

import time
from collections.abc import Callable, Mapping
from typing import IO, TypeAlias

from flora_tensor._checks import printable

__all__ = ["Progress", "ProgressLine", "silent"]

Progress: TypeAlias = Callable[[str, int, int, str], None]
"""Called as ``progress(phase, done, total, name)``."""


def silent(phase: str, done: int, total: int, name: str) -> None:
    """Show no progress."""


class ProgressLine:
    """Shows progress as a line that is rewritten on a terminal, and as a line now and then elsewhere.

    Parameters
    ----------
    stream : text stream
        Where to write.
    sizes : mapping of str to (int, int)
        How many numbers and bytes each tensor has; with it, rates and the time left are told.
    every : float
        Seconds between two lines.
    clock : callable
        The time in seconds.
    """

    def __init__(
        self,
        stream: IO[str],
        sizes: Mapping[str, tuple[int, int]] | None = None,
        *,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._sizes, self._clock = stream, sizes or {}, clock
        self._rewrites = stream.isatty()
        self._every = every if every is not None else 0.1 if self._rewrites else 10.0
        self._phase, self._begun, self._shown = "", 0.0, 0.0
        self._numbers = self._bytes = 0
        self._last = ""

    def __call__(self, phase: str, done: int, total: int, name: str) -> None:
        """Take note that ``done`` of ``total`` tensors are finished and ``name`` is next, or among the last ones."""
        now = self._clock()
        if phase != self._phase:
            self._phase, self._begun, self._shown = phase, now, now if not self._rewrites else now - self._every
            self._numbers = self._bytes = 0
        elif self._last in self._sizes:
            numbers, n_bytes = self._sizes[self._last]
            self._numbers, self._bytes = self._numbers + numbers, self._bytes + n_bytes
        self._last = name
        if now - self._shown >= self._every:
            self._shown = now
            self._write(self._text(done, total, name, now - self._begun))

    def close(self) -> None:
        """Clear the line."""
        if self._rewrites:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _text(self, done: int, total: int, name: str, seconds: float) -> str:
        parts = [f"{self._phase} {done}/{total}"]
        if seconds > 0 and done:
            if self._numbers:
                parts.append(
                    f"{self._numbers / seconds / 1e6:.1f} M parameters/s, {self._bytes / seconds / 1e6:.0f} MB/s"
                )
            # Large tensors take longer than small ones: what is left is told by numbers where they are known.
            share = self._numbers / self._total() if self._numbers else done / total
            parts.append(f"{_duration(seconds * (1 - share) / share)} left")
        return ", ".join([*parts, printable(name[-40:])])

    def _total(self) -> int:
        return max(sum(numbers for numbers, _ in self._sizes.values()), self._numbers)

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._rewrites else f"{text}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
