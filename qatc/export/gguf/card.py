"""What a reader is told of a GGUF file: its card, what differs in llama.cpp, and its options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qatc.export.gguf.architectures import context_length, head_size
from qatc.export.gguf.blocks import BLOCK
from qatc.output import Output
from qatc.output.model_card import base_name, is_hub_name, provenance, recipe_rows, table
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec


def stem(metadata: Mapping[str, Any]) -> str:
    """The model that it was made from, as the begin of a file name."""
    name = base_name(metadata) if "model" in metadata else "model"
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2]).strip("-.") or "model"


def differences(recipe: Recipe, values_of_head: int) -> list[str]:
    """What llama.cpp computes in another way than was trained, a line each."""
    found = []
    inputs, trains_so = recipe.activations, "--target llama.cpp trains with that"
    ends = (recipe.weights, recipe.head, recipe.embedding)
    if any(spec.quantizes for spec in ends) and not _in_blocks(inputs):
        rule = "inputs in float"
        if inputs.quantizes:
            per = f"{inputs.group_size} values" if inputs.group_size else "token"
            zero = " and zero point" if inputs.affine else ""
            rule = f"{inputs.bits} bits and one scale{zero} per {per}"
        found.append(
            "llama.cpp rounds the inputs of quantized weights to 8 bits with one scale per"
            f" {BLOCK} values, where this model was trained with {rule}; {trains_so}"
        )
    if recipe.kv.quantizes and values_of_head % BLOCK:
        found.append(
            f"llama.cpp keeps K and V in float here, where this model was trained with"
            f" {recipe.kv_bits} bits: it quantizes them in blocks of {BLOCK}, which do not divide"
            f" heads of {values_of_head}"
        )
    elif recipe.kv.quantizes:
        close = recipe.kv_site == "cache" and _in_blocks(recipe.kv, recipe.kv.bits)
        other = "" if close else f", in blocks of {BLOCK}; {trains_so}"
        found.append(
            f"this model was trained with K and V of {recipe.kv_bits} bits, which llama.cpp is told"
            f" to have by{cache_options(recipe, values_of_head)}{other}"
        )
    if recipe.kv.learned:
        found.append(
            "the ranges of K and V that were learned are left out: llama.cpp takes those of each"
            " block"
        )
    return found


def _in_blocks(spec: QuantSpec, bits: int = 8) -> bool:
    return spec.bits == bits and spec.group_size == BLOCK and spec.range == "restricted"


def cache_types(recipe: Recipe, values_of_head: int) -> tuple[str, str]:
    """The types of llama.cpp that have K and V in the nearest bits; ``f16`` is its own choice."""
    if not recipe.kv.quantizes or values_of_head % BLOCK:
        return "f16", "f16"
    keys, values = ("q4_0" if spec.bits <= 4 else "q8_0" for spec in (recipe.kv, recipe.values))
    return keys, values


def cache_options(recipe: Recipe, values_of_head: int) -> str:
    """The options of llama.cpp that give K and V these types, with a space before each."""
    keys, values = cache_types(recipe, values_of_head)
    if keys == values == "f16":
        return ""
    return f" --flash-attn on --cache-type-k {keys} --cache-type-v {values}"


def commands(output: Output, file: str) -> list[str]:
    """How llama.cpp is started with a file."""
    config: Any = output.config
    cache = cache_options(output.recipe, head_size(config))
    told = f"-m {shlex.quote(file)} --ctx-size {min(context_length(config), 4096)}{cache}"
    text = '-no-cnv -p "Once upon a time" -n 64'  # without a chat, at whose prompt it would wait
    return [f"llama-server {told}", f"llama-completion {told} {text}"]


def make_card(
    output: Output, file: str, sizes: Mapping[str, Sequence[int]], notes: Sequence[str]
) -> str:
    """The text of the card of a GGUF file.

    Args:
        output: what it was made of.
        file: its name.
        sizes: of each type in it, how many tensors there are, and numbers and bytes in them.
        notes: what to know of it.
    """
    import yaml

    metadata, recipe = output.metadata, output.recipe
    front: dict[str, Any] = {"library_name": "gguf", "pipeline_tag": "text-generation"}
    if is_hub_name(metadata):
        front |= {"base_model": base_name(metadata), "base_model_relation": "quantized"}
    front |= metadata.get("license", {}) | {"tags": ["gguf", "llama.cpp", "qatc"]}
    rows = [["type", "tensors", "numbers", "bytes"]]
    rows += [[kind, *(f"{number:,}" for number in own)] for kind, own in sorted(sizes.items())]
    numbers, size = (sum(own[place] for own in sizes.values()) for place in (1, 2))
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {stem(metadata)} at {recipe.bits}, GGUF",
        f"`{file}` holds {numbers:,} numbers in {size:,} bytes ({8 * size / numbers:.2f} bits"
        " each), with the codes and scales that qatc made; llama.cpp did not quantize it again.",
        table(rows),
        "## How to run it",
        "```\n" + "\n".join(commands(output, file)) + "\n```",
        "\n".join(f"- {note}" for note in notes) or "With what it was trained for.",
        "## What is quantized",
        "As the model was trained; what llama.cpp does otherwise is said above.",
        table([["", ""], *recipe_rows(recipe.to_dict())]),
        *provenance(metadata),
    ]
    return "\n\n".join(sections) + "\n"
