"""Let linears that read one input, and what is added to one, run in one launch on a GPU."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, GraphModule, Node

from qatc.graph.nodes import aten
from qatc.kernels.gpu.products import MOST_JOINED
from qatc.kernels.packed_linear import PACKED_LINEAR, PACKED_LINEAR_AND, PACKED_LINEARS
from qatc.kernels.table import TRITON
from qatc.passes.base import Edits, GraphPass
from qatc.passes.lower_linear import LowerLinear


@dataclass(frozen=True)
class JoinLinears(GraphPass):
    """Replace lowered linears on Triton by ops that start fewer kernels.

    Those of one input, as of queries, keys and values, or of gate and up, become one
    ``torch.ops.qatc.packed_linears``, whose bits are theirs: their input is quantized once, and the
    kernel starts once. Weights of other bits, and biases of which some are missing, stay apart. A
    linear that nothing but a sum reads, as of the residual stream, becomes
    ``torch.ops.qatc.packed_linear_and``, which rounds the product, and then the sum, as the two
    did. Graph inputs stay as they are.

    It is for graphs that are about to be compiled: what looks for single linears in a graph does
    not find them any more.
    """

    requires: ClassVar = (LowerLinear,)
    may_match_nothing: ClassVar = True

    def edit(self, gm: GraphModule) -> Edits:
        groups = joined_linears(gm.graph)
        for group in groups:
            _join(gm.graph, group)
        sums = added_linears(gm.graph)
        for linear, total in sums:
            _add(gm.graph, linear, total)
        count = sum(map(len, groups)) + len(sums)
        return Edits(matched=count, edited=count)


def joined_linears(graph: Graph) -> list[list[Node]]:
    """The lowered linears that can run in one launch, two to :data:`MOST_JOINED` at a time."""
    groups: dict[Any, list[Node]] = {}
    for node in _on_triton(graph):
        args: Any = node.args
        x, *weights, inputs, x_spec, weight_spec = args
        if all(part is None or part.op == "placeholder" for part in weights):
            bias = weights[2]
            kind = None if bias is None else bias.meta["val"].dtype
            groups.setdefault((x, inputs, x_spec, weight_spec, kind), []).append(node)
    cut = [
        group[start : start + MOST_JOINED]
        for group in groups.values()
        for start in range(0, len(group), MOST_JOINED)
    ]
    return [group for group in cut if len(group) > 1]


def added_linears(graph: Graph) -> list[tuple[Node, Node]]:
    """The lowered linears that a sum alone reads, of the same shape and dtype, and the sums."""
    found: dict[Node, Node] = {}
    for node in _on_triton(graph):
        total = next(iter(node.users), None)
        if total is None or len(node.users) > 1 or total.target is not aten.add.Tensor:
            continue
        values: list[Any] = [getattr(part, "meta", {}).get("val") for part in total.args]
        if total.kwargs or None in values or total.args[0] is total.args[1]:
            continue
        if len({(str(value.shape), value.dtype) for value in values}) == 1:  # of symbols
            found.setdefault(total, node)  # of two linears, one
    return [(node, total) for total, node in found.items()]


def _on_triton(graph: Graph) -> list[Node]:
    linears = graph.find_nodes(op="call_function", target=PACKED_LINEAR)
    return [node for node in linears if set(node.kwargs.values()) == {TRITON}]


def _add(graph: Graph, linear: Node, total: Node) -> None:
    added = total.args[total.args[0] is linear]
    x, packed, scale, bias, _, *specs = linear.args
    with graph.inserting_before(total):
        found = graph.call_function(PACKED_LINEAR_AND, (x, packed, scale, bias, added, *specs))
    found.meta = dict(total.meta)
    total.replace_all_uses_with(found)
    graph.erase_node(total)
    graph.erase_node(linear)


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
