"""The local part of the parity gate: layer by layer and node by node, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Interpreter, Node

from qatc import kernels, packing
from qatc.capture import Template
from qatc.graph import ATTENTION, LINEAR, as_node, is_quantized, parameter_name, quantizer_of
from qatc.packed_cache import cache_attention, cache_tensors
from qatc.passes.lower_linear import PACKED
from qatc.preparation import prepared_state
from qatc.recipe import Recipe
from qatc.runtime import LoweredForward, runtime_of, take_out
from qatc.spec import FLOAT_BITS
from qatc.templates import TemplateForward, TemplateStore

STALE = 99
"""What unused cache slots are filled with: no query may see it."""


@dataclass(frozen=True)
class Difference:
    """How far a place in the lowered layer is from the same place in the trained one.

    Attributes:
        kind: ``linear``, ``codes``, ``attention`` or ``wiring`` (what a node reads).
        place: layer, node, and how it was run.
        figure: by how much.
    """

    kind: str
    place: str
    figure: float


def compare_layers(
    reference: Any, lowered: Any, recipe: Recipe, ids: Tensor
) -> Iterator[Difference]:
    """Compare every layer of a lowered model with the trained one, node by node.

    Args:
        reference: the prepared model, in float.
        lowered: the model that runs on integers.
        recipe: of both.
        ids: int64 ``[B, T]``: text, whose hidden states in the trained model go into both layers.
    """
    for forward, own, call in _calls(reference, lowered, ids):
        for difference in _compare(forward, own, call, recipe):
            yield _named(difference, own.name)


def _named(difference: Difference, layer: str) -> Difference:
    figure = difference.figure if math.isfinite(difference.figure) else math.inf
    return Difference(difference.kind, f"{layer}, {difference.place}", figure)


def _calls(
    reference: Any, lowered: Any, ids: Tensor
) -> Iterator[tuple[TemplateForward, LoweredForward, tuple[Any, Any]]]:
    """Every layer, in both models, with the arguments that the trained model calls it with."""
    calls: list[tuple[Any, Any]] = []
    forwards = prepared_state(reference).forwards
    hooks = [
        forward.module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
        )
        for forward in forwards
    ]
    reference(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    yield from zip(forwards, runtime_of(lowered).forwards, calls, strict=True)


def _run(
    forward: TemplateForward,
    store: TemplateStore,
    call: tuple[Any, Any],
    extra: Callable[[Template], list[Any]],
) -> tuple[torch.fx.Graph, dict[Node, Any]]:
    """The graph that serves a call, and what all of its nodes compute."""
    template, leaves = forward.find(*call, store)
    interpreter = Interpreter(template.graph_module, garbage_collect_values=False)
    inputs = [leaves[i] for i in template.inputs]
    interpreter.run(*forward.parameters(template), *inputs, *extra(template))
    return template.graph_module.graph, interpreter.env


def _compare(
    forward: TemplateForward, own: LoweredForward, call: tuple[Any, Any], recipe: Recipe
) -> Iterator[Difference]:
    graph, trained = _run(forward, forward.store, call, lambda template: [])
    args, kwargs, _, mask = take_out(*call)
    store = own.runtime.cached if mask is None else own.runtime.masked
    batch, length = _hidden(call).shape[:2]
    positions = torch.arange(length, device=_hidden(call).device).expand(batch, length)

    def extra(template: Template) -> list[Any]:
        masks = [] if mask is None else [mask.expand(batch, 1, length, length)]
        return [*_stale(template, batch, length, positions.device), positions, *masks]

    lowered_graph, values = _run(own, store, (args, kwargs), extra)
    by_name: dict[str, list[Node]] = {}
    for node in lowered_graph.nodes:
        if node.target is kernels.PACKED_LINEAR:
            name = str(parameter_name(node.args[1])).removesuffix(PACKED)
            by_name.setdefault(name, []).append(node)
    for node in graph.nodes:
        if node.target is LINEAR and is_quantized(node.args[1]):
            name = str(parameter_name(node.args[1]))
            yield from _compare_linear(name, node, by_name[name].pop(0), trained, values)
        elif node.target is ATTENTION:
            lowered = cache_attention(lowered_graph)
            yield from _compare_attention(node, lowered, trained, values, recipe, mask)


def _hidden(call: tuple[Any, Any]) -> Tensor:
    args, kwargs = call
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _stale(template: Template, rows: int, slots: int, device: torch.device) -> list[Tensor]:
    return [
        torch.full((rows, heads, slots, width), STALE, dtype=dtype, device=device)
        for (heads, width), dtype in cache_tensors(template)
    ]


def _raw(node: Any) -> Node:
    """What is quantized before ``node`` is read, or what is read if nothing is."""
    quantizer = quantizer_of(node)
    return as_node(node if quantizer is None else quantizer.args[0])


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    largest = float(wanted.abs().max())
    return float((got.float() - wanted.float()).abs().max()) / max(largest, 1e-30)


def _wiring(place: str, got: Tensor, wanted: Tensor) -> Difference:
    if got.shape != wanted.shape:
        return Difference("wiring", place, math.inf)
    norm = float(wanted.norm())
    return Difference("wiring", place, float((got - wanted).norm()) / max(norm, 1e-30))


def _compare_linear(
    name: str, node: Node, lowered: Node, trained: dict[Node, Any], values: dict[Node, Any]
) -> Iterator[Difference]:
    # An input that is rounded in groups keeps its fake-quant node in the lowered graph as well.
    rounds = lowered.args[5] != FLOAT_BITS
    x, wanted = trained[_raw(node.args[0]) if rounds else as_node(node.args[0])], trained[node]
    read: list[Any] = [values[a] if isinstance(a, Node) else a for a in lowered.args]
    yield _wiring(name, read[0], x)
    for phase, rows in (("prefill", slice(None)), ("decode", slice(0, 1))):
        part = x[rows] if phase == "prefill" else x[rows, :1]
        aim = wanted[rows] if phase == "prefill" else wanted[rows, :1]
        got = kernels.PACKED_LINEAR(part, *read[1:], **lowered.kwargs)
        kernel = lowered.kwargs[phase]
        yield Difference("linear", f"{name} ({phase}: {kernel})", distance(got, aim))


def _compare_attention(
    node: Node,
    lowered: Node,
    trained: dict[Node, Any],
    values: dict[Node, Any],
    recipe: Recipe,
    window: Tensor | None,
) -> Iterator[Difference]:
    """Attention over a cache, fed in several ways; ``window`` is the mask of the layer itself."""
    read: list[Any] = list(node.args[:3])
    given: list[Tensor] = [trained[read[0]], trained[_raw(read[1])], trained[_raw(read[2])]]
    query, key, value = given
    mine: list[Any] = list(lowered.args[:3])
    for title, one, other in zip(("query", "key", "value"), mine, given, strict=True):
        yield _wiring(f"{title} of attention", values[one], other)
    rounded: list[Tensor] = [trained[n] for n in read[1:]]
    scale: Any = node.kwargs.get("scale")
    length = query.shape[2]
    pad = torch.zeros(len(query), 1, 1, length, dtype=torch.bool, device=query.device)
    for row in range(len(query)):
        pad[row, ..., row:] = True  # rows begin one token after another, as left padding has it
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=query.device)
    padded = (causal & pad) | itself if window is None else (causal & pad & window) | itself
    half = max(1, length // 2)
    for title, mask, chunks in (
        ("prefill", window, [length]),
        ("chunked prefill", window, [half, length - half]),
        ("decode", window, [half] + [1] * (length - half)),
        ("decode with padding", padded, [half] + [1] * (length - half)),
    ):
        wanted = trained[node]
        if mask is padded:
            wanted = F.scaled_dot_product_attention(
                query, rounded[0], rounded[1], attn_mask=mask, scale=scale, enable_gqa=True
            )
        got, caches = _attend(lowered, (query, key, value), chunks, mask)
        if recipe.kv.quantizes and title != "prefill":
            yield Difference(
                "codes", f"KV cache after {title}", _other_codes(caches, rounded, recipe)
            )
        yield Difference("attention", f"attention ({title})", distance(got, wanted))


def _attend(
    lowered: Node, tensors: tuple[Tensor, ...], chunks: list[int], mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Attention as the lowered graph computes it, over a cache full of garbage."""
    query, key, value = tensors
    rows, slots = len(query), key.shape[2] + 3
    inputs: list[Any] = [node for node in lowered.args[3:] if isinstance(node, Node)]
    shapes = [node.meta["val"] for node in inputs if node.meta["val"].dim() == 4]
    shapes = [shape for shape in shapes if shape.dtype is not torch.bool]
    caches = [
        torch.full((rows, s.shape[1], slots, s.shape[3]), STALE, dtype=s.dtype, device=key.device)
        for s in shapes
    ]
    if mask is not None:
        mask = F.pad(mask.expand(rows, 1, -1, -1), (0, slots - mask.shape[-1]), value=True)
    outs, start = [], 0
    target: Any = lowered.target
    for size in chunks:
        now = slice(start, start + size)
        positions = torch.arange(start, start + size, device=key.device).expand(rows, size)
        outs.append(
            target(
                *(tensor[:, :, now] for tensor in tensors),
                *caches,
                positions,
                None if mask is None else mask[:, :, now],
                **lowered.kwargs,
            )
        )
        start += size
    return torch.cat(outs, 2), caches


def _other_codes(caches: list[Tensor], rounded: list[Tensor], recipe: Recipe) -> float:
    """Share of codes in the cache whose value is not the one that was trained with."""
    other = count = 0
    for codes, scale, values in zip(caches[::2], caches[1::2], rounded, strict=True):
        length, width = values.shape[2:]
        held = packing.unpack(codes[:, :, :length], recipe.kv.bits, width)
        other += int((held.float() * scale[:, :, :length] != values).sum())
        count += values.numel()
    return other / count
