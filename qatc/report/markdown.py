"""The report that is written beside a quantized model: figures, settings, and the loss curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatc.data.config import CHAT
from qatc.data.corpus import TEXT
from qatc.evaluation.checks import Check
from qatc.evaluation.metrics import Metrics
from qatc.recipe.recipe import Recipe
from qatc.report.tables import (
    check_rows,
    corpus_text,
    figure_rows,
    kernel_rows,
    memory_rows,
    recipe_rows,
)
from qatc.report.usage import KernelUse, Memory
from qatc.training.blockwise import LayerMetrics
from qatc.training.config import StepMetrics

LOSS_PLOT = "loss.png"


def write_report(
    directory: Path,
    metadata: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Metrics]],
    history: Sequence[StepMetrics],
    layers: Sequence[LayerMetrics] = (),
) -> None:
    """Write ``report.md`` and the loss plot into ``directory``.

    Args:
        directory: of the output.
        metadata: what ``qatc.json`` says.
        figures: text name -> model name -> metrics.
        history: every step end to end.
        layers: every step of a single layer.
    """
    recipe, data = metadata["run"]["recipe"], metadata["data"]
    bits = Recipe.from_dict(recipe).bits
    sections = [
        f"# {metadata['model']} at {bits}",
        "Bits are those of weights, activations and KV cache. RTN is the same model rounded to"
        f" these bits without training; {_written(figures)} is the model in this directory,"
        " evaluated with the weights that are stored. Recovery is (RTN - model) / (RTN - full"
        " precision).",
        _table(figure_rows(figures)),
        _held_out(data["strategy"]),
        *(_training_sections(metadata, history, layers) if history or layers else []),
        *_depth_sections(metadata.get("divergence_by_layer", [])),
        *_runtime_sections(metadata),
        "## Recipe and provenance",
        _table(
            [
                *recipe_rows(recipe, "`"),
                *_budget_rows(metadata.get("budget")),
                ["corpus", f"`{data['fingerprint'][:16]}`, {corpus_text(data)}"],
                *([name, version] for name, version in metadata["versions"].items()),
            ]
        ),
    ]
    text = "\n\n".join(sections) + "\n"
    # A path in it may hold bytes that are no text.
    (directory / "report.md").write_bytes(text.encode("utf-8", errors="backslashreplace"))
    if history:
        _plot(directory / LOSS_PLOT, history)


def _held_out(strategy: str) -> str:
    """What the figures of the end of the corpus are measured on."""
    if strategy == TEXT:
        return "The text `held out` is the end of the corpus, which was not trained on."
    if strategy == CHAT:
        return (
            "Figures on `generated` are those of the answers in held-out conversations which the"
            " full-precision model wrote itself."
        )
    return (
        "Perplexity on `generated` is that of held-out sequences which the full-precision model"
        " wrote itself."
    )


def _budget_rows(budget: Mapping[str, Any] | None) -> list[list[str]]:
    """What was chosen for a budget of bits, if there was one."""
    if budget is None:
        return []
    chosen = f"{budget['average']:.4g} bits, chosen for a budget of {budget['budget']:g}"
    return [["weights on average", chosen]]


def _written(figures: Mapping[str, Mapping[str, Metrics]]) -> str:
    """What the figures call the model that was written."""
    return [*next(iter(figures.values()))][-1]


def _training_sections(
    metadata: Mapping[str, Any], history: Sequence[StepMetrics], layers: Sequence[LayerMetrics]
) -> list[str]:
    tokens = sum(step.tokens for step in layers) + sum(step.tokens for step in history)
    seconds = max(metadata["training_seconds"], 1e-9)
    how = metadata["run"]["training"]
    stages = f"{len(history)} steps{_only(how)}, " if history else "In all "
    lowered = f" loss `{how['loss']}`{_loss_on(metadata)}," if history else ""
    return [
        "## Training",
        *([f"![KL divergence and loss by step]({LOSS_PLOT})"] if history else []),
        *([_layers_trained(layers, bool(history))] if layers else []),
        f"{stages}{tokens:,} tokens in {seconds:.0f} s"
        f" ({tokens / seconds:,.0f} tokens/s) on {metadata['device']}, computing in"
        f" {metadata['compute_dtype']}, quantized linears"
        f" {'on int8 codes' if metadata['integer_forward'] else 'in float'};{lowered}"
        f" peak learning rate {metadata['learning_rate']:.3g};"
        f" {metadata['row_utilization']:.1%} of the training tokens were no padding.",
    ]


def _only(how: Mapping[str, Any]) -> str:
    """What alone was trained, if not everything."""
    what = {"scales": "scales", "norms": "norms", "lora": f"updates of rank {how.get('lora_rank')}"}
    end_to_end = str(how.get("train")).rpartition("+")[2]
    return f" of {what[end_to_end]} alone" if end_to_end in what else ""


def _layers_trained(layers: Sequence[LayerMetrics], followed: bool) -> str:
    """How layers were trained one after the other, and what each came to."""
    ends = [
        s
        for s, after in zip(layers, (*layers[1:], None), strict=True)
        if after is None or after.layer != s.layer
    ]
    then = "First, each" if followed else "Each"
    return (
        f"{then} of {len(ends)} decoder layers was trained for {ends[0].step} steps, one after the"
        " other, to give what the teacher's gives, on what the trained layers before it give."
        " Squared error of the last step, relative to the teacher's squared norm:"
        f" {', '.join(f'{end.loss:.3g}' for end in ends)}."
    )


def _loss_on(metadata: Mapping[str, Any]) -> str:
    """Which tokens of conversations the loss counts."""
    if metadata["data"]["strategy"] != CHAT:
        return ""
    return " on all tokens" if metadata["run"].get("loss_on") == "all" else " on answers"


def _depth_sections(by_layer: Sequence[float]) -> list[str]:
    """How far it has gone from the original by the end of each layer."""
    if not by_layer:
        return []
    return [
        "## By layer",
        "KL (nats per token, on some of the held-out rows) where the layers up to one, and"
        " the token embedding, are those of the model in this directory, and what is behind them is"
        f" full precision: {', '.join(f'{kl:.3g}' for kl in by_layer)}. What training has put right"
        " in later layers, or in the head, does not show.",
    ]


def _runtime_sections(metadata: Mapping[str, Any]) -> list[str]:
    """How the model runs on integers, and how it was compared with the trained one."""
    parity = metadata.get("parity")
    if parity is None:
        return []
    if parity["passed"] is None:
        return ["## On integers", f"Not verified: {parity['reason']}"]
    checks = [
        Check(c["point"], c["what"], math.nan if c["figure"] is None else c["figure"], c["limit"])
        for c in parity["checks"]
    ]
    return [
        "## On integers",
        "`qatc.load` and `qatc generate` run this directory on packed integers. Before it was"
        " called complete, that model was compared with the trained graph:",
        _table(check_rows(checks)),
        _table(memory_rows(Memory(**metadata["memory"]))),
        _table(kernel_rows(KernelUse(**use) for use in metadata["kernels"])),
        f"A single row is decoded by {metadata['decoding']}.",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table in Markdown."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot(path: Path, history: Sequence[StepMetrics]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [record.step for record in history]
    axes.plot(steps, [record.kl for record in history], label="KL to the teacher", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    rates = [record.learning_rate for record in history]
    right.plot(steps, rates, color="tab:gray", linestyle=":", label="learning rate")
    right.set_ylabel("learning rate")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
