"""What a prepared model holds besides its own parameters: learned scales and centers of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatc.graph.nodes import find_attentions, shape_of
from qatc.numerics.learned import learned_scale, least_error_scale
from qatc.passes.quantize_kv import KEY_CENTER, KEY_GAIN, VALUE_GAIN
from qatc.passes.quantize_weights import SCALE_GAIN, SCALE_START
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

if TYPE_CHECKING:
    from qatc.models.preparation import Prepared

OF_ATTENTION = (KEY_CENTER, KEY_GAIN, VALUE_GAIN)


@dataclass(frozen=True, eq=False)
class Added:
    """A parameter or buffer that :func:`add` put on a module."""

    module: nn.Module
    name: str

    def remove(self) -> None:
        delattr(self.module, self.name)


def of_attention(name: str) -> bool:
    """Whether a tensor of a state dict says how keys and values are quantized."""
    return name.rpartition(".")[2].rstrip("_0123456789") in OF_ATTENTION


def is_gain(name: str) -> bool:
    """Whether a tensor of a state dict is the gain of scales of keys or values: fp32 for good."""
    return of_attention(name) and KEY_CENTER not in name


def of_weight(name: str) -> bool:
    """Whether a tensor of a state dict is of the learned scales of a weight."""
    return name.endswith((SCALE_START, SCALE_GAIN))


@torch.no_grad()
def add(
    model: nn.Module,
    recipe: Recipe,
    weights: Iterable[str],
    attentions: Mapping[str, tuple[tuple[int, int], ...]],
    start_scales: Mapping[str, Tensor],
) -> tuple[Added, ...]:
    """Put learned scales and centers, as they are before training, on a model.

    Args:
        model: whose layers are still its own.
        recipe: says which there are.
        weights: names of those that are quantized in its layers.
        attentions: heads and width of the keys of every attention, by the layer's name.
        start_scales: of weights, those that do not start at the least squared error.

    Returns:
        What was put there.
    """
    found: list[Added] = []

    def put(path: str, name: str, value: Tensor, trained: bool) -> None:
        module = model.get_submodule(path)
        if trained:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
        found.append(Added(module, name))

    for full in weights if recipe.weights.learned else ():
        path, _, leaf = full.rpartition(".")
        weight = model.get_parameter(full)
        start = start_scales.get(full)
        if start is None:
            start = least_error_scale(weight, recipe.weights_of(full))
        start = start.to(weight.device, copy=True)
        put(path, leaf + SCALE_START, start, False)
        put(path, leaf + SCALE_GAIN, torch.zeros_like(start), True)
    for path, sizes in attentions.items():
        device = next(model.get_submodule(path).parameters()).device
        for number, (heads, width) in enumerate(sizes):
            end = f"_{number}" if number else ""
            if recipe.center_keys:
                put(path, KEY_CENTER + end, torch.zeros((heads, 1, width), device=device), False)
            for name in (KEY_GAIN, VALUE_GAIN) if recipe.kv.learned else ():
                put(path, name + end, torch.zeros((heads, 1, 1), device=device), True)
    return tuple(found)


def attention_sizes(prepared: Prepared) -> dict[str, tuple[tuple[int, int], ...]]:
    """Heads and width of the keys of every attention, by the layer's name."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for forward in prepared.forwards:
        for template in prepared.store.of(forward):
            keys = [shape_of(a.key) for a in find_attentions(template.graph_module)]
            found[forward.name] = tuple((int(shape[1]), int(shape[3])) for shape in keys)
    return found


def learned_scale_of(state: Mapping[str, Any], name: str, spec: QuantSpec) -> Tensor | None:
    """The trained scale ``[N, G]`` of a weight in a state dict; None for a MinMax one."""
    if not spec.learned:
        return None
    start, gain = state[name + SCALE_START], state[name + SCALE_GAIN]
    return learned_scale(start.detach(), gain.detach(), spec, snap=True)
