"""GGUF, which llama.cpp, ollama and LM Studio load: one file with the tokenizer in it.

Quantized weights become Q4_0 (up to 4 bits), Q5_0 and Q8_0, with the codes and scales that were
trained (:mod:`qatc.export.gguf.blocks`). Everything else keeps its values: vectors in fp32,
matrices in the narrowest float type that holds them.

It cannot hold how activations, keys and values are quantized, which llama.cpp decides by itself or
is told when it starts; :func:`notes` says what differs. Refused are groups that are no multiple of
32, scales that fp16 does not hold, inputs that are rotated at run time, and architectures and
tokenizers that are not known (:mod:`qatc.export.gguf.architectures`,
:mod:`qatc.export.gguf.vocabulary`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qatc
from qatc.errors import CheckpointError
from qatc.export.base import Format
from qatc.export.gguf import blocks, card
from qatc.export.gguf.architectures import (
    context_length,
    describe,
    head_size,
    row_order,
    transformers_name,
)
from qatc.export.gguf.plan import EMBEDDING, HEAD, Plan, make_plan, require_gguf
from qatc.models.cards import CARD
from qatc.output import Output, QuantizedWeight
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import write_atomically, write_json


def write(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory: a GGUF file, and its card."""
    write_plan(make_plan(output), directory)


def write_plan(plan: Plan, directory: Path) -> None:
    """:func:`write` of a plan."""
    import gguf

    output = plan.output
    path = directory / f"{card.stem(output.metadata)}-{plan.file_type}.gguf"
    with contextlib.closing(gguf.GGUFWriter(path, plan.architecture.name)) as writer:
        _describe(plan, writer)
        sizes = _write_tensors(plan, writer)
    told = {"format": GGUF.name, "files": [path.name], "recipe": output.recipe.to_dict()}
    write_json(directory / EXPORT_FILE, told)
    text = card.make_card(output, path.name, sizes, notes_of(plan))
    write_atomically(directory / CARD, text.encode("utf-8", errors="backslashreplace"))


def _write_tensors(plan: Plan, writer: Any) -> dict[str, list[int]]:
    """Write the file, one tensor in memory; of each type the tensors, numbers and bytes."""
    import gguf

    sizes: dict[str, list[int]] = {}
    for name, kind in plan.types.items():
        shape = plan.shape_of(name)
        numbers = math.prod(shape)
        dtype = gguf.GGMLQuantizationType[kind]
        per_block, bytes_of_block = gguf.GGML_QUANT_SIZES[dtype]
        size = numbers // per_block * bytes_of_block
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, dtype)
        row = sizes.setdefault(kind, [0, 0, 0])
        sizes[kind] = [row[0] + 1, row[1] + numbers, row[2] + size]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in plan.types.items():
        held = plan.held(name)
        if isinstance(held, QuantizedWeight):
            writer.write_tensor_data(blocks.to_blocks(held))
        else:
            writer.write_tensor_data(blocks.to_bytes(held, kind))
    return sizes


def _describe(plan: Plan, writer: Any) -> None:
    """All that the file says besides the tensors."""
    import gguf

    metadata, recipe = plan.output.metadata, plan.output.recipe
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{card.stem(metadata)} {recipe.bits}")
    if isinstance(license := metadata.get("license", {}).get("license"), str):
        writer.add_license(license)
    kinds = {"F32": "ALL_F32"}
    kind = kinds.get(plan.file_type, f"MOSTLY_{plan.file_type}")
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by("qatc")
    describe(writer, plan.output.config)
    writer.add_feed_forward_length(plan.width)
    plan.vocabulary.put(writer)
    writer.add_string("qatc.version", qatc.__version__)
    writer.add_string("qatc.bits", recipe.bits)
    writer.add_string("qatc.recipe", json.dumps(recipe.to_dict()))
    writer.add_uint32("qatc.feed_forward_length", plan.output.config.intermediate_size)
    writer.add_bool("qatc.interleaved", plan.architecture.interleaved)
    if "model" in metadata:
        writer.add_string("qatc.model", card.stem(metadata))


def read(directory: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of the one GGUF file in a directory, by the names of transformers.

    Raises:
        CheckpointError: there is none, or it is damaged or not written by qatc.
    """
    require_gguf()
    paths = list(directory.glob("*.gguf"))
    if len(paths) != 1:
        raise CheckpointError(f"{directory} has {len(paths)} GGUF files, and one is expected")
    try:
        return dict(_read(paths[0]))
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{paths[0]} is damaged, or no GGUF file of qatc ({error}); export it again"
        ) from error


def _read(path: Path) -> Iterator[tuple[str, QuantizedWeight]]:
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    own = value("general.architecture")
    heads = {"attn_q": value(f"{own}.attention.head_count")}
    heads["attn_k"] = value(f"{own}.attention.head_count_kv")
    recipe = Recipe.from_dict(json.loads(value("qatc.recipe")))
    narrow = value("qatc.feed_forward_length")
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in blocks.BYTES:
            continue
        name = transformers_name(tensor.name)
        codes, scale = blocks.from_blocks(tensor.data, kind)
        if ".ffn_down." in tensor.name:
            codes = codes[:, :narrow].contiguous()
        elif ".ffn_" in tensor.name:
            codes, scale = codes[:narrow].clone(), scale[:narrow]
        order = row_order(tensor.name, len(codes), heads) if value("qatc.interleaved") else None
        if order is not None:
            codes, scale = codes[order.argsort()], scale[order.argsort()]
        spec = _spec_of(name, recipe)
        groups = 1 if spec.group_size is None else codes.shape[1] // spec.group_size
        scale = scale.unflatten(1, (groups, -1))
        if not torch.equal(scale, scale[..., :1].expand_as(scale)):
            raise ValueError(f"the scales of {tensor.name} are not those of its recipe")
        yield name, QuantizedWeight(codes, scale[..., 0].contiguous(), spec)


def _spec_of(name: str, recipe: Recipe) -> QuantSpec:
    if name == EMBEDDING:
        return recipe.embedding
    return recipe.head if name == HEAD else recipe.weights_of(name)


def notes(output: Output) -> list[str]:
    """What llama.cpp computes in another way than the model was trained for, and what else is so.

    Raises as :func:`write` does.
    """
    return notes_of(make_plan(output))


def notes_of(plan: Plan) -> list[str]:
    """:func:`notes` of a plan."""
    config: Any = plan.output.config
    found = card.differences(plan.output.recipe, head_size(config))
    narrow = sorted({w.spec.bits for w in plan.output.weights.values() if w.spec.bits < 4})
    if narrow:
        found.append(
            f"weights of {' and '.join(map(str, narrow))} bits take 4.5 bits each: Q4_0 is the"
            " narrowest type with their codes"
        )
    if plan.width != config.intermediate_size:
        found.append(
            f"the MLPs have {plan.width} hidden values in place of {config.intermediate_size}, a"
            " multiple of 32: those added are zeros, which change nothing"
        )
    if context_length(config) != config.max_position_embeddings:
        found.append(
            f"the context ends at {config.sliding_window} tokens: llama.cpp has no sliding window"
            " for this architecture"
        )
    return [*found, *plan.vocabulary.notes]


def commands(output: Output, directory: Path) -> list[str]:
    """How llama.cpp is started with what was written."""
    (path,) = directory.glob("*.gguf")
    return card.commands(output, str(path))


GGUF = Format("gguf", "llama.cpp, ollama, LM Studio", write, read, notes, commands)
