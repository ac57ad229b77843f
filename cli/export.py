"""``qatc export`` and ``qatc push``."""

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
        str,
        typer.Option(
            help="compressed-tensors, torchao, vllm, vllm-marlin, gguf, pt2, aoti or executorch."
        ),
    ] = "compressed-tensors",
    overwrite: options.Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the integer model with the trained one first, as qatc verify does.",
        ),
    ] = True,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Write a quantized model in the format of another runtime, once it is verified.

    [bold]Example[/]

      qatc export Llama-2-7b-4-8-4 --format compressed-tensors --output for-transformers
      qatc export Llama-2-7b-4-8-4 --format torchao --output for-torchao
      qatc export Llama-2-7b-4-8-4 --format vllm --output for-vllm
      qatc export Llama-2-7b-4-8-4 --format gguf --output for-llama-cpp
      qatc export Llama-2-7b-4-8-4 --format pt2 --output for-pytorch
      qatc export Llama-2-7b-4-8-4 --format executorch --output for-executorch
    """
    from qatc.cli import terminal

    with readable_errors("interrupted; nothing was written"):
        terminal.quiet_libraries()
        from qatc.errors import PassError
        from qatc.evaluation.parity import verify as compare
        from qatc.export import FORMATS
        from qatc.export import export as run
        from qatc.output import Output

        notes: list[str] = []
        opened: list[Output] = []

        def check(output: Output) -> None:
            opened.append(output)
            notes.extend(FORMATS[format].notes(output))  # refuses before what takes time
            if not verify:
                terminal.note("not verified, as --no-verify asks")
                return
            display.stage(f"Verifying {source}, for some minutes; --no-verify spares it")
            try:
                compare(output).require(str(source))
            except PassError as error:
                terminal.err.print(f"not verified, as it does not run on integers: {error}")

        with terminal.RunDisplay().live() as display:
            written = run(
                source,
                output,
                format=format,
                overwrite=overwrite,
                verify=check,
                trust_remote_code=trust_remote_code,
                observer=display,
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


def push(
    source: options.Output,
    repo: Annotated[str, typer.Option(help="Where to: OWNER/NAME on the hub.", show_default=False)],
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub name of the model that it was made from, where that was a directory.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to.", show_default=False)
    ] = None,
    new_card: Annotated[
        bool,
        typer.Option("--new-card", help="Upload the card that follows from the files, not mine."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded; needs no network.")
    ] = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Publish a quantized model on the Hugging Face hub, in one commit.

    [bold]Example[/]

      qatc push Llama-2-7b-4-8-4 --repo me/Llama-2-7b-4-8-4 --dry-run
      qatc push Llama-2-7b-4-8-4 --repo me/Llama-2-7b-4-8-4
    """
    from qatc.cli import terminal

    with readable_errors("interrupted; nothing was published"):
        terminal.quiet_libraries()
        from qatc.export.hub import plan_push
        from qatc.export.hub import push as upload

        planned = plan_push(
            source,
            repo,
            base_model=base_model,
            new_card=new_card,
            trust_remote_code=trust_remote_code,
        )
        for note in planned.notes:
            terminal.note(note)
        address = None
        if not dry_run:
            address = upload(planned, private=private, overwrite=overwrite, revision=revision)
    sizes = planned.sizes
    if json:
        terminal.print_json({"repo": repo, "published": address, "files": sizes})
        return
    for name, size in sizes.items():
        terminal.out.print(f"{size:>15,}  {name}", highlight=False)
    total = f"{sum(sizes.values()):,} bytes in {len(sizes)} files"
    done = f"would be published as {repo}" if address is None else f"published: {address}"
    terminal.out.print(f"{total}, {done}", highlight=False)
