"""The model card: what an output is, read off its own files, as the ``README.md`` of its directory.

A card outlives the run that wrote it, and is what a hub shows. So nothing in it comes from settings
that were meant: sizes, dtypes and numbers of weights are those of the stored tensors, everything
else is in ``qatc.json`` and ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatc.data.corpus import TEXT
from qatc.models.cards import CARD, HUB_NAME
from qatc.output import how_to_run
from qatc.output.compressed_tensors import loads_as_it_is
from qatc.output.stored import Stored, measure
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import rule_in_words
from qatc.recipe.weight_bits import describe
from qatc.storage.files import read_json, write_atomically


def write_card(directory: Path) -> None:
    """Write the card of a complete output beside its files, in place of an older one."""
    card = make_card(
        read_json(directory / "qatc.json"), read_json(directory / "config.json"), measure(directory)
    )
    # A path in it may hold bytes that are no text.
    write_atomically(directory / CARD, card.encode("utf-8", errors="backslashreplace"))


def make_card(metadata: Mapping[str, Any], config: Mapping[str, Any], stored: Stored) -> str:
    """The text of a card.

    Args:
        metadata: the ``qatc.json`` of an output.
        config: its ``config.json``.
        stored: what its weight files hold.
    """
    recipe = metadata["recipe"]
    bits = Recipe.from_dict(recipe).bits
    teacher = base_name(metadata) if is_hub_name(metadata) else "FULL_PRECISION_MODEL"
    sections = [
        _front_matter(metadata, config, bits),
        f"# {base_name(metadata)} at {bits}",
        *_what(metadata, stored),
        "## What is quantized",
        table([["", ""], *recipe_rows(recipe)]),
        table(stored_rows(stored)),
        *_figures(metadata),
        "## How to run it",
        *how_to_run.runtimes(metadata, config),
        "## How to measure it",
        *how_to_run.measuring(metadata, config, teacher),
        *provenance(metadata),
    ]
    return "\n\n".join(sections) + "\n"


def base_name(metadata: Mapping[str, Any]) -> str:
    """The model that it was made from: its hub name, or the last part of its path."""
    model = str(metadata.get("model", "A model"))
    return model if is_hub_name(metadata) else Path(model).name or "A model"


def is_hub_name(metadata: Mapping[str, Any]) -> bool:
    model = str(metadata.get("model", ""))
    return bool(HUB_NAME.fullmatch(model)) and not metadata.get("model_is_directory", False)


def _on_text(metadata: Mapping[str, Any]) -> bool:
    """Whether it was trained on text that no model wrote, as far as is known."""
    return bool(metadata.get("data", {"strategy": TEXT}).get("strategy") == TEXT)


def _front_matter(metadata: Mapping[str, Any], config: Mapping[str, Any], bits: str) -> str:
    import yaml

    free = [] if _on_text(metadata) else ["data-free"]
    trained = ["quantization-aware-training"] if _is_trained(metadata) else []
    width = "w{}a{}kv{}".format(*bits.split("-")).lower().replace("kvk", "k")
    tags = ["qatc", *trained, *free, width]
    if reader := how_to_run.reader_of(config):
        tags.append(reader)
    if "auto_map" in config:
        tags.append("custom_code")
    library = "transformers" if loads_as_it_is(config) else "qatc"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if "model" in metadata:
        front |= {"base_model": base_name(metadata), "base_model_relation": "quantized"}
    front |= metadata.get("license", {})
    return f"---\n{yaml.safe_dump(front | {'tags': tags}, sort_keys=False)}---"


def _is_trained(metadata: Mapping[str, Any]) -> bool:
    return "qat" in metadata.get("run", {}).get("method", "qat").split("+")


def _what(metadata: Mapping[str, Any], stored: Stored) -> list[str]:
    numbers = stored.parameters + stored.float_parameters
    size = stored.code_bytes + stored.scale_bytes + stored.float_bytes
    how = "" if _on_text(metadata) else "data-free "
    if _is_trained(metadata):
        how += "quantization-aware training ([LLM-QAT](https://arxiv.org/abs/2305.17888))"
    else:
        how += f"post-training quantization (`{metadata['run']['method']}`)"
    text = (
        f"A causal language model of {numbers:,} parameters in {size:,} bytes"
        f" ({8 * size / numbers:.2f} bits a parameter), quantized by {how} with qatc. Its"
        " name ends with the bits of weights, activations and KV cache; 16 means not quantized."
    )
    local = "model" in metadata and not is_hub_name(metadata)
    note = (
        f"It was made from a directory called `{base_name(metadata)}`: before you publish it, put"
        " the hub name of that model into `base_model` above."
    )
    return [text, note] if local else [text]


_ENDS = (("head", "output head"), ("embedding", "token embedding"))
_ROWS = {"weights": "output channel", "activations": "token", "kv": "token and head"}


def recipe_rows(recipe: Mapping[str, Any]) -> list[list[str]]:
    """How each kind of tensor is quantized, without a header."""
    rows = []
    for key, title in (
        *(("weights", "weights of linear layers"), ("activations", "inputs of linear layers")),
        ("kv", "KV cache"),
        *_ENDS,
    ):
        if (spec := recipe.get(key)) is None:
            continue
        text = "not quantized"
        if spec["bits"] != 16:
            row = _ROWS.get(key, "token of the vocabulary")
            if key == "kv" and recipe["kv_site"] == "projection":
                row = "token"
            group = f"{spec['group_size']} values" if spec["group_size"] else row
            codes = rule_in_words(spec["bits"], spec["range"])
            text = f"{spec['bits']} bits, one scale per {group}, {codes}"
        rows.append([title, text])
        if key == "kv" and (own := recipe.get("value_bits")):
            rows.append(["values in it", f"{own} bits, {rule_in_words(own, spec['range'])}"])
    others = describe(recipe.get("weight_bits", {}).items(), "`")
    rows += [["weights of other bits", others]] if others else []
    skip = ", ".join(f"`{pattern}`" for pattern in recipe["skip"]) or "nothing"
    ends = [title for key, title in _ENDS if recipe.get(key, {"bits": 16})["bits"] != 16]
    if ends:  # which go before the patterns
        skip += f", but for the {' and the '.join(ends)}"
    if rotated := ", ".join(f"`{pattern}`" for pattern in recipe.get("rotate_inputs", ())):
        rows.append(["read their inputs through a Hadamard transform", rotated])
    if recipe.get("rotate_keys"):
        rows.append(["queries and keys", "rotated by a Hadamard transform of every head"])
    return [*rows, ["stay in full precision", skip]]


def stored_rows(stored: Stored) -> list[list[str]]:
    """What the weight files hold, header first."""
    rows = [["stored", "numbers", "bytes"]]
    if stored.weights:
        codes = f"codes of {stored.weights} weights"
        rows += [
            [codes, f"{stored.parameters:,}", f"{stored.code_bytes:,}"],
            ["their scales", f"{stored.scales:,}", f"{stored.scale_bytes:,}"],
        ]
    dtypes = ", ".join(stored.float_dtypes)
    floats = [f"everything else, {dtypes}", f"{stored.float_parameters:,}"]
    return [*rows, [*floats, f"{stored.float_bytes:,}"]]


def _figures(metadata: Mapping[str, Any]) -> list[str]:
    figures = metadata.get("figures")
    if not figures:
        return []
    columns = {"perplexity": ".4g", "kl": ".4f", "top1_agreement": ".1%"}
    rows = [["text", "model", "perplexity", "KL to full precision", "same top token"]]
    for text, models in figures.items():
        for name, found in models.items():
            rows.append([text, name, *(_number(found[k], form) for k, form in columns.items())])
    parity = metadata.get("parity") or {}
    checked = "The integer model has **not been verified** against the trained one."
    if parity.get("passed"):
        checked = (
            "The integer model was compared with the trained one before it was called complete, and"
            f" all {len(parity['checks'])} checks passed."
        )
    elif parity.get("passed") is False:
        checked = "The integer model was compared with the trained one, and **differed**."
    return [
        "## Figures",
        "Measured with the numerics above, on the weights that are stored here. `RTN` is the model"
        f" rounded to the same bits without training, `{[*models][-1]}` is this one; the text"
        " `generated` was written by the full-precision model itself, `held out` is the end of the"
        " corpus, which was not trained on.",
        table(rows),
        checked,
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def provenance(metadata: Mapping[str, Any]) -> list[str]:
    """How it was made: a title and a table, or nothing."""
    rows = []
    if data := metadata.get("data"):
        text = f"{data['sequences']} sequences of at most {data['max_length']} tokens, "
        if _on_text(metadata):
            text += f"of {Path(data['text']).name}"
        else:
            how = f"strategy {data['strategy']}, seed {data['seed']}"
            text += f"written by the full-precision model ({how})"
        rows.append(["training text", text])
    if training := metadata.get("run", {}).get("training"):
        step = training["batch_size"] * training["accumulate"]
        rows.append(["training", f"{training['steps']} steps of {step} rows"])
        if "learning_rate" in metadata:
            rows[-1][1] += f", peak learning rate {metadata['learning_rate']:.3g}"
        rows[-1][1] += f", loss {training.get('loss', 'logits')}"
    rows += [[name, str(version)] for name, version in metadata.get("versions", {}).items()]
    return ["## Made with", table([["", ""], *rows])] if rows else []


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in Markdown, header first."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
