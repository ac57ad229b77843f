"""Let attention write to, and read from, a preallocated KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph import Attention, find_attentions, shape_of
from qatc.kv_cache import cached_attention
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize

CACHE_INPUTS = ("key_cache", "value_cache", "positions")
"""The graph inputs that the pass adds, in order, after all others."""


@dataclass(frozen=True)
class InsertKVCache(GraphPass):
    """Replace a layer's causal attention by attention over a cache in full precision.

    The graph gets three more inputs, in place changed: ``key_cache`` and ``value_cache``
    ``[B, Hkv, S, D]``, and ``positions`` int64 ``[B, T]``, see
    :func:`qatc.kv_cache.cached_attention`.
    """

    requires: ClassVar = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        attentions = find_attentions(gm)
        done = [n for n in gm.graph.nodes if n.target is cached_attention]
        if not attentions:
            return Edits(matched=len(done), edited=0)
        if len(attentions) != 1:
            raise PassError(
                f"a layer with {len(attentions)} attentions has no place for one KV cache"
            )
        attention = attentions[0]
        if attention.mask is not None:
            raise PassError("the layer was captured with a mask; capture it without one")
        # Over a single token, causal attention is spelled without the flag.
        if not attention.is_causal and str(shape_of(attention.query)[2]) != "1":
            raise PassError("the attention is not causal; a cache holds only what came before")
        caches = _add_inputs(gm, attention)
        node = attention.node
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                cached_attention,
                (attention.query, attention.key, attention.value, *caches),
                {"scale": attention.scale},
            )
        new.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        return Edits(matched=1, edited=1)


def _add_inputs(gm: GraphModule, attention: Attention) -> list[Node]:
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    inputs = []
    for name in reversed(CACHE_INPUTS):
        with gm.graph.inserting_after(last):
            inputs.append(gm.graph.placeholder(name))
    key_cache, value_cache, positions = inputs[::-1]
    if "val" in attention.key.meta:
        # The number of slots is free; as an example, as many as there are new tokens.
        key, value = attention.key.meta["val"], attention.value.meta["val"]
        key_cache.meta["val"] = torch.empty_like(key)
        value_cache.meta["val"] = torch.empty_like(value)
        positions.meta["val"] = key.new_empty((key.shape[0], key.shape[2]), dtype=torch.int64)
    return [key_cache, value_cache, positions]
