"""The report that is written beside a quantized model: figures, settings, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatc.evaluation.metrics import Metrics, recovery
from qatc.training.distill import StepMetrics

LOSS_PLOT = "loss.png"


def figure_rows(figures: Mapping[str, Mapping[str, Metrics]]) -> list[list[str]]:
    """The result table, header first: one row for every text and model, with recovery."""
    rows = [["text", "model", "perplexity", "KL to teacher", "top-1 agreement", "recovery"]]
    for text, models in figures.items():
        for name, metrics in models.items():
            rows.append(
                [
                    text,
                    name,
                    f"{metrics.perplexity:.4g}",
                    "" if metrics.kl is None else f"{metrics.kl:.4f}",
                    "" if metrics.top1_agreement is None else f"{metrics.top1_agreement:.1%}",
                    recovery_text(models) if name == "QAT" else "",
                ]
            )
    return rows


def recovery_text(models: Mapping[str, Metrics]) -> str:
    """Recovery of perplexity and of KL, in percent, as text."""
    full, rounded, trained = (models[name] for name in ("full precision", "RTN", "QAT"))
    parts = []
    perplexity = recovery(full.perplexity, rounded.perplexity, trained.perplexity)
    if perplexity is not None:
        parts.append(f"{perplexity:.1f} %")
    if rounded.kl is not None and trained.kl is not None:
        divergence = recovery(0.0, rounded.kl, trained.kl)
        if divergence is not None:
            parts.append(f"(KL {divergence:.1f} %)")
    return " ".join(parts)


def write_report(
    directory: Path,
    metadata: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Metrics]],
    history: Sequence[StepMetrics],
) -> None:
    """Write ``report.md`` and the loss plot into ``directory``."""
    recipe = metadata["run"]["recipe"]
    bits = "-".join(str(recipe[key]["bits"]) for key in ("weights", "activations", "kv"))
    tokens = sum(record.tokens for record in history)
    seconds = max(metadata["training_seconds"], 1e-9)
    sections = [
        f"# {metadata['model']} at {bits}",
        "Bits are those of weights, activations and KV cache. RTN is the same model rounded to"
        " these bits without training; QAT is the trained model in this directory, evaluated with"
        " the weights that are stored. Recovery is (RTN - QAT) / (RTN - full precision).",
        _markdown_table(figure_rows(figures)),
        "Perplexity on `generated` is that of held-out sequences which the full-precision model"
        " wrote itself.",
        "## Training",
        f"![KL divergence and loss by step]({LOSS_PLOT})",
        f"{len(history)} steps, {tokens:,} tokens in {seconds:.0f} s"
        f" ({tokens / seconds:,.0f} tokens/s) on {metadata['device']}, computing in"
        f" {metadata['compute_dtype']}, quantized linears"
        f" {'on int8 codes' if metadata['integer_forward'] else 'in float'}; peak learning rate"
        f" {metadata['learning_rate']:.3g};"
        f" {metadata['row_utilization']:.1%} of the training tokens were no padding.",
        *_runtime_sections(metadata),
        "## Recipe and provenance",
        _markdown_table(
            [
                ["setting", "value"],
                ["weights", _spec_text(recipe["weights"], "output channel")],
                ["activations", _spec_text(recipe["activations"], "token")],
                ["KV cache", _spec_text(recipe["kv"], _KV_ROW[recipe["kv_site"]])],
                ["output head", _spec_text(recipe["head"], "token of the vocabulary")],
                ["token embedding", _spec_text(recipe["embedding"], "token of the vocabulary")],
                ["KV site", recipe["kv_site"]],
                ["in full precision", ", ".join(f"`{p}`" for p in recipe["skip"])],
                ["corpus", f"`{metadata['data']['fingerprint'][:16]}`, {_corpus_text(metadata)}"],
                *([name, version] for name, version in metadata["versions"].items()),
            ]
        ),
    ]
    text = "\n\n".join(sections) + "\n"
    # A path in it may hold bytes that are no text.
    (directory / "report.md").write_bytes(text.encode("utf-8", errors="backslashreplace"))
    _plot(directory / LOSS_PLOT, history)


def _runtime_sections(metadata: Mapping[str, Any]) -> list[str]:
    """How the model runs on integers, and how it was compared with the trained one."""
    parity = metadata.get("parity")
    if parity is None:
        return []
    if parity["passed"] is None:
        return ["## On integers", f"Not verified: {parity['reason']}"]
    memory = metadata["memory"]
    checks = [["compared", "found", "limit"]]
    checks += [
        [
            f"{c['point']}: {c['what']}",
            f"{c['figure']:.2g}",
            "reported" if c["limit"] is None else f"{c['limit']:.2g}",
        ]
        for c in parity["checks"]
    ]
    kernels = [["layer", "weight", "shape", "phase", "kernel", "not used"]]
    kernels += [
        [
            *(use["layer"], use["weight"], " x ".join(str(n) for n in use["shape"]), use["phase"]),
            use["kernel"],
            "; ".join(f"{name}: {why}" for name, why in use["passed_over"]),
        ]
        for use in metadata["kernels"]
    ]
    sizes = [["bytes", "held", "in bf16", "share"]]
    for title, held, plain in (
        ("quantized linears", memory["quantized"], memory["bf16_quantized"]),
        ("quantized head and embedding", memory["ends"], memory["bf16_ends"]),
        ("KV cache, per token", memory["cache_per_token"], memory["bf16_cache_per_token"]),
    ):
        if plain:
            sizes.append([title, f"{held:,}", f"{plain:,}", f"{held / plain:.3f}"])
    return [
        "## On integers",
        "`qatc.load` and `qatc generate` run this directory on packed integers. Before it was"
        " called complete, that model was compared with the trained graph:",
        _markdown_table(checks),
        _markdown_table(sizes),
        _markdown_table(kernels),
        f"A single row is decoded by {metadata['decoding']}.",
    ]


def _corpus_text(metadata: Mapping[str, Any]) -> str:
    data = metadata["data"]
    return (
        f"{data['sequences']} sequences of at most {data['max_length']} tokens written by"
        f" {data['model']} (strategy {data['strategy']}, seed {data['seed']})"
    )


_KV_ROW = {"cache": "token and head", "projection": "token"}


def _spec_text(spec: Mapping[str, Any], row: str) -> str:
    if spec["bits"] == 16:
        return "not quantized"
    group = f"{spec['group_size']} values" if spec["group_size"] else row
    return f"{spec['bits']} bits, one scale per {group}, {spec['range']} range"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
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
