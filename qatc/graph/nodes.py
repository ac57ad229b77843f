"""The vocabulary of captured graphs: what a linear, an attention and a K/V site look like.

Finders are pure: they select nodes and never edit. Nothing is matched by a module's name, so they
serve any architecture; names serve only to *skip*.

Parameters of a captured layer are graph inputs. A placeholder that stands for one carries its name
relative to the captured module in ``node.meta["parameter"]``; graphs that hold their parameters
as ``get_attr`` nodes (``torch.export.export(...).module()``, ``symbolic_trace``) work as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qatc.kernels import integer_linear
from qatc.numerics import fake_quant
from qatc.recipe.patterns import matches
from qatc.recipe.spec import QuantSpec, read_spec_arg

aten = torch.ops.aten

LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
ATTENTION = aten.scaled_dot_product_attention.default

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class Linear:
    """A linear node: ``input [..., K] @ weight[N, K].T + bias``."""

    node: Node
    parameter: str
    """Name of the weight, relative to the captured module."""

    @property
    def input(self) -> Node:
        return as_node(self.node.args[0])

    @property
    def weight(self) -> Node:
        return as_node(self.node.args[1])


@dataclass(frozen=True)
class Attention:
    """An attention node over ``q [B, Hq, T, D]`` and ``k``, ``v`` ``[B, Hkv, S, D]``."""

    node: Node

    @property
    def query(self) -> Node:
        return as_node(self.node.args[0])

    @property
    def key(self) -> Node:
        return as_node(self.node.args[1])

    @property
    def value(self) -> Node:
        return as_node(self.node.args[2])

    @property
    def mask(self) -> Node | None:
        mask = argument(self.node, 3, "attn_mask", None)
        return None if mask is None else as_node(mask)

    @property
    def is_causal(self) -> bool:
        return bool(argument(self.node, 5, "is_causal", False))

    @property
    def scale(self) -> float | None:
        scale: float | None = self.node.kwargs.get("scale")  # type: ignore[assignment]
        return scale


def find_linears(gm: GraphModule) -> list[Linear]:
    """All linear nodes whose weight is a parameter, in graph order."""
    return _linears_of(gm, LINEAR)


def find_integer_linears(gm: GraphModule) -> list[Linear]:
    """All integer linears whose weight is a parameter, in graph order.

    They quantize input and weight themselves: the two that they read are in full precision.
    """
    return _linears_of(gm, integer_linear.INTEGER_LINEAR)


def _linears_of(gm: GraphModule, target: Any) -> list[Linear]:
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=target):
        name = parameter_name(as_node(node.args[1]))
        if name is not None:
            found.append(Linear(node, name))
    return found


def find_quantizable(gm: GraphModule, skip: Iterable[str] = ()) -> list[Linear]:
    """The linears whose input and weight are to be quantized, in graph order.

    Args:
        gm: the graph.
        skip: patterns of weight names that stay in full precision. Those of routers do so as well:
            a router chooses experts, so that a rounding error does not shade its result but takes
            another expert, and it is a few thousandths of the weights.
    """
    routers = {router.node for router in find_routers(gm)}
    return [
        linear
        for linear in find_linears(gm)
        if linear.node not in routers and not matches(linear.parameter, skip)
    ]


def find_routers(gm: GraphModule) -> list[Linear]:
    """The linears of whose outputs, row by row, the largest are picked out, in graph order."""
    linears = {linear.node: linear for linear in find_linears(gm)}
    found: dict[Node, None] = {}
    stack = [as_node(n.args[0]) for n in gm.graph.nodes if _picks(n)]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in linears:
            found[node] = None
        elif node not in seen and _keeps_scores(node):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return [linear for node, linear in linears.items() if node in found]


def _picks(node: Node) -> bool:
    """Whether a node tells where the largest values are."""
    if node.target is aten.max.dim:
        return any(user.args[1] == 1 for user in node.users)
    return node.target is aten.topk.default


_SCORE_OPS = frozenset(
    {
        *("softmax.int", "_softmax.default", "sigmoid.default", "to.dtype", "_to_copy.default"),
        *("add.Tensor", "add_.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "div_.Tensor"),
        *(
            "view.default",
            "reshape.default",
            "masked_fill.Scalar",
            "scatter_.value",
            "detach.default",
        ),
        *("expand.default", "unsqueeze.default", "sum.dim_IntList", "sum.default", "clone.default"),
        *("tanh.default", "detach.default", "softplus.default", "sqrt.default", "where.self"),
    }
)


def _keeps_scores(node: Node) -> bool:
    """Whether a node only rescales, reshapes or masks the scores that it reads."""
    name = str(node.target).removeprefix("aten.")
    return node.op == "call_function" and name in _SCORE_OPS


@dataclass(frozen=True)
class Embedding:
    """A lookup: the rows of ``weight [V, K]`` that integers name."""

    node: Node
    parameter: str
    """Name of the table, relative to the captured module."""

    @property
    def readers(self) -> list[Node]:
        """The fake-quant nodes that read the rows."""
        return [user for user in self.node.users if is_fake_quantize(user)]


def find_embeddings(gm: GraphModule) -> list[Embedding]:
    """All lookups in a table that is a parameter, in graph order."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is EMBEDDING:
            name = parameter_name(as_node(node.args[0]))
            if name is not None:
                found.append(Embedding(node, name))
    return found


def find_attentions(gm: GraphModule) -> list[Attention]:
    """All ``scaled_dot_product_attention`` nodes, in graph order."""
    return [
        Attention(n) for n in gm.graph.nodes if n.op == "call_function" and n.target is ATTENTION
    ]


def mixes_neighbours(gm: GraphModule) -> bool:
    """Whether a graph convolves, with more than one tap: then a token needs those before it."""
    return any(
        max((int(size) for size in shape_of(as_node(node.args[1]))[2:]), default=1) > 1
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target in _CONVOLUTIONS
    )


_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    aten.convolution.default,
)


def find_projections(node: Node) -> list[Node]:
    """The linear nodes that ``node`` is computed from, without crossing a linear."""
    found: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and current.target is LINEAR:
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return found


def parameter_name(node: Node) -> str | None:
    """Name of the parameter that ``node`` reads, through casts and fake-quant nodes, or None."""
    while node.op == "call_function" and (is_fake_quantize(node) or node.target in _CASTS):
        node = as_node(node.args[0])
    if node.op == "get_attr":
        return str(node.target)
    name = node.meta.get("parameter")
    return None if name is None else str(name)


def is_fake_quantize(node: Node) -> bool:
    """Whether ``node`` is a fake-quant node."""
    return node.op == "call_function" and node.target is fake_quant.FAKE_QUANTIZE


def quantizer_of(node: Node) -> Node | None:
    """The fake-quant node that ``node`` is, or is a cast of."""
    while node.op == "call_function" and node.target in _CASTS:
        node = as_node(node.args[0])
    return node if is_fake_quantize(node) else None


def is_quantized(node: Node) -> bool:
    """Whether ``node`` is a fake-quant node, or a cast of one."""
    return quantizer_of(node) is not None


def weight_sites(gm: GraphModule) -> dict[str, QuantSpec]:
    """The weights that are quantized for their linear by name, in graph order, and how."""
    linears = [*find_linears(gm), *find_integer_linears(gm)]
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    found = {}
    for linear in sorted(linears, key=lambda linear: order[linear.node]):
        if linear.node.target is integer_linear.INTEGER_LINEAR:
            found[linear.parameter] = spec_of(linear.node, "weight_spec")
        elif (quantizer := quantizer_of(linear.weight)) is not None:
            found[linear.parameter] = spec_of(quantizer)
    return found


def reads_master(user: Node, source: Node) -> bool:
    """Whether ``user`` rounds ``source`` to codes, for which it wants it in full precision.

    Learned scales, by which it rounds, it wants so as well.
    """
    if source in user.kwargs.values():
        return is_fake_quantize(user) or user.target is integer_linear.INTEGER_LINEAR
    if user.op == "call_function" and user.target is integer_linear.INTEGER_LINEAR:
        return user.args[1] is source
    return is_fake_quantize(user)


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of ``node``, given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape_of(node: Node) -> torch.Size:
    """The (possibly symbolic) shape of the tensor that ``node`` computes."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def spec_of(node: Node, name: str = "spec") -> QuantSpec:
    """The spec that a node was given as its argument ``name``."""
    if name in node.kwargs:
        return read_spec_arg(str(node.kwargs[name]))
    places = [own.name for own in node.target._schema.arguments]  # type: ignore[union-attr]
    return read_spec_arg(str(node.args[places.index(name)]))


def as_node(value: Any) -> Node:
    """An argument of a node, which must be a node itself."""
    assert isinstance(value, Node), f"expected a graph node, got {value!r}"
    return value
