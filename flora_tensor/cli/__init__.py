"""The command line: `flora-tensor` and `python -m flora_tensor`.

Thin: each command calls one function of the library and shows what it returns. Tables and JSON go to stdout,
progress and errors to stderr; `flora_tensor.cli.running` has the exit codes.
"""

import click

from flora_tensor._version import __version__
from flora_tensor.cli import adapter_commands, checkpoint_commands
from flora_tensor.cli.options import examples
from flora_tensor.cli.running import Commands

__all__ = ["main"]


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "flora-tensor extract base/ tuned/ -o adapter --max-ratio 5%",
        "flora-tensor merge base/ adapter -o merged/",
        "flora-tensor extract --help",
        'eval "$(_FLORA_TENSOR_COMPLETE=bash_source flora-tensor)"   # completion; also zsh_source, fish_source',
    ),
)
@click.version_option(__version__, prog_name="flora-tensor")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Low-rank tensor adapters from checkpoints: extract, merge, inspect, compare.

    A checkpoint is a .safetensors file, a *.safetensors.index.json file, or a directory that holds one of them. An
    adapter is a directory with adapter_config.json and adapter_model.safetensors.

    Exit codes: 0 done, 2 a wrong argument, 3 bad input, 4 a file that cannot be read or written, 5 not enough memory or
    a package that is missing, 130 or 143 interrupted.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (*checkpoint_commands.COMMANDS, *adapter_commands.COMMANDS):
    main.add_command(command)
