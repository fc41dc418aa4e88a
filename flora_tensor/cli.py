"""The command line: `flora-tensor` and `python -m flora_tensor`.

Thin: each command calls one function of the library and shows what it returns. Tables and JSON go to stdout,
progress and errors to stderr. Exit codes: 0 done, 2 a wrong argument, 3 bad input, 4 a file that cannot be read or
written, 5 not enough memory or a package that is missing, 130 interrupted, 143 terminated, 1 a mistake of ours.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import click

from flora_tensor._checks import printable
from flora_tensor._errors import InputError, ResourceError
from flora_tensor._progress import ProgressLine
from flora_tensor._version import __version__
from flora_tensor._warnings import FloraWarning

_Command = TypeVar("_Command", bound=Callable[..., Any])
_EXISTING = click.Path(path_type=Path)


class _InterruptedError(Exception):
    """Ctrl-C or SIGTERM; click would print a line of its own for a bare KeyboardInterrupt."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        kept = getattr(cause, "__notes__", ["nothing was written"])
        super().__init__(f"interrupted; {'; '.join(kept)}")
        self.exit_code = 143 if isinstance(cause, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which cleans up as Ctrl-C does."""


class _Commands(click.Group):
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
        except BaseException as error:
            if "--debug" in given:
                traceback.print_exc()
            code, text = _verdict(error)
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
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        return 4, text + kept
    if isinstance(error, ValueError | TypeError):
        return 2, str(error)
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug and report it"


@contextlib.contextmanager
def _terminated_like_interrupted() -> Generator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _warnings_on_stderr() -> Generator[None]:
    """Show our warnings as one line each, without the source line that `warnings` adds."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {printable(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", FloraWarning)
        warnings.showwarning = line
        yield


def _noise(text: str) -> float | str | None:
    """Read "auto", "none" or a number."""
    return {"auto": "auto", "none": None}[text.lower()] if text.lower() in ("auto", "none") else float(text)


def _heads(text: str) -> int | str | None:
    """Read "auto", "none" or a number of heads."""
    if text.lower() in ("auto", "none"):
        return {"auto": "auto", "none": None}[text.lower()]
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is not a number of heads; pass one such as 12, auto, or none")
    return int(text)


def _share(text: str) -> float:
    """Read a share, as ``5%`` or ``0.05``."""
    try:
        number = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a share; pass one such as 5% or 0.05") from None
    if not 0 < number <= 1:
        raise click.BadParameter(f"{text!r} is not a share above 0 and up to 100 %")
    return number


def _ranks(text: str) -> int | list[int]:
    """Read ranks, as ``16`` or ``16,16,2,2``."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of ranks; pass one such as 16 or 16,16,2,2") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _size(text: str) -> int:
    """Read a number of bytes, as ``5GB``, ``512MiB`` or ``1000``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"{text!r} is not a size; pass one such as 5GB or 512MiB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))


@contextlib.contextmanager
def _progress(
    *checkpoints: Path, wanted: bool | None = None, allow_pickle: bool = False
) -> Generator[Callable[[str, int, int, str], None] | None]:
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
def _executor(workers: int | None, address: str | None) -> "Generator[Executor | None]":
    """Open what ``--workers`` or ``--executor`` ask for."""
    from flora_tensor._workers import WorkerPool, dask_executor

    if workers is not None and address is not None:
        raise click.UsageError("got --workers and --executor; pass one of them")
    if workers is None and address is None:
        yield None
        return
    with WorkerPool(workers) if workers is not None else dask_executor(address or "") as executor:
        yield executor


def _common(command: _Command) -> _Command:
    """Add the options that every command has."""
    debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
    return as_json(debug(command))


def _pickle(command: _Command) -> _Command:
    text = "Read .bin and .pt files, with weights_only=True. They are refused otherwise: a pickle can run code."
    return click.option("--allow-pickle", is_flag=True, help=text)(command)


def _selection(command: _Command) -> _Command:
    include = click.option("--include", multiple=True, metavar="GLOB", help="Look only at these tensors; repeatable.")
    exclude = click.option("--exclude", multiple=True, metavar="GLOB", help="Do not look at these tensors; repeatable.")
    return include(exclude(command))


def _in_a_directory(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, before hours of work and not after them."""
    if value is not None and (value.is_dir() or not value.absolute().parent.is_dir()):
        raise click.BadParameter(f"{str(value)!r} is a directory or lies in none", ctx, parameter)
    return value


def _picture(what: str) -> Callable[[_Command], _Command]:
    text = f"Draw {what} into this file (PNG, PDF, SVG)."
    return click.option("--plot", type=click.Path(path_type=Path), callback=_in_a_directory, metavar="FILE", help=text)


def _page(command: _Command) -> _Command:
    text = "Write the report as one HTML page, complete in itself."
    kind = click.Path(path_type=Path)
    return click.option("--html", "page", type=kind, callback=_in_a_directory, metavar="FILE", help=text)(command)


def _write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    from flora_tensor._files import staged_file, write_file

    with staged_file("html", path, overwrite=True) as stage:
        write_file(stage, text.encode())


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flora-tensor")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Low-rank tensor adapters from checkpoints: extract, merge, inspect, compare."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@click.argument("base", type=_EXISTING)
@click.argument("tuned", type=_EXISTING)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The adapter directory to write.")
@click.option(
    "--max-ratio", type=_share, metavar="SHARE", help="Numbers stored, as a share of the dense change; 5% by default."
)
@click.option("--max-parameters", type=int, help="Numbers stored in all.")
@click.option("--max-bytes", type=_size, metavar="SIZE", help="Bytes of the numbers stored, such as 20MB.")
@click.option("--rtol", type=float, help="The relative error to stay within.")
@click.option("--ranks", type=_ranks, metavar="RANKS", help="The ranks themselves: 16, or 16,16,2,2.")
@click.option("--arrangement", default="auto", show_default=True, metavar="PATTERN", help="Which axes form a mode.")
@click.option(
    "--heads", type=_heads, default="auto", show_default=True, metavar="N", help="Attention heads: N or none."
)
@click.option(
    "--calibration", type=_EXISTING, metavar="FILE", help="Second moments of the inputs: count errors of the outputs."
)
@click.option(
    "--weights",
    type=click.Choice(["norm", "uniform"]),
    default="norm",
    show_default=True,
    help="Minimize the error of all changes, or that of each relative to its size.",
)
@click.option("--vectors", type=click.Choice(["keep", "skip", "error"]), default="keep", show_default=True)
@click.option("--on-mismatch", type=click.Choice(["error", "skip"]), default="error", show_default=True)
@click.option("--resized", type=click.Choice(["error", "pad", "skip"]), default="error", show_default=True)
@click.option("--allow-missing", is_flag=True, help="Leave out tensors that only one checkpoint has.")
@click.option(
    "--noise-floor",
    type=_noise,
    default="auto",
    show_default=True,
    metavar="NOISE",
    help="Cap ranks at this noise per entry: auto (the rounding of the storage types), none, or a number.",
)
@click.option("--device", help="A PyTorch device, such as cuda.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32", show_default=True
)
@click.option("--max-memory", type=_size, metavar="SIZE", help="The most memory for one tensor's work.")
@click.option("--dry-run", is_flag=True, help="Say what would be stored, and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter directory that exists.")
@click.option("--resume", is_flag=True, help="Go on from OUT.partial, which an interrupted run left.")
@click.option("--workers", type=int, metavar="N", help="Share the tensors among N processes.")
@click.option("--executor", "address", metavar="ADDRESS", help="Or among a cluster: dask://host:port.")
@click.option("--progress/--no-progress", "wanted", default=None, help="Show progress; by default on a terminal.")
@_picture("what other budgets would buy, and the ranks")
@_page
@_selection
@_pickle
@_common
def extract(
    base: Path,
    tuned: Path,
    out: Path | None,
    arrangement: str,
    dry_run: bool,
    workers: int | None,
    address: str | None,
    wanted: bool | None,
    page: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn the difference of two checkpoints into an adapter directory."""
    from flora_tensor.extraction import extract as run

    if out is None and not dry_run:
        raise click.UsageError("missing option '-o' / '--out'; pass a directory, or --dry-run")
    show = _progress(base, tuned, wanted=wanted, allow_pickle=options["allow_pickle"])
    with show as progress, _executor(workers, address) as executor:
        ways = {"progress": progress, "executor": executor}
        report = run(base, tuned, out, arrangements=arrangement, dry_run=dry_run, **ways, **options)
    if page is not None:
        from flora_tensor.html_report import report_html

        _write_page(page, report_html(report, title=f"{tuned.name} − {base.name}"))
    if plot is not None:
        from flora_tensor.plots import plot_report, save_figure

        save_figure(plot_report(report, title=f"{tuned.name} − {base.name}"), plot)
    click.echo(report.to_json() if as_json else report.to_table())


@main.command()
@click.argument("base", type=_EXISTING)
@click.argument("adapter", type=_EXISTING)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="A .safetensors file or a directory.")
@click.option("--max-shard-size", type=_size, metavar="SIZE", help="The most bytes in a file; as in BASE by default.")
@click.option("--verify-base", type=click.Choice(["warn", "error", "ignore"]), default="warn", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@_pickle
@_common
def merge(base: Path, adapter: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Add an adapter to the checkpoint it was made for."""
    from flora_tensor.merging import merge_checkpoint

    with _progress() as progress:
        report = merge_checkpoint(base, adapter, out, progress=progress, **options)
    counts = f"{len(report.merged)} tensors merged, {len(report.replaced)} replaced, {len(report.copied)} copied"
    click.echo(report.to_json() if as_json else f"{counts}: {', '.join(report.files)}")


@main.command()
@click.argument("adapter", type=_EXISTING)
@_common
def inspect(adapter: Path, as_json: bool) -> None:
    """Show what an adapter directory holds, after checking all of it."""
    import json

    from flora_tensor.adapter_file import load_adapter
    from flora_tensor.report import adapter_table, describe_adapter

    loaded = load_adapter(adapter)
    text = json.dumps(describe_adapter(loaded), indent=2, ensure_ascii=False) if as_json else adapter_table(loaded)
    click.echo(text)


@main.command()
@click.argument("base", type=_EXISTING)
@click.argument("tuned", type=_EXISTING)
@click.option(
    "--budget", "budgets", type=_share, metavar="SHARE", multiple=True, help="A budget to try, such as 5%; repeatable."
)
@_picture("the singular values")
@_page
@click.option("--max-memory", type=_size, metavar="SIZE", help="The most memory for one tensor's work.")
@_selection
@_pickle
@_common
def ranks(
    base: Path,
    tuned: Path,
    budgets: tuple[float, ...],
    page: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show the spectra of every weight's change, and what each budget would buy."""
    from flora_tensor.plots import plot_spectra, save_figure
    from flora_tensor.rank_study import BUDGETS, study_ranks

    with _progress() as progress:
        study = study_ranks(base, tuned, budgets=budgets or BUDGETS, progress=progress, **options)
    if plot is not None:
        save_figure(plot_spectra(study.spectra, title=f"Singular values of {tuned.name} − {base.name}"), plot)
    if page is not None:
        from flora_tensor.html_report import study_html

        _write_page(page, study_html(study, title=f"Ranks of {tuned.name} − {base.name}"))
    click.echo(study.to_json() if as_json else study.to_table())


_BUDGET = (
    click.option("--max-parameters", type=int, help="Numbers stored in all."),
    click.option("--max-ratio", type=_share, metavar="SHARE", help="Numbers stored, as a share of the dense changes."),
    click.option("--rtol", type=float, help="The relative error to stay within."),
)
_OUTPUT = (
    click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The adapter directory to write."),
    click.option("--overwrite", is_flag=True, help="Replace an adapter directory that exists."),
)
_BASE = (
    click.option("--base", type=_EXISTING, help="The checkpoint they change; tensors stored whole need it."),
    click.option("--verify-base", type=click.Choice(["warn", "error", "ignore"]), default="warn", show_default=True),
)


def _with(*groups: Sequence[Callable[[Any], Any]]) -> Callable[[_Command], _Command]:
    """Add options in the order in which they are to be listed."""

    def decorate(command: _Command) -> _Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def _save(out: Path, overwrite: bool, fit: Any, as_json: bool) -> None:
    from flora_tensor.adapter_file import save_adapter

    save_adapter(out, fit.adapter, overwrite=overwrite)
    click.echo(fit.to_json() if as_json else fit.to_table())


@main.command("round")
@click.argument("adapter", type=_EXISTING)
@_with(_OUTPUT[:1], _BUDGET, _OUTPUT[1:])
@_common
def round_command(adapter: Path, out: Path, overwrite: bool, as_json: bool, **budget: Any) -> None:
    """Lower an adapter's ranks under one budget, or within one tolerance."""
    from flora_tensor.adapter_algebra import round_adapter

    _save(out, overwrite, round_adapter(adapter, **budget), as_json)


class _WithNumbers(click.Command):
    """A command whose ``--weights`` takes numbers with spaces between them, or with commas."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the numbers that follow ``--weights`` to one argument."""
        joined: list[str] = []
        for word in args:
            if "--weights" in joined[-2:-1] and _is_number(word):
                joined[-1] += f",{word}"
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(text: str) -> list[float]:
    """Read numbers, as ``.7,.3``."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers; pass one for each adapter: .7 .3") from None


@main.command(cls=_WithNumbers)
@click.argument("adapters", type=_EXISTING, nargs=-1, required=True)
@click.option("--weights", type=_numbers, metavar="W1 W2 …", help="A number for each adapter; 1 by default.")
@_with(_OUTPUT[:1], _BUDGET, _BASE, _OUTPUT[1:])
@_common
def add(adapters: tuple[Path, ...], out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Add adapters of one base exactly, then round the sum if a budget is given."""
    from flora_tensor.adapter_algebra import add_adapters

    _save(out, overwrite, add_adapters(adapters, **options), as_json)


@main.command()
@click.argument("a", type=_EXISTING)
@click.argument("b", type=_EXISTING)
@_with(_OUTPUT[:1], _BASE, _OUTPUT[1:])
@_common
def subtract(a: Path, b: Path, out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Subtract adapter B from adapter A, exactly."""
    from flora_tensor.adapter_algebra import subtract_adapters

    _save(out, overwrite, subtract_adapters(a, b, **options), as_json)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("adapter", type=_EXISTING)
@click.argument("factor", type=float)
@_with(_OUTPUT[:1], _BASE, _OUTPUT[1:])
@_common
def scale(adapter: Path, factor: float, out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Multiply an adapter by a number; its cores and factors keep their bits."""
    import json

    from flora_tensor.adapter_algebra import scale_adapter
    from flora_tensor.adapter_file import save_adapter
    from flora_tensor.report import adapter_table, describe_adapter

    scaled = scale_adapter(adapter, factor, **options)
    save_adapter(out, scaled, overwrite=overwrite)
    text = json.dumps(describe_adapter(scaled), indent=2, ensure_ascii=False) if as_json else adapter_table(scaled)
    click.echo(text)


@main.command()
@click.argument("source", type=_EXISTING)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["flora", "peft-lora", "lycoris", "kohya"]), required=True)
@click.option("--base", type=_EXISTING, help="The model's checkpoint; LyCORIS and kohya files need it for the names.")
@click.option("--scale", type=float, help="The multiplier of an official FLoRA, whose file does not hold it.")
@click.option("--prefix", help="What a LyCORIS or kohya file's names begin with, such as lora_unet.")
@click.option("--skip-whole", is_flag=True, help="Leave out tensors stored whole, which LyCORIS and kohya cannot hold.")
@_with(_OUTPUT[1:])
@_pickle
@_common
def convert(
    source: Path,
    out: Path,
    target: str,
    prefix: str | None,
    skip_whole: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert an adapter exactly: from and to PEFT's LoRA, LyCORIS and kohya, and from the official FLoRA."""
    import json

    from flora_tensor import conversion
    from flora_tensor.adapter_file import save_adapter
    from flora_tensor.report import adapter_table, describe_adapter

    adapter = conversion.convert_adapter(source, prefix=prefix, **options)
    if target == "flora":
        save_adapter(out, adapter, overwrite=overwrite)
    elif target == "peft-lora":
        conversion.to_peft_lora(adapter, out, overwrite=overwrite)
    else:
        start = prefix or ("lycoris" if target == "lycoris" else "lora_unet")
        whole = "skip" if skip_whole else "error"
        conversion.to_lycoris(adapter, out, prefix=start, tucker=target == "lycoris", whole=whole, overwrite=overwrite)
    text = json.dumps(describe_adapter(adapter), indent=2, ensure_ascii=False) if as_json else adapter_table(adapter)
    click.echo(text)


@main.command()
@click.argument("a", type=_EXISTING)
@click.argument("b", type=_EXISTING)
@_pickle
@_common
def diff(a: Path, b: Path, allow_pickle: bool, as_json: bool) -> None:
    """Compare two checkpoints tensor by tensor."""
    from flora_tensor.merging import diff_checkpoints

    with _progress() as progress:
        report = diff_checkpoints(a, b, allow_pickle=allow_pickle, progress=progress)
    click.echo(report.to_json() if as_json else report.to_table())


@main.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default="demo-output", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_common
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Fine-tune a small network, extract adapters from it, merge, compare, and train on."""
    try:
        run = importlib.import_module("flora_torch.demo").run_demo
    except ModuleNotFoundError as error:
        raise ImportError(f"demo: {error.name} is not installed; pip install 'flora-tensor[demo]'") from error
    report = run(out, seed=seed, progress=lambda line: click.echo(line, err=True))
    click.echo(report.to_json() if as_json else report.to_table())
