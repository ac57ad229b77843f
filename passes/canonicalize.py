"""Bring a captured graph into one spelling, so that the other passes need one matcher each.

- Run-time asserts that ``torch.export`` bakes in (dtype and device of an intermediate) are dropped.
- Repeated K/V heads (``unsqueeze``, ``expand``, ``reshape``: how transformers spells grouped-query
  attention when a mask is given) are folded into ``scaled_dot_product_attention(enable_gqa=True)``,
  so that K/V sites sit on the heads that a cache would store.
- Symbolic sizes are read off one anchor, the first graph input with symbolic dimensions. Export
  unifies equal symbols and may read the batch size off the mask, which breaks when another mask is
  passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qatc.graph.nodes import Attention, aten, find_attentions, shape_of
from qatc.passes.base import Edits, GraphPass

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)

_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
)


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Drop asserts, fold repeated K/V heads, read sizes off one input."""

    may_match_nothing: ClassVar[bool] = True

    def edit(self, gm: GraphModule) -> Edits:
        edited = _drop_asserts(gm) + _fold_repeated_heads(gm) + _anchor_sizes(gm)
        return Edits(matched=edited, edited=edited)


def _drop_asserts(gm: GraphModule) -> int:
    asserts = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _ASSERTS]
    for node in asserts:
        gm.graph.erase_node(node)
    return len(asserts)


def _fold_repeated_heads(gm: GraphModule) -> int:
    edited = 0
    for attention in find_attentions(gm):
        key, value = (_unrepeated(attention, n) for n in (attention.key, attention.value))
        if key is None or value is None or shape_of(key)[1] != shape_of(value)[1]:
            continue
        node = attention.node
        node.args = (attention.query, key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        edited += 1
    return edited


def _unrepeated(attention: Attention, node: Node) -> Node | None:
    """The ``[B, Hkv, S, D]`` node whose heads are repeated to give ``node``, or None.

    Only the spelling ``unsqueeze(2)``, ``expand``, ``reshape`` is accepted: it repeats each head in
    place, which is what ``enable_gqa`` means. Any other order of heads must not match, nor may
    anything be cut off on the way.
    """
    path = []
    source = node
    while source.op == "call_function" and source.target in _RESHAPES:
        path.append(source)
        parent = source.args[0]
        assert isinstance(parent, Node)
        source = parent
    unsqueezes = [n for n in path if n.target is aten.unsqueeze.default]
    expands = [n for n in path if n.target is aten.expand.default]
    if len(unsqueezes) != 1 or len(expands) != 1 or unsqueezes[0].args[1] != 2:
        return None
    before, expanded = unsqueezes[0].args[0], shape_of(expands[0])
    assert isinstance(before, Node)
    if len(shape_of(before)) != 4 or len(expanded) != 5:
        return None
    batch, kv_heads, length, width = shape_of(before)
    heads = shape_of(attention.query)[1]
    repeated = (batch, kv_heads, heads // kv_heads, length, width)
    if not _same(expanded, repeated) or not _same(shape_of(node), (batch, heads, length, width)):
        return None
    return before


def _same(sizes: Sequence[int | torch.SymInt], others: Sequence[int | torch.SymInt]) -> bool:
    """Whether sizes are equal for certain; to compare two symbols would specialise them."""
    return [str(size) for size in sizes] == [str(size) for size in others]


def _anchor_sizes(gm: GraphModule) -> int:
    """Replace ``sym_size(other, d)`` by ``sym_size(anchor, e)`` where both are the same symbol."""
    anchor = _anchor(gm)
    if anchor is None:
        return 0
    dims = {str(size): dim for dim, size in reversed(list(enumerate(shape_of(anchor))))}
    edited = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not aten.sym_size.int:
            continue
        dim = dims.get(str(node.meta.get("val")))
        if dim is not None and node.args != (anchor, dim):
            node.args = (anchor, dim)
            edited += 1
    return edited


def _anchor(gm: GraphModule) -> Node | None:
    node: Node
    for node in gm.graph.nodes:
        if node.op != "placeholder" or "parameter" in node.meta:
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(
            isinstance(size, torch.SymInt) for size in value.shape
        ):
            return node
    return None
