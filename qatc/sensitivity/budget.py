"""Which bits each weight gets, so that all of them have so many on average and lose least.

What a model loses is taken to be the sum of what it loses by each weight alone. That is measured at
the width next to the budget, and at other widths taken to be as much larger or smaller as the
squared error of the rounded weight is: of small changes, KL is a quadratic form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import FLOAT_BITS, VALID_BITS
from qatc.recipe.targets import find_target
from qatc.recipe.weight_bits import WeightBits
from qatc.sensitivity.answers import Answers
from qatc.sensitivity.weights import divergences, find_weights, round_to_nearest, with_bits

_NOISE = 1e-9
"""KL in nats that a weight is taken to cost at least: what is measured below is rounding of fp32,
and a weight that seemed to cost nothing would be left with the fewest bits, whatever the budget."""

WIDTHS = tuple(bits for bits in VALID_BITS if bits != FLOAT_BITS)


@dataclass(frozen=True)
class BitChoice:
    """Bits that were chosen for a budget.

    Attributes:
        budget: bits of a quantized weight on average, at most.
        average: what they are on average.
        divergence: estimated KL to full precision of all weights rounded so, nats per token.
        weight_bits: of a recipe, weights whose bits are not those of its ``weights``.
    """

    budget: float
    average: float
    divergence: float
    weight_bits: WeightBits


def check_budget(budget: float, recipe: Recipe) -> None:
    """Raise ``ConfigError`` if bits of this average cannot be chosen for a recipe."""
    if not WIDTHS[0] <= budget <= WIDTHS[-1]:
        raise ConfigError(
            f"the budget is the bits of a weight on average, {WIDTHS[0]} to {WIDTHS[-1]}, such as"
            f" 4.5; got {budget!r}"
        )
    if not recipe.weights.quantizes:
        raise ConfigError(
            f"a budget chooses the bits of weights, and {recipe.bits} leaves them at 16; choose"
            " fewer, such as --bits 4-8-4"
        )
    if recipe.weight_bits:
        raise ConfigError(
            "the recipe gives weights bits of their own (weight_bits), and a budget would choose"
            " others; leave out one of the two"
        )
    widest = replace(recipe.weights, bits=WIDTHS[-1])
    if obstacle := find_target(recipe.target).obstacle(widest):
        raise ConfigError(
            f"a budget gives weights up to {WIDTHS[-1]} bits, and the target {recipe.target} cannot"
            f" hold such a weight: {obstacle}"
        )


def fit_budget(
    model: Any,
    rows: Rows,
    recipe: Recipe,
    budget: float,
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> BitChoice:
    """Choose bits for every weight of the layers; the same model and rows give the same ones.

    Args:
        model: a transformers causal LM that is not prepared; it is as it was afterwards.
        rows: some rows of text.
        recipe: which weights are quantized, and how but for their bits.
        budget: bits of a quantized weight on average, at most.
        batch_size: rows at a time.
        on_progress: called with the weights measured and all of them.

    Raises:
        ConfigError: the budget is out of range, the recipe has ``weight_bits`` already or
            quantizes no weights, or the model is none that qatc supports.
        CaptureError: a layer cannot be captured.
        DataError: there is no row.
    """
    check_budget(budget, recipe)
    nearest = min(WIDTHS, key=lambda width: abs(width - budget))
    weights, answers = find_weights(model, recipe), Answers(model, rows, batch_size)
    measured = divergences(weights, answers, "weight", bits=nearest, on_progress=on_progress)
    estimates, sizes = {}, {}
    for weight in weights:
        values = weight.parameter.detach()
        sizes[weight.name] = values.numel()
        errors = {w: _error(values, round_to_nearest(values, with_bits(weight.spec, w)))
                  for w in WIDTHS}  # fmt: skip
        unit = max(measured[weight.name], _NOISE) / errors[nearest] if errors[nearest] else 0.0
        estimates[weight.name] = {width: unit * error for width, error in errors.items()}
    chosen = choose_bits(estimates, sizes, budget)
    usual = recipe.weights.bits
    return BitChoice(
        budget,
        sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes.values()),
        sum(estimates[name][bits] for name, bits in chosen.items()),
        tuple((name, bits) for name, bits in chosen.items() if bits != usual),
    )


def _error(values: Tensor, others: Tensor) -> float:
    return float((values.double() - others.double()).square().sum())


def choose_bits(
    divergences: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Bits of each weight, of the least sum of divergences that fits.

    All begin with the fewest bits, and those steps upwards are taken first that gain most for the
    numbers they take: along the lower convex hull of each weight, where what a next step gains is
    less than what the one before it did. What is left in the end is less than one step.

    Args:
        divergences: what each weight loses at each width.
        sizes: numbers in each weight.
        budget: bits on average, at most.
    """
    chosen = {name: min(widths) for name, widths in divergences.items()}
    room = sum(sizes[name] * (budget - bits) for name, bits in chosen.items())
    steps = [
        (-gain / sizes[name], number, low, high, name)
        for number, (name, widths) in enumerate(divergences.items())
        for low, high, gain in _hull(widths)
    ]
    for _, _, low, high, name in sorted(steps):
        cost = sizes[name] * (high - low)
        if chosen[name] == low and cost <= room:
            chosen[name], room = high, room - cost
    return chosen


def _hull(divergences: Mapping[int, float]) -> Iterator[tuple[int, int, float]]:
    """Steps along the lower convex hull, as (from, to, gain per bit), downhill only."""
    low = min(divergences)
    while True:
        wider = [width for width in divergences if width > low]
        gains = {w: (divergences[low] - divergences[w]) / (w - low) for w in wider}
        best = max(gains, key=lambda width: (gains[width], width), default=low)
        if best == low or gains[best] <= 0:
            return
        yield low, best, gains[best]
        low = best
