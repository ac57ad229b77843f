"""``qatc evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError


def evaluate(
    model: Annotated[str, typer.Argument(help="A qatc output, or any full-precision model.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file to evaluate on.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Corpus to evaluate on.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Full-precision model, for KL and agreement.", show_default=False),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Round a full-precision model to these bits.", show_default=False),
    ] = None,
    head_bits: options.HeadBits = None,
    embedding_bits: options.EmbeddingBits = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, at most.")] = 65_536,
    batch_size: options.Rows = 8,
    device: options.Device = "auto",
    compile: options.Compile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure perplexity and, against a teacher, KL divergence and top-1 agreement.

    [bold]Examples[/]

      qatc evaluate Llama-2-7b-4-8-4 --text wiki.txt --teacher meta-llama/Llama-2-7b-hf

      qatc evaluate ./my-model --bits 4-8-4 --text wiki.txt --teacher ./my-model
    """
    from qatc.cli import terminal

    with readable_errors():
        recipe = None
        if bits is not None:
            recipe = options.build_recipe(
                bits, None, head_bits=head_bits, embedding_bits=embedding_bits
            )
        elif head_bits is not None or embedding_bits is not None:
            raise ConfigError("--head-bits and --embedding-bits need --bits beside them")
        terminal.quiet_libraries()
        from qatc.evaluation.evaluate import AssessConfig, assess

        config = AssessConfig(
            model=model,
            text=text,
            data=data,
            teacher=teacher,
            recipe=recipe,
            length=length,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=device,
            compile=compile,
            trust_remote_code=trust_remote_code,
        )
        with terminal.RunDisplay().live() as display:
            metrics = assess(config, display)
    if json:
        terminal.print_json(metrics.to_dict())
        return
    rows = [["figure", "value"], ["perplexity", f"{metrics.perplexity:.4g}"]]
    if metrics.kl is not None and metrics.top1_agreement is not None:
        rows += [["KL to teacher", f"{metrics.kl:.4f}"]]
        rows += [["top-1 agreement", f"{metrics.top1_agreement:.1%}"]]
    terminal.print_table([*rows, ["scored tokens", f"{metrics.tokens:,}"]])
