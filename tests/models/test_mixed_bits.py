"""Weights of several bits in one model: trained, stored and run as each of them says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qatc.cli.main import app
from qatc.errors import ConfigError
from qatc.evaluation.parity import verify
from qatc.losses.distances import soft_cross_entropy
from qatc.models.preparation import prepare, prepared_state, quantized_specs, restore
from qatc.output import load_codes, load_reference
from qatc.ptq import gptq
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.report.plan import inspect_model
from qatc.runtime import program
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load
from tests.conftest import load_with_transformers, make_llama, make_output, save
from tests.ptq.conftest import make_rows

MIXED = (
    *(("*.1.self_attn.v_proj.weight", 8), ("*.0.mlp.down_proj.weight", 16)),
    *(("*.v_proj.weight", 5), ("*.2.*", 2), ("*.0.mlp.*", 3)),
)
RECIPE = Recipe.from_bits("4-8-4", weight_bits=MIXED)
LINEARS = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [
    f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
]
IDS = torch.randint(2, 112, (3, 21), generator=torch.Generator().manual_seed(0))


def wanted(name: str) -> int:
    """Written out by hand: what the first match of each weight says."""
    layer, linear = int(name.split(".")[2]), name.split(".")[4]
    if linear == "v_proj":
        return 8 if layer == 1 else 5
    if layer == 0 and "mlp" in name:
        return 16 if linear == "down_proj" else 3
    return 2 if layer == 2 else 4


WANTED = {
    name: wanted(name) for layer in range(3) for own in LINEARS
    if wanted(name := f"model.layers.{layer}.{own}") != 16
}  # fmt: skip


def make_model() -> Any:
    return make_llama(num_hidden_layers=3)


def values_of(weight: Any, bits: int) -> Any:
    """What restricted MinMax makes of a weight, in fp64; its scales are bf16 ones."""
    values = weight.detach().double()
    scale = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.to(torch.bfloat16).double()
    largest = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-largest, largest) * scale


def test_every_weight_gets_its_bits_and_equal_layers_share_a_graph() -> None:
    model = make_llama(num_hidden_layers=5)
    recipe = Recipe.from_bits("4-8-4", weight_bits=MIXED)
    prepare(model, recipe, compile=False)
    found = quantized_specs(model)
    assert {name: spec.bits for name, spec in found.items() if name in WANTED} == WANTED
    assert len(found) == len(WANTED) + 2 * len(LINEARS)
    state = prepared_state(model)
    graphs = [id(state.store.of(forward)[0]) for forward in state.forwards]
    assert graphs[3] == graphs[4] and len(set(graphs)) == 4
    assert {spec.group_size for spec in found.values()} == {None}


@pytest.mark.parametrize("on_integers", [False, True])
def test_it_computes_what_the_rounded_weights_do(on_integers: bool) -> None:
    bits = "4-8-16" if on_integers else "4-16-16"
    recipe = Recipe.from_bits(bits, weight_bits=MIXED)
    model, plain = make_model(), make_model()
    with torch.no_grad():
        for name, own in WANTED.items():
            plain.get_parameter(name).copy_(values_of(plain.get_parameter(name), own))
    only_inputs = Recipe.from_bits(
        bits.replace("4", "16", 1), skip=("*lm_head*", "*embed*", "*.0.mlp.down_proj.weight")
    )
    if on_integers:
        prepare(plain, only_inputs, compile=False)
    prepare(model, recipe, compile=False, integer_forward=on_integers)
    with torch.no_grad():
        found, should = (m(input_ids=IDS, use_cache=False).logits for m in (model, plain))
    assert float((found - should).abs().max() / should.abs().max()) < 1e-3


def test_gradients_reach_every_weight() -> None:
    model, teacher = make_model(), make_model()
    prepare(model, RECIPE, compile=False)
    with torch.no_grad():
        target = teacher(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    loss, _ = soft_cross_entropy(logits, target, torch.ones(len(target), dtype=torch.bool))
    loss.backward()
    assert all(bool(model.get_parameter(name).grad.abs().sum() > 0) for name in WANTED)


def test_the_integer_model_computes_what_was_trained(tmp_path: Path) -> None:
    own = (("*.0.mlp.up_proj.weight", 16), ("*.0.*.v_proj.*", 8), ("*.1.mlp.*", 3), ("*.1.*", 5))
    recipe = Recipe.from_bits("4-8-4", weight_bits=own)
    output = make_output(tmp_path / "out", recipe)
    report = verify(output, reload=False)
    assert report.passed, [check for check in report.checks if not check.passed]
    codes = load_codes(output)
    bits = {name.removeprefix("model.layers."): w.spec.bits for name, w in codes.items()}
    assert bits == {f"1.{name}": 3 if "mlp" in name else 5 for name in LINEARS} | {
        f"0.{name}": 8 if "v_proj" in name else 4 for name in LINEARS if "up_proj" not in name
    }
    model = load(output, compile=False)
    if program.obstacle() is None:
        decode = runtime_of(model).decode
        assert decode is not None and decode.program() is not None, decode and decode.reason


def test_learned_scales_start_at_the_bits_of_each_weight(tmp_path: Path) -> None:
    recipe = Recipe.from_bits("4-8-4", preset="best", weight_bits=MIXED)
    model = make_model()
    prepare(model, recipe, compile=False)
    specs = quantized_specs(model)
    assert specs["model.layers.2.mlp.up_proj.weight"] == QuantSpec(
        2, range="signed", clip="learned"
    )
    starts = dict(model.named_buffers())
    for name, spec in specs.items():
        weight = model.get_parameter(name).detach()
        largest = (weight / starts[f"{name}_scale_start"]).abs().max()
        assert -spec.code_min * 0.7 <= float(largest) <= -spec.code_min * 1.6
    restore(model)


def test_gptq_rounds_to_the_bits_of_each_weight() -> None:
    recipe = Recipe.from_bits("4-16-16", weight_bits=MIXED)
    model = make_model()
    gptq(model, make_rows(), recipe, batch_size=4)
    for name, bits in WANTED.items():
        weight = model.get_parameter(name).detach()
        off = (weight - values_of(weight, bits)).abs().max() / weight.abs().max()
        assert float(off) < 0.005, (name, bits)
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(down, make_model().get_parameter("model.layers.0.mlp.down_proj.weight"))


def test_transformers_loads_both_layouts_side_by_side(tmp_path: Path) -> None:
    recipe = Recipe.from_bits("4-16-16", weight_bits=MIXED)
    output = make_output(tmp_path / "out", recipe, make_model())
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert [group["format"] for group in groups] == ["int-quantized", "pack-quantized"]
    assert [group["targets"] for group in groups] == [
        [f"model.layers.{i}.self_attn.v_proj" for i in range(3)], ["Linear"],
    ]  # fmt: skip
    assert config["format"] == "mixed-precision"
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.down_proj"}
    loaded, reference = load_with_transformers(output), load_reference(output)
    with torch.no_grad():
        found, should = (m(input_ids=IDS, use_cache=False).logits for m in (loaded, reference))
    assert float((found - should).abs().max() / should.abs().max()) < 1e-5


def test_the_plan_counts_each_weight_by_its_bits(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "model", make_model(), tokenizer)
    uniform, mixed = (inspect_model(str(path), r) for r in (Recipe(), RECIPE))
    numbers = {name: p.numel() for name, p in make_model().named_parameters()}
    total = sum(numbers[name] for name in WANTED)
    mean = sum(numbers[name] * bits for name, bits in WANTED.items()) / total
    assert (uniform.weight_bits, uniform.bits) == (4, "4-8-4")
    assert mixed.weight_bits == pytest.approx(mean) and mixed.bits == "mixed-8-4"
    down = numbers["model.layers.0.mlp.down_proj.weight"]
    macs = sum(numbers[name] * (bits - 4) * 8 for name, bits in WANTED.items())
    macs += down * (16 * 16 - 4 * 8)
    assert mixed.operations[1] - uniform.operations[1] == pytest.approx(2048 * macs)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.to_yaml(), encoding="utf-8")
    shown = CliRunner().invoke(app, ["inspect", str(path), "--recipe", str(recipe)])
    assert shown.exit_code == 0, shown.output
    assert "weight_bits are 16" in shown.stdout
    assert f"{mean:,.4g}" in shown.stdout and "mixed-8-4" in shown.stdout


@pytest.mark.parametrize("pattern", ["*.v_prj.*", "lm_head.weight", "*embed*", "*norm*"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    recipe = Recipe.from_bits("4-8-4", weight_bits=((pattern, 6),))
    says = f"weight_bits pattern {re.escape(repr(pattern))} matches no weight .*--head-bits"
    with pytest.raises(ConfigError, match=says):
        prepare(make_llama(), recipe, compile=False)
