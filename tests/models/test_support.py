"""Which models and weights are refused, and what the message proposes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from qatc.errors import CaptureError, ConfigError, QatcError
from qatc.models.preparation import prepare, quantized_parameters
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from tests.conftest import make_llama
from tests.models.conftest import SMALL


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_what_cannot_be_treated_says_so(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"{kind}_path")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(QatcError) as raised:
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    assert "qatc" in str(raised.value) or "aten" in str(raised.value)


def moe(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**(sizes | changes))).eval()


def test_stacked_experts_are_refused_and_can_be_skipped() -> None:
    model = moe()
    with pytest.raises(ConfigError, match=r"--skip '\*\.experts\.\*'"):
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    recipe = dataclasses.replace(
        Recipe.from_bits("4-8-4"), skip=("*lm_head*", "*embed*", "*.experts.*")
    )
    prepare(model, recipe, compile=False)
    assert "model.layers.0.self_attn.q_proj.weight" in quantized_parameters(model)
    assert not any("experts" in name for name in quantized_parameters(model))


def test_routers_stay_in_float_by_themselves() -> None:
    """As they are read by F.linear, or belong to a class that only looks like a linear layer."""
    skip = (*DEFAULT_SKIP, "*.experts.*")
    recipe = dataclasses.replace(Recipe.from_bits("4-8-4"), skip=skip)
    for kind, changes in MIXTURES.items():
        config = transformers.AutoConfig.for_model(kind, **(SMALL | changes))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        prepare(model.eval(), recipe, compile=False)
        quantized = quantized_parameters(model)
        routers = [n for n, m in model.named_modules() if n.endswith((".gate", ".router"))]
        assert routers and not any(f"{name}.weight" in quantized for name in routers), kind
        for name in quantized:
            assert isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear), name


MIXTURES: dict[str, Any] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {"num_local_experts": 4},
}


class LinearInDisguise(nn.Module):
    """Multiplies by a weight without being a ``nn.Linear``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_weight_that_no_output_can_hold_is_found_at_once() -> None:
    model = make_llama(96)
    for layer in model.model.layers:
        layer.mlp.up_proj = LinearInDisguise(layer.mlp.up_proj)
        layer.mlp.down_proj = LinearInDisguise(layer.mlp.down_proj)
    with pytest.raises(ConfigError, match="but belongs to a LinearInDisguise") as raised:
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    proposed = re.findall(r"--skip '([^']+)'", str(raised.value))
    recipe = dataclasses.replace(Recipe.from_bits("4-8-4"), skip=(*DEFAULT_SKIP, *proposed))
    prepare(model, recipe, compile=False)  # the proposal works, at once
    assert len(quantized_parameters(model)) == 2 * 5


def test_other_stacked_weights_are_proposed_to_be_skipped() -> None:
    model = make_llama(96)
    for layer in model.model.layers:
        layer.mlp.weight = nn.Parameter(torch.zeros(2, 3, 4))
        layer.stacked = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="stacks weights in 3 dimensions") as raised:
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    proposed = re.findall(r"--skip '([^']+)'", str(raised.value))
    assert len(proposed) == 2
    recipe = dataclasses.replace(Recipe.from_bits("4-8-4"), skip=(*DEFAULT_SKIP, *proposed))
    assert prepare(model, recipe, compile=False)
    assert len(quantized_parameters(model)) == 2 * 7


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bert", {}, "BertLayer.* attends to later tokens, as the layers of an encoder do"),
        ("roberta", {}, "RobertaLayer.* attends to later tokens"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends to later tokens"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of the 2 layers.* kind conv"),
        (
            "qwen3_next",
            {
                **{"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
                "layer_types": ["linear_attention", "full_attention"],
            },
            "1 of the 2 layers of Qwen3NextForCausalLM are of the kind linear_attention",
        ),
        (
            "gemma3n_text",
            {
                **{"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
                **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
                **{"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 2},
            },
            "the last 1 layers.* keys and values of other layers .num_kv_shared_layers=1",
        ),
    ],
)
def test_models_that_are_no_causal_decoders(kind: str, changes: dict[str, Any], says: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **(SMALL | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(QatcError, match=says):
        prepare(model.eval(), Recipe.from_bits("4-8-4"), compile=False)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_decoder_of_an_encoder_is_no_encoder() -> None:
    config = transformers.AutoConfig.for_model("bert", **(SMALL | {"is_decoder": True}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert prepare(model.eval(), Recipe.from_bits("4-8-4"), compile=False)


def test_an_encoder_with_a_decoder() -> None:
    config = transformers.BartConfig(
        d_model=32, vocab_size=96, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="BartForConditionalGeneration is an encoder with a"):
        prepare(transformers.BartForConditionalGeneration(config), Recipe(), compile=False)


def test_convolutions_are_no_experts() -> None:
    model = make_llama(96)
    model.model.layers[0].mlp.conv = nn.Conv1d(32, 32, 3)
    assert prepare(model, Recipe.from_bits("4-8-4"), compile=False), "nothing reads it"
    model = make_llama(96)
    model.model.layers[0].mlp = Convolved(model.model.layers[0].mlp)
    with pytest.raises(CaptureError, match="convolves neighbouring tokens"):
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)


class Convolved(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.conv = inner, nn.Conv1d(32, 32, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(x.transpose(1, 2))[..., : x.shape[1]]
        out: Tensor = self.inner(mixed.transpose(1, 2))
        return out
