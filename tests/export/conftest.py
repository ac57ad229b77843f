"""Models with windows; recipes for torchao, and what it computes, written again in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchao.quantization import Int8Tensor

from qatc.output import QuantizedWeight
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
    "mistral": {"sliding_window": 8},  # it tells no kinds of layers
}
"""Architectures whose layers forget, as programs cannot, and their settings."""

GROUPS = QuantSpec(4, 16)

RECIPES = {
    "8-8-16": Recipe.from_bits("8-8-16"),
    "4-8-4": Recipe.from_bits("4-8-4"),
    "3-8-16": Recipe.from_bits("3-8-16", skip=("*lm_head*", "*embed*", "*o_proj*")),
    "mixed": Recipe.from_bits("4-8-4", weight_bits=(("*.0.*v_proj*", 6), ("*.1.mlp.*", 3))),
    "8-16-16": Recipe.from_bits("8-16-16"),
    "groups": Recipe.from_bits("4-16-16", group_size=16),
    "ends": Recipe.from_bits("4-8-16", head_bits=4, embedding_bits=4),
    "head": Recipe.from_bits("4-8-16", head_bits=8),
    "embedding": Recipe.from_bits("8-16-16", embedding_bits=6),
    "ends in groups": Recipe(GROUPS, QuantSpec(), QuantSpec(), head=GROUPS, embedding=GROUPS),
    "ends alone": Recipe.from_bits("16-16-16", head_bits=8, embedding_bits=8),
}

UNHELD = {
    "quantizes no weights": Recipe.from_bits("16-16-4"),
    "leaves the weights of linear layers in float": Recipe.from_bits("16-8-16", head_bits=8),
    "trained with 6; export it as compressed-tensors": Recipe.from_bits("4-6-16"),
    "trained with groups of 32": Recipe.from_bits("4-8-16", target="llama.cpp"),
    "which torchao does not; run it by qatc": Recipe.from_bits(
        "4-4-16", rotate_inputs=("*.down_proj.weight",)
    ),
    "has groups of 16; export it": Recipe.from_bits("4-8-16", group_size=16),
    "has groups of 8": dataclasses.replace(
        Recipe.from_bits("4-8-16"), head=QuantSpec(4, 8), embedding=QuantSpec(4)
    ),
}


def width_of(recipe: Recipe) -> int:
    """Of the middle of an MLP: odd, where groups allow it."""
    return 29 if recipe.weights.group_size is None else 48


def assert_held(model: Any, weights: dict[str, QuantizedWeight]) -> None:
    """Every weight is what torchao makes of these codes and scales, and no other is quantized."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name for name, p in parameters.items() if isinstance(p.data, Int8Tensor)}
    assert found == weights.keys()
    for name, weight in weights.items():
        tensor = parameters[name].data
        assert torch.equal(tensor.qdata, weight.codes) and tensor.qdata.dtype == torch.int8
        assert torch.equal(tensor.scale, weight.scale) and tensor.scale.dtype == torch.float32
        assert tensor.dtype == model.dtype
        assert torch.equal(tensor.dequantize(), weight.dequantize(model.dtype))


def linear_of_torchao(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The linear layer of torchao in numpy: fp32, but for sums, which are integers."""
    rows = x.numpy().reshape(-1, x.shape[-1])
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scale = np.maximum(largest / np.float32(127.5), np.float32(2.0**-23))
    codes = np.clip(np.round(rows * (np.float32(1) / scale)), -128, 127)
    assert scale.dtype == codes.dtype == np.float32
    sums = codes.astype(np.int64) @ weight.codes.numpy().astype(np.int64).T
    values = sums.astype(np.float32) * scale * weight.scale.numpy().T
    return torch.from_numpy(values).reshape(*x.shape[:-1], -1)


def run_by(reference: Any, weights: dict[str, QuantizedWeight], model: Any) -> None:
    """Let the quantized linear layers of a float model compute what ``linear_of_torchao`` does.

    Other tensors are those of ``model``: a product in float depends on where a weight lies.
    """
    for name, parameter in reference.named_parameters():
        if name not in weights:
            parameter.data = model.get_parameter(name).data
    for name, weight in weights.items():
        if "embed" not in name:
            layer = reference.get_submodule(name.removesuffix(".weight"))
            layer.forward = lambda x, weight=weight: linear_of_torchao(x, weight)
