"""Commands that read checkpoints: extract, ranks, merge and diff."""

from pathlib import Path
from typing import Any

import click

from flora_tensor.cli.options import (
    COMMON,
    EXISTING,
    MAX_MEMORY,
    MAX_SHARD_SIZE,
    OUTPUT,
    PAGE,
    PICKLE,
    PROGRESS,
    SELECTION,
    VERIFY_BASE,
    WEIGHTS,
    SectionedCommand,
    budget,
    examples,
    heads,
    noise,
    opened_executor,
    picture,
    ranks,
    share,
    shown_progress,
    size,
    with_options,
    write_page,
)

__all__ = ["COMMANDS"]

_BUDGET = (
    *budget("5% by default"),
    click.option(
        "--ranks",
        type=ranks,
        metavar="RANKS",
        help="The ranks themselves: 16 for every mode, or one a mode: 16,16,2,2.",
    ),
)
_HEADS = click.option(
    "--heads",
    type=heads,
    default="auto",
    show_default=True,
    metavar="N",
    help="How many heads the attentions have, which may form a mode: auto (as config.json says), none, or a number.",
)
_STACK = click.option(
    "--stack",
    multiple=True,
    metavar="PATTERN",
    help="Store the weights of one shape that match, such as 'layers.*.fc.weight', as one tensor where that is "
    "smaller; repeatable.",
)
_METHOD = (
    click.option(
        "--arrangement",
        default="auto",
        show_default=True,
        metavar="PATTERN",
        help="Which axes form a mode, such as 'o i h w' or 'o (i h w)'; auto chooses for each weight.",
    ),
    _STACK,
    _HEADS,
    click.option(
        "--calibration",
        type=EXISTING,
        metavar="FILE",
        help="Minimize the error of the layers' outputs, by the second moments of their inputs that "
        "flora_torch.collect_moments wrote here.",
    ),
    WEIGHTS,
    click.option(
        "--noise-floor",
        type=noise,
        default="auto",
        show_default=True,
        metavar="NOISE",
        help="Spend no rank on noise of this standard deviation per entry: auto (the rounding of the types that the "
        "checkpoints are stored in), none, or a number.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
        default="float32",
        show_default=True,
        help="The type to store cores and factors in.",
    ),
)
_TENSORS = (
    *SELECTION,
    click.option(
        "--vectors",
        type=click.Choice(["keep", "skip", "error"]),
        default="keep",
        show_default=True,
        help="Changed biases and norms: store them whole, leave them out, or refuse.",
    ),
    click.option(
        "--on-mismatch",
        type=click.Choice(["error", "skip"]),
        default="error",
        show_default=True,
        help="What to do about a tensor whose shape differs.",
    ),
    click.option(
        "--resized",
        type=click.Choice(["error", "pad", "skip"]),
        default="error",
        show_default=True,
        help="What to do about new rows, such as those of a vocabulary that grew; pad stores them whole.",
    ),
    click.option("--allow-missing", is_flag=True, help="Leave out tensors that only one checkpoint has."),
    PICKLE,
)
_WRITING = (
    click.option("-o", "--out", type=OUTPUT, help="The adapter directory to write."),
    click.option("--overwrite", is_flag=True, help="Replace an adapter directory that exists."),
    MAX_SHARD_SIZE,
    click.option("--dry-run", is_flag=True, help="Say what would be stored, and write nothing."),
    click.option("--resume", is_flag=True, help="Go on from OUT.partial, which an interrupted run left."),
)
_MACHINE = (
    MAX_MEMORY,
    click.option("--device", help="A PyTorch device to compute on, such as cuda; NumPy by default."),
    click.option("--workers", type=int, metavar="N", help="Share the tensors among N processes; none by default."),
    click.option("--executor", "address", metavar="ADDRESS", help="Or among a cluster: dask://host:port."),
)


@click.command(
    cls=SectionedCommand,
    sections={
        "out": "Output",
        "max_ratio": "Size or accuracy (one of them)",
        "arrangement": "Method",
        "include": "Tensors",
        "max_memory": "Machine",
        "plot": "Report",
        "wanted": "Other options",
    },
    epilog=examples(
        "flora-tensor extract base/ tuned/ -o adapter",
        "flora-tensor extract base.safetensors tuned.safetensors -o adapter --rtol 0.1 --html report.html",
        "flora-tensor extract base/ tuned/ -o adapter --max-bytes 50MB --dtype bfloat16 --include '*attn*'",
        "flora-tensor extract base/ tuned/ -o adapter --stack 'layers.*.attn.q_proj.weight'",
        "flora-tensor extract base/ tuned/ --dry-run",
    ),
)
@click.argument("base", type=EXISTING)
@click.argument("tuned", type=EXISTING)
@with_options(
    _WRITING,
    _BUDGET,
    _METHOD,
    _TENSORS,
    _MACHINE,
    picture("what budgets buy, and of the ranks"),
    PAGE,
    PROGRESS,
    COMMON,
)
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
    """Turn the difference of two checkpoints into an adapter.

    BASE and TUNED are checkpoints of one model, before and after its fine-tuning. Every changed weight becomes a Tucker
    tensor; the budget is spread so that the error of all of them together is smallest.
    """
    from flora_tensor.extraction import extract as run

    if out is None and not dry_run:
        raise click.UsageError("missing option '-o' / '--out'; pass a directory, or --dry-run")
    show = shown_progress(base, tuned, wanted=wanted, allow_pickle=options["allow_pickle"])
    with show as progress, opened_executor(workers, address) as executor:
        ways = {"progress": progress, "executor": executor}
        report = run(base, tuned, out, arrangements=arrangement, dry_run=dry_run, **ways, **options)
    title = f"{tuned.name} − {base.name}"
    if page is not None:
        from flora_tensor.html_report import report_html

        write_page(page, report_html(report, title=title))
    if plot is not None:
        from flora_tensor.plots import plot_report, save_figure

        save_figure(plot_report(report, title=title), plot)
    click.echo(report.to_json() if as_json else report.to_table())


@click.command(
    "ranks",
    epilog=examples(
        "flora-tensor ranks base/ tuned/",
        "flora-tensor ranks base/ tuned/ --budget 1% --budget 5% --html ranks.html --plot spectra.png",
        "flora-tensor ranks base/ tuned/ --stack 'layers.*.attn.q_proj.weight'",
    ),
)
@click.argument("base", type=EXISTING)
@click.argument("tuned", type=EXISTING)
@click.option(
    "--budget",
    "budgets",
    type=share,
    metavar="SHARE",
    multiple=True,
    help="A budget to try, such as 5%, in place of a row from 0.5% to 50%; repeatable.",
)
@with_options(_STACK, _HEADS, picture("the singular values"), PAGE, MAX_MEMORY, SELECTION, PICKLE, PROGRESS, COMMON)
def ranks_command(
    base: Path,
    tuned: Path,
    budgets: tuple[float, ...],
    page: Path | None,
    plot: Path | None,
    wanted: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what ranks and budgets would buy, and write no adapter.

    The spectra of every weight's change, the ranks that hold most of it, and the error that each budget would give.
    """
    from flora_tensor.rank_study import BUDGETS, study_ranks

    show = shown_progress(base, tuned, wanted=wanted, allow_pickle=options["allow_pickle"])
    with show as progress:
        study = study_ranks(base, tuned, budgets=budgets or BUDGETS, progress=progress, **options)
    if plot is not None:
        from flora_tensor.plots import plot_spectra, save_figure

        save_figure(plot_spectra(study.spectra, title=f"Singular values of {tuned.name} − {base.name}"), plot)
    if page is not None:
        from flora_tensor.html_report import study_html

        write_page(page, study_html(study, title=f"Ranks of {tuned.name} − {base.name}"))
    click.echo(study.to_json() if as_json else study.to_table())


@click.command(
    epilog=examples(
        "flora-tensor merge base/ adapter -o merged/",
        "flora-tensor merge base/ adapter -o merged/ --max-shard-size 5GB",
    )
)
@click.argument("base", type=EXISTING)
@click.argument("adapter", type=EXISTING)
@click.option(
    "-o", "--out", type=OUTPUT, required=True, help="The file to write, if it ends in .safetensors, else a directory."
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--max-shard-size", type=size, metavar="SIZE", help="The most bytes in a file; as in BASE by default.")
@with_options(VERIFY_BASE, PICKLE, PROGRESS, COMMON)
def merge(base: Path, adapter: Path, out: Path, wanted: bool | None, as_json: bool, **options: Any) -> None:
    """Add an adapter to the checkpoint it was made for."""
    from flora_tensor.merging import merge_checkpoint

    with shown_progress(base, wanted=wanted, allow_pickle=options["allow_pickle"]) as progress:
        report = merge_checkpoint(base, adapter, out, progress=progress, **options)
    click.echo(report.to_json() if as_json else report.to_table())


@click.command(
    epilog=examples("flora-tensor diff tuned/ merged/", "flora-tensor diff a.safetensors b.safetensors --json")
)
@click.argument("a", type=EXISTING)
@click.argument("b", type=EXISTING)
@with_options(PICKLE, PROGRESS, COMMON)
def diff(a: Path, b: Path, allow_pickle: bool, wanted: bool | None, as_json: bool) -> None:
    """Compare two checkpoints tensor by tensor."""
    from flora_tensor.comparison import diff_checkpoints

    with shown_progress(a, b, wanted=wanted, allow_pickle=allow_pickle) as progress:
        report = diff_checkpoints(a, b, allow_pickle=allow_pickle, progress=progress)
    click.echo(report.to_json() if as_json else report.to_table())


COMMANDS = (extract, ranks_command, merge, diff)
