"""Commands that read adapters and no model: inspect, round, add, subtract, scale, convert; and the demonstration."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flora_tensor.cli.options import (
    COMMON,
    EXISTING,
    MAX_SHARD_SIZE,
    OUTPUT,
    PICKLE,
    VERIFY_BASE,
    WEIGHTS,
    budget,
    examples,
    numbers,
    with_options,
)

if TYPE_CHECKING:
    from flora_tensor.adapter import Adapter
    from flora_tensor.adapter_fit import AdapterFit

__all__ = ["COMMANDS"]

_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
_WRITING = (
    click.option("-o", "--out", type=OUTPUT, required=True, help="The adapter directory to write."),
    _OVERWRITE,
    MAX_SHARD_SIZE,
)
_BUDGET = budget("such as 5% or 0.05")
_BASE = (
    click.option("--base", type=EXISTING, help="The checkpoint they change; tensors stored whole need it."),
    VERIFY_BASE,
)


def _refuse_early(command: str, out: Path, overwrite: bool) -> None:
    """Refuse an output that must not be replaced before the work is done, not after it."""
    from flora_tensor._files import check_target
    from flora_tensor.adapter_file import OWNED_NAMES

    check_target(command, out, overwrite=overwrite, owned=OWNED_NAMES)


def _save(fit: "AdapterFit", out: Path, overwrite: bool, max_shard_size: int | None, as_json: bool) -> None:
    from flora_tensor.adapter_file import save_adapter

    save_adapter(out, fit.adapter, max_shard_size=max_shard_size, overwrite=overwrite)
    click.echo(fit.to_json() if as_json else fit.to_table())


def _show(adapter: "Adapter", as_json: bool) -> None:
    from flora_tensor.report import adapter_table, describe_adapter

    text = json.dumps(describe_adapter(adapter), indent=2, ensure_ascii=False) if as_json else adapter_table(adapter)
    click.echo(text)


@click.command(epilog=examples("flora-tensor inspect adapter", "flora-tensor inspect adapter --json"))
@click.argument("adapter", type=EXISTING)
@with_options(COMMON)
def inspect(adapter: Path, as_json: bool) -> None:
    """Show what an adapter holds, all of it checked."""
    from flora_tensor.adapter_file import load_adapter

    _show(load_adapter(adapter), as_json)


@click.command(
    "round",
    epilog=examples(
        "flora-tensor round adapter -o smaller --max-bytes 20MB",
        "flora-tensor round adapter -o smaller --rtol 0.05",
    ),
)
@click.argument("adapter", type=EXISTING)
@with_options(_WRITING, _BUDGET, WEIGHTS, COMMON)
def round_command(
    adapter: Path, out: Path, overwrite: bool, max_shard_size: int | None, as_json: bool, **budget: Any
) -> None:
    """Lower an adapter's ranks to a budget or a tolerance."""
    from flora_tensor.adapter_algebra import round_adapter

    _refuse_early("round", out, overwrite)
    _save(round_adapter(adapter, **budget), out, overwrite, max_shard_size, as_json)


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


@click.command(
    cls=_WithNumbers,
    epilog=examples(
        "flora-tensor add style subject -o both --weights .7 .3",
        "flora-tensor add one two three -o sum --max-ratio 5%",
    ),
)
@click.argument("adapters", type=EXISTING, nargs=-1, required=True)
@click.option("--weights", type=numbers, metavar="W1 W2 …", help="A number for each adapter; 1 by default.")
@with_options(_WRITING, _BUDGET, _BASE, COMMON)
def add(
    adapters: tuple[Path, ...], out: Path, overwrite: bool, max_shard_size: int | None, as_json: bool, **options: Any
) -> None:
    """Add adapters of one base, exactly.

    The sum is rounded if a budget or a tolerance is given.
    """
    from flora_tensor.adapter_algebra import add_adapters

    _refuse_early("add", out, overwrite)
    _save(add_adapters(adapters, **options), out, overwrite, max_shard_size, as_json)


@click.command(epilog=examples("flora-tensor subtract both style -o rest"))
@click.argument("a", type=EXISTING)
@click.argument("b", type=EXISTING)
@with_options(_WRITING, _BASE, COMMON)
def subtract(
    a: Path, b: Path, out: Path, overwrite: bool, max_shard_size: int | None, as_json: bool, **options: Any
) -> None:
    """Subtract adapter B from adapter A, exactly."""
    from flora_tensor.adapter_algebra import subtract_adapters

    _refuse_early("subtract", out, overwrite)
    _save(subtract_adapters(a, b, **options), out, overwrite, max_shard_size, as_json)


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples("flora-tensor scale adapter 0.5 -o half", "flora-tensor scale adapter -1 -o undo"),
)
@click.argument("adapter", type=EXISTING)
@click.argument("factor", type=float)
@with_options(_WRITING, _BASE, COMMON)
def scale(
    adapter: Path,
    factor: float,
    out: Path,
    overwrite: bool,
    max_shard_size: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Multiply an adapter by a number.

    Its cores and factors keep their bits.
    """
    from flora_tensor.adapter_algebra import scale_adapter
    from flora_tensor.adapter_file import save_adapter

    _refuse_early("scale", out, overwrite)
    scaled = scale_adapter(adapter, factor, **options)
    save_adapter(out, scaled, max_shard_size=max_shard_size, overwrite=overwrite)
    _show(scaled, as_json)


@click.command(
    epilog=examples(
        "flora-tensor convert lora_directory adapter --to flora",
        "flora-tensor convert adapter lora_directory --to peft-lora",
        "flora-tensor convert style.safetensors adapter --to flora --base unet.safetensors",
    )
)
@click.argument("source", type=EXISTING)
@click.argument("out", type=OUTPUT, required=False)
@click.option("-o", "--out", "named", type=OUTPUT, help="Where to write, in place of OUT.")
@click.option(
    "--to",
    "target",
    type=click.Choice(["flora", "peft-lora", "diffusers", "lycoris", "kohya"]),
    required=True,
    help="The format to write; that of SOURCE is recognized.",
)
@click.option("--base", type=EXISTING, help="The checkpoint of the model or pipeline; LyCORIS and kohya files need it.")
@click.option("--scale", type=float, help="The multiplier of an official FLoRA, whose file does not hold it.")
@click.option("--prefix", help="What names in the other format begin with, such as lora_unet, or unet.")
@click.option("--skip-whole", is_flag=True, help="Leave out tensors stored whole, which only flora and peft-lora hold.")
@with_options(_OVERWRITE, MAX_SHARD_SIZE, PICKLE, COMMON)
def convert(
    source: Path,
    out: Path | None,
    named: Path | None,
    target: str,
    prefix: str | None,
    skip_whole: bool,
    overwrite: bool,
    max_shard_size: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert from and to LoRA, LyCORIS and kohya, exactly.

    Reads LoRA, LoHa and LoKr of PEFT and diffusers, LyCORIS and kohya files, and those of the official FLoRA.
    """
    from flora_tensor.adapter_export import to_diffusers, to_lycoris, to_peft_lora
    from flora_tensor.adapter_file import save_adapter
    from flora_tensor.conversion import convert_adapter

    if (out is None) == (named is None):
        raise click.UsageError("pass where to write once: as OUT, or with '-o' / '--out'")
    if max_shard_size is not None and target != "flora":
        raise click.UsageError(f"--max-shard-size splits adapters of this library, not {target}; leave it out")
    out = Path(out or named or "")
    adapter = convert_adapter(source, prefix=prefix, **options)
    whole = "skip" if skip_whole else "error"
    if target == "flora":
        save_adapter(out, adapter, max_shard_size=max_shard_size, overwrite=overwrite)
    elif target == "peft-lora":
        to_peft_lora(adapter, out, overwrite=overwrite)
    elif target == "diffusers":
        to_diffusers(adapter, out, whole=whole, overwrite=overwrite)
    else:
        start = prefix or ("lycoris" if target == "lycoris" else None)
        to_lycoris(adapter, out, prefix=start, tucker=target == "lycoris", whole=whole, overwrite=overwrite)
    _show(adapter, as_json)


@click.command(epilog=examples("flora-tensor demo -o demo-output"))
@click.option(
    "-o",
    "--out",
    type=OUTPUT,
    default="demo-output",
    show_default=True,
    help="The directory for checkpoints, adapters and pictures.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the network, the data and the training.")
@with_options(COMMON)
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Go the whole way with a small network.

    It is fine-tuned; adapters are extracted, merged, compared, and trained on.
    """
    try:
        run = importlib.import_module("flora_torch.demo").run_demo
    except ModuleNotFoundError as error:
        raise ImportError(f"demo: {error.name} is not installed; pip install 'flora-tensor[demo]'") from error
    report = run(out, seed=seed, progress=lambda line: click.echo(line, err=True))
    click.echo(report.to_json() if as_json else report.to_table())


COMMANDS = (inspect, round_command, add, subtract, scale, convert, demo)
