"""What prepared models compute: against references that share no code."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qatc.errors import ConfigError
from qatc.graph.nodes import find_linears, is_fake_quantize
from qatc.models.preparation import (
    can_compile,
    prepare,
    prepared_state,
    quantized_parameters,
    restore,
)
from qatc.recipe.recipe import Recipe
from tests.conftest import make_small
from tests.graph.conftest import FLOAT, QUANTIZED, gradients, logits, padded, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_are_the_model_itself(dtype: torch.dtype) -> None:
    model = make_small().to(dtype)
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
    model = make_small().double()
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
    model = prepare(make_small().double(), QUANTIZED, compile=False)
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
    linear = nn.Linear(8, 4, bias=False)
    module, weight = nn.Sequential(linear), linear.weight
    x = torch.randn(3, 5, 8, requires_grad=True)
    prepare(module, Recipe.from_bits("4-8-16"), compile=False)
    gradient = torch.randn(3, 5, 4)
    module(x).backward(gradient)
    assert weight.grad is not None and x.grad is not None
    torch.testing.assert_close(weight.grad, torch.einsum("btn,btk->nk", gradient, rule(x, 8)))
    torch.testing.assert_close(x.grad, gradient @ rule(weight, 4, snap=True))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt"])
def test_bf16_compute_over_fp32_masters(kind: str) -> None:
    changes: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    ids = tokens(2, 6)
    model = make_small(kind, **changes)
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
    model: Any = prepare(
        make_small(), Recipe.from_bits("4-16-16"), compile=False, compute_dtype=torch.bfloat16
    )
    reference = make_small()
    for linear in reference.model.layers.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = rule(linear.weight, 4, snap=True)
    reference.to(torch.bfloat16).model.rotary_emb = make_small().model.rotary_emb
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
    model, ids = make_small(num_hidden_layers=1), tokens(2, 8)
    recipe = Recipe.from_bits("4-16-16")
    prepare(model, recipe, compile=False)
    wanted = logits(model, ids)
    restore(model)
    prepare(model, recipe, compile=True)
    torch.testing.assert_close(logits(model, ids), wanted, atol=2e-5, rtol=1e-5)


def test_lora_beside_a_rotated_input() -> None:
    """An adapter that adds nothing yet: the weight is another module's now, and read as before."""
    recipe = dataclasses.replace(QUANTIZED, rotate_inputs=("*.down_proj.weight",))
    model, ids = make_small().double(), tokens(2, 6)
    prepare(model, recipe, compile=False, integer_forward=False)
    alone = logits(model, ids)
    lora: Any = get_peft_model(model, LoraConfig(r=3, target_modules=["down_proj"]))
    torch.testing.assert_close(logits(lora, ids), alone, atol=1e-9, rtol=0)


def test_lora_on_a_prepared_model() -> None:
    """Adapters in float, around weights that are quantized, or skipped, as they were before."""
    skip = (*QUANTIZED.skip, "model.layers.0.mlp.down_proj.weight", "*.v_proj.*")
    recipe = dataclasses.replace(QUANTIZED, skip=skip)
    model, ids = make_small().double(), tokens(2, 6)
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
