"""A trained model that torchao holds, without a directory in between."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor

import qatc
from qatc.errors import ConfigError
from qatc.export import export
from qatc.output import QuantizedWeight, load_reference
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import load_with_transformers, make_output
from tests.export.conftest import RECIPES, UNHELD, linear_of_torchao, width_of
from tests.output.conftest import IDS, logits, make_model


@pytest.mark.parametrize("name", ["4-8-4", "groups", "ends", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_a_trained_model_in_place(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model: Any = make_model(dtype=dtype, width=width_of(recipe))
    source = make_output(tmp_path / "source", recipe, copy.deepcopy(model))
    given = load_with_transformers(export(source, tmp_path / "out", format="torchao"))

    use_cache = model.config.use_cache
    qatc.prepare(model, recipe, compile=False)
    model.train()
    with pytest.raises(ConfigError, match=r"model\.layers\.0 was not captured .* training mode"):
        qatc.to_torchao(model)
    logits(model)
    assert id(qatc.to_torchao(model)) == id(model) and not model.training
    assert model.config.use_cache == use_cache
    for own, value in given.named_parameters():
        same = model.get_parameter(own).data
        if isinstance(value.data, Int8Tensor):
            assert isinstance(same, Int8Tensor)
            assert torch.equal(same.qdata, value.data.qdata)
            assert torch.equal(same.scale, value.data.scale)
        else:
            assert torch.equal(same, value)
    wanted = logits(given)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    written = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, given.generate(IDS, max_new_tokens=5, do_sample=False))

    for same in (model, copy.deepcopy(model)):
        same.save_pretrained(tmp_path / "saved")
        loaded = load_with_transformers(tmp_path / "saved")
        assert torch.equal(logits(loaded), wanted)
    assert loaded.config.tie_word_embeddings == (name in ("4-8-4", "groups"))


@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_it_compiles() -> None:
    model: Any = make_model()
    qatc.to_torchao(qatc.prepare(model, RECIPES["4-8-4"], compile=False))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for part in (x, x[:1, :1]):
            torch.testing.assert_close(compiled(part), layer(part), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_learned_scales_are_those_that_were_trained() -> None:
    model: Any = qatc.prepare(make_model(), Recipe.from_bits("4-8-4", preset="best"), compile=False)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(f"{name}_scale_gain").fill_(0.5)
    wanted = QuantizedWeight.from_state(
        model.state_dict(), name, QuantSpec(4, range="signed", clip="learned")
    )
    held = qatc.to_torchao(model).get_parameter(name)
    assert torch.equal(held.dequantize(), wanted.dequantize())


@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(13, 7), nn.Linear(7, 5)
    model = nn.Sequential(first, nn.ReLU(), last)
    qatc.prepare(model, Recipe.from_bits("4-8-16"), compile=False)
    with pytest.raises(ConfigError, match="run the model once"):
        qatc.to_torchao(model)
    x = torch.randn(11, 13)
    model(x)
    codes = [QuantizedWeight.from_float(own.weight, QuantSpec(4)) for own in (first, last)]
    with torch.no_grad():
        actual = qatc.to_torchao(model)(x)
        hidden = (linear_of_torchao(x, codes[0]) + first.bias).relu()
        assert torch.equal(actual, linear_of_torchao(hidden, codes[1]) + last.bias)


@pytest.mark.parametrize("reason", UNHELD)
def test_what_torchao_cannot_hold_is_refused(reason: str) -> None:
    model, recipe = make_model(tied=False, width=64), UNHELD[reason]
    qatc.prepare(model, recipe, compile=False)
    wanted = logits(model)
    with pytest.raises(ConfigError, match=reason):
        qatc.to_torchao(model)
    assert torch.equal(logits(model), wanted), "as it was"
    qatc.restore(model)


def test_a_model_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not prepared"):
        qatc.to_torchao(make_model())


def test_a_model_says_so_too() -> None:
    model = qatc.prepare(make_model(), RECIPES["8-8-16"], compile=False)
    with pytest.warns(UserWarning, match="another activation rule"):
        qatc.to_torchao(model)


@pytest.mark.parametrize("bits", ["8-8-16", "4-8-16"])
def test_under_its_own_rule_it_computes_what_was_trained(bits: str, tmp_path: Path) -> None:
    """The integer model, the trained graph and what transformers loads: one and the same."""
    recipe = Recipe.from_bits(bits, target="torchao")
    source = make_output(tmp_path / "source", recipe, make_model())
    given = load_with_transformers(export(source, tmp_path / "out", format="torchao"))
    lowered = qatc.load(source, compile=False, kernels="torchao")
    wanted = logits(given)
    trained: Any = load_reference(source)
    qatc.prepare(trained, recipe, compile=False, integer_forward=True)

    def apart(one: Tensor, other: Tensor) -> float:
        """Median of the tokens: a code on a tie falls either way with the last bit of a sum."""
        return float((one - other).abs().amax(-1).median() / wanted.abs().max())

    assert apart(logits(lowered), wanted) <= 1e-6 and apart(logits(trained), wanted) <= 1e-6

    other = make_output(tmp_path / "other", Recipe.from_bits(bits), make_model())
    elsewhere = load_with_transformers(export(other, tmp_path / "there", format="torchao"))
    assert apart(logits(qatc.load(other, compile=False)), logits(elsewhere)) > 1e-4
