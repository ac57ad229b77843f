"""Prepared models: the same numbers, state dict and training loop, on one graph per layer kind."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from qatc.errors import CaptureError, ConfigError, QatcError
from qatc.models.preparation import (
    can_compile,
    prepare,
    prepared_state,
    quantized_parameters,
    restore,
)
from qatc.numerics.fake_quant import fake_quantize
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import make_llama
from tests.models.conftest import SMALL

ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 16},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
}


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (batch, length), generator=generator)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | ARCHITECTURES[kind]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_architectures(kind: str) -> None:
    model = make(kind)
    wanted = model(ids()).logits
    prepare(model, Recipe.from_bits("16-16-16"), compile=False)
    torch.testing.assert_close(model(ids()).logits, wanted, atol=1e-6, rtol=1e-6)
    restore(model)
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    quantized = model(ids()).logits
    assert torch.isfinite(quantized).all() and (quantized - wanted).abs().max() > 1e-4
    assert len(quantized_parameters(model)) >= 2 * 4
    restore(model)
    torch.testing.assert_close(model(ids()).logits, wanted, atol=0, rtol=0)


class _Reference:
    """The contract on a plain Hugging Face Llama: hooks on linears, and attention patched."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, model: Any, tokens: Tensor) -> Tensor:
        model = copy.deepcopy(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                weight = fake_quantize(module.weight.data, self.recipe.weights, snap_scale=True)
                module.weight.data = weight
                module.register_forward_pre_hook(self._input)
        attend = F.scaled_dot_product_attention

        def patched(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            kv = self.recipe.kv
            return attend(q, fake_quantize(k, kv), fake_quantize(v, kv), *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", patched)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", patched)
            result: Tensor = model(tokens).logits
        return result

    def _input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(args[0], self.recipe.activations),)


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8", "3-16-16", "16-6-16", "16-16-4"])
@torch.no_grad()
def test_equals_an_eager_reference(bits: str) -> None:
    model, recipe = make_llama(96), Recipe.from_bits(bits)
    wanted = _Reference(recipe)(model, ids())
    prepare(model, recipe, compile=False)
    torch.testing.assert_close(model(ids()).logits, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing() -> None:
    model = prepare(make_llama(96), Recipe.from_bits("4-8-4"), compile=False)
    short, padding = ids(1, 7), torch.zeros((1, 5), dtype=torch.long)
    wanted = model(short).logits
    ones, zeros = torch.ones_like(short), torch.zeros_like(padding)
    for parts, masks, place in [
        ((padding, short), (zeros, ones), slice(5, 12)),
        ((short, padding), (ones, zeros), slice(0, 7)),
    ]:
        batch = torch.cat([torch.cat(parts, 1), ids(1)])
        mask = torch.cat([torch.cat(masks, 1), torch.ones((1, 12), dtype=torch.long)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(batch, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[:1, place], wanted, atol=1e-4, rtol=1e-4)


def test_state_dict_and_saving(tmp_path: Path) -> None:
    model = make_llama(96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(before[n], v) for n, v in again.state_dict().items())


@torch.no_grad()
def test_copies_are_independent() -> None:
    model = prepare(make_llama(96), Recipe.from_bits("4-8-4"), compile=False)
    wanted = model(ids()).logits
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert (twin(ids()).logits - wanted).abs().max() > 1e-3
    torch.testing.assert_close(model(ids()).logits, wanted, atol=0, rtol=0)


def test_bf16_compute_over_fp32_masters() -> None:
    model = make_llama(96)
    full = model(ids()).logits
    prepare(model, Recipe.from_bits("8-8-8"), compile=False, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids()).logits
    assert logits.dtype is torch.bfloat16
    assert (logits - full).abs().max() < 0.2 * full.abs().max()
    logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype is torch.float32, name


@torch.no_grad()
def test_generate_and_caches() -> None:
    model = make_llama(96)
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    prompt = ids(1, 5)
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)
    by_hand = prompt
    for _ in range(written.shape[1] - 5):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, by_hand)
    with pytest.raises(CaptureError, match="use_cache=False"):
        model(prompt, use_cache=True, past_key_values=transformers.DynamicCache())


def test_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model: Any = prepare(make_llama(96), Recipe.from_bits("4-8-4"), compile=False)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids()).logits.logsumexp(-1).mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Plain(nn.Module):
    """Not from Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def test_plain_module_with_its_own_loop() -> None:
    torch.manual_seed(0)
    model = Plain()
    names = list(model.state_dict())
    prepare(model, Recipe.from_bits("4-8-16"), compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(32, 8)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert list(model.state_dict()) == names
    assert quantized_parameters(model) == ["up.weight", "down.weight"]


def test_skip_leaves_a_layer_alone() -> None:
    recipe = Recipe(kv=QuantSpec(16), skip=(*DEFAULT_SKIP, "*.layers.0.*"))
    model = prepare(make_llama(96), recipe, compile=False)
    names = quantized_parameters(model)
    assert len(names) == 7 and all(".layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(skip=("*nothing_like_it*",)), "matches no parameter"),
        (Recipe(weights=QuantSpec(4, group_size=7)), "does not divide"),
    ],
)
def test_bad_recipes_leave_the_model_as_it_was(recipe: Recipe, says: str) -> None:
    model = make_llama(96)
    with pytest.raises(QatcError, match=says):
        prepare(model, recipe, compile=False)
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
@pytest.mark.parametrize("depth", [2, 12])
def test_one_training_compile_whatever_the_depth(depth: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_llama(96, num_hidden_layers=depth)
    prepare(model, Recipe.from_bits("4-8-4"), compile=True)
    for batch, length in ((2, 12), (3, 20), (5, 7)):
        model(ids(batch, length)).logits.logsumexp(-1).mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(list(prepared_state(model).templates())) == 1


def test_a_prepared_model_saves_its_own_config(tmp_path: Path) -> None:
    model = make_llama()
    before = dict(model.config.to_dict())
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is before["use_cache"]
    assert model.config.use_cache is False
    restore(model)
    assert "save_pretrained" not in vars(model)


def scaled(factor: float) -> Any:
    """The model of seed 0 with values ``factor`` times as large, which o_proj takes back."""
    model = make_llama(hidden_size=64, intermediate_size=96, head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= factor
            layer.self_attn.o_proj.weight /= factor
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("bits", ["4-8-16", "8-8-8"])
@pytest.mark.parametrize("factor", [1e-4, 1e-9])
@pytest.mark.parametrize("integer_forward", [False, True])
def test_small_weights_are_quantized_as_well_as_any(
    bits: str, factor: float, integer_forward: bool
) -> None:
    """Values a ten-thousandth as large, and an o_proj that takes it back, are the same function."""
    tokens = ids()
    options: dict[str, Any] = {"compile": False, "integer_forward": integer_forward}
    logits = [
        prepare(scaled(f), Recipe.from_bits(bits), **options)(input_ids=tokens).logits
        for f in (1.0, factor)
    ]
    exact = scaled(1.0)(input_ids=tokens).logits
    errors = [float((own - exact).norm() / exact.norm()) for own in logits]
    assert errors[1] <= 1.2 * errors[0]


@torch.no_grad()
def test_small_weights_of_a_target_with_fp16_scales() -> None:
    """A few small rows get the smallest steps; a weight that is small throughout is refused."""
    recipe = Recipe.from_bits("4-16-16", target="llama.cpp")
    few = scaled(1.0)
    few.model.layers[0].self_attn.v_proj.weight[:4] *= 1e-6
    assert prepare(few, recipe, compile=False)(input_ids=ids()).logits.isfinite().all()
    name = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(ConfigError, match=rf"{name} is not for the target llama.cpp: .*fp16"):
        prepare(scaled(1e-5), recipe, compile=False)
    skipped = dataclasses.replace(recipe, skip=(*DEFAULT_SKIP, "*.v_proj.*", "*.o_proj.*"))
    prepare(scaled(1e-5), skipped, compile=False)
    huge = scaled(1.0)
    huge.model.layers[1].mlp.up_proj.weight[0, 0] = 1e7
    with pytest.raises(ConfigError, match="largest value is 1e"):
        prepare(huge, recipe, compile=False)
