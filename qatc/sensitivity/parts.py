"""How far a model moves when only its weights, inputs, keys or values are quantized."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qatc.data.corpus import Rows
from qatc.graph.nodes import LINEAR, find_attentions, is_fake_quantize
from qatc.models.centers import center_keys
from qatc.models.preparation import prepare, prepared_state, restore
from qatc.ptq.calibrate import batches
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.sensitivity.answers import Answers


def part_sensitivity(
    model: Any, rows: Rows, recipe: Recipe, *, batch_size: int = 8
) -> dict[str, float]:
    """KL of the model to itself with only one part of a recipe, and with all of it, not trained.

    Args:
        model: a transformers causal LM that is not prepared; it is as it was afterwards.
        rows: some rows of text; the centers of keys are measured on them, if the recipe has them.
        recipe: what is quantized, and how.
        batch_size: rows at a time.

    Returns:
        KL(model || quantized), nats per token, by ``weights``, ``activations``, ``keys``,
        ``values``, ``head`` and ``embedding``, as far as the recipe quantizes them, and
        ``everything``.

    Raises:
        QatcError: as :func:`qatc.prepare`, or there is no row.
    """
    answers = Answers(model, rows, batch_size)
    found = {}
    for name, own in _parts(recipe).items():
        teacher = copy.deepcopy(model) if own.center_keys else None
        prepare(model, own, compile=False, integer_forward=False)
        try:
            if teacher is not None:
                ids, real = (
                    torch.cat(parts)
                    for parts in zip(*batches(model, rows, batch_size), strict=True)
                )
                center_keys(model, teacher, ids, real)
            if name in ("keys", "values"):
                for template in prepared_state(model).templates():
                    _leave_only(name, template.graph_module)
            found[name] = answers.divergence()
        finally:
            restore(model)
    return found


def _parts(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each part of a recipe."""
    specs = ("weights", "activations", "kv", "head", "embedding")
    off: dict[str, Any] = dict.fromkeys(specs, QuantSpec())
    off |= {"weight_bits": (), "value_bits": None, "center_keys": False, "rotate_keys": False}
    off["target"] = "qatc"  # no runtime has one part alone; its rules are in the specs
    recipe = replace(recipe, rotate_inputs=())  # weights have not been turned
    fields = {
        "weights": ("weights", "weight_bits"),
        "activations": ("activations",),
        "keys": ("kv", "value_bits", "center_keys", "rotate_keys"),
        "values": ("kv", "value_bits"),
        "head": ("head",),
        "embedding": ("embedding",),
    }
    found = {
        part: replace(recipe, **off | {name: getattr(recipe, name) for name in names})
        for part, names in fields.items()
    }
    return {name: part for name, part in found.items() if part.quantizes} | {"everything": recipe}


def _leave_only(part: str, gm: GraphModule) -> None:
    """Take the fake-quant nodes of the keys, or of the values, out of a graph."""
    for attention in find_attentions(gm):
        other = attention.value if part == "keys" else attention.key
        for node in _quantizers_behind(other):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            gm.graph.erase_node(node)
    gm.recompile()


def _quantizers_behind(node: Node) -> list[Node]:
    """The fake-quant nodes that ``node`` is, or is computed from without crossing a linear."""
    found: dict[Node, None] = {}
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.target is LINEAR:
            continue
        seen.add(current)
        if is_fake_quantize(current):
            found[current] = None
        else:
            stack.extend(current.all_input_nodes)
    return [*found]
