"""What can be folded into what: found in the graphs of a model's layers, not by names.

Finders are pure, as those of :mod:`qatc.graph.nodes`. Names of parameters are relative to the
captured layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qatc.graph.nodes import (
    ATTENTION,
    Attention,
    Linear,
    aten,
    find_attentions,
    find_linears,
    parameter_name,
    shape_of,
)
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore, dry_run, same_for_all
from qatc.models import find_regions
from qatc.models.support import refuse_unsupported
from qatc.passes import Canonicalize

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
_LAYOUT = (
    *(aten.view.default, aten.reshape.default, aten.transpose.int, aten.contiguous.default),
    *(aten.clone.default, aten.permute.default),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer and its captured graph, which layers of one structure share."""

    name: str
    module: nn.Module
    graph: GraphModule


@dataclass(frozen=True, eq=False)
class Gain:
    """A vector ``[K]`` that multiplies the values of a norm, channel by channel.

    Attributes:
        node: what has been multiplied.
        weight, bias: names of the parameters; a bias only of a LayerNorm.
        offset: what is added to the weight before it multiplies, 1 in Gemma.
        source: what an RMSNorm normalizes; None for another norm.
        inside: the nodes of the norm that read ``source``.
        readers: the linears that read ``node``; none if anything else does so too.
    """

    node: Node
    weight: str
    bias: str | None
    offset: float
    source: Node | None
    inside: frozenset[Node]
    readers: tuple[Linear, ...]


@dataclass(frozen=True, eq=False)
class Chain:
    """Linears whose input channels are, one for one, the output channels of another.

    Attributes:
        source: the linear that gives the channels: V's projection, or that of the gated product.
        readers: the linears that read them.
        heads: query heads and K/V heads where attention lies between them: every K/V head serves
            as many query heads side by side as there are per K/V head. None for a product.
    """

    source: Linear
    readers: tuple[Linear, ...]
    heads: tuple[int, int] | None


@torch.no_grad()
def layer_graphs(model: nn.Module) -> list[Layer]:
    """The decoder layers of a transformers causal LM with their canonical float graphs.

    Raises:
        ConfigError: the model is none that qatc supports.
        CaptureError: a layer cannot be captured.
    """
    refuse_unsupported(model)
    store = TemplateStore(same_for_all(Canonicalize()))
    forwards = [TemplateForward(module, name, store) for name, module in find_regions(model)]
    ids = torch.zeros((2, 8), dtype=torch.long, device=next(model.parameters()).device)
    for forward in forwards:
        forward.install()
    try:
        with dry_run([store]):
            model(input_ids=ids, use_cache=False)
        return [Layer(f.name, f.module, store.of(f)[0].graph_module) for f in forwards]
    finally:
        for forward in forwards:
            forward.remove()


def find_gains(gm: GraphModule) -> list[Gain]:
    """All norms with a weight of their own, in graph order."""
    linears = {linear.node: linear for linear in find_linears(gm)}
    found = []
    for node in gm.graph.nodes:
        read = _gain(node)
        if read is None:
            continue
        weight, bias, offset, source, inside = read
        users = list(users_of(node))
        whole = all(user in linears and uncast(linears[user].input) is node for user in users)
        readers = tuple(linears[user] for user in users) if whole else ()
        found.append(Gain(node, weight, bias, offset, source, inside, readers))
    return found


def find_chains(gm: GraphModule) -> list[Chain]:
    """All pairs of linears of which one's output channels are the other's inputs."""
    linears = {linear.node: linear for linear in find_linears(gm)}
    attentions = {attention.node: attention for attention in find_attentions(gm)}
    read: dict[Node, list[Linear]] = {}
    for linear in linears.values():
        read.setdefault(uncast(linear.input), []).append(linear)
    found = []
    for node, readers in read.items():
        if set(users_of(node)) != {reader.node for reader in readers}:
            continue
        if node.target is aten.mul.Tensor:
            factors = [uncast(f) for f in reversed(node.args) if isinstance(f, Node)]
            source = next((f for f in factors if f in linears and _only_user(f) is node), None)
            if source is not None:
                found.append(Chain(linears[source], tuple(readers), None))
            continue
        outer = _through_layout(node)
        if outer and outer[-1].target is ATTENTION:
            chain = _value_chain(attentions[outer[-1]], outer, linears)
            if chain is not None:
                found.append(Chain(chain[0], tuple(readers), chain[1]))
    return found


def bias_name(linear: Linear) -> str | None:
    """Name of a linear's bias."""
    bias = linear.node.args[2] if len(linear.node.args) > 2 else linear.node.kwargs.get("bias")
    return parameter_name(bias) if isinstance(bias, Node) else None


def uncast(node: Node) -> Node:
    """What ``node`` is, before casts to other dtypes and dropout that drops nothing."""
    while _keeps_values(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def users_of(node: Node) -> Iterator[Node]:
    """The users of ``node``, and of its casts in their place."""
    for user in node.users:
        if _keeps_values(user):
            if user.args[0] is node:  # and not only the tensor whose dtype is taken
                yield from users_of(user)
        else:
            yield user


def _keeps_values(node: Node) -> bool:
    if node.op != "call_function":
        return False
    drops_nothing = node.target is aten.dropout.default and 0 in node.args[1:]  # or False
    return node.target in _CASTS or drops_nothing


def _only_user(node: Node) -> Node | None:
    users = list(users_of(node))
    return users[0] if len(users) == 1 else None


_Read = tuple[str, str | None, float, Node | None, frozenset[Node]]


def _gain(node: Node) -> _Read | None:
    """Weight, bias, offset, source and inner nodes of the norm that ends in ``node``."""
    if node.op != "call_function":
        return None
    if node.target is aten.mul.Tensor:
        for weight, other in (node.args, reversed(node.args)):
            found = _vector(weight)
            if found is not None and isinstance(other, Node):
                source, inside = _normalized(uncast(other))
                return (found[0], None, found[1], source, inside)
        return None
    if node.target in (aten.rms_norm.default, aten.layer_norm.default):
        weight = _vector(node.args[2]) if len(node.args) > 2 else None
        if weight is None:
            return None
        source = uncast(node.args[0])  # type: ignore[arg-type]
        if node.target is aten.rms_norm.default:
            return weight[0], None, 0.0, source, frozenset({node})
        bias = _vector(node.args[3]) if len(node.args) > 3 else None
        return weight[0], None if bias is None else bias[0], 0.0, None, frozenset()
    return None


def _vector(value: Any) -> tuple[str, float] | None:
    """Name of the parameter ``[K]`` that ``value`` is, and the number that is added to it."""
    if not isinstance(value, Node):
        return None
    node, offset = uncast(value), 0.0
    if node.target is aten.add.Tensor:
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        nodes = [a for a in node.args if isinstance(a, Node)]
        if len(numbers) != 1 or len(nodes) != 1:
            return None
        node, offset = uncast(nodes[0]), float(numbers[0])
    name = node.meta.get("parameter")
    if name is None or len(shape_of(node)) != 1 or _only_user(node) is None:
        return None
    return str(name), offset


def _normalized(node: Node) -> tuple[Node | None, frozenset[Node]]:
    """What ``node`` is the RMS-normalized value of, ``x * rsqrt(mean(x^2) + eps)``, or None."""
    if node.target is not aten.mul.Tensor:
        return None, frozenset()
    for value, factor in (node.args, reversed(node.args)):
        if not (isinstance(value, Node) and isinstance(factor, Node)):
            continue
        square = _root_mean_of(uncast(factor))
        if square is not None and uncast(square.args[0]) is uncast(value):  # type: ignore[arg-type]
            return uncast(value), frozenset({node, square})
    return None, frozenset()


def _root_mean_of(node: Node) -> Node | None:
    """The square ``x^2`` of ``rsqrt(mean(x^2, -1) + eps)``."""
    inner: Any = node
    for target in (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim):
        if not isinstance(inner, Node) or inner.target is not target:
            return None
        step, inner = inner, inner.args[0]
        inner = uncast(inner) if isinstance(inner, Node) else inner
        if target is aten.mean.dim and list(step.args[1]) != [-1]:  # type: ignore[arg-type]
            return None
    is_square = inner.target is aten.pow.Tensor_Scalar and inner.args[1] == 2
    return inner if is_square else None


def _through_layout(node: Node) -> list[Node]:
    """``node`` and what it is computed from, back through changes of layout, each read once."""
    path = [node]
    while path[-1].target in _LAYOUT and _only_user(path[-1].args[0]) is not None:  # type: ignore[arg-type]
        path.append(uncast(path[-1].args[0]))  # type: ignore[arg-type]
        if _only_user(path[-1]) is None:
            return []
    return path


def _value_chain(
    attention: Attention, outer: list[Node], linears: dict[Node, Linear]
) -> tuple[Linear, tuple[int, int]] | None:
    """The linear behind V, and the heads, if channels are laid out head by head on both sides."""
    inner = _through_layout(uncast(attention.value))
    if len(inner) < 2 or inner[-1] not in linears or len(outer) < 2:
        return None
    query, value = shape_of(attention.query), shape_of(attention.value)
    size = value[-1]
    ours, theirs = (query[1], size), (value[1], size)
    if shape_of(outer[1])[-2:] != ours or shape_of(inner[-2])[-2:] != theirs:
        return None
    return linears[inner[-1]], (int(query[1]), int(value[1]))
