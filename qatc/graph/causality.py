"""Whether a captured layer can write text token by token, with a cache of keys and values.

It cannot if it attends to what comes later, as the layers of an encoder do, or if tokens see one
another in other ways than attention: hybrid models have layers that keep a recurrent or convolved
state. Either can be trained, but nothing would run what was. What decides is the graph: the
attentions, their flags, and the values of the masks that they were given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qatc.graph.nodes import ATTENTION, Attention, aten, find_attentions, mixes_neighbours, shape_of

_BLOCKED = -1e4
"""Scores that a float mask lowers by this much, or more, get no weight."""


def why_not_causal(gm: GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Why a layer has no KV cache from which it could go on, or None if nothing speaks against it.

    Args:
        gm: the graph, captured with more than one token.
        inputs: all that it takes, in order: the tensors of a real call.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    if mixes_neighbours(gm):
        return "convolves neighbouring tokens, as hybrid models do, for which there is no cache"
    if not any(_is_attention(node) for node in nodes):
        return "has no attention but keeps a recurrent state, as hybrid models do"
    if any(_attends_ahead(gm, attention, inputs) for attention in find_attentions(gm)):
        return "attends to later tokens, as the layers of an encoder do"
    return None


_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_BETWEEN = (
    *(aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default),
    *(aten.view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor),
)


def _is_attention(node: Node) -> bool:
    """Whether a node is an attention, or the product of one that is spelled out."""
    if node.target is ATTENTION:
        return True
    if node.target not in _PRODUCTS:
        return False
    source = node.all_input_nodes[0]
    while source.op == "call_function" and source.target in _BETWEEN:
        source = source.all_input_nodes[0]
    return source.target in _SOFTMAX


def _attends_ahead(gm: GraphModule, attention: Attention, inputs: Sequence[Tensor]) -> bool:
    queries, keys = shape_of(attention.query)[2], shape_of(attention.key)[2]
    if attention.is_causal or str(queries) != str(keys):
        return False  # a cross attention has no order
    if attention.mask is None:
        return str(queries) != "1"
    mask = _value_of(gm, attention.mask, inputs)
    visible = mask if mask.dtype is torch.bool else mask > _BLOCKED
    return bool(visible.triu(1).any())


def _value_of(gm: GraphModule, node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """What ``node`` computes from the inputs, without computing anything that it does not need."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph.output(copies[node])
    graph.eliminate_dead_code()
    value: Tensor = GraphModule(gm, graph)(*inputs)
    return value
