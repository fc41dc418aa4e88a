"""What commands have in common: how arguments are read, options that several commands take, and help in sections."""

import contextlib
import re
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from flora_tensor._progress import Progress, ProgressLine

__all__ = [
    "COMMON",
    "EXISTING",
    "MAX_MEMORY",
    "MAX_SHARD_SIZE",
    "OUTPUT",
    "PAGE",
    "PICKLE",
    "PROGRESS",
    "SELECTION",
    "VERIFY_BASE",
    "WEIGHTS",
    "SectionedCommand",
    "budget",
    "examples",
    "heads",
    "noise",
    "numbers",
    "opened_executor",
    "picture",
    "ranks",
    "share",
    "shown_progress",
    "size",
    "with_options",
    "write_page",
]

AnyCommand = TypeVar("AnyCommand", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]
EXISTING = click.Path(path_type=Path)


class _Output(click.Path):
    """A file or a directory to write; nothing here can be written to stdout, as ``-`` asks of other programs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "-":
            self.fail("'-' is no place to write to; pass a path (./- for a file of that name)", param, ctx)
        return super().convert(value, param, ctx)


OUTPUT = _Output(path_type=Path)

# Reading arguments ----------------------------------------------------------------------------------------------------


def noise(text: str) -> float | str | None:
    """Read "auto", "none" or a number."""
    if text.lower() in ("auto", "none"):
        return {"auto": "auto", "none": None}[text.lower()]
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a noise; pass auto, none, or a number") from None


def heads(text: str) -> int | str | None:
    """Read "auto", "none" or a number of heads."""
    if text.lower() in ("auto", "none"):
        return {"auto": "auto", "none": None}[text.lower()]
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is not a number of heads; pass one such as 12, auto, or none")
    return int(text)


def share(text: str) -> float:
    """Read a share, as ``5%`` or ``0.05``."""
    try:
        number = tolerance(text)
    except click.BadParameter:
        raise click.BadParameter(f"{text!r} is not a share; pass one such as 5% or 0.05") from None
    if not 0 < number <= 1:
        raise click.BadParameter(f"{text!r} is not a share above 0 and up to 100 %")
    return number


def tolerance(text: str) -> float:
    """Read a relative error, as ``0.1`` or ``10%``; its range is checked where it is used."""
    try:
        return float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not an error; pass one such as 0.1 or 10%") from None


def count(text: str) -> int:
    """Read how many numbers to store, as ``20000000``, ``2e7``, ``20M`` or ``1.5B``."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([KMB]?)", text.strip(), re.IGNORECASE)
    number = Fraction(match[1]) * 1000 ** " KMB".index(match[2].upper() or " ") if match else Fraction(1, 2)
    if number.denominator != 1:
        raise click.BadParameter(f"{text!r} is not a count; pass one such as 20000000, 2e7 or 20M")
    return int(number)


def ranks(text: str) -> int | list[int]:
    """Read ranks, as ``16`` or ``16,16,2,2``."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of ranks; pass one such as 16 or 16,16,2,2") from None
    return numbers[0] if len(numbers) == 1 else numbers


def size(text: str) -> int:
    """Read a number of bytes, as ``5GB``, ``512MiB``, ``5e9`` or ``1000``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"{text!r} is not a size; pass one such as 5GB or 512MiB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))


def numbers(text: str) -> list[float]:
    """Read numbers, as ``.7,.3``."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers; pass one for each adapter: .7 .3") from None


# Help -----------------------------------------------------------------------------------------------------------------


def examples(*lines: str) -> str:
    """Return the end of a help text, which shows how a command is used."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class SectionedCommand(click.Command):
    """A command with many options, which its help lists in sections.

    Parameters
    ----------
    sections : mapping of str to str
        The title under which each option, and what follows it, is listed.
    """

    def __init__(self, *args: Any, sections: dict[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options in the order in which they were given, a title before each section."""
        tables: dict[str, list[tuple[str, str]]] = {}
        title = "Options"
        for option in self.get_params(ctx):
            if not isinstance(option, click.Option):
                continue
            title = self.sections.get(option.name or "", title)
            if (record := option.get_help_record(ctx)) is not None:
                tables.setdefault(title, []).append(record)
        for name, records in tables.items():
            with formatter.section(name):
                formatter.write_dl(records)


# Options --------------------------------------------------------------------------------------------------------------


def with_options(*groups: Decorator | Sequence[Decorator]) -> Callable[[AnyCommand], AnyCommand]:
    """Add options in the order in which they are to be listed."""
    options = [o for group in groups for o in (group if isinstance(group, Sequence) else [group])]

    def decorate(command: AnyCommand) -> AnyCommand:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


COMMON = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
PICKLE = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read .bin and .pt files, with weights_only=True. They are refused otherwise: a pickle can run code.",
)
SELECTION = (
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Look only at tensors whose whole name matches, such as '*.attn.*'; repeatable.",
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Do not look at tensors whose name matches; repeatable."
    ),
)
PROGRESS = click.option(
    "--progress/--no-progress", "wanted", default=None, help="Show progress; by default on a terminal."
)
MAX_SHARD_SIZE = click.option(
    "--max-shard-size",
    type=size,
    metavar="SIZE",
    help="Split the tensor file at this size, such as 2GB; one file by default, as PEFT reads no more.",
)
MAX_MEMORY = click.option(
    "--max-memory",
    type=size,
    metavar="SIZE",
    help="The most memory for one tensor's work, such as 8GB; what is free by default.",
)


def budget(ratio: str) -> tuple[Decorator, ...]:
    """Return the options that limit what is stored, one of which is taken; ``ratio`` says which shares there are."""
    shares = f"Numbers stored, as a share of the dense changes, {ratio}."
    return (
        click.option("--max-ratio", type=share, metavar="SHARE", help=shares),
        click.option(
            "--max-parameters",
            type=count,
            metavar="N",
            help="Numbers stored in all Tucker tensors, such as 2000000 or 2M.",
        ),
        click.option("--max-bytes", type=size, metavar="SIZE", help="Bytes of the numbers stored, such as 20MB."),
        click.option(
            "--rtol",
            type=tolerance,
            metavar="ERROR",
            help="The relative error of all changes together to stay within: 0.1 or 10%.",
        ),
    )


WEIGHTS = click.option(
    "--weights",
    type=click.Choice(["norm", "uniform"]),
    default="norm",
    show_default=True,
    help="Minimize the error of all changes together, or that of each relative to its own size.",
)
VERIFY_BASE = click.option(
    "--verify-base",
    type=click.Choice(["warn", "error", "ignore"]),
    default="warn",
    show_default=True,
    help="What to do where the adapter was made for another base.",
)


def _writable(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, before hours of work and not after them."""
    if value is None:
        return None
    if value.is_dir() or not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{str(value)!r} is a directory or lies in none", ctx, parameter)
    if parameter.name == "page":
        # A page replaces what is there: by its name, that can be no checkpoint.
        if value.suffix.lower() not in (".html", ".htm"):
            raise click.BadParameter(f"{str(value)!r} does not end in .html", ctx, parameter)
        return value
    from flora_tensor.plots import picture_formats

    if value.suffix.lower().removeprefix(".") not in picture_formats():
        raise click.BadParameter(f"{str(value)!r} does not end in .png, .pdf or .svg", ctx, parameter)
    return value


def picture(what: str) -> Decorator:
    """Return the option for a picture of ``what``."""
    text = f"Draw a picture of {what} (PNG, PDF, SVG)."
    return click.option("--plot", type=OUTPUT, callback=_writable, metavar="FILE", help=text)


PAGE = click.option(
    "--html",
    "page",
    type=OUTPUT,
    callback=_writable,
    metavar="FILE",
    help="Write the report as one HTML page, complete in itself.",
)


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    from flora_tensor._files import staged_file, write_file

    with staged_file("html", path, overwrite=True) as stage:
        write_file(stage, text.encode())


# What runs beside a command -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shown_progress(
    *checkpoints: Path, wanted: bool | None = None, allow_pickle: bool = False
) -> Generator[Progress | None]:
    """Give a callback that shows progress on stderr, if that is a terminal or it is ``wanted``."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    line = ProgressLine(sys.stderr, _sizes(checkpoints, allow_pickle))
    try:
        yield line
    finally:
        line.close()


def _sizes(checkpoints: Sequence[Path], allow_pickle: bool) -> dict[str, tuple[int, int]]:
    """Return how many numbers each tensor has, and how many bytes in all checkpoints."""
    from flora_tensor.checkpoint import open_checkpoint

    sizes: dict[str, tuple[int, int]] = {}
    for path in checkpoints:
        checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
        for name in checkpoint.names():
            info = checkpoint.info(name)
            sizes[name] = (info.n_elements, info.n_bytes + sizes.get(name, (0, 0))[1])
    return sizes


@contextlib.contextmanager
def opened_executor(workers: int | None, address: str | None) -> "Generator[Executor | None]":
    """Open what ``--workers`` or ``--executor`` ask for."""
    from flora_tensor._workers import WorkerPool, dask_executor

    if workers is not None and address is not None:
        raise click.UsageError("got --workers and --executor; pass one of them")
    if workers is None and address is None:
        yield None
        return
    with WorkerPool(workers) if workers is not None else dask_executor(address or "") as executor:
        yield executor
