"""Whether a captured layer attends to what comes later, as the layers of an encoder do.

A layer that does can be trained, but has no KV cache and writes no text. What decides is the graph:
the flag of its attentions, and the values of the masks that they were given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qatc.graph import Attention, find_attentions, shape_of

_BLOCKED = -1e4
"""Scores that a float mask lowers by this much, or more, get no weight."""


def attends_ahead(gm: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether any attention of a layer's graph lets a query see keys behind its own position.

    Args:
        gm: the graph, captured with more than one token.
        inputs: all that it takes, in order: the tensors of a real call.
    """
    return any(_attends_ahead(gm, attention, inputs) for attention in find_attentions(gm))


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
