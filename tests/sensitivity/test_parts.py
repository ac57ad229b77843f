"""Only weights, inputs, keys or values quantized."""

from __future__ import annotations

import pytest
import torch

from qatc.models.preparation import prepare, restore
from qatc.recipe.recipe import Recipe
from qatc.sensitivity import measure_sensitivity, part_sensitivity
from tests.conftest import make_llama
from tests.sensitivity.conftest import divergence, make_rows

WEIGHTS = [f"self_attn.{p}_proj" for p in "qkvo"] + [
    f"mlp.{p}_proj" for p in ("gate", "up", "down")
]
NAMES = [f"model.layers.{i}.{own}.weight" for i in range(2) for own in WEIGHTS]


def test_each_part_alone_against_fp64() -> None:
    model, rows = make_llama(), make_rows()
    found = part_sensitivity(model, rows, Recipe.from_bits("4-6-3"), batch_size=2)
    wanted = {
        "weights": divergence(model, rows, NAMES, 4),
        "activations": divergence(model, rows, activations=6),
        "keys": divergence(model, rows, keys=3),
        "values": divergence(model, rows, values=3),
        "everything": divergence(model, rows, NAMES, 4, activations=6, keys=3, values=3),
    }
    assert found == pytest.approx(wanted, rel=0.02)  # a code on a tie may fall the other way


def test_the_projection_site_and_parts_that_are_left_out() -> None:
    model, rows = make_llama(), make_rows()
    recipe = Recipe.from_bits("16-16-3", kv_site="projection")
    found = part_sensitivity(model, rows, recipe)
    assert [*found] == ["keys", "values", "everything"]
    assert 0 < found["keys"] != found["values"] > 0
    assert found["everything"] > max(found["keys"], found["values"])


def test_centers_are_measured_and_head_and_embedding_have_lines() -> None:
    model, rows = make_llama(), make_rows()
    for layer in model.model.layers:
        bias = torch.tensor([0, 0, 4, 20, 0, 0, 4, 20.0]).repeat(2)
        layer.self_attn.k_proj.bias = torch.nn.Parameter(bias)
    plain = Recipe.from_bits("16-16-4", head_bits=3, embedding_bits=3)
    centered = Recipe.from_bits("16-16-4", head_bits=3, embedding_bits=3, center_keys=True)
    one, other = (part_sensitivity(model, rows, recipe) for recipe in (plain, centered))
    assert [*one] == ["keys", "values", "head", "embedding", "everything"]
    assert other["keys"] < 0.2 * one["keys"]
    assert other["values"] == pytest.approx(one["values"], rel=1e-3)
    assert one["head"] > 0 and one["embedding"] > 0


def test_parts_that_their_target_takes_together_only() -> None:
    model, rows = make_llama(), make_rows()
    found = part_sensitivity(model, rows, Recipe.from_bits("4-8-16", target="executorch"))
    assert [*found] == ["weights", "activations", "everything"] and min(found.values()) > 0


def test_values_of_other_bits() -> None:
    model, rows = make_llama(), make_rows()
    at = {bits: part_sensitivity(model, rows, Recipe.from_bits(f"16-16-{bits}")) for bits in (3, 6)}
    mixed = part_sensitivity(model, rows, Recipe.from_bits("16-16-6", value_bits=3))
    assert (mixed["keys"], mixed["values"]) == (at[6]["keys"], at[3]["values"])
    assert at[6]["everything"] < mixed["everything"] < at[3]["everything"]


def test_rotations_belong_to_the_keys_alone() -> None:
    """Weights have not been turned, so inputs are not rotated either."""
    model, rows = make_llama(), make_rows()
    recipe = Recipe.from_bits("4-6-3", rotate_inputs=("*.down_proj.weight",), rotate_keys=True)
    plain = part_sensitivity(model, rows, Recipe.from_bits("4-6-3"))
    rotated = part_sensitivity(model, rows, recipe)
    assert plain.keys() == rotated.keys() and rotated["keys"] != plain["keys"]
    for part in ("weights", "activations", "values"):
        assert rotated[part] == plain[part]
    assert 0.3 < rotated["everything"] / plain["everything"] < 3


def test_the_model_can_be_prepared_afterwards() -> None:
    model, rows = make_llama(), make_rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_sensitivity(model, rows, Recipe(), name="tiny")
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert (found.model, found.bits, found.tokens) == ("tiny", "4-8-4", int(rows.real.sum()))
    assert len(found.layers) == 2 and len(found.kinds) == 7
    assert not measure_sensitivity(model, rows, Recipe.from_bits("16-8-16")).layers
    restore(prepare(model, Recipe(), compile=False))
