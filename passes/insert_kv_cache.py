"""Let attention write to, and read from, a preallocated KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import replace_node
from qatc.graph.nodes import (
    Attention,
    find_attentions,
    mixes_neighbours,
    quantizer_of,
    shape_of,
    spec_of,
)
from qatc.kernels.cached_attention import cache_shapes, cached_attention, quantized_attention
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.quantize_kv import check_one_rule
from qatc.recipe.spec import QuantSpec, spec_arg


@dataclass(frozen=True)
class InsertKVCache(GraphPass):
    """Replace a layer's causal attention by attention over a cache.

    The graph gets more inputs at its end, of which the caches are changed in place:

    - in full precision ``key_cache`` and ``value_cache`` ``[B, Hkv, S, D]``; quantized
      ``key_codes``, ``key_scale``, ``value_codes`` and ``value_scale``, see
      :func:`qatc.kernels.cached_attention.quantized_attention`;
    - ``positions`` int64 ``[B, T]``;
    - if it is ``masked``, ``cache_mask`` bool ``[B, 1, T, S]``.

    Args:
        spec: bits of the cache: those at which the graph quantizes K and V, whose fake-quant nodes
            give way to the codes.
        masked: take a mask.
        values: spec of the values, where it is not that of the keys.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(16))
    masked: bool = False
    values: QuantSpec | None = None
    requires: ClassVar = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        attentions = find_attentions(gm)
        done = [n for n in gm.graph.nodes if n.target in (cached_attention, quantized_attention)]
        if not attentions:
            return Edits(matched=len(done), edited=0)
        if len(attentions) != 1:
            raise PassError(
                f"a layer with {len(attentions)} attentions has no place for one KV cache"
            )
        if mixes_neighbours(gm):
            raise PassError(
                "the layer convolves neighbouring tokens, of which a cache of keys and values holds"
                " nothing; choose a model without recurrent or convolved layers"
            )
        attention = attentions[0]
        if attention.mask is not None:
            raise PassError("the layer was captured with a mask; capture it without one")
        # Over a single token, causal attention is spelled without the flag.
        if not attention.is_causal and str(shape_of(attention.query)[2]) != "1":
            raise PassError("the attention is not causal; a cache holds only what came before")
        key, value = attention.key, attention.value
        options: dict[str, Any] = {"scale": attention.scale}
        if self.spec.quantizes:
            quantizers = [
                self._quantizer(node, spec)
                for node, spec in zip((key, value), self._specs, strict=True)
            ]
            key, value = (self._unquantized(node) for node in quantizers)
            options["spec"], options["value_spec"] = map(spec_arg, self._specs)
            if self.spec.learned:
                gains = (node.kwargs["gain"] for node in quantizers)
                options |= dict(zip(("key_gain", "value_gain"), gains, strict=True))
        inputs = self._add_inputs(gm, attention)
        target = quantized_attention if self.spec.quantizes else cached_attention
        replace_node(attention.node, target, (attention.query, key, value, *inputs), options)
        return Edits(matched=1, edited=1)

    @property
    def _specs(self) -> tuple[QuantSpec, QuantSpec]:
        """Of keys and of values."""
        return self.spec, check_one_rule(self.spec, self.values)

    def _quantizer(self, node: Node, spec: QuantSpec) -> Node:
        """The fake-quant node of a K or V, which rounds as the cache will."""
        quantizer = quantizer_of(node)
        if quantizer is None:
            raise PassError(
                "the K or V that attention reads is not what was quantized, so that a cache has no"
                " codes to store; quantize them where the cache stores them (--kv-site cache)"
            )
        found = spec_of(quantizer)
        if found.group_size:
            raise PassError(
                "the KV cache stores one scale per token and head; leave kv.group_size out"
            )
        if found != spec:
            raise PassError(
                f"the graph quantizes K or V to {spec_arg(found)}, and the cache is to have"
                f" {spec_arg(spec)}"
            )
        return quantizer

    def _unquantized(self, quantizer: Node) -> Node:
        """What a fake-quant node of K or V rounds, which the cache rounds itself."""
        source = quantizer.args[0]
        assert isinstance(source, Node)
        return source

    def _add_inputs(self, gm: GraphModule, attention: Attention) -> list[Node]:
        """The new inputs; as an example, the cache has as many slots as there are new tokens."""
        examples: dict[str, Tensor | None] = {}
        known = "val" in attention.key.meta
        sources = (("key", attention.key), ("value", attention.value))
        for (name, node), spec in zip(sources, self._specs, strict=True):
            value = node.meta["val"] if known else None
            if not self.spec.quantizes:
                examples[f"{name}_cache"] = None if value is None else torch.empty_like(value)
                continue
            for part, index in (("codes", 0), ("scale", 1)):
                example = None
                if value is not None:
                    width, dtype = cache_shapes(spec, int(value.shape[-1]))[index]
                    example = value.new_empty((*value.shape[:-1], width), dtype=dtype)
                examples[f"{name}_{part}"] = example
        key = attention.key.meta["val"] if known else None
        shape = None if key is None else (key.shape[0], key.shape[2])
        examples["positions"] = None if key is None else key.new_empty(shape, dtype=torch.int64)
        if self.masked:
            visible = None if shape is None else (shape[0], 1, shape[1], shape[1])
            examples["cache_mask"] = (
                None if key is None else key.new_empty(visible, dtype=torch.bool)
            )
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        inputs = []
        for name, example in examples.items():
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(name)
            if example is not None:
                last.meta["val"] = example
            inputs.append(last)
        return inputs
