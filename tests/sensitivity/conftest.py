"""What a model computes with parts of it rounded, written again in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qatc.data.corpus import Rows
from tests.conftest import make_llama

SIZE = {"num_hidden_layers": 3}


def make_model() -> Any:
    return make_llama(**SIZE)


def make_rows(count: int = 5, length: int = 20) -> Rows:
    """Rows of one sequence each; the rest is padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, 112, (count, length), dtype=np.int32)
    real = np.arange(length) < random.integers(5, length + 1, (count, 1))
    return Rows((tokens * real).astype(np.int32), real.astype(np.int32), real)


def minmax(values: Tensor, bits: int, *, snap: bool = False) -> Tensor:
    """Restricted MinMax of the last dimension; the scales of weights are bf16 values."""
    largest = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True) / largest
    scale = scale.to(torch.bfloat16).double() if snap else scale
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).round().clamp(-largest, largest) * scale


class Rounding(TorchFunctionMode):
    """Rounds keys and values as attention reads them."""

    def __init__(self, **bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value, *others = args
            if "keys" in self.bits:
                key = minmax(key, self.bits["keys"])
            if "values" in self.bits:
                value = minmax(value, self.bits["values"])
            args = (query, key, value, *others)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def divergence(
    model: Any, rows: Rows, weights: Iterable[str] = (), bits: int = 16, **others: int
) -> float:
    """KL of the model to itself with some weights, inputs, keys or values rounded, in fp64."""
    plain, changed = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for name in weights:
        own = changed.get_parameter(name)
        own.copy_(minmax(own, bits, snap=True))
    if "activations" in others:
        for name, module in changed.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.register_forward_pre_hook(
                    lambda _, args: (minmax(args[0], others["activations"]),)
                )
    ids, real = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.real)
    before = plain(input_ids=ids, use_cache=False).logits[real].log_softmax(-1)
    with Rounding(**others):
        after = changed(input_ids=ids, use_cache=False).logits[real].log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())
