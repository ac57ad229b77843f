"""Let linears that read one input run in one launch of a GPU's kernel."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, GraphModule, Node

from qatc.kernels.gpu.products import MOST_JOINED
from qatc.kernels.packed_linear import PACKED_LINEAR, PACKED_LINEARS
from qatc.kernels.table import TRITON
from qatc.passes.base import Edits, GraphPass
from qatc.passes.lower_linear import LowerLinear


@dataclass(frozen=True)
class JoinLinears(GraphPass):
    """Replace lowered linears of one input, on Triton, by ``torch.ops.qatc.packed_linears``.

    Those of queries, keys and values, and of gate and up, become one node each, whose bits are
    theirs: their input is quantized once, and the kernel starts once. Weights of other bits, and
    biases of which some are missing, stay apart. Graph inputs stay as they are.

    It is for graphs that are about to be compiled: what looks for single linears in a graph does
    not find them any more.
    """

    requires: ClassVar = (LowerLinear,)
    may_match_nothing: ClassVar = True

    def edit(self, gm: GraphModule) -> Edits:
        groups = joined_linears(gm.graph)
        for group in groups:
            _join(gm.graph, group)
        count = sum(map(len, groups))
        return Edits(matched=count, edited=count)


def joined_linears(graph: Graph) -> list[list[Node]]:
    """The lowered linears that can run in one launch, two to :data:`MOST_JOINED` at a time."""
    groups: dict[Any, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=PACKED_LINEAR):
        x, *weights, inputs, x_spec, weight_spec = node.args
        given = all(part is None or part.op == "placeholder" for part in weights)
        if given and set(node.kwargs.values()) == {TRITON}:
            bias = weights[2]
            kind = None if bias is None else bias.meta["val"].dtype
            groups.setdefault((x, inputs, x_spec, weight_spec, kind), []).append(node)
    cut = [
        group[start : start + MOST_JOINED]
        for group in groups.values()
        for start in range(0, len(group), MOST_JOINED)
    ]
    return [group for group in cut if len(group) > 1]


def _join(graph: Graph, group: list[Node]) -> None:
    x, _, _, _, _, *specs = group[0].args
    parts = [[node.args[i] for node in group] for i in (1, 2, 3)]
    with graph.inserting_before(group[0]):
        joined = graph.call_function(PACKED_LINEARS, (x, *parts, *specs))
        outs = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(group))]
    for node, out in zip(group, outs, strict=True):
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
