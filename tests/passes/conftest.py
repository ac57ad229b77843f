"""Captured graphs to run passes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from qatc.graph.capture import Template, capture

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "attn_implementation": "sdpa",
}


class Captured:
    """A captured decoder layer: its template, and the flat arguments of its graph."""

    def __init__(self, template: Template, layer: nn.Module, leaves: list[Any]) -> None:
        self._graph = template.graph_module
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        self.args = (
            *(tensors[name].detach() for name in template.parameters),
            *(leaves[i] for i in template.inputs),
        )

    @property
    def graph(self) -> GraphModule:
        """A fresh copy, which the test may edit."""
        return copy.deepcopy(self._graph)


def capture_layer(model: PreTrainedModel, layer: nn.Module, masked: bool) -> Captured:
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    calls: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda m, *call: calls.append(call), with_kwargs=True)
    model.eval()(input_ids=ids, attention_mask=mask if masked else None, use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    template = capture(layer, args, kwargs, "layer")
    return Captured(template, layer, torch.utils._pytree.tree_leaves((args, kwargs)))


def llama(masked: bool) -> Captured:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))
    return capture_layer(model, model.model.layers[0], masked)


@pytest.fixture(scope="session")
def llama_layer() -> Captured:
    """A layer with four heads over two K/V heads, without a mask."""
    return llama(masked=False)


@pytest.fixture(scope="session")
def masked_llama_layer() -> Captured:
    """The same with a mask, so that transformers repeats the K/V heads."""
    return llama(masked=True)


@pytest.fixture(scope="session")
def neox_layer() -> Captured:
    """A layer whose query, key and value come from one linear."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    return capture_layer(model, model.gpt_neox.layers[0], masked=False)


class Plain(nn.Module):
    """No model of transformers: one weight used twice, one linear skipped by name."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).relu()))


@pytest.fixture(scope="session")
def plain() -> Captured:
    """A captured plain module."""
    torch.manual_seed(0)
    module, x = Plain(), torch.randn(2, 3, 8)
    return Captured(capture(module, (x,), {}), module, [x])
