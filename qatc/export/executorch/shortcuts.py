"""What ExecuTorch (1.5.1) computes again and again while it lowers a model, computed once.

Its time grows with the third power of the number of layers otherwise. The file that comes of it is
the same, byte for byte. Where another version has no such function, nothing is replaced.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.utils.fuser_utils import validate_partition
from torch.fx.traceback import NodeSource

from qatc.progress import Observer

_FIRST = {
    *(operator.add, operator.mul, operator.sub, operator.floordiv, operator.truediv, operator.mod),
    *(operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne),
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.scalar_tensor.default,
    torch.ops.aten._assert_scalar.default,
}
"""What assertions are made of: as early as it can be, in ``legalize_graph``."""


@contextmanager
def shortcuts() -> Iterator[None]:
    """Inside the block, ExecuTorch lowers with them."""
    from executorch.exir import lowered_backend_module
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    partitioner = group_partitioner.GroupBasedPartitioner
    replaced = [
        (group_partitioner, "_DependencyViewer", _Below),
        (partitioner, "_can_merge_partitions", _can_merge),
        (lowered_backend_module, "legalize_graph", _sort),
    ]
    with ExitStack() as stack:
        if all(hasattr(owner, name) for owner, name, _ in replaced):
            for owner, name, new in replaced:
                stack.enter_context(patch.object(owner, name, new))
        # Each node tells what it was made of, in each pass: a past that nothing changes any more.
        share = patch.object(NodeSource, "__deepcopy__", lambda own, copies: own, create=True)
        stack.enter_context(share)
        yield


@contextmanager
def watched(backend: Any, observer: Observer) -> Iterator[None]:
    """Inside the block, an observer is told of each part that a backend has lowered."""
    one, every = backend.preprocess, backend.preprocess_multimethod
    done = total = 0

    def preprocess(*args: Any, **options: Any) -> Any:
        nonlocal done
        result = one(*args, **options)
        observer.lowered(done := done + 1, total)
        return result

    def preprocess_multimethod(programs: Any, *args: Any, **options: Any) -> Any:
        nonlocal total
        total += sum(map(len, programs.values()))
        return every(programs, *args, **options)

    with (
        patch.object(backend, "preprocess", staticmethod(preprocess)),
        patch.object(backend, "preprocess_multimethod", staticmethod(preprocess_multimethod)),
    ):
        yield


class _Below:
    """What lies below each node of a graph, as a bit for each node, where ExecuTorch has sets."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.bits: dict[Node, int] = {}
        self.below: dict[Node, int] = {}
        self.partitions: dict[tuple[Any, int], tuple[int, set[Node]]] = {}
        for number, node in enumerate(reversed(graph_module.graph.nodes)):
            self.bits[node] = 1 << number
            self.below[node] = 0
            for user in node.users:
                self.below[node] |= self.bits[user] | self.below[user]

    def of_partition(self, partition: Any) -> tuple[int, set[Node]]:
        """The bits of its nodes, and those that use them; a partition only ever grows."""
        key = partition.id, len(partition.nodes)
        if key not in self.partitions:
            own = 0
            for node in partition.nodes:
                own |= self.bits[node]
            users = {user for node in partition.nodes for user in node.users}
            self.partitions[key] = own, users
        return self.partitions[key]


def _can_merge(partitioner: Any, first: Any, second: Any, partitions: Any) -> bool:
    """Whether no way leads out of two partitions and back into them."""
    viewer: _Below = partitioner.dependency_viewer
    both = [viewer.of_partition(partitions[own]) for own in (first, second)]
    held = both[0][0] | both[1][0]
    for _, users in both:
        if any(viewer.below[user] & held for user in users if not viewer.bits[user] & held):
            return False
    nodes = {*partitions[first].nodes, *partitions[second].nodes}
    return bool(validate_partition(list(nodes)))


def _sort(graph_module: GraphModule) -> GraphModule:
    """``torch.fx``'s ``legalize_graph``: nodes behind those that they read, in its order.

    It copies the graph and writes its code anew, for each part that a backend takes.
    """
    graph = graph_module.graph
    missing = dict.fromkeys(graph.nodes, 0)
    for node in graph.nodes:
        for user in node.users:
            missing[user] += 1
    queue = deque(node for node in graph.nodes if not missing[node])
    end = next(iter(reversed(graph.nodes)))
    while queue:
        node = queue.popleft()
        if node is not end:
            end.append(node)
            end = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                (queue.appendleft if user.target in _FIRST else queue.append)(user)
    assert not any(missing.values()), "a graph has a cycle"
    return graph_module
