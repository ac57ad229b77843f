"""Which layers share a graph, and which have one of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qatc.errors import CaptureError, PassError
from qatc.models.preparation import prepare, prepared_state, quantized_parameters, restore
from qatc.passes import pass_records
from qatc.recipe.recipe import Recipe
from tests.conftest import make_small
from tests.graph.conftest import FLOAT, QUANTIZED, Factor, logits, padded, tokens

# Architectures with something of their own


@pytest.mark.parametrize(
    ("kind", "changes", "graphs"),
    [
        ("mistral", {"sliding_window": 5}, 1),
        ("mixtral", {}, 1),  # keyword arguments that the layer's signature does not name
        ("cohere2", {"sliding_window": 5}, 2),
        ("gemma3_text", {"sliding_window": 5, "head_dim": 8}, 2),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 2),
    ],
)
def test_layers_of_different_structure(kind: str, changes: dict[str, Any], graphs: int) -> None:
    """Beyond the sliding window and under a mask, at 16 bits: the model itself."""
    if graphs == 2 and "sliding_window" in changes:
        changes = changes | {"layer_types": ["sliding_attention", "full_attention"]}
    model = make_small(kind, **changes)
    ids, mask = padded()
    seen = mask.bool()
    wanted = logits(model, ids), logits(model, ids, attention_mask=mask)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted[0])
    forwards = prepared_state(model).forwards
    served = {tuple(id(t) for t in prepared_state(model).store.of(f)) for f in forwards}
    assert len(served) == graphs
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[seen], wanted[1][seen], atol=2e-5, rtol=1e-5)
    restore(model)
    prepare(model, Recipe.from_bits("16-16-4"), compile=False)
    assert not torch.allclose(logits(model, ids), wanted[0], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        ("gpt2", "sdpa", "transformer.h.0 (GPT2Block): .*no aten.linear.*as those of GPT-2"),
        ("falcon", "sdpa", "(FalconDecoderLayer): .*no aten.linear.*GPT-2 and Falcon"),
        ("bloom", "eager", "(BloomBlock): .*or leave K and V alone with 16 KV bits"),
        ("gemma2", "eager", "(Gemma2DecoderLayer): .*16 KV bits, such as 4-8-16"),
    ],
)
def test_an_architecture_that_is_refused(kind: str, attention: str, message: str) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    ids = tokens(2, 6)
    before = logits(model, ids)
    with pytest.raises(PassError, match=message.replace("(", r"\(").replace(")", r"\)")):
        prepare(model, QUANTIZED, compile=False)
    assert torch.equal(logits(model, ids), before), "the model was not restored"


def test_a_layer_that_cannot_be_captured() -> None:
    model = make_small()

    class Branches(type(model.model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            return out if out.sum() > 0 else -out

    model.model.layers[1].mlp.__class__ = Branches
    with pytest.raises(CaptureError, match=r"cannot capture model.layers.1 \(LlamaDecoderLayer\)"):
        prepare(model, QUANTIZED, compile=False)
    assert not any("forward" in vars(module) for module in model.modules())


# Which layers share a graph


@pytest.mark.parametrize(("read", "graphs"), [(False, 1), (True, 2)])
def test_layers_that_read_their_number(read: bool, graphs: int) -> None:
    """As layers do of which every third leaves out the rotary embedding."""
    model = make_small(num_hidden_layers=6)

    class Alternating(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            out = super().forward(hidden_states, **kwargs)
            return out * 2 if read and self.self_attn.layer_idx % 3 == 2 else out

    for layer in model.model.layers:
        layer.__class__ = Alternating
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    assert len(list(prepared_state(model).templates())) == graphs
    ours = [prepared_state(model).store.of(f) for f in prepared_state(model).forwards]
    assert all(len(templates) == 1 for templates in ours)


class WithTable(nn.Module):
    """Multiplies by a tensor that is neither parameter nor buffer."""

    def __init__(self, inner: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.table
        return out


def test_what_a_layer_has_for_itself_gives_it_a_graph_of_its_own() -> None:
    model = make_small(num_hidden_layers=7)
    layers = model.model.layers
    layers[1].self_attn.scaling *= 2
    layers[2].mlp.act_fn = nn.GELU()
    layers[3].input_layernorm.variance_epsilon = 0.1
    shared = torch.rand(32)
    for layer, table in zip(layers[4:], (shared, shared, torch.rand(32)), strict=True):
        layer.mlp = WithTable(layer.mlp, table)
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    assert len(list(prepared_state(model).templates())) == 6


def test_skipped_layers() -> None:
    recipe = Recipe.from_bits("4-8-4", skip=("*.layers.0.*", "*.down_proj.*", "*lm_head*"))
    model = prepare(make_small(num_hidden_layers=3), recipe, compile=False)
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    wanted = {f"model.layers.{i}.{p}.weight" for i in (1, 2) for p in projections}
    assert set(quantized_parameters(model)) == wanted
    assert len(list(prepared_state(model).templates())) == 2
    (template,) = prepared_state(model).store.of(prepared_state(model).forwards[0])
    assert [r.name for r in pass_records(template.graph_module)] == ["Canonicalize", "QuantizeKV"]


HOLDERS: dict[str, Any] = {
    "dict": lambda f: {"factor": f},
    "tuple": lambda f: (f, 1),
    "nested": lambda f: [(f, 1)],
    "object": lambda f: SimpleNamespace(factor=f),
    "numpy": np.float32,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_layers_that_differ_in_any_attribute_have_graphs_of_their_own(kind: str) -> None:
    model = make_small(num_hidden_layers=3)
    for layer, factor in zip(model.model.layers, (1.5, 2.5, 1.5), strict=True):
        layer.mlp = Factor(layer.mlp, HOLDERS[kind](factor))
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    assert len(list(prepared_state(model).templates())) == 2


def test_layers_that_differ_in_what_nobody_reads_are_compiled_once() -> None:
    model = make_small(num_hidden_layers=3)
    for number, layer in enumerate(model.model.layers):
        layer.title = {"name": f"the layer {number}"}
    compiled: list[Any] = []
    prepare(model, FLOAT, compile=False)
    store = prepared_state(model).store
    assert len(list(store)) == 1
    store.compile = lambda gm: compiled.append(gm) or gm  # type: ignore[func-returns-value]
    model.model.layers[1].title["name"] = "another"
    logits(model, tokens(2, 6))
    assert not compiled
