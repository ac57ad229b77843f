"""Learned scales and centered keys on a whole model: what they change, and what they do not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from qatc.errors import ConfigError
from qatc.evaluation.parity import verify
from qatc.evaluation.reference import prepare_reference
from qatc.models.centers import center_keys
from qatc.models.preparation import prepare, prepared_state, restore
from qatc.models.scales import learned_scale_of, of_attention
from qatc.numerics.hadamard import hadamard
from qatc.numerics.learned import least_error_scale
from qatc.output import QuantizedWeight, load_codes, load_reference, open_output
from qatc.quantize.run import quantize
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.runtime.model import load
from qatc.training.config import TrainingConfig
from tests.conftest import make_llama, make_small, save
from tests.quantize.conftest import make

BEST = Recipe.from_bits("4-8-4", preset="best")
ASYMMETRIC = QuantSpec(4, range="asymmetric")
CENTERED = Recipe(weights=QuantSpec(16), activations=QuantSpec(16), center_keys=True)


def ids_of(model: Any, rows: int = 3, length: int = 20) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)


def shifted(model: Any) -> Any:
    """The model with keys far from zero where they turn slowly, as those of real models are."""
    bias = torch.tensor([0, 0, 4, 20, 0, 0, 4, 20.0]).repeat(2)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = nn.Parameter(bias.clone())
    return model


@pytest.fixture
def keys_of(monkeypatch: pytest.MonkeyPatch, captured_anew: None) -> list[Any]:
    """What the rotary embedding makes of the keys, layer by layer."""
    seen: list[Any] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def noting(*args: Any, **kwargs: Any) -> Any:
        query, key = rotate(*args, **kwargs)
        seen.append(key.detach().double())
        return query, key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", noting)
    return seen


def test_centers_are_mean_keys_behind_the_rotary_embedding(keys_of: list[Any]) -> None:
    teacher = shifted(make_llama())
    student: Any = prepare(copy.deepcopy(teacher), CENTERED, compile=False)
    ids, real = ids_of(teacher, 6), torch.ones((6, 20), dtype=torch.bool)
    real[2, 11:] = real[4, 3:] = False
    with torch.no_grad():
        teacher(input_ids=ids, use_cache=False)
    keys = keys_of[-2:]
    center_keys(student, teacher, ids, real)
    for layer, key in zip(student.model.layers, keys, strict=True):
        rows = key.transpose(1, 2)[real]  # [tokens, Hkv, D]
        mean = rows.mean(0).float()
        assert torch.equal(layer.key_center.squeeze(1), mean.bfloat16().float())
        assert layer.key_center.abs().max() > 1


def test_centers_of_rotated_keys_are_rotated_means() -> None:
    teacher: Any = shifted(make_llama())
    ids, real = ids_of(teacher, 6), torch.ones((6, 20), dtype=torch.bool)
    found = []
    for rotated in (False, True):
        recipe = replace(CENTERED, rotate_keys=rotated)
        student: Any = prepare(copy.deepcopy(teacher), recipe, compile=False)
        center_keys(student, teacher, ids, real)
        found.append([layer.key_center.double() for layer in student.model.layers])
    for plain, turned in zip(*found, strict=True):
        torch.testing.assert_close(turned, plain @ hadamard(8), rtol=0.01, atol=0.05)


def test_centered_keys_leave_the_function_as_it_is() -> None:
    """Softmax does not see them: the float function is the same to 1e-5 of its largest value."""
    teacher = shifted(make_llama())
    ids = ids_of(teacher)
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits
        recipe = replace(CENTERED, weights=QuantSpec(8), kv=QuantSpec(8))
        student = prepare(copy.deepcopy(teacher), recipe, compile=False)
        center_keys(student, teacher, ids, torch.ones_like(ids, dtype=torch.bool))
        for template in prepared_state(student).store:  # take the rounding out of the graph
            graph = template.graph_module.graph
            for node in [n for n in graph.nodes if "fake_quantize" in str(n.target)]:
                node.replace_all_uses_with(node.args[0])
            template.graph_module.recompile()
        got = student(input_ids=ids).logits
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_centered_keys_lose_less() -> None:
    teacher = shifted(make_llama())
    ids = ids_of(teacher)
    errors = []
    for center in (False, True):
        recipe = replace(CENTERED, center_keys=center)
        student = prepare(copy.deepcopy(teacher), recipe, compile=False)
        center_keys(student, teacher, ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            got, wanted = (m(input_ids=ids).logits for m in (student, teacher))
        errors.append(float((got - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("integer_forward", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_prepare_adds_them_and_restore_takes_them_away(kind: str, integer_forward: bool) -> None:
    model = make_small(kind) if kind != "llama" else make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, BEST, compile=False, integer_forward=integer_forward)
    added = model.state_dict().keys() - before.keys()
    layers = model.config.num_hidden_layers
    assert sum(map(of_attention, added)) == 3 * layers
    gains = [n for n, p in model.named_parameters() if n in added]
    model(input_ids=ids_of(model)).logits.square().sum().backward()
    for name in gains:
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 0, name
    weights = [name for name in gains if name.endswith("weight_scale_gain")]
    assert len(weights) == (len(added) - 3 * layers) / 2
    restore(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_both_forwards_compute_and_train_the_same() -> None:
    results = []
    for integer_forward in (False, True):
        model = prepare(make_llama(), BEST, compile=False, integer_forward=integer_forward)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gain"):
                    parameter.fill_(-0.2 if "q_proj" in name else 0.05)
        out = model(input_ids=ids_of(model)).logits
        out.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients))
    (one, wanted), (other, got) = results
    assert wanted.keys() == got.keys()
    assert float((one - other).abs().max()) < 1e-3 * float(one.abs().max())
    for name, gradient in wanted.items():
        close = (gradient - got[name]).norm() / gradient.norm().clamp(min=1e-9)
        assert float(close) < 0.05, name


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """An output of the main job, whose scales and centers training has moved."""
    place = tmp_path_factory.mktemp("best")
    model = save(place / "model", make_llama(), tokenizer)
    training = TrainingConfig(steps=6, batch_size=4, learning_rate=0.02)
    return quantize(make(model, place / "out", recipe=BEST, training=training))


def test_an_output_computes_what_was_trained(best: Any) -> None:
    """The gate passes, decoding program and all; the codes are the scales' own."""
    output = open_output(best.output)
    report = verify(output, reload=False)
    report.require("out")
    assert any("decoding program" in check.what for check in report.checks)
    assert [name for name in output.state if of_attention(name)]
    gains = [t for n, t in output.state.items() if n.endswith(("key_gain", "value_gain"))]
    assert all(gain.dtype is torch.float32 for gain in gains)
    assert max(float(gain.abs().max()) for gain in gains) > 0.01
    for name, weight in load_codes(best.output).items():
        assert int(weight.codes.min()) >= -8 and int(weight.codes.max()) <= 7, name
    assert any(int(w.codes.min()) == -8 for w in output.weights.values())
    assert any(bool((w.scale < 0).any()) for w in output.weights.values())
    reference = prepare_reference(load_reference(output), output, compile=False)
    lowered = load(best.output, compile=False)
    ids = ids_of(lowered)
    with torch.no_grad():
        difference = reference(input_ids=ids).logits - lowered(input_ids=ids).logits
    assert float(difference.abs().median()) < 1e-4


@pytest.mark.parametrize("what", ["key_center", "value_gain"])
def test_the_gate_sees_a_wrong_center_and_a_wrong_gain(
    best: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = open_output(best.output)
    name = f"model.layers.1.{what}"
    wrong = dict(output.state) | {name: output.state[name] + 0.25}
    loaded = replace(output, state=wrong)
    monkeypatch.setattr("qatc.evaluation.parity.load", lambda _, **options: load(loaded, **options))
    failed = [check for check in verify(output, reload=False).checks if not check.passed]
    assert any("layers.1" in str(check.where) for check in failed), failed


def test_a_loaded_model_saves_them(best: Any, tmp_path: Path) -> None:
    load(best.output, compile=False).save_pretrained(tmp_path / "again")
    one, other = open_output(best.output), open_output(tmp_path / "again")
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())


def test_the_trained_scale_is_start_and_gain() -> None:
    model = prepare(make_llama(), BEST, compile=False)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach()
    start = least_error_scale(weight, BEST.weights)
    with torch.no_grad():
        model.get_parameter(f"{name}_scale_gain").fill_(0.5)
    scale = learned_scale_of(model.state_dict(), name, BEST.weights)
    assert scale is not None and torch.equal(scale, (start * 1.5).bfloat16().float())
    codes = QuantizedWeight.from_state(model.state_dict(), name, BEST.weights).codes
    wanted = (weight.double() / scale.double()).float().round().clamp(-8, 7)
    assert torch.equal(codes, wanted.to(torch.int8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": QuantSpec(8, range="signed")}, "activations.range is 'signed'"),
        ({"activations": QuantSpec(8, clip="learned")}, "activations.clip is 'learned'"),
        ({"head": QuantSpec(8, clip="learned")}, "head.clip is 'learned'"),
        ({"center_keys": True, "kv_site": "projection"}, "kv_site: cache"),
        ({"center_keys": True, "kv": QuantSpec()}, "without quantized keys"),
        ({"kv": ASYMMETRIC, "kv_site": "projection"}, "offsets of K and V, are of the cache site"),
        ({"kv": replace(ASYMMETRIC, group_size=8)}, "leave kv.group_size out"),
        ({"kv": ASYMMETRIC, "target": "torchao"}, "which the target torchao has not"),
        ({"rotate_keys": True, "target": "transformers"}, "rotate_keys is for the cache of qatc"),
        ({"value_bits": 16}, "value_bits must be 2 to 8"),
        ({"value_bits": 4, "kv": QuantSpec()}, "give kv fewer bits than 16"),
        ({"value_bits": 4, "kv_site": "projection"}, "take kv_site: cache"),
        ({"value_bits": 4, "target": "transformers"}, "target transformers has its own"),
        ({"weights": ASYMMETRIC}, "weights.range is 'asymmetric'"),
        ({"activations": ASYMMETRIC}, "activations.range is 'asymmetric'"),
        ({"head": ASYMMETRIC}, "head.range is 'asymmetric'"),
    ],
)
def test_a_recipe_says_what_cannot_be(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


def test_presets() -> None:
    assert Recipe.from_bits("4-8-4", preset="paper") == Recipe.from_bits("4-8-4")
    assert (BEST.weights.range, BEST.weights.clip) == ("signed", "learned")
    assert BEST.kv == BEST.weights and BEST.center_keys
    assert BEST.activations == Recipe().activations
    elsewhere = Recipe.from_bits("4-8-8", preset="best", target="vllm")
    assert elsewhere.weights.learned and not (elsewhere.kv.learned or elsewhere.center_keys)
    assert Recipe.from_dict(BEST.to_dict()) == BEST
    with pytest.raises(ConfigError, match="preset must be one of paper, best; got 'worst'"):
        Recipe.from_bits("4-8-4", preset="worst")


def test_the_range_of_keys_and_values_can_be_chosen() -> None:
    recipe = Recipe.from_bits("4-8-4", preset="best", kv_range="asymmetric")
    assert recipe == replace(BEST, kv=replace(BEST.kv, range="asymmetric"))
    assert Recipe.from_bits("4-8-4", kv_range="asymmetric").kv == ASYMMETRIC
    with pytest.raises(ConfigError, match="range must be one of"):
        Recipe.from_bits("4-8-4", kv_range="odd")
    with pytest.raises(ConfigError, match="kv_range .* leaves K and V at 16 bits"):
        Recipe.from_bits("4-8-16", kv_range="asymmetric")


def test_frozen_weights_pass_gradients_on() -> None:
    """As below an adapter, whose base weights are frozen, or behind a frozen head."""
    model = prepare(make_llama(), BEST, compile=False, integer_forward=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("value_gain"))
    model(input_ids=ids_of(model)).logits.square().sum().backward()
    gradient = model.get_parameter("model.layers.0.value_gain").grad
    assert gradient is not None and gradient.abs().max() > 0
    plain = prepare(make_llama(), Recipe(), compile=False, integer_forward=True)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" in name)
    plain(input_ids=ids_of(plain)).logits.square().sum().backward()
    assert plain.get_parameter("model.layers.0.input_layernorm.weight").grad is not None


def test_a_model_that_cannot_be_prepared_is_left_as_it_was() -> None:
    model = make_llama()
    names = model.state_dict().keys()
    grouped = Recipe.from_bits("4-8-4", preset="best", group_size=16)
    with pytest.raises(ConfigError, match="no integer forward"):
        prepare(model, grouped, compile=False, integer_forward=True)
    assert model.state_dict().keys() == names


def test_a_prepared_model_may_be_cast() -> None:
    """Its scales are computed in fp32 whatever they are kept in."""
    model = prepare(make_llama(), BEST, compile=False).to(torch.bfloat16)
    assert model(input_ids=ids_of(model)).logits.isfinite().all()
