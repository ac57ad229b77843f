"""Methods as a user names them: ``rtn``, ``gptq``, ``rotate+gptq``, ``gptq+qat``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.ptq.gptq import gptq
from qatc.ptq.rotation import rotate, rotate_inputs
from qatc.ptq.smoothquant import smoothquant
from qatc.recipe.recipe import Recipe

DOWN_PROJECTIONS = ("*.down_proj.weight",)
"""What the models that can be rotated call the weight whose input has the worst outliers."""

ORDER = ("rotate", "smoothquant", "gptq", "qat")
"""Each makes a model that the next may start from. The other way round it would undo its work: a
rotation folds in the norms that smoothing scaled, and both move weights off GPTQ's codes."""


@dataclass(frozen=True)
class Method:
    """How a model gets to its codes.

    Attributes:
        steps: the post-training methods, in order.
        trains: whether quantization-aware training follows.
    """

    steps: tuple[str, ...]
    trains: bool

    @property
    def name(self) -> str:
        """What a model after the steps is called in figures."""
        return "+".join(self.steps)


def parse_method(text: str) -> Method:
    """The method that ``text`` names.

    Raises:
        ConfigError: it names none, or its steps are in another order than theirs.
    """
    steps = [] if text == "rtn" else text.split("+")
    unknown = [step for step in steps if step not in ORDER]
    if unknown or len(set(steps)) != len(steps):
        what = f"there is no {unknown[0]!r}" if unknown else "a step stands twice"
        raise ConfigError(
            f"method must be rtn, or one or more of {', '.join(ORDER)} joined by +; got {text!r}:"
            f" {what}"
        )
    ordered = [step for step in ORDER if step in steps]
    if steps != ordered:
        raise ConfigError(
            f"the method {text!r} would undo an earlier step in a later one; write"
            f" {'+'.join(ordered)!r}"
        )
    return Method(tuple(step for step in steps if step != "qat"), "qat" in steps)


def with_rotations(recipe: Recipe, method: Method) -> Recipe:
    """The recipe of a method that rotates: with what it rotates at run time, or without.

    With fewer than 8 bits the activations of a gated product, which have the worst outliers of a
    layer, are where a rotated model loses most, and keys of fewer bits than that come next; at 8
    bits the transforms are not worth their time. Only qatc's runtime has them, so that another
    target goes without.
    """
    needs = recipe.activations.bits < 8 and recipe.weights.quantizes and recipe.target == "qatc"
    if "rotate" not in method.steps or not needs:
        return recipe
    keys = recipe.rotate_keys or (recipe.kv.bits < 8 and recipe.kv_site == "cache")
    inputs = recipe.rotate_inputs or DOWN_PROJECTIONS
    return dataclasses.replace(recipe, rotate_inputs=inputs, rotate_keys=keys)


def apply(
    method: Method,
    model: Any,
    rows: Rows,
    recipe: Recipe,
    *,
    seed: int = 0,
    batch_size: int = 8,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Change the weights of ``model`` by all steps of a method, in place.

    Args:
        method: its steps.
        model: a transformers causal LM whose layers run in float.
        rows: calibration text.
        recipe: what is quantized and how.
        seed: of what is random.
        batch_size: rows per forward pass.
        on_layer: called with the layers that GPTQ has rounded, and all layers.

    Returns:
        Scales of weights where GPTQ chose codes for them, see :func:`qatc.ptq.gptq.gptq`.
    """
    if "rotate" in method.steps:
        rotate(model, seed=seed)
    if "smoothquant" in method.steps:
        smoothquant(model, rows, batch_size=batch_size)
    if recipe.rotate_inputs:
        rotate_inputs(model, recipe)
    if "gptq" in method.steps:
        return gptq(model, rows, recipe, batch_size=batch_size, on_layer=on_layer)
    return {}
