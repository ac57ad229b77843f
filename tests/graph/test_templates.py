"""Which layers share a graph, and what it computes: against references that share no code."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qatc.errors import CaptureError, ConfigError, PassError
from qatc.graph.nodes import find_linears, is_fake_quantize
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import GRAPHS_PER_MODULE
from qatc.models.preparation import (
    can_compile,
    prepare,
    prepared_state,
    quantized_parameters,
    restore,
)
from qatc.passes import pass_records
from qatc.recipe.recipe import Recipe

FLOAT = Recipe.from_bits("16-16-16")
QUANTIZED = Recipe.from_bits("4-8-4")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(kind: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(rows))


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **kwargs).logits
    return out


def padded() -> tuple[Tensor, Tensor]:
    """Ids and mask of three rows: whole, padded on the left, padded on the right."""
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    return ids, mask


# What is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_are_the_model_itself(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    batches = [tokens(rows, length) for rows, length in ((2, 8), (1, 1), (3, 1), (1, 6), (5, 13))]
    wanted = [logits(model, ids) for ids in batches]
    prepare(model, FLOAT, compile=False)
    for ids, want in zip(batches, wanted, strict=True):
        assert torch.equal(logits(model, ids), want)
    assert len(list(prepared_state(model).templates())) == 1


def rule(x: Tensor, bits: int, group_size: int | None = None, snap: bool = False) -> Tensor:
    """Fake-quantization in numpy, in the words of the design: the reference for a whole model."""
    values = x.detach().float().numpy().astype(np.float64)
    groups = values.reshape(*values.shape[:-1], -1, group_size or values.shape[-1])
    steps = 2 ** (bits - 1) - 1
    scale = (np.abs(groups).max(-1, keepdims=True) / steps).astype(np.float32).astype(np.float64)
    scale[scale == 0] = 1
    if snap:
        mantissa, exponent = np.frexp(scale)
        scale = np.maximum(np.ldexp(np.rint(mantissa * 256) / 256, exponent), 2.0**-17)
    codes = np.clip(np.rint((groups / scale).astype(np.float32)), -steps, steps)
    return torch.from_numpy((codes * scale).astype(np.float32).reshape(values.shape)).to(x.dtype)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
    return sdpa_attention_forward(module, query, rule(key, 4), rule(value, 4), *args, **kw)


AttentionInterface.register("fake_quantized_for_tests", attend)
AttentionMaskInterface.register("fake_quantized_for_tests", sdpa_mask)


def eager_reference(model: Any, recipe: Recipe) -> Any:
    """The model at 4-8-4 by hooks, replaced weights and an attention of its own."""
    model = copy.deepcopy(model)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rule(module.weight, 4, recipe.weights.group_size, snap=True)
            module.register_forward_pre_hook(lambda module, args: (rule(args[0], 8),))
        if recipe.kv_site == "projection" and name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda module, args, out: rule(out, 4))
    if recipe.kv_site == "cache":
        model.set_attn_implementation("fake_quantized_for_tests")
    return model


@pytest.mark.parametrize(
    "recipe",
    [
        QUANTIZED,
        Recipe.from_bits("4-8-4", group_size=16),
        Recipe.from_bits("4-8-4", kv_site="projection"),
    ],
)
def test_a_whole_model_against_numpy(recipe: Recipe) -> None:
    """In fp64, so that no rounding upstream moves a value over a tie."""
    model = make().double()
    reference = eager_reference(model, recipe)
    ids, mask = padded()
    wanted = logits(reference, ids), logits(reference, ids, attention_mask=mask)
    assert not torch.allclose(wanted[0], logits(model, ids), atol=1e-2)
    prepare(model, recipe, compile=False)
    torch.testing.assert_close(logits(model, ids), wanted[0], atol=1e-5, rtol=0)
    seen = mask.bool()
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[seen], wanted[1][seen], atol=1e-5, rtol=0)


def test_padding_changes_nothing() -> None:
    model = prepare(make().double(), QUANTIZED, compile=False)
    ids, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row in range(3):
        seen = mask[row].bool()
        alone = logits(model, ids[row, seen][None])[0]
        torch.testing.assert_close(found[row, seen], alone, atol=1e-5, rtol=0)


def test_gradients_are_those_of_straight_through_estimation() -> None:
    """The gradient of a quantized weight is that of the product with the quantized input."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4, bias=False))
    weight = module[0].weight
    x = torch.randn(3, 5, 8, requires_grad=True)
    prepare(module, Recipe.from_bits("4-8-16"), compile=False)
    gradient = torch.randn(3, 5, 4)
    module(x).backward(gradient)
    assert weight.grad is not None and x.grad is not None
    torch.testing.assert_close(weight.grad, torch.einsum("btn,btk->nk", gradient, rule(x, 8)))
    torch.testing.assert_close(x.grad, gradient @ rule(weight, 4, snap=True))


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
    model = make(kind, **changes)
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
    model = make()

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
    model = make(num_hidden_layers=6)

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
    model = make(num_hidden_layers=7)
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
    model = prepare(make(num_hidden_layers=3), recipe, compile=False)
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    wanted = {f"model.layers.{i}.{p}.weight" for i in (1, 2) for p in projections}
    assert set(quantized_parameters(model)) == wanted
    assert len(list(prepared_state(model).templates())) == 2
    (template,) = prepared_state(model).store.of(prepared_state(model).forwards[0])
    assert [r.name for r in pass_records(template.graph_module)] == ["Canonicalize", "QuantizeKV"]


# What stays as it was


def test_a_forward_of_its_own_comes_back() -> None:
    model = make()
    layer = model.model.layers[1]
    own = layer.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) * 2

    layer.forward = doubled
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    restore(model)
    assert layer.forward is doubled and torch.equal(logits(model, ids), wanted)


def test_restoring_the_original_leaves_a_deep_copy_prepared() -> None:
    model = prepare(make(), QUANTIZED, compile=False)
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), wanted)
    assert prepared_state(copied).store is prepared_state(model).store, "nothing is compiled again"
    restore(model)
    assert torch.equal(logits(copied, ids), wanted)
    assert quantized_parameters(copied)
    restore(copied)
    assert torch.equal(logits(copied, ids), logits(model, ids))
    assert not torch.equal(logits(copied, ids), wanted)


@pytest.mark.parametrize("how", ["use_cache", "past_key_values"])
def test_a_cache_is_refused(how: str) -> None:
    model = prepare(make(), FLOAT, compile=False)
    cache = {"use_cache": True} if how == "use_cache" else {"past_key_values": DynamicCache()}
    with pytest.raises(CaptureError) as raised:
        logits(model, tokens(2, 6), **cache)
    assert str(raised.value) == (
        "model.layers.0 was called with a DynamicCache, which a captured graph cannot take;"
        " generate with use_cache=False"
    )


# Training


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=ids).logits.float()
    F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(
    when: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 6)
    model = prepare(make(), QUANTIZED, compile=False).train()
    wanted = gradients(model, ids)
    if when == "before":
        restore(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if when == "before":
        prepare(model, QUANTIZED, compile=False)
    runs: list[TemplateForward] = []
    run = TemplateForward._run
    monkeypatch.setattr(
        TemplateForward, "_run", lambda self, *a, **k: (runs.append(self), run(self, *a, **k))[1]
    )
    found = gradients(model, ids)
    assert len(runs) == 4, "each layer runs in the forward pass and again in the backward pass"
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt"])
def test_bf16_compute_over_fp32_masters(kind: str) -> None:
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    ids = tokens(2, 6)
    model = make(kind, **changes)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model, ids)
        gradient_of = gradients(model.train(), ids)
    assert found.dtype == torch.bfloat16
    assert 0 < (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    for name, gradient in gradient_of.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all() and gradient.any(), name


def test_masters_are_quantized_and_not_their_bf16_copies() -> None:
    """So that training has the codes that an export of the masters has, compiled or not."""
    ids = tokens(2, 6)
    model = prepare(
        make(), Recipe.from_bits("4-16-16"), compile=False, compute_dtype=torch.bfloat16
    )
    reference = make()
    for linear in reference.model.layers.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = rule(linear.weight, 4, snap=True)
    reference.to(torch.bfloat16).model.rotary_emb = make().model.rotary_emb
    outputs: list[Tensor] = []
    for each in (model, reference):
        each.model.layers[1].register_forward_hook(lambda m, args, out: outputs.append(out))
        with torch.autocast("cpu", torch.bfloat16, each is model):
            logits(each, ids)
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)
    assert len(quantized_parameters(model)) == 14
    for template in prepared_state(model).templates():
        for found in find_linears(template.graph_module):
            (source,) = found.weight.all_input_nodes
            assert is_fake_quantize(source)


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_is_eager() -> None:
    """Weights alone and one layer: the two may differ in the rounding of sums, not in a code."""
    torch._dynamo.reset()
    model, ids = make(num_hidden_layers=1), tokens(2, 8)
    recipe = Recipe.from_bits("4-16-16")
    prepare(model, recipe, compile=False)
    wanted = logits(model, ids)
    restore(model)
    prepare(model, recipe, compile=True)
    torch.testing.assert_close(logits(model, ids), wanted, atol=2e-5, rtol=1e-5)


# Constants: what layers differ in, and what changes later


class Factor(nn.Module):
    """Multiplies by a factor that an attribute holds in some way."""

    def __init__(self, inner: nn.Module, held: Any) -> None:
        super().__init__()
        self.inner, self.held = inner, held

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * _factor(self.held)
        return out


def _factor(held: Any) -> float:
    if isinstance(held, dict):
        return float(held["factor"])
    if isinstance(held, (tuple, list)):
        return _factor(held[0])
    return float(getattr(held, "factor", held))


HOLDERS: dict[str, Any] = {
    "dict": lambda f: {"factor": f},
    "tuple": lambda f: (f, 1),
    "nested": lambda f: [(f, 1)],
    "object": lambda f: SimpleNamespace(factor=f),
    "numpy": np.float32,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_layers_that_differ_in_any_attribute_have_graphs_of_their_own(kind: str) -> None:
    model = make(num_hidden_layers=3)
    for layer, factor in zip(model.model.layers, (1.5, 2.5, 1.5), strict=True):
        layer.mlp = Factor(layer.mlp, HOLDERS[kind](factor))
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    assert len(list(prepared_state(model).templates())) == 2


def test_what_changes_after_prepare_is_seen() -> None:
    model = make()
    model.model.layers[0].mlp = Factor(model.model.layers[0].mlp, {"factor": 1.5})
    reference, ids = copy.deepcopy(model), tokens(2, 6)
    prepare(model, FLOAT, compile=False)
    before = logits(model, ids)

    def change(model: Any) -> None:
        layers = model.model.layers
        layers[0].mlp.held["factor"] = 3.0
        layers[0].self_attn.scaling *= 2
        layers[1].input_layernorm.variance_epsilon = 0.5

    change(model)
    change(reference)
    found = logits(model, ids)
    assert torch.equal(found, logits(reference, ids)) and not torch.equal(found, before)
    model.model.layers[0].self_attn.scaling /= 2
    reference.model.layers[0].self_attn.scaling /= 2
    assert torch.equal(logits(model, ids), logits(reference, ids))


def test_layers_that_differ_in_what_nobody_reads_are_compiled_once() -> None:
    model = make(num_hidden_layers=3)
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


class Scaled(nn.Module):
    """A region of its own, with arguments that it reads and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float = 1.0, **unread: Any) -> Tensor:
        out: Tensor = self.linear(x) * factor
        return out


def test_an_argument_that_is_not_read_takes_no_graph() -> None:
    model, x = prepare(Scaled(), FLOAT, compile=False), torch.randn(2, 3, 8)
    store = prepared_state(model).store
    wanted = model(x)
    for step in range(5):
        found = model(x, items=step, ratio=step / 2, name=str(step), anything=object())
        assert torch.equal(found, wanted)
    assert sum(len(k) for calls in store._known.values() for k in calls.values()) == 2
    assert torch.equal(model(x, factor=True), model(x, factor=1)), "but a bool is another call"


def test_an_argument_that_is_read_keeps_a_bounded_number_of_graphs() -> None:
    model, x = prepare(Scaled(), FLOAT, compile=False), torch.randn(2, 3, 8)
    reference = copy.deepcopy(model)
    restore(reference)
    store = prepared_state(model).store
    with pytest.warns(UserWarning, match=r"as its argument 'factor' changes from call to call"):
        for step in range(GRAPHS_PER_MODULE + 1):
            assert torch.equal(model(x, factor=step), reference(x, factor=step))
    assert len(list(store)) == GRAPHS_PER_MODULE
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(x, factor=99)
    assert len(list(store)) == GRAPHS_PER_MODULE


def test_an_object_that_is_read_is_refused() -> None:
    model = prepare(Scaled(), FLOAT, compile=False)
    with pytest.raises(CaptureError, match="called with a SimpleNamespace, which a captured"):
        model(torch.randn(2, 3, 8), factor=SimpleNamespace())


# What the modules inside of a layer would do themselves


def test_hooks_inside_a_layer_are_refused() -> None:
    model, ids = prepare(make(), FLOAT, compile=False), tokens(2, 6)
    calls: list[str] = []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *a: calls.append("layer"))
    logits(model, ids)
    assert calls == ["layer"]
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        handle = getattr(layer.mlp.up_proj, f"register_{register}")(lambda *a: None)
        with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp\.up_proj, which"):
            logits(model, ids)
        handle.remove()
    handle = layer.mlp.register_forward_hook(lambda *a: None)
    restore(model)
    with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp, which"):
        prepare(model, FLOAT, compile=False)
    handle.remove()
    assert prepare(model, FLOAT, compile=False)


def test_outputs_of_parts_of_a_layer_are_refused() -> None:
    model, ids = make(), tokens(2, 6)
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    prepare(model, FLOAT, compile=False)
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == 3 and all(map(torch.equal, found, wanted))
    with pytest.raises(CaptureError, match="output_attentions=True"):
        logits(model, ids, output_attentions=True)


# Compiled by its user


def test_a_prepared_model_may_be_compiled_as_a_whole() -> None:
    model, ids = prepare(make(), QUANTIZED, compile=False), tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in (ids, ids[:, :4]):
        assert torch.equal(logits(compiled, batch), logits(model, batch))
    wanted, found = gradients(model, ids), gradients(compiled, ids)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)


# Adapters


def test_lora_on_a_prepared_model() -> None:
    """Adapters in float, around weights that are quantized, or skipped, as they were before."""
    skip = (*QUANTIZED.skip, "model.layers.0.mlp.down_proj.weight", "*.v_proj.*")
    recipe = dataclasses.replace(QUANTIZED, skip=skip)
    model, ids = make().double(), tokens(2, 6)
    prepare(model, recipe, compile=False, integer_forward=False)
    alone, quantized = logits(model, ids), quantized_parameters(model)
    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    lora: Any = get_peft_model(model, settings)
    found = logits(lora, ids)
    names = [name.replace(".base_layer", "") for name in quantized_parameters(model)]
    assert names == quantized

    reference = copy.deepcopy(lora)
    restore(reference.base_model.model)
    for name, module in reference.base_model.model.model.layers.named_modules():
        base = name.removesuffix(".base_layer")
        adapter = any(part.startswith("lora_") for part in name.split("."))
        kept = base == "0.mlp.down_proj" or base.endswith("v_proj") or adapter
        if isinstance(module, nn.Linear) and not kept:
            module.weight.data = rule(module.weight, 4, snap=True)
            module.register_forward_pre_hook(lambda module, args: (rule(args[0], 8),))
    reference.base_model.model.set_attn_implementation("fake_quantized_for_tests")
    torch.testing.assert_close(found, logits(reference, ids), atol=1e-5, rtol=0)
    assert not torch.allclose(found, alone, atol=1e-2)
    with lora.disable_adapter():
        torch.testing.assert_close(logits(lora, ids), alone, atol=1e-9, rtol=0)
    assert torch.equal(logits(lora, ids), found)
    lora.merge_adapter()
    assert not torch.allclose(logits(lora, ids), found, atol=1e-3), "the sum is what is quantized"
    lora.unmerge_adapter()
    torch.testing.assert_close(logits(lora, ids), found, atol=1e-5, rtol=0)
    lora(input_ids=ids).logits.logsumexp(-1).mean().backward()
    trained = {n for n, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, _ in lora.named_parameters() if ".lora_" in n}
    with pytest.raises(ConfigError, match="prepare it first and add them then"):
        restore(model)
        prepare(model, recipe, compile=False)
