"""One weight, layer or kind of linear rounded at a time."""

from __future__ import annotations

import pytest
import torch

from qatc.errors import ConfigError, DataError
from qatc.numerics.learned import least_error_scale
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.sensitivity import weight_sensitivity
from qatc.sensitivity.answers import Answers
from qatc.sensitivity.weights import find_weights, round_to_nearest
from tests.sensitivity.conftest import divergence, make_model, make_rows

W4 = Recipe.from_bits("4-16-16")


def test_each_weight_alone_against_a_whole_model_in_fp64() -> None:
    model, rows = make_model(), make_rows()
    done: list[tuple[int, int]] = []
    found = weight_sensitivity(
        model, rows, W4, batch_size=2, on_progress=lambda *now: done.append(now)
    )
    assert len(found) == 21 and done == [(i, 21) for i in range(1, 22)]
    for name, kl in found.items():
        assert kl == pytest.approx(divergence(model, rows, [name], 4), rel=2e-3), name


def test_layers_and_kinds_are_rounded_together() -> None:
    model, rows = make_model(), make_rows()
    names = [weight.name for weight in find_weights(model, W4)]
    by_layer = weight_sensitivity(model, rows, W4, "layer", bits=3)
    assert [*by_layer] == [f"model.layers.{i}" for i in range(3)]
    for layer, kl in by_layer.items():
        own = [name for name in names if name.startswith(f"{layer}.")]
        assert kl == pytest.approx(divergence(model, rows, own, 3), rel=2e-3)
    by_kind = weight_sensitivity(model, rows, W4, "kind")
    assert len(by_kind) == 7
    down = [name for name in names if "down" in name]
    assert by_kind["mlp.down_proj"] == pytest.approx(divergence(model, rows, down, 4), rel=2e-3)


def test_bits_are_those_of_the_recipe_and_skipped_weights_are_left_out() -> None:
    model, rows = make_model(), make_rows()
    recipe = Recipe.from_bits(
        "4-8-4", skip=("*.1.*",), weight_bits=(("*v_proj*", 2), ("*up_proj*", 16))
    )
    found = weight_sensitivity(model, rows, recipe)
    assert len(found) == 12 and not [name for name in found if ".1." in name or "up_proj" in name]
    for own, bits in (("v_proj", 2), ("k_proj", 4)):
        name = f"model.layers.2.self_attn.{own}.weight"
        assert found[name] == pytest.approx(divergence(model, rows, [name], bits), rel=2e-3)


def test_the_model_is_as_it_was() -> None:
    model, rows = make_model(), make_rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight_sensitivity(model, rows, W4, "layer")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    first, second, _ = model.model.layers
    own = second.forward
    second.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)
    assert Answers(model, rows, 2).divergence(2) == 0
    assert vars(second)["forward"] is wrapped and "forward" not in vars(first)


def test_learned_scales_begin_where_training_does() -> None:
    spec = QuantSpec(3, range="signed", clip="learned")
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    steps = least_error_scale(weight, spec).double()
    wanted = (weight.double() / steps).round().clamp(-4, 3) * steps
    assert torch.equal(round_to_nearest(weight, spec).double(), wanted)


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(DataError, match="no rows"):
        weight_sensitivity(make_model(), make_rows()[:0], W4)
    for recipe in (Recipe.from_bits("16-8-4"), Recipe.from_bits("4-8-4", skip=("*",))):
        with pytest.raises(ConfigError, match="quantizes no weights of the layers of Llama"):
            weight_sensitivity(make_model(), make_rows(), recipe)
