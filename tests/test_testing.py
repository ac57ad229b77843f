"""``check_pass`` accepts a good pass, and notices every way in which one can be bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from qatc.errors import PassError
from qatc.testing import check_pass, count_ops

aten = torch.ops.aten


class Example(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + x


@pytest.fixture
def graph() -> GraphModule:
    return torch.export.export(Example(), (torch.randn(3),), strict=False).graph_module


X = torch.tensor([-1.0, 2.0])


def edit(gm: GraphModule, target: Any = aten.gelu.default) -> bool:
    """Replace every relu; an embedder's pass, which knows nothing of qatc's base class."""
    nodes = [n for n in gm.graph.nodes if n.target is aten.relu.default]
    for node in nodes:
        node.target = target
    return bool(nodes)


@dataclass(frozen=True)
class Good:
    target: Any = aten.gelu.default
    may_match_nothing: bool = True

    def __call__(self, gm: GraphModule) -> PassResult:
        edited = edit(gm, self.target)
        gm.recompile()
        return PassResult(gm, edited)


COUNTS: dict[str, Any] = {
    "before": {"aten.relu": 1, aten.gelu.default: 0},
    "after": {"aten.relu": 0, aten.gelu.default: 1, "aten.add": 1},
}


def test_a_good_pass_returns_its_edited_copy(graph: GraphModule) -> None:
    edited = check_pass(Good(), graph, **COUNTS)
    assert count_ops(edited) == {"aten.gelu": 1, "aten.add": 1}
    assert count_ops(graph) == {"aten.relu": 1, "aten.add": 1}


def test_counts_are_checked_before_and_after(graph: GraphModule) -> None:
    with pytest.raises(AssertionError, match="before Good: aten.relu occurs 1 times instead of 2"):
        check_pass(Good(), graph, before={"aten.relu": 2}, after={})
    with pytest.raises(AssertionError, match="after Good: aten.add occurs 1 times instead of 0"):
        check_pass(Good(), graph, before={}, after={"aten.add": 0})


def test_outputs(graph: GraphModule) -> None:
    check_pass(Good(aten.relu6.default), graph, (X,), before={}, after={}, check_outputs=0)
    with pytest.raises(AssertionError, match="Good moved output 0 by 0.159, more than 0.1"):
        check_pass(Good(), graph, (X,), **COUNTS, check_outputs=0.1)
    check_pass(Good(), graph, (X,), **COUNTS, check_outputs=0.2)
    seen: list[Any] = []
    check_pass(Good(), graph, (X,), **COUNTS, check_outputs=lambda *both: seen.append(both))
    ((one, other),) = seen
    assert torch.equal(one[0], X.relu() + X)
    assert torch.equal(other[0], nn.functional.gelu(X) + X)


@dataclass
class NotFrozen:
    def __call__(self, gm: GraphModule) -> PassResult:
        return Good()(gm)


@dataclass(frozen=True)
class ReturnsNothing:
    def __call__(self, gm: GraphModule) -> None:
        Good()(gm)


@dataclass(frozen=True)
class AlwaysModified:
    may_match_nothing: bool = True

    def __call__(self, gm: GraphModule) -> PassResult:
        return PassResult(Good()(gm).graph_module, True)


@dataclass(frozen=True)
class NeverModified:
    def __call__(self, gm: GraphModule) -> PassResult:
        return PassResult(Good()(gm).graph_module, False)


@dataclass(frozen=True)
class ForgetsToRecompile:
    def __call__(self, gm: GraphModule) -> PassResult:
        return PassResult(gm, edit(gm))


@dataclass(frozen=True)
class EditsEveryTime:
    def __call__(self, gm: GraphModule) -> PassResult:
        node = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(aten.add.Tensor, (node, node.args[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        gm.recompile()
        return PassResult(gm, True)


@dataclass(frozen=True)
class LosesMeta:
    def __call__(self, gm: GraphModule) -> PassResult:
        result = Good()(gm)
        for node in gm.graph.nodes:
            if node.target is aten.gelu.default:
                node.meta.pop("val", None)
        return result


@dataclass(frozen=True)
class BreaksTheGraph:
    def __call__(self, gm: GraphModule) -> PassResult:
        relu, add = (n for n in gm.graph.nodes if n.op == "call_function")
        add.append(relu)
        return Good()(gm)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (NotFrozen(), "NotFrozen is no frozen dataclass"),
        (edit, "function is no frozen dataclass"),
        (ReturnsNothing(), "ReturnsNothing returned None, not a PassResult"),
        (AlwaysModified(), "a second run of AlwaysModified returned modified=True"),
        (NeverModified(), "returned modified=False, but the code changed"),
        (ForgetsToRecompile(), "did not recompile what it edited"),
        (EditsEveryTime(), "a second run of EditsEveryTime changed the graph"),
        (LosesMeta(), r'LosesMeta left nodes without meta\["val"\]: \[relu\]'),
        (Good(may_match_nothing=False), "raised no PassError on a graph without anything to match"),
    ],
)
def test_a_bad_pass_is_noticed(graph: GraphModule, bad: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pass(bad, graph, before={}, after={})


def test_a_broken_graph_is_noticed(graph: GraphModule) -> None:
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        check_pass(BreaksTheGraph(), graph, before={}, after={})


def test_an_error_of_the_pass_is_the_error(graph: GraphModule) -> None:
    @dataclass(frozen=True)
    class Refuses:
        def __call__(self, gm: GraphModule) -> PassResult:
            raise PassError("not this one")

    with pytest.raises(PassError, match="not this one"):
        check_pass(Refuses(), graph, before={}, after={})
