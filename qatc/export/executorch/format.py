"""ExecuTorch, which runs models on phones: a ``.pte`` for its XNNPACK backend.

Weights of up to 4 bits become XNNPACK's groups of 32 (or a multiple of that), others those of 8
bits per channel, and the embedding a table of bytes, with the codes and scales that were trained.
Inputs of quantized linear layers are rounded to 8 bits by XNNPACK's own rule, K and V stay in
float; :func:`notes` says what differs.

It cannot hold groups that are no multiple of 32, groups of more than 4 bits, negative scales,
activations of other bits, inputs that are rotated at run time, and layers with a sliding window:
they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.export.base import Format, context_of, end_tokens, refuse_windows
from qatc.export.executorch import generate
from qatc.export.executorch.lowering import export_step, lower, require_executorch
from qatc.export.executorch.modules import (
    QuantizedLinear,
    quantized_step,
)
from qatc.export.executorch.stored import describe, keys_of, products_of, tables_of, weight_in
from qatc.export.programs import card_of, commands, notes_on_text, write_beside
from qatc.models.building import build_model
from qatc.output import Output, QuantizedWeight
from qatc.output.compressed_tensors import refuse_rotated
from qatc.output.directory import with_tied
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import spec_arg
from qatc.recipe.targets import why_not_in_xnnpack
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import read_json, write_atomically

FILE = "model.pte"

LONGEST = 2048
"""Tokens that a cache has room for, at most: it is a part of the memory that a program plans."""

CHUNK = 128
"""Tokens that a call takes at most; memory is planned for so many."""


def write(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory."""
    known = notes(output)  # refuses before what takes time
    slots = slots_of(output)
    step = quantized_step(output, slots)
    constants = {
        **{"get_max_seq_len": min(CHUNK, slots), "get_max_context_len": slots},
        **{"use_kv_cache": True, "get_eos_ids": end_tokens(output)},
        "get_vocab_size": output.config.get_text_config().vocab_size,
    }
    observer.stage("capture")
    exported = export_step(step, min(CHUNK, slots))
    observer.stage("lower")
    content = lower(exported, constants, observer)
    codes = with_tied(output.weights, step.model.all_tied_weights_keys)
    modules = {name: _owner(step.model, name) for name in codes}
    _require_held(content, modules)
    weights = {
        name: describe(modules[name]) | {"spec": spec_arg(own.spec), "width": own.codes.shape[1]}
        for name, own in output.weights.items()
    }
    write_atomically(directory / FILE, content)
    told = {
        "format": EXECUTORCH.name,
        "slots": slots,
        "chunk": min(CHUNK, slots),
        "weights": weights,
    }
    card = card_of(
        output,
        kind="ExecuTorch",
        about=f"`{FILE}` holds the codes and scales that qatc made, for its XNNPACK backend",
        packages=["executorch", "torch"],
        notes=known,
    )
    write_beside(output, directory, Path(generate.__file__), told, card)


def _owner(model: Any, weight: str) -> Any:
    """The module that a weight is of."""
    return model.get_submodule(weight.rpartition(".")[0])


def _require_held(content: bytes, modules: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if a product was not handed to XNNPACK with the very codes.

    A table of an embedding counts for no product, though a tied head may have the same bytes.
    """
    products = products_of(content).keys()
    constants = products | tables_of(content).keys()
    missing = [
        name
        for name, module in modules.items()
        if not keys_of(module) <= (products if isinstance(module, QuantizedLinear) else constants)
    ]
    if missing:
        raise ConfigError(
            f"ExecuTorch did not take {len(missing)} weights as they are, among them {missing[0]};"
            " this version of it looks for other operators: install the one that qatc is tested"
            " with"
        )


def slots_of(output: Output) -> int:
    """Tokens that the cache has room for."""
    return min(LONGEST, context_of(output) or LONGEST)


def read(directory: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of a directory that :func:`write` wrote, by name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    require_executorch()
    try:
        told = read_json(directory / EXPORT_FILE)
        content = (directory / FILE).read_bytes()
        data = products_of(content) | tables_of(content)
        return {name: weight_in(data, own) for name, own in told["weights"].items()}
    except (DataError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is damaged, or holds no .pte of qatc ({error}); export it again"
        ) from error


def _refuse_unheld(output: Output) -> None:
    require_executorch()
    recipe = output.recipe
    refuse_rotated(recipe, "ExecuTorch")
    refuse_windows(output, "ExecuTorch", slots_of(output))
    inputs = recipe.activations
    if inputs.quantizes and inputs.bits != 8:
        raise ConfigError(
            f"XNNPACK rounds inputs of linear layers to 8 bits, where this model was trained with"
            f" {inputs.bits}; run it by qatc, or quantize it again with --bits 4-8-16"
        )
    if inputs.quantizes and not recipe.weights.quantizes:
        raise ConfigError(
            "XNNPACK rounds inputs of linear layers only where their weights are quantized, and"
            " here those are in float; run it by qatc"
        )
    skeleton = build_model(
        output.config, torch.float32, device="meta", trust_remote_code=output.trust_remote_code
    )
    for name, weight in with_tied(output.weights, skeleton.all_tied_weights_keys).items():
        is_table = isinstance(_owner(skeleton, name), nn.Embedding)
        obstacle = None if is_table else why_not_in_xnnpack(weight.spec)
        if obstacle is not None:
            raise ConfigError(f"ExecuTorch's XNNPACK cannot hold {name}: {obstacle}")


def notes(output: Output) -> list[str]:
    """What ExecuTorch computes in another way than the model was trained for, and what else is so.

    Raises as :func:`write` does.
    """
    _refuse_unheld(output)
    slots = slots_of(output)
    found = [f"the cache holds {slots} tokens, and a call takes at most {min(CHUNK, slots)}"]
    found += differences(output)
    odd = sorted({w.spec.bits for w in output.weights.values()} - {4, 8})
    if odd:
        found.append(
            f"weights of {' and '.join(map(str, odd))} bits take 4 (up to 4) or 8 bits each"
        )
    return [*found, *notes_on_text(output)]


def differences(output: Output) -> list[str]:
    """What ExecuTorch computes in another way than the model was trained for."""
    recipe, found = output.recipe, []
    if output.weights and not recipe.activations.affine:
        found.append(
            "XNNPACK rounds the inputs of quantized weights to 8 bits with a scale and a zero point"
            f" per token, where this model was trained with {_inputs_in_words(recipe)}; --target"
            " executorch trains with that"
        )
    if recipe.kv.quantizes:
        found.append(
            f"K and V stay in float, where this model was trained with {recipe.kv_bits} bits"
        )
    return found


def _inputs_in_words(recipe: Recipe) -> str:
    inputs = recipe.activations
    if not inputs.quantizes:
        return "inputs in float"
    return "one scale per " + (f"{inputs.group_size} values" if inputs.group_size else "token")


EXECUTORCH = Format("executorch", "ExecuTorch", write, read, notes, commands)
