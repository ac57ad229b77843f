"""``qatc inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError

if TYPE_CHECKING:
    from qatc.report.plan import Plan, Site


def inspect(
    output: Annotated[
        Path | None,
        typer.Argument(help="A qatc output, for --kernels.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hub name or directory of the model.", show_default=False),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="What runs every linear of an output, and its memory.")
    ] = False,
    bits: options.Bits = None,
    recipe: options.RecipeFile = None,
    group_size: options.GroupSize = None,
    kv_site: options.KVSite = None,
    skip: options.Skip = None,
    target: options.Target = None,
    head_bits: options.HeadBits = None,
    embedding_bits: options.EmbeddingBits = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Show what would be quantized, what is skipped and why, and the size. Loads no weights.

    [bold]Examples[/]

      qatc inspect --model meta-llama/Llama-2-7b-hf --bits 4-8-4

      qatc inspect Llama-2-7b-4-8-4 --kernels
    """
    from qatc.cli import terminal

    with readable_errors():
        if kernels:
            if output is None:
                raise ConfigError("--kernels is about an output: qatc inspect OUTPUT --kernels")
            terminal.quiet_libraries()
            _render_kernels(output, json, trust_remote_code)
            return
        if model is None:
            raise ConfigError("say what to inspect: --model MODEL, or OUTPUT --kernels")
        chosen = options.build_recipe(
            bits, recipe, group_size, kv_site, skip, target, head_bits, embedding_bits
        )
        terminal.quiet_libraries()
        from qatc.report.plan import inspect_model

        plan = inspect_model(model, chosen, trust_remote_code=trust_remote_code)
    if json:
        terminal.print_json(plan.to_dict())
        return
    _render(plan)


def _render_kernels(output: Path, json: bool, trust_remote_code: bool) -> None:
    from dataclasses import asdict

    from qatc.cli import terminal
    from qatc.report.tables import kernel_rows, memory_rows
    from qatc.report.usage import decoding_report, kernel_report, memory
    from qatc.runtime.model import load

    loaded = load(output, compile=False, trust_remote_code=trust_remote_code)
    terminal.warn_unverified(output)
    uses, held, decoding = kernel_report(loaded), memory(loaded), decoding_report(loaded)
    if json:
        kernels = [asdict(use) for use in uses]
        terminal.print_json({"kernels": kernels, "decoding": decoding, "memory": asdict(held)})
        return
    terminal.print_table(kernel_rows(uses))
    terminal.print_table([["a single row is decoded by"], [decoding]])
    terminal.print_table(memory_rows(held))


def _render(plan: Plan) -> None:
    from qatc.cli import terminal

    for kind in plan.kinds:
        rows = [["site", "of", "shape", "bits", "scales"]]
        for site in kind.sites:
            scales = f"per {site.group_size} values" if site.group_size else _row(site)
            shape = " x ".join(map(str, site.shape))
            rows.append([site.kind, site.where, shape, str(site.bits), scales])
        first, last = kind.layers[0], kind.layers[-1]
        title = f"{len(kind.layers)} x {kind.name}: {first}{'' if first == last else f' to {last}'}"
        terminal.print_table(rows, title)
        passes = [["pass", "options", "matched", "edited"]]
        for record in kind.passes:
            options_text = ", ".join(f"{k}={v}" for k, v in _flat(record["options"]).items())
            passes.append(
                [record["name"], options_text, str(record["matched"]), str(record["edited"])]
            )
        terminal.print_table(passes, "passes")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        reasons.setdefault(reason, []).append(name)
    skipped = [["in full precision because", "parameters", "for example"]]
    skipped += [[reason, str(len(names)), names[0]] for reason, names in reasons.items()]
    terminal.print_table(skipped)
    terminal.out.print(f"quantized linears train {plan.training}", highlight=False)
    before, after = plan.operations
    terminal.print_table(
        [
            ["estimate", "full precision", plan.bits, "ratio"],
            _line("checkpoint, GB", *plan.size_gb),
            _line("of it head and embedding, GB", *plan.ends_gb),
            _line("KV cache, bytes per token", *plan.kv_bytes_per_token),
            _line("OPs = MACs x W bits x A bits at length 2048, 1e12", before / 1e12, after / 1e12),
        ]
    )


def _row(site: Site) -> str:
    """What one scale is for, where there are no groups."""
    if site.kind == "weight":
        return "per output channel"
    if site.kind == "embedding":
        return "per row of the table"
    return "per token and head" if len(site.shape) == 4 else "per token"


def _line(name: str, before: float, after: float) -> list[str]:
    return [name, f"{before:,.4g}", f"{after:,.4g}", f"{after / before:.3f}"]


def _flat(options: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in options.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if value not in (None, (), [])}
