"""Results as rows of text, header first, for the report and the command line to draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qatc.data.config import CHAT
from qatc.data.corpus import TEXT
from qatc.evaluation.checks import Check
from qatc.evaluation.evaluate import TaskComparison
from qatc.evaluation.metrics import Metrics, recovery
from qatc.evaluation.scores import Pairing, TaskScore
from qatc.recipe.recipe import Recipe
from qatc.recipe.weight_bits import describe
from qatc.report.contents import CorpusContents, OutputContents
from qatc.report.usage import KernelUse, Memory
from qatc.sensitivity.overview import Sensitivity

Rows = list[list[str]]


def figure_rows(figures: Mapping[str, Mapping[str, Metrics]]) -> Rows:
    """One row for every text and model, with recovery."""
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
                    "" if name in ("full precision", "RTN") else recovery_text(models, name),
                ]
            )
    return rows


def recovery_text(models: Mapping[str, Metrics], name: str = "QAT") -> str:
    """Recovery of perplexity and of KL by the model ``name``, in percent, as text."""
    full, rounded, trained = (models[name] for name in ("full precision", "RTN", name))
    parts = []
    perplexity = recovery(full.perplexity, rounded.perplexity, trained.perplexity)
    if perplexity is not None:
        parts.append(f"{perplexity:.1f} %")
    if rounded.kl is not None and trained.kl is not None:
        divergence = recovery(0.0, rounded.kl, trained.kl)
        if divergence is not None:
            parts.append(f"(KL {divergence:.1f} %)")
    return " ".join(parts)


def check_rows(checks: Iterable[Check]) -> Rows:
    """What the parity gate compared."""
    rows = [["compared", "found", "limit"]]
    for check in checks:
        limit = "reported" if check.limit is None else f"{check.limit:.2g}"
        rows.append([f"{check.point}: {check.what}", f"{check.figure:.2g}", limit])
    return rows


def memory_rows(held: Memory) -> Rows:
    """What a loaded model holds, beside what it would hold in bf16."""
    rows = [["bytes", "held", "in bf16", "share"]]
    for share in held.shares():
        rows.append([share.part, f"{share.held:,}", f"{share.bf16:,}", f"{share.ratio:.3f}"])
    return rows


def kernel_rows(uses: Iterable[KernelUse]) -> Rows:
    """What runs every linear, and why no kernel before it does."""
    rows = [["layer", "weight", "shape", "phase", "kernel", "not used"]]
    for use in uses:
        shape = " x ".join(map(str, use.shape))
        passed_over = "; ".join(f"{name}: {why}" for name, why in use.passed_over)
        rows.append([use.layer, use.weight, shape, use.phase, use.kernel, passed_over])
    return rows


def recipe_rows(recipe: Mapping[str, Any], code: str = "") -> Rows:
    """What a recipe, as plain data, quantizes and how.

    Args:
        recipe: as :meth:`qatc.recipe.recipe.Recipe.to_dict` gives it.
        code: what to put around names, such as the backtick of Markdown.
    """
    rotated = recipe.get("rotate_inputs", ())
    kv_row = {"cache": "token and head", "projection": "token"}[recipe["kv_site"]]
    others = describe(recipe.get("weight_bits", {}).items(), code)
    value_bits = recipe.get("value_bits")
    return [
        ["setting", "value"],
        ["weights", _spec_text(recipe["weights"], "output channel")],
        *([["weights of other bits", others]] if others else []),
        ["activations", _spec_text(recipe["activations"], "token")],
        ["KV cache", _spec_text(recipe["kv"], kv_row)],
        *([["values in it", f"{value_bits} bits"]] if value_bits else []),
        ["output head", _spec_text(recipe["head"], "token of the vocabulary")],
        ["token embedding", _spec_text(recipe["embedding"], "token of the vocabulary")],
        ["KV site", recipe["kv_site"]],
        *([["keys", "centered"]] if recipe.get("center_keys") else []),
        *([["queries and keys", "rotated"]] if recipe.get("rotate_keys") else []),
        *([["rotated inputs of", _names(rotated, code)]] if rotated else []),
        ["in full precision", _names(recipe["skip"], code)],
    ]


def _names(patterns: Iterable[str], code: str) -> str:
    return ", ".join(f"{code}{pattern}{code}" for pattern in patterns)


def _spec_text(spec: Mapping[str, Any], row: str) -> str:
    if spec["bits"] == 16:
        return "not quantized"
    group = f"{spec['group_size']} values" if spec["group_size"] else row
    learned = ", learned" if spec.get("clip") == "learned" else ""
    return f"{spec['bits']} bits, one scale per {group}, {spec['range']} range{learned}"


def sensitivity_rows(found: Sensitivity, recipe: Recipe) -> list[Rows]:
    """What each part of a recipe costs, each decoder layer, and each kind of linear: a table each.

    A share is that of the sum of its table, which need not be what all of it together costs.
    """
    specs = {"weights": recipe.weights, "activations": recipe.activations}
    specs |= {"keys": recipe.kv, "values": recipe.values}
    specs |= {"head": recipe.head, "embedding": recipe.embedding}
    bits = {name: str(spec.bits) for name, spec in specs.items()}
    if recipe.weight_bits:
        bits["weights"] = "mixed"
    parts = {name: kl for name, kl in found.parts.items() if name in bits}
    first = [["only these are quantized", "bits", "KL", "share"]]
    first += [[name, bits[name], *_shared(kl, parts)] for name, kl in parts.items()]
    first.append(["everything", found.bits, f"{found.parts['everything']:.4g}", ""])
    return [
        first,
        *(
            [[title, "KL", "share"], *([name, *_shared(kl, own)] for name, kl in own.items())]
            for title, own in (
                ("only the weights of this layer", found.layers),
                ("only the weights of these linears", found.kinds),
            )
            if own
        ),
    ]


def _shared(kl: float, others: Mapping[str, float]) -> list[str]:
    return [f"{kl:.4g}", f"{kl / (sum(others.values()) or 1):.1%}"]


def output_rows(found: OutputContents) -> Rows:
    """What an output is, apart from its figures and its stored tensors."""
    recipe, because = found.recipe, f" ({found.unverified})" if found.unverified else ""
    verified = {
        True: "it computes what was trained",
        False: "it differs from what was trained",
        None: f"not compared with what was trained{because}; see qatc verify",
    }
    loads = ["qatc"] if recipe["kv"]["bits"] == 16 or recipe["kv_site"] == "cache" else []
    if not recipe.get("rotate_inputs"):
        loads += ["transformers" if found.loads_elsewhere else "transformers after qatc export"]
    return [
        *recipe_rows(recipe),
        ["made from", found.model or "unknown"],
        *([["corpus", corpus_text(found.data)]] if found.data else []),
        ["verified", verified[found.verified]],
        ["loads in", ", ".join(loads)],
        *([name, version] for name, version in found.versions.items()),
    ]


def corpus_rows(found: CorpusContents) -> Rows:
    """What a corpus is, and whether it can be trained on."""
    manifest = found.manifest
    state = "complete"
    if found.damaged:
        files = ", ".join(found.damaged)
        state = f"missing or damaged: {files}; the same qatc generate-data command writes it anew"
    elif not manifest["complete"]:
        state = "unfinished; the same qatc generate-data command completes it"
    side_by_side = f"{manifest['slots']} side by side" if "slots" in manifest else ""
    answers = []
    if manifest["strategy"] == CHAT:
        total = sum(shard["answer_tokens"] for shard in manifest["shards"])
        turns = "" if manifest["turns"] is None else f", at most {manifest['turns']} a conversation"
        answers = [["of answers", f"{total:,}{turns}"]]
    if manifest["strategy"] == TEXT:
        origin = [["text", manifest["text"]], ["tokenizer of", manifest["model"]]]
    else:
        origin = [
            ["written by", manifest["model"]],
            ["strategy", f"{manifest['strategy']}, seed {manifest['seed']}"],
            ["decoded", ", ".join(filter(None, [side_by_side, f"in {manifest['dtype']}"]))],
        ]
    return [
        ["setting", "value"],
        ["state", state],
        ["sequences", f"{found.sequences:,} of {manifest['sequences']:,}"],
        ["tokens", f"{found.tokens:,}, at most {manifest['max_length']:,} a sequence"],
        *answers,
        *origin,
        ["files", f"{len(manifest['shards'])} of up to {manifest['shard_size']:,} sequences"],
        *_record_rows(found),
        ["fingerprint", found.fingerprint or "none yet"],
        *(
            [name, manifest[f"{name}_version"]]
            for name in ("qatc", "torch", "transformers")
            if f"{name}_version" in manifest
        ),
    ]


def _record_rows(found: CorpusContents) -> Rows:
    """What is recorded of a teacher beside a corpus."""
    if found.record is None:
        return []
    how = found.record["record_logits"]
    state = "complete" if found.record["complete"] else "unfinished"
    if found.damaged_record:
        state = f"missing or damaged: {', '.join(found.damaged_record)}"
    if state != "complete":
        state += f"; qatc generate-data --record-logits {how} completes it"
    return [["teacher recorded", f"{how} of {found.record['model']}, {state}"]]


def corpus_text(manifest: Mapping[str, Any]) -> str:
    """What a corpus is, in a line, from what its manifest says."""
    what = f"{manifest['sequences']} sequences of at most {manifest['max_length']} tokens"
    if manifest["strategy"] == TEXT:
        return f"{what} of the text {manifest['text']}"
    how = f"(strategy {manifest['strategy']}, seed {manifest['seed']})"
    return f"{what} written by {manifest['model']} {how}"


def task_rows(found: TaskComparison) -> Rows:
    """One row for every task, and the average of those with right and wrong answers, in percent.

    Beside a teacher: how many of its right answers were lost and how many gained, and McNemar's p.
    """
    own, teacher, pairings = found.model, found.teacher, found.pairings
    rows = [["task", "metric", "model"]]
    rows += [[score.task, _metric(score), _score(score)] for score in own.scores]
    if own.average is not None:
        rows.append(["average", "", _percent(*own.average)])
    if teacher is not None:
        rows[0] += ["teacher", "lost", "gained", "p"]
        for row, score in zip(rows[1:], teacher.scores, strict=False):
            row += [_score(score), *_flips(pairings.get(score.task))]
        if own.average is not None and teacher.average is not None:
            total = sum(pairings.values(), Pairing(0, 0, 0))
            rows[-1] += [_percent(*teacher.average), *_flips(total)]
    return rows


def _metric(score: TaskScore) -> str:
    return f"{score.metric}, {score.shots}-shot" if score.shots else score.metric


def _score(score: TaskScore) -> str:
    if score.right_or_wrong:
        return _percent(score.value, score.stderr)
    return f"{score.value:.4g}"


def _percent(value: float, stderr: float | None) -> str:
    spread = "" if stderr is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{100 * stderr:.1f}"
    return f"{100 * value:.1f}{spread}"


def _flips(pairing: Pairing | None) -> list[str]:
    if pairing is None:
        return ["", "", ""]
    return [str(pairing.lost), str(pairing.gained), f"{pairing.p:.2g}"]


def numerics_text(numerics: Mapping[str, Any]) -> str:
    """How tasks were computed, in a line."""
    limit = numerics["limit"]
    versions = ", ".join(f"{name} {version}" for name, version in numerics["versions"].items())
    return (
        f"{numerics['model']}: {numerics['runtime']}, {numerics['dtype']}, softmax in"
        f" {numerics['softmax_dtype']}, batch {numerics['batch_size']}, at most"
        f" {numerics['max_length']:,} tokens, {'all' if limit is None else f'the first {limit}'}"
        f" items; {versions}"
    )
