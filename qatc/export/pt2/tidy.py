"""A program without what it would compute for nothing, which also takes time to load.

``torch.export`` writes down each operator that was called, asserts and casts to the same dtype
among them, and layers that read one input quantize it once each.
"""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten


def tidy(exported: ExportedProgram) -> None:
    """Take out of a program, in place, what changes none of its values."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_no_cast(node):
            source = node.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _merge_equal(graph)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _is_no_cast(node: Node) -> bool:
    if node.target is not aten.to.dtype or len(node.args) > 2 or node.kwargs or _is_given(node):
        return False
    source = node.args[0]
    return isinstance(source, Node) and source.meta["val"].dtype is node.args[1]


def _is_given(node: Node) -> bool:
    """Whether the program returns it, by a name that is told elsewhere as well."""
    return any(user.op == "output" for user in node.users)


def _merge_equal(graph: Graph) -> None:
    """Let nodes that compute the same of the same values be one."""
    written = _written(graph)
    found: dict[tuple[object, str, str], Node] = {}
    for node in list(graph.nodes):
        if (
            not _is_function(node)
            or _is_given(node)
            or not written.isdisjoint((node, *node.all_input_nodes))
        ):
            continue
        first = found.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_function(node: Node) -> bool:
    """Whether a node gives the same whenever its inputs are the same, and does nothing else."""
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and bool(node.target._schema.returns)
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _written(graph: Graph) -> set[Node]:
    """The tensors that operators write into, and views of them: the cache."""
    nodes = [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    written = {n.args[0] for n in nodes if n.target._schema.is_mutable}
    views = [
        (n, n.args[0])
        for n in nodes
        if n.args and any(r.alias_info for r in n.target._schema.returns)
    ]
    known = -1
    while known < (known := len(written)):
        for pair in views:
            if not written.isdisjoint(pair):
                written.update(pair)
    return written
