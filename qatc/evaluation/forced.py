"""Run a lowered model on what the trained one saw, and compare the two site by site.

The lowered model runs as it always does: its own embeddings, positions, masks and KV cache. But at
every site (see :mod:`qatc.evaluation.traces`) and before every layer, what it computed is compared
with what the trained model computed there, and then replaced by it. Between two sites nothing is
rounded, so that what is compared differs by the last bits of float sums alone, whatever the depth,
and a fault shows at its own place and at no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qatc.evaluation.traces import (
    CACHED,
    LayerTrace,
    Site,
    Trace,
    entered,
    interpret,
    interpreted,
    is_attention,
    rows,
    sites_by_node,
)
from qatc.kernels import packed_linear
from qatc.kernels.cached_attention import values_of
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.runtime.forward import runtime_of

STALE = 99
"""What unused cache slots are filled with: no query may see it."""

Kind = Literal["reads", "linear", "attention", "codes", "logits"]


@dataclass(frozen=True)
class Difference:
    """How far a place in the lowered model is from the same place in the trained one.

    Attributes:
        kind: ``reads`` (what a site is given), ``linear``, ``attention``, ``codes`` (K and V as
            attention reads them) or ``logits``.
        place: layer, site, and how it was run.
        figure: the largest difference, relative to the largest value; of codes, the share that
            differ.
    """

    kind: Kind
    place: str
    figure: float


@torch.no_grad()
def compare(
    lowered: Any, trace: Trace, recipe: Recipe, title: str, chunks: Sequence[int] | None = None
) -> list[Difference]:
    """Run the lowered model on the text of a trace, and compare it site by site.

    Args:
        lowered: the model that runs on integers, uncompiled.
        trace: what the trained model computed.
        recipe: of both.
        title: of this way to run it.
        chunks: numbers of tokens that are fed one after another into a KV cache whose unused slots
            hold garbage; None for one forward without a cache.

    Returns:
        The largest difference of every place, in the order in which places were met.
    """
    runtime, comparison = runtime_of(lowered), _Comparison(trace, recipe, title)
    cache, start = None, 0
    with (
        interpreted((runtime.scoring, runtime.cached, runtime.masked), comparison.run),
        entered(runtime.forwards, comparison.enter),
    ):
        for size in chunks or [trace.ids.shape[1]]:
            comparison.now = now = slice(start, start + size)
            out = lowered(
                input_ids=trace.ids[:, now],
                attention_mask=None if trace.mask is None else trace.mask[:, : now.stop],
                past_key_values=cache,
                use_cache=chunks is not None,
            )
            comparison.leave(out.logits)
            cache, start = out.past_key_values, now.stop
    return comparison.differences()


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    largest = float(wanted.abs().max())
    return float((got.float() - wanted.float()).abs().max()) / max(largest, 1e-30)


class _Comparison:
    """One run of the lowered model on what the trained one saw.

    Attributes:
        now: the tokens that are being fed.
    """

    def __init__(self, trace: Trace, recipe: Recipe, title: str) -> None:
        self._trace, self._recipe, self._title = trace, recipe, title
        self._found: dict[tuple[Kind, str], float] = {}
        self._entered = self._ran = 0
        self.now = slice(0, 0)

    def differences(self) -> list[Difference]:
        """The largest difference of every place."""
        return [Difference(kind, place, figure) for (kind, place), figure in self._found.items()]

    def enter(self, number: int, hidden: Tensor) -> Tensor:
        """Compare what a layer is called with, and give it what the trained one was called with."""
        assert number == self._entered == self._ran, "every layer runs once, on its own graph"
        self._entered += 1
        layer = self._trace.layers[number]
        wanted = layer.hidden[:, self.now]
        self._note("reads", f"{layer.name}, its input ({self._title})", hidden, wanted)
        return _like(hidden, wanted)

    def leave(self, logits: Tensor) -> None:
        """Compare the logits, once all layers ran."""
        assert self._entered == self._ran == len(self._trace.layers), "every layer runs once"
        self._entered = self._ran = 0
        wanted = self._trace.logits[:, self.now]
        self._note("logits", f"the end of the model ({self._title})", logits, wanted)

    def run(self, graph_module: GraphModule, tensors: tuple[Any, ...]) -> Any:
        """Interpret a layer's graph: compare and replace every site's tensor."""
        layer = self._trace.layers[self._ran]
        assert self._entered == self._ran + 1, "a layer's graph runs inside the layer"
        graph, batch = graph_module.graph, len(self._trace.ids)
        wanted_at = sites_by_node(graph)
        missing = {site for site in layer.sites if not site[1].startswith("held")}
        missing -= {site for sites in wanted_at.values() for site in sites}
        for site in sorted(missing):
            self._set("reads", f"{layer.name}, {' of '.join(site[::-1])}: not there", math.inf)

        def seen(node: Node, value: Any) -> Any:
            for site in wanted_at.get(node, ()):
                kind, place = self._describe(layer, site, node, value)
                if site not in layer.sites:
                    self._set(kind, f"{place}: only there", math.inf)
                    continue
                whole = rows(layer.sites[site], site, batch)
                got, wanted = rows(value, site, batch), whole[:, self.now]
                self._note(kind, place, got, wanted)
                if got.shape == wanted.shape:
                    forced = _like(got, wanted)
                    value = forced.transpose(1, 2) if is_attention(site) else forced.view_as(value)
            return value

        cache = _cache_of(graph, tensors, self._recipe)
        if cache is not None:
            self._compare_held(layer, cache, cache.start)
            cache.spoil()
        result = interpret(graph_module, tensors, seen)
        if cache is not None:
            self._compare_held(layer, cache, cache.start + self.now.stop - self.now.start)
        self._ran += 1
        return result

    def _describe(
        self, layer: LayerTrace, site: Site, node: Node, value: Tensor
    ) -> tuple[Kind, str]:
        name, part = site
        if part == "output" and not is_attention(site):
            how = "float"
            if node.target is packed_linear.PACKED_LINEAR:
                phase = "decode" if value.shape[-2] == 1 else "prefill"
                how = f"{phase}: {node.kwargs[phase]}"
            return "linear", f"{layer.name}, {name} ({how})"
        if part == "output":
            return "attention", f"{layer.name}, {name} ({self._title})"
        kind: Kind = "codes" if part.startswith("held") else "reads"
        return kind, f"{layer.name}, {part} of {name} ({self._title})"

    def _compare_held(self, layer: LayerTrace, cache: _Cache, slots: int) -> None:
        """Hold the first slots of a cache against the last tokens that were fed."""
        last = self.now.start + slots - cache.start
        tokens = slice(last - slots, last)
        for title, held in zip(("key", "value"), cache.values(slots), strict=True):
            wanted = layer.sites["attention", f"held {title}"][:, :, tokens]
            place = f"{layer.name}, KV cache ({self._title})"
            self._note("codes", place, held.transpose(1, 2), wanted.transpose(1, 2), tokens)

    def _note(
        self, kind: Kind, place: str, got: Tensor, wanted: Tensor, tokens: slice | None = None
    ) -> None:
        """Compare ``[B, T, ...]``, padding left out."""
        if got.shape != wanted.shape:
            self._set(kind, place, math.inf)
        elif got.numel():
            if self._trace.mask is not None:
                real = self._trace.mask[:, tokens or self.now].bool()
                got, wanted = got[real], wanted[real]
            differs = kind == "codes"
            figure = (got != wanted).float().mean().item() if differs else distance(got, wanted)
            self._set(kind, place, figure)

    def _set(self, kind: Kind, place: str, figure: float) -> None:
        figure = figure if math.isfinite(figure) else math.inf
        self._found[kind, place] = max(self._found.get((kind, place), 0.0), figure)


def _like(value: Tensor, wanted: Tensor) -> Tensor:
    """``wanted`` in the memory layout of ``value``, which what follows may rely on."""
    return torch.empty_like(value).copy_(wanted)


@dataclass(frozen=True)
class _Cache:
    """The KV cache that a layer's graph is given.

    Attributes:
        tensors: ``[B, Hkv, S, ...]`` each, the very memory.
        start: the slot that the first new token gets.
        specs, widths: of keys and of values; 16 bits where the cache holds floats.
    """

    tensors: list[Tensor]
    start: int
    specs: tuple[QuantSpec, QuantSpec]
    widths: tuple[int, int]

    def spoil(self) -> None:
        """Fill what holds no token with garbage."""
        for tensor in self.tensors:
            tensor[:, :, self.start :] = STALE

    def values(self, slots: int) -> list[Tensor]:
        """Keys and values in the first slots, ``[B, Hkv, slots, D]`` each."""
        held = [tensor[:, :, :slots] for tensor in self.tensors]
        if not self.specs[0].quantizes:
            return held
        return [
            values_of(codes, scale, spec, width)
            for codes, scale, spec, width in zip(
                held[::2], held[1::2], self.specs, self.widths, strict=True
            )
        ]


def _cache_of(graph: Graph, tensors: tuple[Any, ...], recipe: Recipe) -> _Cache | None:
    attention = next((node for node in graph.nodes if node.target in CACHED), None)
    if attention is None:
        return None
    placeholders = (node for node in graph.nodes if node.op == "placeholder")
    given = dict(zip(placeholders, tensors, strict=True))
    inputs = [given[node] for node in attention.args[3:] if node in given]
    caches = [tensor for tensor in inputs if tensor.dim() == 4 and tensor.dtype is not torch.bool]
    (positions,) = (tensor for tensor in inputs if tensor.dim() == 2)
    key, value = (int(node.meta["val"].shape[3]) for node in attention.args[1:3])
    return _Cache(caches, int(positions[0, 0]), (recipe.kv, recipe.values), (key, value))
