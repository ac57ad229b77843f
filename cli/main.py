"""``qatc``: one command for each use. Torch is imported only by the command that needs it."""

from __future__ import annotations

import typer

import qatc
from qatc.cli.compare import compare
from qatc.cli.estimate import estimate
from qatc.cli.evaluate import evaluate, verify
from qatc.cli.export import export, push
from qatc.cli.generate import generate
from qatc.cli.generate_data import generate_data
from qatc.cli.inspect import inspect
from qatc.cli.quantize import quantize
from qatc.cli.terminal import prepare_streams

app = typer.Typer(
    name="qatc",
    help="Quantize language models to integers by data-free quantization-aware training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize)
app.command("generate-data")(generate_data)
app.command("inspect")(inspect)
app.command("estimate")(estimate)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("verify")(verify)
app.command("export")(export)
app.command("push")(push)


@app.callback(invoke_without_command=True)
def top(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Quantize language models to integers by data-free quantization-aware training."""
    prepare_streams()
    if version:
        typer.echo(f"qatc {qatc.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the ``qatc`` script."""
    prepare_streams()  # for --help, which runs no command
    app()
