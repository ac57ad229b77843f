"""A float model whose quantized modules are spelled as ExecuTorch's XNNPACK backend looks for them.

Linear layers quantize their input to 8 bits, asymmetrically and per token (a scale and a zero point
for each), and dequantize codes that stay a part of the graph: where it is lowered, the backend
takes the three operators for one product of integers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from qatc.output import Output, QuantizedWeight, load_reference
from qatc.output.directory import with_tied
from qatc.recipe.spec import QuantSpec
from qatc.recipe.targets import XNNPACK_GROUP


class QuantizedLinear(nn.Module):
    """A linear layer on ``codes`` int8 ``[N, K]`` and their ``scale``, of 4 bits or of 8.

    Of 4 bits the scales are those of groups, ``[N, G]``. A row with a single scale is G groups with
    the same one: ExecuTorch hands XNNPACK wrong scales for 4 bits per channel (it says so itself
    in ``backends/xnnpack/operators/quant_params.py``). Rows are filled up to whole groups with
    zeros, and inputs with them: that changes neither sums nor how inputs are rounded, whose range
    holds zero anyway. Of 8 bits the scales are ``[N]``.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale = weight.codes, weight.scale
        self.bits, self.missing, groups = bits_of(weight.spec), 0, 1
        if self.bits == 4:
            self.missing = -codes.shape[1] % XNNPACK_GROUP
            codes = F.pad(codes, (0, self.missing))
            groups = codes.shape[1] // XNNPACK_GROUP if scale.shape[1] == 1 else scale.shape[1]
            scale = scale.expand(-1, groups)
        else:
            scale = scale.squeeze(1)
        self.group = codes.shape[1] // groups
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int32))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.bits == 4:
            weight = ops.dequantize_per_channel_group(
                self.codes, self.scale, self.zero, -8, 7, torch.int8, self.group, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel(
                self.codes, self.scale, self.zero, 0, -128, 127, torch.int8
            )
        x = F.pad(x, (0, self.missing)) if self.missing else x
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        of_token = (scale, zero, -128, 127, torch.int8)
        codes = ops.quantize_per_token(x, *of_token)
        return F.linear(
            ops.dequantize_per_token(codes, *of_token, torch.float32), weight, self.bias
        )


class QuantizedEmbedding(nn.Module):
    """A table of int8 codes ``[V, K]``, whose rows are looked up and scaled."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)

    def forward(self, ids: Tensor) -> Tensor:
        look_up = torch.ops.quantized_decomposed.embedding_byte.default
        result: Tensor = look_up(self.codes, self.scale, None, -128, 127, ids)
        return result


def bits_of(spec: QuantSpec) -> int:
    """Bits that a linear layer's codes take: 4 for up to 4, and 8."""
    return 4 if spec.bits <= 4 else 8


class StepCache(Cache):
    """Keys and values ``[1, H, slots, D]`` of all layers in float, written where a call stands."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values
        self.layers = []
        self.positions: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.positions] = key_states
        values[:, :, self.positions] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Step(nn.Module):
    """A model with its cache: ``(ids [1, T], positions [T]) -> logits [1, V]`` of the last token.

    Args:
        model: a causal language model of transformers, with its layers as they will be.
        slots: tokens that the cache holds.
    """

    def __init__(self, model: Any, slots: int) -> None:
        super().__init__()
        self.model, self.slots = model, slots
        with torch.no_grad():
            known = model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=True)
        for number, layer in enumerate(known.past_key_values.layers):
            for name, value in (("key", layer.keys), ("value", layer.values)):
                buffer = torch.zeros((1, value.shape[1], slots, value.shape[3]))
                self.register_buffer(f"{name}_cache_{number}", buffer, persistent=False)
        self.layers = len(known.past_key_values.layers)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        keys, values = (
            [getattr(self, f"{name}_cache_{number}") for number in range(self.layers)]
            for name in ("key", "value")
        )
        cache = StepCache(keys, values)
        cache.positions = positions
        visible = torch.arange(self.slots)[None] <= positions[:, None]
        result = self.model(
            input_ids=ids,
            position_ids=positions[None],
            attention_mask=visible[None, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = result.logits[:, -1]
        return logits


def quantized_step(output: Output, slots: int) -> Step:
    """The model of an output, whose quantized weights are codes."""
    model: Any = load_reference(output)
    for name, weight in with_tied(output.weights, model.all_tied_weights_keys).items():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            replacement: nn.Module = QuantizedEmbedding(weight)
        else:
            replacement = QuantizedLinear(weight, module.bias)
        model.set_submodule(path, replacement)
    return Step(model.requires_grad_(False), slots).eval()
