"""``qatc export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors


def export(
    source: options.Output,
    output: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    format: Annotated[
        str, typer.Option(help="compressed-tensors, torchao or gguf.")
    ] = "compressed-tensors",
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Write a quantized model in the format of another runtime, once it is verified.

    [bold]Example[/]

      qatc export Llama-2-7b-4-8-4 --format compressed-tensors --output for-transformers
      qatc export Llama-2-7b-4-8-4 --format torchao --output for-torchao
      qatc export Llama-2-7b-4-8-4 --format gguf --output for-llama-cpp
    """
    from qatc.cli import terminal

    with readable_errors("interrupted; nothing was written"):
        terminal.quiet_libraries()
        from qatc.errors import PassError
        from qatc.evaluation.parity import verify
        from qatc.export import FORMATS
        from qatc.export import export as run
        from qatc.output import Output

        notes: list[str] = []
        opened: list[Output] = []

        def check(output: Output) -> None:
            opened.append(output)
            notes.extend(FORMATS[format].notes(output))  # refuses before what takes time
            try:
                verify(output).require(str(source))
            except PassError as error:
                terminal.err.print(f"not verified, as it does not run on integers: {error}")

        written = run(
            source,
            output,
            format=format,
            overwrite=overwrite,
            verify=check,
            trust_remote_code=trust_remote_code,
        )
        for note in notes:
            terminal.note(note)
        commands = list(FORMATS[format].commands(opened[0], written))
    if json:
        terminal.print_json({"output": str(written), "format": format, "commands": commands})
        return
    terminal.out.print(f"{written}: {format}", highlight=False)
    for command in commands:
        terminal.out.print(command, highlight=False, markup=False, soft_wrap=True)
