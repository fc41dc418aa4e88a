"""How every command runs: what ends it, what is said on stderr, and the exit code.

Exit codes: 0 done, 2 a wrong argument, 3 bad input, 4 a file that cannot be read or written, 5 not enough memory or a
package that is missing, 130 interrupted, 143 terminated, 129 the terminal was closed, 1 a mistake of ours.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import click

from flora_tensor._checks import printable
from flora_tensor._errors import InputError, ResourceError
from flora_tensor._warnings import FloraWarning

__all__ = ["Commands"]


class _InterruptedError(Exception):
    """Ctrl-C, SIGTERM or SIGHUP; click would print a line of its own for a bare KeyboardInterrupt."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        kept = getattr(cause, "__notes__", ["nothing was written"])
        super().__init__(f"interrupted; {'; '.join(kept)}")
        self.exit_code = 128 + (cause.number if isinstance(cause, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """A signal that ends a process, which cleans up as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Commands(click.Group):
    """A group whose errors are one line on stderr, with an exit code that says of what kind they are."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _InterruptedError(interrupt) from None
        except BrokenPipeError:
            # The reader of our output has seen enough. Python flushes stdout once more at its end: let that go nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command and leave the process with its exit code."""
        given = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            with _terminated_like_interrupted(), _warnings_on_stderr():
                # Without standalone mode an exit code that click was asked for comes back as the result.
                code = super().main(args=given, **extra)
        except SystemExit:  # click has answered a shell that completes a line
            raise
        except BaseException as error:
            if "--debug" in given:
                traceback.print_exc()
            code, text = _verdict(error)
            with contextlib.suppress(OSError):  # the terminal may be gone
                if text:
                    click.echo(f"error: {printable(' '.join(text.split()))}", err=True)
        sys.exit(code or 0)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one line that stand for an error."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, _InterruptedError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "interrupted; nothing was written"
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, InputError):
        return 3, str(error)
    kept = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, ImportError | ResourceError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 5, (str(error) or "not enough memory") + kept
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        text = f"{said}: {error.filename}" if error.strerror and error.filename else said
        return 4, text + kept
    if isinstance(error, ValueError | TypeError):
        return 2, str(error)
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug and report it"


@contextlib.contextmanager
def _terminated_like_interrupted() -> Generator[None]:
    """Let SIGTERM, and a terminal that is closed, clean up as Ctrl-C does; what `nohup` has ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, *_: Any) -> None:
        raise _Terminated(number)

    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no terminals that hang up
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _warnings_on_stderr() -> Generator[None]:
    """Show our warnings as one line each, without the source line that `warnings` adds."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {printable(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", FloraWarning)
        warnings.showwarning = line
        yield
