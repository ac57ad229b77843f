"""What a model's layers compute at the nodes around which they round, recorded while it runs.

A code on a rounding tie falls either way with the last bit of a float sum, and moves everything
behind it. Two graphs can therefore be compared closely only where they are given the very same
numbers. The nodes at which that is done are called *sites*: what every linear reads and gives, and
what attention reads and gives. A trained graph and the one lowered from it have the same sites,
however else they differ, and between two of them nothing is rounded.

Models run as they always do, through ``model(...)``; only the graphs of their layers are
interpreted node by node instead of called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from qatc.graph.nodes import ATTENTION, LINEAR, as_node, parameter_name, quantizer_of
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore
from qatc.kernels.cached_attention import cached_attention, quantized_attention
from qatc.kernels.integer_linear import INTEGER_LINEAR
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.models.preparation import prepared_state
from qatc.passes.lower_linear import PACKED

CACHED = (cached_attention, quantized_attention)
ATTENTIONS = (ATTENTION, *CACHED)
LINEARS = (LINEAR, INTEGER_LINEAR, PACKED_LINEAR)

Site = tuple[str, str]
"""A linear, by the name of its weight, or ``attention``; and which of its tensors."""

Seen = Callable[[Node, Any], Any]
"""Called with every node and its value; what it returns is the node's value for all its users."""


def find_sites(graph: Graph) -> dict[Site, Node]:
    """The sites of a layer's graph, whichever passes it went through.

    Returns:
        ``(NAME, "input")`` and ``(NAME, "output")`` of every linear over a parameter, with ``#2``
        added to the name where a weight is used again. Of ``attention`` the ``query``, ``key``,
        ``value`` and ``output``, and, if it has no cache, the ``held key`` and ``held value`` that
        it reads. All others are what was there before it was rounded.
    """
    found: dict[Site, Node] = {}
    for node in graph.nodes:
        if node.target in LINEARS and (weight := parameter_name(node.args[1])) is not None:
            name = _unused(weight.removesuffix(PACKED), found)
            found |= {(name, "input"): _before_rounding(node.args[0]), (name, "output"): node}
        elif node.target in ATTENTIONS:
            name = _unused("attention", found)
            for title, argument in zip(("query", "key", "value"), node.args[:3], strict=True):
                found[name, title] = _before_rounding(argument)
                if node.target is ATTENTION and title != "query":
                    found[name, f"held {title}"] = argument
            found[name, "output"] = node
    return found


def _unused(name: str, found: dict[Site, Node]) -> str:
    uses = sum(part == "output" and other.split("#")[0] == name for other, part in found)
    return f"{name}#{uses + 1}" if uses else name


def _before_rounding(node: Any) -> Node:
    quantizer = quantizer_of(node)
    return as_node(node if quantizer is None else quantizer.args[0])


class _Watching(Interpreter):
    """Runs a graph and shows every node's value to ``seen``."""

    def __init__(self, graph_module: GraphModule, seen: Seen) -> None:
        super().__init__(graph_module)
        self._seen = seen

    def run_node(self, n: Node) -> Any:
        return self._seen(n, super().run_node(n))


def interpret(graph_module: GraphModule, tensors: Sequence[Any], seen: Seen) -> Any:
    """What ``graph_module(*tensors)`` returns, with every node shown to ``seen``."""
    return _Watching(graph_module, seen).run(*tensors)


@contextmanager
def interpreted(
    stores: Iterable[TemplateStore], run: Callable[[GraphModule, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """Let ``run`` compute the layers' graphs inside the block, those not yet captured included.

    Args:
        stores: whose templates they are.
        run: takes a graph and its inputs, and returns what the graph returns.
    """

    def call(graph_module: GraphModule) -> Callable[..., Any]:
        return lambda *tensors: run(graph_module, tensors)

    stores = list(stores)
    compilers = [store.compile for store in stores]
    calls = [(template, template.call) for store in stores for template in store]
    for store in stores:
        store.compile = call
        for template in store:
            template.call = call(template.graph_module)
    try:
        yield
    finally:
        for store, compiler in zip(stores, compilers, strict=True):
            store.compile = compiler
            for template in store:
                graph_module = template.graph_module
                template.call = graph_module if compiler is None else compiler(graph_module)
        for template, before in calls:
            template.call = before


@contextmanager
def entered(
    forwards: Sequence[TemplateForward], enter: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Call ``enter`` before every layer inside the block.

    Args:
        forwards: of the layers.
        enter: takes the layer's number and the hidden states ``[B, T, C]`` that it is called with,
            and returns those that it gets.
    """

    def hook(
        number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (enter(number, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": enter(number, kwargs["hidden_states"])}

    with ExitStack() as stack:
        for number, forward in enumerate(forwards):
            module = forward.module
            handle = module.register_forward_pre_hook(partial(hook, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@dataclass
class LayerTrace:
    """What one layer was given and what it computed.

    Attributes:
        name: of the layer.
        hidden: what it was called with, ``[B, T, C]``.
        sites: the tensors of its sites.
    """

    name: str
    hidden: Tensor
    sites: dict[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """What the layers of a model computed in one forward without a cache.

    Attributes:
        layers: in the order in which they ran.
        logits: ``[B, T, V]``.
        ids: int64 ``[B, T]``: the text.
        mask: int64 ``[B, T]``: 0 for padding; None for a text without.
    """

    layers: tuple[LayerTrace, ...]
    logits: Tensor
    ids: Tensor
    mask: Tensor | None = None


@torch.no_grad()
def record(model: Any, ids: Tensor, mask: Tensor | None = None) -> Trace:
    """Run a prepared, uncompiled model and keep what its layers compute at their sites.

    Args:
        model: the model.
        ids: int64 ``[B, T]``: the text.
        mask: int64 ``[B, T]``: 0 for padding.
    """
    prepared, layers = prepared_state(model), list[LayerTrace]()
    forwards = prepared.forwards

    def enter(number: int, hidden: Tensor) -> Tensor:
        layers.append(LayerTrace(forwards[number].name, hidden))
        return hidden

    def run(graph_module: GraphModule, tensors: tuple[Any, ...]) -> Any:
        wanted = sites_by_node(graph_module.graph)
        kept = layers[-1].sites

        def seen(node: Node, value: Any) -> Any:
            kept.update({site: value for site in wanted.get(node, ())})
            return value

        return interpret(graph_module, tensors, seen)

    with interpreted([prepared.store], run), entered(forwards, enter):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert [layer.name for layer in layers] == [f.name for f in forwards], "each layer runs once"
    return Trace(tuple(layers), logits, ids, mask)


def sites_by_node(graph: Graph) -> dict[Node, list[Site]]:
    """The sites at every node that has some."""
    found: dict[Node, list[Site]] = {}
    for site, node in find_sites(graph).items():
        found.setdefault(node, []).append(site)
    return found


def is_attention(site: Site) -> bool:
    """Whether a site belongs to attention, and not to a linear, whose name may begin likewise."""
    return site[0].split("#")[0] == "attention"


def rows(value: Tensor, site: Site, batch: int) -> Tensor:
    """A site's tensor as ``[B, T, ...]``, whatever the order of its dimensions.

    Args:
        value: ``[B, H, T, D]`` at attention; ``[B, T, C]`` or ``[B * T, C]`` at a linear.
        site: where it is from.
        batch: B.
    """
    if is_attention(site):
        return value.transpose(1, 2)
    return value.unflatten(0, (batch, -1)) if value.dim() == 2 else value
