"""Low-rank updates: what they compute and learn, that they are merged as trained, and going on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.machine.world import World
from qatc.models.preparation import prepare, prepared_state
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.low_rank import LowRank, Updates, add_updates
from qatc.training.parts import choose_parts, trained_at_once
from qatc.training.sharding import check_training
from tests.conftest import kill_at_call, run_until_killed
from tests.training.conftest import CONFIG, assert_equal, losses, make, make_rows, weights

LORA = replace(CONFIG, train="lora", lora_rank=3)
BITS = Recipe.from_bits("4-8-4")
IDS = torch.arange(24).view(2, 12) % 40


def student(recipe: Recipe = BITS, **how: Any) -> Any:
    return prepare(make(1), recipe, compile=False, **how)


def begin(directory: Path, config: TrainingConfig = LORA, model: Any = None) -> Any:
    """A run, and the updates that it trains."""
    model = model or student()
    updates = choose_parts(model, "lora", config.lora_rank, config.seed)
    return Distiller(model, make(0), make_rows(), config, directory), updates


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def disturbed(updates: Updates) -> None:
    """B that is not 0, as after a training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, update in updates.of:
            update.B.copy_(torch.randn(update.B.shape, generator=generator) * 0.05)


def test_before_a_step_the_student_is_as_it_was() -> None:
    model = student()
    before, graphs = logits(model), len([*prepared_state(model).templates()])
    updates = add_updates(model, 3, 0)
    assert len(updates.of) == 7 and torch.equal(logits(model), before)
    assert len([*prepared_state(model).templates()]) == graphs, "nothing is captured again"
    disturbed(updates)
    assert not torch.equal(logits(model), before)
    updates.remove()
    assert torch.equal(logits(model), before) and not hasattr(model, "low_rank")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_what_was_trained(dtype: torch.dtype) -> None:
    """Under autocast as well, which would round the product of masters in fp32."""
    plain = make(1).to(dtype)
    model = prepare(plain, BITS, compile=False, compute_dtype=torch.bfloat16)
    updates = add_updates(model, 3, 0)
    disturbed(updates)
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits(model)
        seen = [update(weight) for weight, update in updates.of]
        before = [weight.clone() for weight, _ in updates.of]
        updates.merge()
        assert torch.equal(logits(model), trained)
    for (weight, update), old, merged in zip(updates.of, before, seen, strict=True):
        assert weight.dtype is dtype and torch.equal(weight, merged)
        exact = old.double() + update.B.double() @ update.A.double()
        tolerance = 1e-6 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(weight.double(), exact, rtol=tolerance, atol=tolerance / 10)


def test_gradients_equal_a_reference() -> None:
    """In fp64: the gradient of the rounded weight, passed straight through, times B and A."""
    for recomputed in (False, True):
        model = student(checkpoint_activations=recomputed)
        updates = choose_parts(model, "lora", 3)
        assert updates is not None
        disturbed(updates)
        model(input_ids=IDS).logits.logsumexp(-1).mean().backward()
        reference = make(1)
        with torch.no_grad():
            weights = {n: p for n, p in reference.named_parameters() if "layers" in n}
            for name, update in model.low_rank.items():
                weights[name.replace("/", ".")].copy_(update(weights[name.replace("/", ".")]))
        prepare(reference, BITS, compile=False)
        reference(input_ids=IDS).logits.logsumexp(-1).mean().backward()
        for name, update in model.low_rank.items():
            gradient = weights[name.replace("/", ".")].grad
            assert gradient is not None
            whole = gradient.double()
            wanted = update.B.double().t() @ whole, whole @ update.A.double().t()
            for parameter, value in zip((update.A, update.B), wanted, strict=True):
                assert value.abs().max() > 0
                torch.testing.assert_close(
                    parameter.grad.double(), value.detach(), rtol=1e-4, atol=1e-7
                )
        assert all(weight.grad is None for weight, _ in updates.of)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.linear(inputs)
        return result


def test_an_update_through_rounding_equals_a_reference() -> None:
    """Of one linear, with the rounding written out in fp64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    model = One()
    with torch.no_grad():
        model.linear.weight.copy_(weight)
    prepare(model, Recipe.from_bits("4-16-16", kv_site="cache"), compile=False)
    updates = add_updates(model, 2, 0)
    disturbed(updates)
    inputs, factor = torch.randn(5, 8, generator=generator), torch.randn(5, 6, generator=generator)
    (model(inputs) * factor).sum().backward()
    ((_, update),) = updates.of
    a, b = update.A.detach().double().requires_grad_(), update.B.detach().double().requires_grad_()
    merged = weight.double() + b @ a
    scale = (merged.detach().abs().amax(1, keepdim=True) / 7).float().bfloat16().double()
    rounded = (merged.detach() / scale).round().clamp(-7, 7) * scale
    passed = merged + (rounded - merged).detach()
    outputs = inputs.double() @ passed.t()
    torch.testing.assert_close(model(inputs).double(), outputs, rtol=1e-5, atol=1e-5)
    (outputs * factor.double()).sum().backward()
    for mine, its in ((update.A, a), (update.B, b)):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-5, atol=1e-5)


def test_how_an_update_starts() -> None:
    weight = torch.empty(50, 4000)
    first, again, other = (LowRank(weight, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(first.A, again.A) and not torch.equal(first.A, other.A)
    assert not first.B.any() and first.B.shape == (50, 16)
    assert float(first.A.detach().var()) == pytest.approx(1 / 16, rel=0.02)
    # All of B moved by the rate, an element of the weight moves as far, whatever the signs.
    signs = torch.randint(2, (50, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    moved = 1e-3 * signs @ first.A.detach()
    assert float(moved.square().mean().sqrt()) == pytest.approx(1e-3, rel=0.05)
    assert LowRank(torch.empty(3, 40), 16, 0).A.shape == (3, 40)
    starts = [update.A for _, update in add_updates(student(), 3, 0).of]
    assert not any(torch.equal(a, b) for a in starts for b in starts if a is not b)


def test_a_training_comes_closer_and_changes_nothing_else(tmp_path: Path) -> None:
    run, updates = begin(tmp_path)
    before = weights(run.student)
    history = run.run()
    assert sum(r.kl for r in history[-3:]) < 0.9 * sum(r.kl for r in history[:3])
    trained = {n for n, value in weights(run.student).items() if not torch.equal(value, before[n])}
    assert trained == {n for n in before if n.startswith("low_rank.")}
    function = logits(run.student)
    updates.merge()
    assert torch.equal(logits(run.student), function)
    moved = {n for n, v in weights(run.student).items() if not torch.equal(v, before[n])}
    assert len(moved) == 7 and all(".layers." in n and "proj" in n for n in moved)


def test_learned_scales_are_trained_beside_them() -> None:
    model = student(Recipe.from_bits("4-8-4", preset="best"))
    choose_parts(model, "lora", 3)
    found = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len([n for n in found if n.startswith("low_rank.")]) == 14
    assert len([n for n in found if n.endswith("weight_scale_gain")]) == 7 and len(found) == 23


@pytest.mark.parametrize(
    "change", [{}, {"fused_step": True}, {"optimizer": "adamw8bit", "accumulate": 2}]
)
def test_an_interrupted_run_ends_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(LORA, steps=7, checkpoint_every=3, **change)
    whole, updates = begin(tmp_path / "whole", config)
    whole.run()
    updates.merge()
    kill = kill_at_call(lambda _: None, 5)
    run_until_killed(lambda: begin(tmp_path / "killed", config)[0].run(kill))
    again, its = begin(tmp_path / "killed", config)
    assert losses(again.run()) == losses(whole.history)
    its.merge()
    assert_equal(weights(again.student), weights(whole.student))


def test_the_step_that_is_measured_leaves_nothing() -> None:
    model = student()
    before = copy.deepcopy(model.state_dict())
    with trained_at_once(model, "lora", 3):
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
            3 * sum(u.shape)
            for u in (w for w in before.values() if w.dim() == 2)
            if 40 not in u.shape
        )
    assert all(p.requires_grad for p in model.parameters())
    assert_equal(model.state_dict(), before)


def test_refused() -> None:
    with pytest.raises(ConfigError, match="lora_rank must be at least 1; got 0"):
        TrainingConfig(lora_rank=0)
    with pytest.raises(ConfigError, match="each of 2 processes has a part; start one, or"):
        check_training(World(0, 2), LORA, learned=False)
    with pytest.raises(ConfigError, match="the method gptq trains nothing, .*; add qat"):
        QuantizeConfig("m", Path("o"), method="gptq", training=LORA)
    frozen = student().requires_grad_(False)
    with pytest.raises(ConfigError, match="no linears in its layers whose weights"):
        add_updates(frozen, 3, 0)
