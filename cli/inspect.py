"""``qatc inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError
from qatc.report.kinds import Kind, kind_of

if TYPE_CHECKING:
    from qatc.recipe import Recipe
    from qatc.report.plan import Plan, Quantizer


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|OUTPUT|CORPUS",
            help="Directory or hub name of a model, an output of qatc quantize, or a corpus.",
            show_default=False,
        ),
    ],
    kernels: Annotated[
        bool, typer.Option("--kernels", help="What runs every linear of an output, and its memory.")
    ] = False,
    prefer: Annotated[
        str, typer.Option(help="With --kernels: as they are with --kernels auto, torchao or qatc.")
    ] = "auto",
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="What each part of a model costs alone: W, A, K, V, each layer, each kind of"
            " linear. Loads the model.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --sensitivity: a corpus to measure on. Default: a few sequences that the"
            " model writes.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="With --sensitivity: rows to measure on. Default: about 1,024 tokens.",
            show_default=False,
        ),
    ] = None,
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
    """Show what a model, an output or a corpus is.

    Loads no weights, but for --kernels and --sensitivity.

    Of a model: what would be quantized, what is skipped and why, and the size. Of an output: its
    recipe, what is stored, and its figures. Of a corpus: how it was made, and whether it is whole.

    [bold]Examples[/]

      qatc inspect meta-llama/Llama-2-7b-hf --bits 4-8-4

      qatc inspect meta-llama/Llama-2-7b-hf --bits 4-8-4 --sensitivity

      qatc inspect Llama-2-7b-4-8-4

      qatc inspect Llama-2-7b-4-8-4 --kernels

      qatc inspect Llama-2-7b-4-8-4.data
    """
    from qatc.cli import terminal

    with readable_errors():
        asked: dict[str, Any] = {"bits": bits, "recipe": recipe, "group_size": group_size}
        asked |= {"kv_site": kv_site, "skip": skip, "target": target}
        asked |= {"head_bits": head_bits, "embedding_bits": embedding_bits}
        measuring = {"sensitivity": sensitivity, "data": data, "rows": rows}
        kind = kind_of(what)
        _refuse_idle(what, kind, options.spelled(asked | measuring), kernels)
        if idle := options.spelled({"data": data, "rows": rows}) if not sensitivity else []:
            raise ConfigError(f"{', '.join(idle)} is about sensitivity; give --sensitivity as well")
        if prefer != "auto" and not kernels:
            raise ConfigError("--prefer is about kernels; give --kernels as well")
        if kind is Kind.MODEL:
            chosen = options.build_recipe(**asked)
        terminal.quiet_libraries()
        if kind is Kind.CORPUS:
            _render_corpus(Path(what), json)
        elif kind is Kind.OUTPUT and kernels:
            _render_kernels(Path(what), json, trust_remote_code, prefer)
        elif kind is Kind.OUTPUT:
            _render_output(Path(what), json)
        elif sensitivity:
            _render_sensitivity(what, chosen, data, rows, json, trust_remote_code)
        else:
            from qatc.report.plan import inspect_model

            plan = inspect_model(what, chosen, trust_remote_code=trust_remote_code)
            if json:
                terminal.print_json(plan.to_dict())
            else:
                _render(plan)


def _refuse_idle(what: str, kind: Kind, asked: list[str], kernels: bool) -> None:
    """Raise ``ConfigError`` for options that say nothing of what there is."""
    if kernels and kind is Kind.MODEL and not Path(what).exists():
        raise ConfigError(f"--kernels is about an output, and there is no directory {what} here")
    if kernels and kind is Kind.MODEL:
        raise ConfigError(
            f"--kernels is about an output, and {what} is a model in full precision; leave it out,"
            f" or make one: qatc quantize --model {what}"
        )
    if kernels and kind is Kind.CORPUS:
        raise ConfigError(f"--kernels is about an output, and {what} is a corpus; leave it out")
    if asked and kind is not Kind.MODEL:
        is_what = {Kind.OUTPUT: "an output, quantized already", Kind.CORPUS: "a corpus"}[kind]
        raise ConfigError(
            f"{what} is {is_what}; leave out {', '.join(asked)}, or inspect a model in full"
            " precision"
        )


def _render_corpus(path: Path, json: bool) -> None:
    from qatc.cli import terminal
    from qatc.report.contents import corpus_contents
    from qatc.report.tables import corpus_rows

    found = corpus_contents(path)
    if json:
        terminal.print_json(found.to_dict())
        return
    terminal.print_table(corpus_rows(found))


def _render_output(path: Path, json: bool) -> None:
    from qatc.cli import terminal
    from qatc.output.model_card import stored_rows
    from qatc.report.contents import output_contents
    from qatc.report.tables import figure_rows, output_rows

    found = output_contents(path)
    if json:
        terminal.print_json(found.to_dict())
        return
    terminal.print_table(output_rows(found))
    terminal.print_table(stored_rows(found.stored))
    if found.figures:
        terminal.print_table(figure_rows(found.figures))
    terminal.note(f"what runs it, and the memory: qatc inspect {path} --kernels")


def _render_kernels(output: Path, json: bool, trust_remote_code: bool, prefer: str) -> None:
    from dataclasses import asdict

    from qatc.cli import terminal
    from qatc.report.tables import kernel_rows, memory_rows
    from qatc.report.usage import decoding_report, kernel_report, memory
    from qatc.runtime.model import load

    loaded = load(
        output,
        compile=False,
        trust_remote_code=trust_remote_code,
        kernels=prefer,  # type: ignore[arg-type]  # checked there
    )
    terminal.warn_unverified(output)
    uses, held, decoding = kernel_report(loaded), memory(loaded), decoding_report(loaded)
    if json:
        kernels = [asdict(use) for use in uses]
        terminal.print_json({"kernels": kernels, "decoding": decoding, "memory": asdict(held)})
        return
    terminal.print_table(kernel_rows(uses))
    terminal.print_table([["a single row is decoded by"], [decoding]])
    terminal.print_table(memory_rows(held))


def _render_sensitivity(
    model: str,
    recipe: Recipe,
    data: Path | None,
    rows: int | None,
    json: bool,
    trust_remote_code: bool,
) -> None:
    from qatc.cli import terminal
    from qatc.report.tables import sensitivity_rows
    from qatc.sensitivity import inspect_sensitivity

    found = inspect_sensitivity(
        model, recipe, data=data, rows=rows, trust_remote_code=trust_remote_code
    )
    if json:
        terminal.print_json(found.to_dict())
        return
    for table in sensitivity_rows(found, recipe):
        terminal.print_table(table)
    terminal.out.print(
        f"KL to full precision in nats per token, on {found.tokens:,} tokens, without training",
        highlight=False,
    )


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
            _line("bits of a layer's quantized weight", 16, plan.weight_bits),
            _line("checkpoint, GB", *plan.size_gb),
            _line("of it head and embedding, GB", *plan.ends_gb),
            _line("KV cache, bytes per token", *plan.kv_bytes_per_token),
            _line("OPs = MACs x W bits x A bits at length 2048, 1e12", before / 1e12, after / 1e12),
        ]
    )


def _row(site: Quantizer) -> str:
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
        if not isinstance(value, dict):
            flat[key] = value
            continue
        prefix = "" if key == "spec" else f"{key}."  # there may be another spec beside it
        flat |= {f"{prefix}{name}": own for name, own in value.items()}
    return {key: value for key, value in flat.items() if value not in (None, (), [])}
