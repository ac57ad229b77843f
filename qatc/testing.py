"""Check a graph pass: what it edits, and that it keeps to the contract of passes.

For the passes of qatc and for those of programs that embed it: anything that is called with a
``torch.fx.GraphModule`` and returns torch's ``PassResult``.

    check_pass(
        QuantizeWeights(QuantSpec(bits=4)),
        exported.graph_module,
        (*parameters, *inputs),
        before={"qatc.fake_quantize": 0, "aten.linear": 2},
        after={"qatc.fake_quantize": 2, "aten.linear": 2},
    )
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from qatc.errors import PassError

Op = Any
"""What a node calls: its target, or for operators the name without the overload, such as
``"aten.linear"``."""


def check_pass(
    graph_pass: Callable[[GraphModule], PassResult | None],
    gm: GraphModule,
    args: Sequence[Any] = (),
    *,
    before: Mapping[Op, int],
    after: Mapping[Op, int],
    check_outputs: float | Callable[[Any, Any], None] | None = None,
) -> GraphModule:
    """Run ``graph_pass`` on a copy of ``gm``, and check everything that a pass promises.

    - It is a frozen dataclass, so that its options are values that can be printed and compared.
    - It returns a ``PassResult`` that says truthfully whether the code changed.
    - The counts of operators are those of ``before`` and then those of ``after``.
    - The graph passes ``lint``, and the code belongs to the graph.
    - Where all nodes had ``meta["val"]``, all have it afterwards.
    - A second run changes nothing and says so.
    - On a graph without anything to match it raises ``PassError``, unless the pass has a true
      attribute ``may_match_nothing``.

    Args:
        graph_pass: the pass.
        gm: the graph to run it on; it is left alone.
        args: arguments of ``gm``, needed for ``check_outputs`` only.
        before: how often each operator must occur before the pass.
        after: how often each operator must occur after it; 0 is a count like any other.
        check_outputs: ``None`` leaves the outputs alone. A number is the largest absolute
            difference that each output may have from that of the original graph; 0 asks for the
            same bits. A function is called with the outputs of the original and of the edited
            graph, and raises if they do not suit it.

    Returns:
        The edited copy, for further checks.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    name = type(graph_pass).__name__
    _check_is_value(graph_pass, name)
    _check_counts(gm, before, f"before {name}")
    edited: GraphModule = copy.deepcopy(gm)
    had_values = _without_value(edited) == []
    result = graph_pass(edited)
    assert isinstance(result, PassResult), f"{name} returned {result!r}, not a PassResult"
    edited = result.graph_module
    assert isinstance(edited, GraphModule)
    edited.graph.lint()
    _check_counts(edited, after, f"after {name}")
    code = _code(edited)
    assert edited.code == code, f"{name} did not recompile what it edited"
    changed = code != _code(gm)
    assert result.modified == changed, (
        f"{name} returned modified={result.modified}, but the code"
        f" {'changed' if changed else 'did not change'}"
    )
    if had_values:
        missing = _without_value(edited)
        assert not missing, f'{name} left nodes without meta["val"]: {missing}'
    if check_outputs is not None:
        _check_outputs(gm, edited, args, check_outputs, name)
    _check_second_run(graph_pass, edited, name)
    _check_nothing_to_match(graph_pass, name)
    return edited


def count_ops(gm: GraphModule) -> dict[str, int]:
    """How often each operator occurs in ``gm``, by the name without the overload."""
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            counts[_name(node.target)] = counts.get(_name(node.target), 0) + 1
    return counts


def _check_is_value(graph_pass: Any, name: str) -> None:
    parameters = getattr(type(graph_pass), "__dataclass_params__", None)
    assert dataclasses.is_dataclass(graph_pass) and parameters is not None and parameters.frozen, (
        f"{name} is no frozen dataclass"
    )


def _check_counts(gm: GraphModule, expected: Mapping[Op, int], when: str) -> None:
    wrong = []
    for op, count in expected.items():
        calls = [n.target for n in gm.graph.nodes if n.op.startswith("call_")]
        found = sum(op in (target, _name(target)) for target in calls)
        if found != count:
            wrong.append(f"{_name(op)} occurs {found} times instead of {count}")
    assert not wrong, f"{when}: {'; '.join(wrong)}; the graph has {count_ops(gm)}"


def _check_outputs(
    gm: GraphModule,
    edited: GraphModule,
    args: Sequence[Any],
    check: float | Callable[[Any, Any], None],
    name: str,
) -> None:
    with torch.no_grad():
        original, new = (
            graph(*pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), list(args)))
            for graph in (gm, edited)
        )
    if callable(check):
        check(original, new)
        return
    pairs = list(zip(pytree.tree_leaves(original), pytree.tree_leaves(new), strict=True))
    for position, (one, other) in enumerate(pairs):
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), (
            f"output {position} was {one.dtype} {list(one.shape)} and is {other.dtype}"
            f" {list(other.shape)} after {name}"
        )
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        assert difference <= check, (
            f"{name} moved output {position} by {difference:.3g}, more than {check:.3g}"
        )


def _check_second_run(graph_pass: Any, edited: GraphModule, name: str) -> None:
    code = edited.code
    again = graph_pass(copy.deepcopy(edited))
    assert isinstance(again, PassResult), f"the second run of {name} returned {again!r}"
    assert _code(again.graph_module) == code, f"a second run of {name} changed the graph"
    assert not again.modified, f"a second run of {name} returned modified=True"


def _check_nothing_to_match(graph_pass: Any, name: str) -> None:
    if getattr(graph_pass, "may_match_nothing", False):
        return
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    try:
        graph_pass(GraphModule(torch.nn.Module(), graph))
    except PassError:
        return
    raise AssertionError(
        f"{name} raised no PassError on a graph without anything to match; silence hides failure"
        " (set may_match_nothing = True if there is nothing to fail at)"
    )


def _code(gm: GraphModule) -> str:
    """The code of the graph as it is now, whether or not it was recompiled."""
    return str(gm.graph.python_code("self").src)


def _without_value(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op != "output" and "val" not in n.meta]


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
