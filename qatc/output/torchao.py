"""Quantized weights as tensors of torchao, what those cannot hold, and what transformers is told.

One class holds them all: ``Int8Tensor``, with a byte a code, the scales in fp32 and, where inputs
of linear layers are quantized, the order to do so. Narrower codes are valid codes of 8 bits; the
true bits are in ``qatc.json``. Neither codes nor scales are derived again.

torchao 0.18 quantizes an input per token by ``scale = max(amax / 127.5, 2**-23)`` and ``code =
round(x * (1 / scale))``, -128 to 127. In a bf16 or fp16 model it keeps the scale in that dtype,
unless the model is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qatc.errors import ConfigError
from qatc.output.codes import QuantizedWeight
from qatc.output.compressed_tensors import refuse_rotated
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

_BITS = 8
"""Of the codes of an ``Int8Tensor``, and of those that it makes of its inputs."""

_OTHERWISE = "export it as compressed-tensors"


def refuse_unheld(recipe: Recipe) -> None:
    """Raise ``ConfigError`` if torchao cannot hold what was trained with ``recipe``."""
    refuse_rotated(recipe, "torchao")
    inputs, groups = recipe.activations, _groups_at_linears(recipe)
    if not any(spec.quantizes for spec in (recipe.weights, recipe.head, recipe.embedding)):
        raise ConfigError(
            f"the recipe {recipe.bits} quantizes no weights, and a torchao model holds nothing"
            " else that is quantized; transformers loads the output as it is"
        )
    if not inputs.quantizes:
        return
    if not recipe.weights.quantizes:
        raise ConfigError(
            f"torchao quantizes the inputs of quantized weights only, and the recipe {recipe.bits}"
            " leaves the weights of linear layers in float; quantize them as well"
        )
    if inputs.bits != _BITS:
        raise ConfigError(
            f"torchao quantizes activations to {_BITS} bits, and this model was trained with"
            f" {inputs.bits}; {_OTHERWISE}, or train with activations of 8 or 16 bits"
        )
    if inputs.group_size is not None:
        raise ConfigError(
            "torchao gives activations one scale per token, and this model was trained with groups"
            f" of {inputs.group_size}; {_OTHERWISE}, or leave out their group_size"
        )
    if groups is not None:
        raise ConfigError(
            "torchao multiplies quantized activations by weights of one scale per output channel,"
            f" and this model has groups of {groups}; {_OTHERWISE}, or train without groups or"
            " with activations of 16 bits"
        )


def _groups_at_linears(recipe: Recipe) -> int | None:
    specs = [spec for spec in (recipe.weights, recipe.head) if spec.quantizes]
    return next((spec.group_size for spec in specs if spec.group_size is not None), None)


def rounds_like_torchao(spec: QuantSpec) -> bool:
    """Whether activations of 8 bits are rounded as torchao does it."""
    return spec.range == "full" and spec.rounding == "reciprocal"


def differences(recipe: Recipe) -> list[str]:
    """What torchao computes in another way than the model was trained for, each in some words."""
    inputs, found = recipe.activations, []
    if recipe.kv.quantizes:
        found.append(f"no KV quantization ({recipe.kv_bits} bits here)")
    if inputs.quantizes and not rounds_like_torchao(inputs):
        rules = {"full": "another rounding", "affine": "a zero point beside the scale"}
        rule = rules.get(inputs.range, f"max / {inputs.code_max}")
        found.append(
            "another activation rule (torchao has scale = max / 127.5 and multiplies by its"
            f" reciprocal, where this model was trained with {rule})"
        )
    return found


def int8_tensor(weight: QuantizedWeight, dtype: torch.dtype, *, quantizes_inputs: bool) -> Tensor:
    """An ``Int8Tensor`` ``[N, K]`` around the codes and scales of a weight.

    Args:
        weight: its codes and scales, which are not copied.
        dtype: of the model: what the tensor shows as its own, and dequantizes to.
        quantizes_inputs: whether a linear layer quantizes its input to 8 bits, one scale per token.
    """
    from torchao.quantization import Int8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    rule = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=MappingType.SYMMETRIC)
    tensor: Tensor = Int8Tensor(
        weight.codes,
        weight.scale.float(),
        [1, weight.codes.shape[1] // weight.scale.shape[1]],
        dtype,
        act_quant_kwargs=rule if quantizes_inputs else None,
    )
    return tensor


def int8_tensors(
    weights: Mapping[str, QuantizedWeight], recipe: Recipe, table: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """:func:`int8_tensor` of every weight by name; ``table`` is that of the embedding."""
    inputs = recipe.activations.quantizes
    return {
        name: int8_tensor(weight, dtype, quantizes_inputs=inputs and name != table)
        for name, weight in weights.items()
    }


def file_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the header of every weight file says of all tensors of a model, torchao's included."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    plain = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    metadata: dict[str, str] = flatten_tensor_state_dict(plain)[1]
    return metadata


def quantization_config(recipe: Recipe, ignore: Sequence[str]) -> Any:
    """The ``TorchAoConfig`` of a model.

    What a weight is, transformers reads from the header of its file; this says what a user would
    give to get the same kinds of tensors.

    Args:
        recipe: what the model was trained with.
        ignore: names of the linear modules that stay float.
    """
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
    )
    from transformers import TorchAoConfig

    group = recipe.weights.group_size if recipe.weights.quantizes else None
    base = Int8WeightOnlyConfig(granularity=PerRow() if group is None else PerGroup(group))
    if recipe.activations.quantizes:
        base = Int8DynamicActivationInt8WeightConfig()
    return TorchAoConfig(
        base,
        modules_to_not_convert=list(ignore),
        include_input_output_embeddings=recipe.embedding.quantizes,
    )
