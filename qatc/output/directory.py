"""The directory that qatc writes: an ordinary Hugging Face model plus ``qatc.json``.

==========================  ====================================================================
``config.json``             the model's config, with ``quantization_config``
``generation_config.json``  if the model has one
tokenizer files             if a tokenizer was given
``model.safetensors``       codes, scales and the tensors that stay float; or shards and their index
``qatc.json``               the recipe, the quantized weights, and where they come from
``README.md``               the model card
``*.py``                    the model's own code, if it has some and is trusted
==========================  ====================================================================
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError
from qatc.models.building import build_model
from qatc.models.remote_code import copy_code
from qatc.models.vocabulary import End, are_tied, find_ends, untie
from qatc.output import compressed_tensors, torchao, vllm
from qatc.output.codes import QuantizedWeight
from qatc.output.contents import Output
from qatc.output.layouts import (
    PLAIN,
    TORCHAO,
    Form,
    layout_of,
    loads_exactly_in,
    tensor_names,
    to_tensors,
)
from qatc.output.model_card import write_card
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import FLOAT_BITS, QuantSpec
from qatc.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT_VERSION = 3

OWN_KEYS = (
    *("format_version", "layout", "recipe", "quantized"),
    *("digests", "float_digests", "specs"),
)
"""What :func:`write_output` puts into ``qatc.json`` by itself."""


def write_output(
    directory: Path,
    output: Output,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    form: Form = "qatc",
) -> None:
    """Write a quantized model into an empty directory (see the module's table).

    Args:
        directory: exists and is empty; see :func:`qatc.storage.directories.complete_directory`.
        output: the model. A ``quantization_config`` of its config is replaced, and so is what this
            function puts into ``qatc.json`` by itself. Float tensors of quantized weights are not
            written, and of tied ones only one. A tied weight that not all of its users quantize
            makes the written model untied.
        tokenizer: saved beside the model, if given.
        max_shard_bytes: larger models are split into files of this size.
        form: whom it is written for. ``transformers``: the codes of head and embedding are stored
            where it finds them, which takes more space: those of a tied weight twice, and those of
            the table a byte each; with ``qatc`` such a model is for :func:`qatc.load` alone, and
            says so to others. ``torchao``: the same in its layout, see :mod:`qatc.output.torchao`.
            ``vllm``: codes behind quantized inputs take a byte each; ``vllm-marlin``: they stay
            packed, and inputs are not declared, see :mod:`qatc.output.vllm`.

    Raises:
        ConfigError: a quantized weight is tied to another than the head's or the embedding's, its
            module is neither a linear nor an embedding, or the runtime that it is written for
            cannot hold the model.
        CheckpointError: the weights cannot be written.
    """
    config, recipe, weights = output.config, output.recipe, output.weights
    trust = output.trust_remote_code
    assert all(
        weight.spec in (recipe.weights_of(name), recipe.head, recipe.embedding)
        for name, weight in weights.items()
    ), "another recipe's"
    _refuse_unheld(recipe, form)
    # Without storage: tells the linear layers and the tied weights by their names.
    skeleton = build_model(config, torch.float32, device="meta", trust_remote_code=trust)
    ends, ties = find_ends(skeleton), dict(skeleton.all_tied_weights_keys)
    as_codes = [getattr(recipe, end.role).quantizes for end in ends]
    if are_tied(ends) and any(as_codes) and (form != "qatc" or not all(as_codes)):
        weights = with_tied(weights, ties) if all(as_codes) else weights
        config, ties = copy.deepcopy(config), {}
        untie(config)
    tensors = _drop_tied(output.state, weights, ties)
    weights = _drop_tied_codes(weights, ties)
    layouts = {name: layout_of(w.spec) for name, w in weights.items()}
    end_weights = {end.weight for end in ends}
    tables = [e.weight for e in ends if e.role == "embedding" and e.weight in weights]
    if form != "qatc":  # transformers finds no packed codes in an embedding
        layouts |= dict.fromkeys(tables, PLAIN)
    if form == "torchao":
        layouts = dict.fromkeys(weights, TORCHAO)
    elif form == "vllm" and recipe.activations.quantizes:
        layouts = dict.fromkeys(weights, PLAIN)
    floats = [value for value in tensors.values() if value.is_floating_point()]
    dtype = max(floats, key=Tensor.numel).dtype if floats else torch.float32
    header = {}
    if form == "torchao":
        held = torchao.int8_tensors(weights, recipe, next(iter(tables), None), dtype)
        header = torchao.file_metadata(tensors | held)
    tensors |= to_tensors(weights, dtype=dtype, layouts=layouts)

    # What transformers loads in by itself, scales included, but for torchao's: fp16 may be too
    # coarse for those.
    exact = form == "torchao" or loads_exactly_in(weights, dtype)
    plain_config = _config_of(config, skeleton, dtype if exact else torch.float32)
    if auto_map := copy_code(skeleton, directory):
        plain_config["auto_map"] = auto_map
    ignore = compressed_tensors.find_float_linears(skeleton, weights) if weights else []
    if form == "torchao":
        plain_config["quantization_config"] = torchao.quantization_config(recipe, ignore).to_dict()
    elif weights:
        inputs = QuantSpec(FLOAT_BITS) if form == "vllm-marlin" else recipe.activations
        plain_config["quantization_config"] = compressed_tensors.quantization_config(
            replace(recipe, activations=inputs, target="qatc"),
            ignore,
            _declared_ends(ends, weights, layouts, recipe, are_tied(ends) and bool(ties)),
            compressed_tensors.modules_by_layout(
                {n: own for n, own in layouts.items() if n not in end_weights}
            ),
        )
    write_json(directory / "config.json", dict(sorted(plain_config.items())))
    if output.generation_config is not None:
        plain = json.loads(output.generation_config.to_json_string())
        write_json(directory / "generation_config.json", plain)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    _write_tensors(directory, tensors, max_shard_bytes, header)
    layout = compressed_tensors.joined(layouts.values()) if weights else "float"
    digests = {name: digest_of(w.codes, w.scale) for name, w in sorted(weights.items())}
    packed = {k for n, own in layouts.items() for k in tensor_names(n, own)}
    floats_stored = {n: digest_of(t) for n, t in sorted(tensors.items()) if n not in packed}
    own = (
        *(FORMAT_VERSION, layout, recipe.to_dict(), sorted(weights)),
        *(digests, floats_stored),
        {
            name: asdict(weights[name].spec) | {"layout": own_layout}
            for name, own_layout in layouts.items()
            # What does not follow from the recipe, nor from the name of all layouts.
            if name in end_weights or own_layout not in (layout_of(weights[name].spec), TORCHAO)
        },
    )
    said = _further(output.metadata) | dict(zip(OWN_KEYS, own, strict=True))
    write_json(directory / "qatc.json", said)
    write_card(directory)


def _refuse_unheld(recipe: Recipe, form: Form) -> None:
    if form == "transformers":
        compressed_tensors.refuse_rotated(recipe, form)
    elif form == "torchao":
        torchao.refuse_unheld(recipe)
    elif form != "qatc":
        vllm.refuse_unheld(recipe, form)


def _config_of(
    config: PreTrainedConfig, skeleton: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Any]:
    """What ``config.json`` says of a model, but for how it is quantized and its own code."""
    plain: dict[str, Any] = json.loads(config.to_json_string())
    for key in ("quantization_config", "auto_map"):  # the latter of code that did not run
        plain.pop(key, None)
    plain["dtype"] = str(dtype).removeprefix("torch.")
    plain["architectures"] = [type(skeleton).__name__]
    return plain


def digest_of(*tensors: Tensor) -> str:
    """A short fingerprint of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _declared_ends(
    ends: list[End],
    weights: Mapping[str, QuantizedWeight],
    layouts: Mapping[str, str],
    recipe: Recipe,
    tied: bool,
) -> dict[str, tuple[QuantSpec, QuantSpec, str]]:
    """What ``config.json`` says of head and embedding: spec of weight and input, and layout."""
    found = {}
    for end in ends:
        if end.weight in weights:
            inputs = recipe.activations if end.role == "head" else QuantSpec(FLOAT_BITS)
            layout = layouts[end.weight]
            if tied or (end.role == "embedding" and layout != PLAIN):
                layout = compressed_tensors.OWN_LAYOUT
            found[end.name] = (weights[end.weight].spec, inputs, layout)
    return found


def _drop_tied_codes(
    weights: Mapping[str, QuantizedWeight], tied: Mapping[str, str]
) -> dict[str, QuantizedWeight]:
    """The weights without those that are stored under the name of another one."""
    kept = dict(weights)
    for name, source in tied.items():
        if name in kept and source in kept:
            one, other = kept.pop(name), kept[source]
            same = one.spec == other.spec and torch.equal(one.codes, other.codes)
            assert same and torch.equal(one.scale, other.scale), f"{name} is not {source}"
    return kept


def _drop_tied(
    state: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors to be stored in float: nothing quantized, and each tied weight once."""
    kept = {name: value.detach() for name, value in state.items() if name not in weights}
    for name, source in tied.items():
        if name in weights and source in weights:
            continue
        if name in weights or source in weights:
            raise ConfigError(
                f"{name} and {source} are one tied weight, which cannot be quantized;"
                " add both to the recipe's skip"
            )
        if name in kept:
            value = kept.pop(name)
            assert torch.equal(kept.setdefault(source, value), value), f"{name} is not {source}"
    return kept


def _write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], max_bytes: int, header: Mapping[str, str]
) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in sorted(tensors.items()):
        if shards[-1] and size + value.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)
    for file, names in zip(files, shards, strict=True):
        # Cloned because safetensors refuses tensors that share a storage.
        shard = {n: tensors[n].cpu().clone(memory_format=torch.contiguous_format) for n in names}
        path = directory / file
        try:
            save_file(shard, path, metadata={**header, "format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {path}: {error}; free some space") from error
        shutil.copymode(directory / "config.json", path)  # save_file makes it private


def with_tied(
    codes: Mapping[str, QuantizedWeight], tied: Mapping[str, str]
) -> dict[str, QuantizedWeight]:
    """The weights under the names of all that are tied to them as well."""
    return {**codes, **{name: codes[s] for name, s in tied.items() if s in codes}}


def _further(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ``qatc.json`` says besides what :func:`write_output` puts there by itself."""
    return {key: value for key, value in metadata.items() if key not in OWN_KEYS}


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what :func:`write_output` does not write: generation config, tokenizer, the report."""
    for path in source.iterdir():
        own = path.name in ("config.json", "qatc.json") or ".safetensors" in path.name
        if path.is_file() and not own:
            shutil.copyfile(path, directory / path.name)
