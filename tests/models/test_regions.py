from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qatc.errors import CaptureError
from qatc.models import find_regions, is_transformers_model

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def test_the_decoder_layers_of_a_model() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    regions = find_regions(model)
    assert [name for name, _ in regions] == [f"model.layers.{i}" for i in range(3)]
    assert all(region is model.get_submodule(name) for name, region in regions)


def test_the_list_with_most_parameters_and_not_one_inside_it() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(99, 99)])
    assert [name for name, _ in find_regions(model)] == [f"model.layers.{i}" for i in range(3)]


def test_any_other_module_is_one_region() -> None:
    module = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    assert not is_transformers_model(module)
    assert find_regions(module) == [("", module)]


def test_a_model_without_a_list_of_layers() -> None:
    class Flat(PreTrainedModel):
        config_class = LlamaConfig

    with pytest.raises(CaptureError, match="Flat has no list of layers.*held in a ModuleList"):
        find_regions(Flat(LlamaConfig(**SIZES)))


def test_an_encoder() -> None:
    regions = find_regions(BertModel(BertConfig(**SIZES)))
    assert [name for name, _ in regions] == [f"encoder.layer.{i}" for i in range(3)]
