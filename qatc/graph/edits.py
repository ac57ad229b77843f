"""Edits of a graph that keep what its nodes say of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.numerics import fake_quant
from qatc.recipe.spec import QuantSpec, spec_arg


def insert_between(
    source: Node, users: list[Node], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    """Insert a call that ``users`` read instead of ``source``.

    The new node has the same ``meta["val"]`` as ``source``: fake-quant keeps shape and dtype.
    """
    with source.graph.inserting_before(min(users)):
        new = source.graph.call_function(target, (source, *args), kwargs)
    _describe(new, source)
    for user in users:
        user.replace_input_with(source, new)
    return new


def insert_quantizer(
    source: Node,
    users: list[Node],
    spec: QuantSpec,
    *,
    snap_scale: bool,
    start: Node | None = None,
    gain: Node | None = None,
) -> Node:
    """Insert a fake-quant node that ``users`` read instead of ``source``.

    Args:
        source: what is quantized.
        users: those of its users that read the quantized values.
        spec: how.
        snap_scale: round scales as those of weights are.
        start, gain: of learned scales, see :mod:`qatc.numerics.learned`.
    """
    options: dict[str, Any] = {"snap_scale": snap_scale}
    options |= {name: n for name, n in (("start", start), ("gain", gain)) if n is not None}
    return insert_between(source, users, fake_quant.FAKE_QUANTIZE, (spec_arg(spec),), options)


def add_parameter(gm: GraphModule, name: str, shape: Sequence[int], like: Node) -> Node:
    """A further parameter of the captured module as an input of its graph, fp32.

    Args:
        gm: whose parameters are graph inputs.
        name: of the parameter, relative to the captured module.
        shape: of the parameter.
        like: a node on whose device it is.

    Raises:
        PassError: parameters of the graph are attributes of it.
    """
    first = next(iter(gm.graph.nodes))
    if first.op != "placeholder" or "parameter" not in first.meta:
        raise PassError(
            "learned scales and centered keys are parameters, and those of this graph are no"
            " inputs of it; prepare the model with qatc.prepare, or leave them out of the recipe"
        )
    with gm.graph.inserting_before(first):
        node = gm.graph.placeholder(name.replace(".", "_"))
    node.meta["parameter"] = name
    if "val" in like.meta:
        node.meta["val"] = like.meta["val"].new_empty(tuple(shape), dtype=torch.float32)
    return node


def replace_node(
    node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Node:
    """Put a call in the place of ``node``, whose value it computes: same shape, same dtype."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs or {})
    _describe(new, node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _describe(new: Node, like: Node) -> None:
    new.meta = {key: like.meta[key] for key in ("val", "tensor_meta") if key in like.meta}
