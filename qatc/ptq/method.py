"""Methods as a user names them: ``rtn``, ``gptq``, ``rotate+gptq``, ``gptq+qat``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.ptq.gptq import gptq
from qatc.ptq.rotation import rotate
from qatc.ptq.smoothquant import smoothquant
from qatc.recipe.recipe import Recipe

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
    scales: dict[str, Tensor] = {}
    for step in method.steps:
        if step == "rotate":
            rotate(model, seed=seed)
        elif step == "smoothquant":
            smoothquant(model, rows, batch_size=batch_size)
        else:
            scales = gptq(model, rows, recipe, batch_size=batch_size, on_layer=on_layer)
    return scales
