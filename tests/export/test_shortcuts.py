"""What replaces slow parts of ExecuTorch does the same; it takes no ExecuTorch."""

from __future__ import annotations

import operator
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.tools_common import legalize_graph

from qatc.export.executorch.shortcuts import _Below, _can_merge, _sort, watched
from qatc.progress import Observer

TARGETS: list[Any] = [torch.add, operator.add, torch.ops.aten._assert_scalar.default]


def random_graph(seed: int) -> GraphModule:
    """Nodes that read two others each, of which some stand behind them."""
    draw, graph = random.Random(seed), Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(3)]
    for _ in range(30):
        target = draw.choice(TARGETS)
        nodes.append(graph.call_function(target, tuple(draw.sample(nodes, 2))))
    graph.output(tuple(nodes[-4:]))
    late = draw.sample(nodes[3:], 8)
    for node in late:
        next(iter(reversed(graph.nodes))).append(node)
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("seed", range(8))
def test_nodes_are_sorted_as_torch_does(seed: int) -> None:
    wanted = [n.name for n in legalize_graph(random_graph(seed)).graph.nodes]
    module = random_graph(seed)
    assert [n.name for n in module.graph.nodes] != wanted
    assert [n.name for n in _sort(module).graph.nodes] == wanted
    module.graph.lint()


def is_cut_in_two(nodes: set[Node]) -> bool:
    """Whether a way leads out of the nodes and back, by a search from each of them."""
    for start in nodes:
        ways = [user for user in start.users if user not in nodes]
        while ways:
            node = ways.pop()
            if node in nodes:
                return True
            ways += node.users
    return False


@pytest.mark.parametrize("seed", range(4))
def test_parts_merge_where_no_way_leads_back(seed: int) -> None:
    draw, module = random.Random(seed), legalize_graph(random_graph(seed))
    partitioner = SimpleNamespace(dependency_viewer=_Below(module))
    nodes, found = [n for n in module.graph.nodes if n.op == "call_function"], []
    for number in range(60):
        some = draw.sample(nodes, draw.randint(2, 4))
        parts = {
            own: SimpleNamespace(id=(number, own), nodes=dict.fromkeys(held))
            for own, held in enumerate([some[:1], some[1:]])
        }
        found.append(_can_merge(partitioner, 0, 1, parts))
        assert found[-1] is not is_cut_in_two(set(some))
    assert {True, False} == set(found)


def test_a_part_that_grew_is_looked_at_again() -> None:
    graph = Graph()
    first = graph.placeholder("x")
    nodes = [first := graph.call_function(torch.neg, (first,)) for _ in range(3)]
    graph.output(first)
    viewer = _Below(GraphModule(torch.nn.Module(), graph))
    part = SimpleNamespace(id=0, nodes={nodes[0]: None})
    one, _ = viewer.of_partition(part)
    part.nodes[nodes[2]] = None
    two, users = viewer.of_partition(part)
    assert two == one | viewer.bits[nodes[2]] and nodes[1] in users


def test_an_observer_is_told_of_each_part() -> None:
    class Backend:
        @staticmethod
        def preprocess(program: int, specs: Any) -> int:
            return program * 2

        @classmethod
        def preprocess_multimethod(cls, programs: Any, specs: Any) -> Any:
            return {name: [cls.preprocess(p, specs) for p in own] for name, own in programs.items()}

    class Seen(Observer):
        def lowered(self, done: int, total: int) -> None:
            seen.append((done, total))

    seen: list[tuple[int, int]] = []
    with watched(Backend, Seen()):
        done = Backend.preprocess_multimethod({"forward": [1, 2, 3]}, None)
    assert done == {"forward": [2, 4, 6]} and seen == [(1, 3), (2, 3), (3, 3)]
    assert Backend.preprocess(1, None) == 2 and len(seen) == 3
