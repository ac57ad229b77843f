"""Bits chosen for a budget."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatc.errors import ConfigError
from qatc.recipe.recipe import Recipe
from qatc.sensitivity import choose_bits, fit_budget, weight_sensitivity
from tests.sensitivity.conftest import divergence, make_model, make_rows, minmax

WIDTHS = (2, 3, 4, 6)
costs = st.lists(st.floats(0, 10), min_size=4, max_size=4)
tables = st.lists(st.tuples(costs, st.integers(1, 50)), min_size=1, max_size=4)


def named(table: list[tuple[list[float], int]]) -> tuple[dict[str, Any], dict[str, int]]:
    widths = {str(i): dict(zip(WIDTHS, own, strict=True)) for i, (own, _) in enumerate(table)}
    return widths, {str(i): size for i, (_, size) in enumerate(table)}


def lowest(widths: dict[str, Any], sizes: dict[str, int], budget: float) -> float:
    """The least sum of all combinations that fit."""
    room = budget * sum(sizes.values())
    return min(
        sum(own[bits] for own, bits in zip(widths.values(), chosen, strict=True))
        for chosen in itertools.product(WIDTHS, repeat=len(widths))
        if sum(n * bits for n, bits in zip(sizes.values(), chosen, strict=True)) <= room
    )


@given(table=tables, budget=st.floats(2, 6))
def test_the_choice_fits_and_is_at_most_a_step_from_the_best(
    table: list[tuple[list[float], int]], budget: float
) -> None:
    widths, sizes = named(table)
    chosen = choose_bits(widths, sizes, budget)
    total = sum(sizes.values())
    assert sum(sizes[name] * bits for name, bits in chosen.items()) <= budget * total + 1e-6
    found = sum(widths[name][bits] for name, bits in chosen.items())
    step = max(max(own.values()) - min(own.values()) for own in widths.values())
    assert found <= lowest(widths, sizes, budget) + step + 1e-9
    assert chosen == choose_bits(widths, sizes, budget)


@given(
    scales=st.lists(st.integers(1, 10_000), min_size=4, max_size=4),
    budget=st.sampled_from([2, 2.25, 3, 3.5, 4, 6]),
)
def test_of_equal_sizes_it_is_the_best(scales: list[int], budget: float) -> None:
    widths = {str(i): {w: scale * 4.0**-w for w in (2, 3, 4)} for i, scale in enumerate(scales)}
    chosen = choose_bits(widths, dict.fromkeys(widths, 8), budget)
    best = min(
        sum(own[bits] for own, bits in zip(widths.values(), bits_of, strict=True))
        for bits_of in itertools.product((2, 3, 4), repeat=4)
        if sum(bits_of) <= 4 * budget
    )
    assert sum(widths[name][bits] for name, bits in chosen.items()) == pytest.approx(best)


def test_a_weight_that_gains_nothing_stays_at_the_fewest_bits() -> None:
    widths = {"flat": {2: 1.0, 4: 1.0}, "rising": {2: 1.0, 4: 2.0}, "dip": {2: 5.0, 3: 5.0, 4: 1.0}}
    chosen = choose_bits(widths, dict.fromkeys(widths, 1), 8)
    assert chosen == {"flat": 2, "rising": 2, "dip": 4}


def test_a_gain_counts_for_the_numbers_that_it_takes() -> None:
    widths = {"large": {2: 5.0, 3: 0.0}, "one": {2: 4.0, 3: 0.0}, "other": {2: 4.0, 3: 0.0}}
    chosen = choose_bits(widths, {"large": 4, "one": 2, "other": 2}, 2.5)
    assert chosen == {"large": 2, "one": 3, "other": 3}


def test_bits_of_a_model_follow_what_its_weights_cost() -> None:
    model, rows = make_model(), make_rows()
    idle, loud = model.model.layers[0].mlp, model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        idle.down_proj.weight.zero_()
        loud.weight[:, 0] *= 30
    recipe = Recipe.from_bits("4-8-4")
    choice = fit_budget(model, rows, recipe, 3.7, batch_size=2)
    chosen = dict(choice.weight_bits)
    own = {name: chosen.get(name, 4) for name in weight_sensitivity(model, rows, recipe)}
    sizes = {name: model.get_parameter(name).numel() for name in own}
    mean = sum(sizes[name] * bits for name, bits in own.items()) / sum(sizes.values())
    assert choice.average == pytest.approx(mean) and 3.5 < mean <= 3.7 == choice.budget
    assert {own[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")} == {2}
    assert own["model.layers.1.self_attn.o_proj.weight"] > 4
    assert choice == fit_budget(model, rows, recipe, 3.7, batch_size=2)
    assert 4 not in chosen.values() and {2, 5} <= set(own.values())


def test_less_is_lost_than_by_equal_bits_for_all() -> None:
    model, rows, held_out = make_model(), make_rows(), make_rows(8, 24)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0] *= 20
        model.model.layers[0].self_attn.v_proj.weight[:, 0] *= 20
    choice = fit_budget(model, rows, Recipe(), 4)
    names = [*weight_sensitivity(model, rows, Recipe())]
    chosen = dict(choice.weight_bits)
    with torch.no_grad():
        uniform = divergence(model, held_out, names, 4)
        mixed = model
        for bits in set(chosen.values()):
            own = [name for name in names if chosen.get(name, 4) == bits]
            mixed = _rounded(mixed, own, bits)
        mixed = _rounded(mixed, [name for name in names if name not in chosen], 4)
        found = _between(model, mixed, held_out)
    assert choice.average <= 4 and found < 0.7 * uniform


def _rounded(model: Any, names: list[str], bits: int) -> Any:
    changed = copy.deepcopy(model)
    for name in names:
        own = changed.get_parameter(name)
        own.copy_(minmax(own.double(), bits, snap=True))
    return changed


def _between(model: Any, other: Any, rows: Any) -> float:
    ids, real = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.real)
    before, after = (
        m(input_ids=ids, use_cache=False).logits[real].double().log_softmax(-1)
        for m in (model, other)
    )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (Recipe(), 1.9, r"2 to 8, such as 4\.5; got 1\.9"),
        (Recipe(), 8.5, r"2 to 8, such as 4\.5; got 8\.5"),
        (Recipe(), float("nan"), "got nan"),
        (Recipe.from_bits("16-8-4"), 4, "16-8-4 leaves them at 16"),
        (Recipe(weight_bits=(("*", 3),)), 4, r"bits of their own \(weight_bits\)"),
    ],
)
def test_what_no_bits_can_be_chosen_for(recipe: Recipe, budget: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_budget(make_model(), make_rows(), recipe, budget)
