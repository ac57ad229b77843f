"""Edits of a graph that keep what its nodes say of their values."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qatc.numerics import minmax
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


def insert_quantizer(source: Node, users: list[Node], spec: QuantSpec, *, snap_scale: bool) -> Node:
    """Insert a fake-quant node that ``users`` read instead of ``source``.

    Args:
        source: what is quantized.
        users: those of its users that read the quantized values.
        spec: how.
        snap_scale: round scales as those of weights are.
    """
    options = {"snap_scale": snap_scale}
    return insert_between(source, users, minmax.FAKE_QUANTIZE, (spec_arg(spec),), options)


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
