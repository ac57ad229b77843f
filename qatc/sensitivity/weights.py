"""How far a model moves when some weights of its layers are rounded, and all else is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.graph.nodes import find_quantizable
from qatc.numerics.fake_quant import fake_quantize
from qatc.numerics.learned import least_error_scale
from qatc.ptq.structure import layer_graphs
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.sensitivity.answers import Answers

By = Literal["weight", "layer", "kind"]


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """A weight of a decoder layer that a recipe quantizes.

    Attributes:
        name: its full name.
        kind: its name in the layer, without ``.weight``.
        layer: full name of the layer.
        number: of the layer.
        parameter: the weight.
        spec: how it is quantized.
    """

    name: str
    kind: str
    layer: str
    number: int
    parameter: nn.Parameter
    spec: QuantSpec


def find_weights(model: Any, recipe: Recipe) -> list[LayerWeight]:
    """The weights of decoder layers that a recipe quantizes, layer by layer, in graph order.

    Raises:
        ConfigError: the model is none that qatc supports, or there is no such weight.
        CaptureError: a layer cannot be captured.
    """
    found = []
    for number, layer in enumerate(layer_graphs(model)):
        skip = recipe.exceptions(layer.name, dict(layer.module.named_parameters())).skip
        for own in [linear.parameter for linear in find_quantizable(layer.graph, skip)]:
            name, parameter = f"{layer.name}.{own}", layer.module.get_parameter(own)
            kind, spec = own.removesuffix(".weight"), recipe.weights_of(name)
            found.append(LayerWeight(name, kind, layer.name, number, parameter, spec))
    if not found or not recipe.weights.quantizes:
        raise ConfigError(
            f"the recipe {recipe.bits} quantizes no weights of the layers of"
            f" {type(model).__name__}, so that there is nothing to measure; give weights fewer"
            " bits than 16, or leave out some of skip"
        )
    return found


def weight_sensitivity(
    model: Any,
    rows: Rows,
    recipe: Recipe,
    by: By = "weight",
    *,
    bits: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """KL of the model to itself with only one weight, one layer, or one kind of linear rounded.

    Weights are rounded to nearest, by scales as they are before training; all other weights,
    activations, keys and values stay in float. Layers before those that changed are not computed
    again.

    Args:
        model: a transformers causal LM that is not prepared; it is as it was afterwards.
        rows: some rows of text.
        recipe: which weights are quantized, and how.
        by: what is rounded at a time: a ``weight``, all of a decoder ``layer``, or those of one
            ``kind`` in all layers.
        bits: to round to, ``None`` for those that the recipe gives each weight.
        batch_size: rows at a time.
        on_progress: called with the roundings done and all of them.

    Returns:
        KL(model || rounded), nats per token, by the name of the weight, layer or kind.

    Raises:
        ConfigError: the model is none that qatc supports, or the recipe quantizes none of its
            weights.
        CaptureError: a layer cannot be captured.
        DataError: there is no row.
    """
    weights, answers = find_weights(model, recipe), Answers(model, rows, batch_size)
    return divergences(weights, answers, by, bits=bits, on_progress=on_progress)


def divergences(
    weights: Iterable[LayerWeight],
    answers: Answers,
    by: By,
    *,
    bits: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """:func:`weight_sensitivity` of weights that are known, by answers that are."""
    groups: dict[str, list[LayerWeight]] = {}
    for weight in weights:
        name = {"weight": weight.name, "layer": weight.layer, "kind": weight.kind}[by]
        groups.setdefault(name, []).append(weight)
    found = {}
    for done, (name, group) in enumerate(groups.items()):
        with rounded({w: w.spec if bits is None else with_bits(w.spec, bits) for w in group}):
            found[name] = answers.divergence(min(weight.number for weight in group))
        if on_progress is not None:
            on_progress(done + 1, len(groups))
    return found


def with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    """The same quantizer of so many bits."""
    return dataclasses.replace(spec, bits=bits)


def round_to_nearest(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The values ``[N, K]`` that a weight is quantized to before anything is trained."""
    scale = least_error_scale(weight, spec) if spec.learned else None
    return fake_quantize(weight.detach(), spec, snap_scale=True, start=scale)


@contextmanager
def rounded(weights: Mapping[LayerWeight, QuantSpec]) -> Iterator[None]:
    """Let weights be what they are quantized to."""
    own = {weight: weight.parameter.data for weight in weights}
    try:
        for weight, spec in weights.items():
            weight.parameter.data = round_to_nearest(own[weight], spec)
        yield
    finally:
        for weight, values in own.items():
            weight.parameter.data = values
