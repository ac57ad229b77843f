"""The KV cache of a model that runs on integers: packed codes, in a ``Cache`` of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from qatc.errors import CaptureError
from qatc.graph.capture import Template
from qatc.graph.nodes import spec_of
from qatc.kernels.cached_attention import cache_shapes, cached_attention, quantized_attention

SLOTS = 64
"""Attention reads the slots in use, rounded up to this many."""

_FOREIGN = "a packed KV cache is written by the layers of a model of qatc.load only"


class PackedLayer(CacheLayerMixin):
    """The KV cache of one layer: codes and scales, or floats where K and V are not quantized.

    A layer with a sliding window forgets the tokens that no later one can see, some
    :data:`SLOTS` at a time: to move what is held to the front costs a copy. Where tokens may be
    taken back, as in assisted decoding, it waits for that: see :meth:`activate_past_recording`.

    Args:
        window: tokens that a query of this layer sees, itself included; ``None`` for all.

    Attributes:
        length: tokens held.
        forgotten: tokens that were held and are not any more.
        tensors: what the layer's graph reads and writes, ``[B, Hkv, S, ...]`` each.
    """

    is_compileable = False
    is_croppable = True
    sees_all = False
    """Whether a query sees all slots up to its own, whatever mask comes with it."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.length = self.forgotten = 0
        self.tensors: list[Tensor] = []

    def reserve(self, template: Template, batch: int, slots: int, device: torch.device) -> None:
        """Make room for ``slots`` slots; what is held is kept.

        One slot more than is ever read is allocated, so that what is read is never contiguous:
        Inductor would compile a second graph for that.
        """
        if self.tensors and self.tensors[0].shape[0] != batch:
            if self.length:
                raise CaptureError(
                    f"the KV cache holds {self.tensors[0].shape[0]} rows and the batch has"
                    f" {batch}; start with a new cache"
                )
            self.tensors = []
        held = self.tensors[0].shape[2] - 1 if self.tensors else 0
        if held >= slots:
            return
        capacity = slots if self.is_sliding else max(slots, 2 * held)
        grown = []
        for number, (shape, dtype) in enumerate(cache_tensors(template)):
            heads, width = shape
            tensor = torch.zeros((batch, heads, capacity + 1, width), dtype=dtype, device=device)
            if held:
                tensor[:, :, :held] = self.tensors[number][:, :, :held]
            grown.append(tensor)
        self.tensors, self.is_initialized = grown, True

    def slots_read(self, new: int) -> int:
        """The number of slots that attention reads when there are so many new tokens."""
        return round_up(self.length + new)

    def positions(self, batch: int, new: int, device: torch.device) -> Tensor:
        """The slots of new tokens: int64 ``[B, T]``."""
        start = self.length
        return torch.arange(start, start + new, device=device).expand(batch, new).contiguous()

    def advance(self, new: int) -> None:
        """Count the tokens that a forward pass has written, and forget what is out of sight."""
        self.length += new
        if not self.record_past:
            self._forget()

    def _forget(self) -> None:
        if self.window is None or self.length < self.window + SLOTS:
            return
        kept = self.window - 1
        start = self.length - kept
        room = round_up(self.window + SLOTS) + 1
        shrunk = []
        for tensor in self.tensors:
            last = tensor[:, :, start : self.length].clone()
            if tensor.shape[2] > room:  # after a long prefill
                tensor = tensor.new_zeros((*tensor.shape[:2], room, tensor.shape[3]))
            tensor[:, :, :kept] = last
            shrunk.append(tensor)
        self.tensors = shrunk
        self.length, self.forgotten = kept, self.forgotten + start

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held take."""
        return sum(t[:, :, : self.length].numel() * t.element_size() for t in self.tensors)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CaptureError(_FOREIGN)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise CaptureError(_FOREIGN)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, self.forgotten

    def get_seq_length(self) -> int:
        return self.forgotten + self.length

    def get_max_length(self) -> int:
        return self.window or -1

    def offload(self) -> None:
        raise CaptureError("a packed KV cache cannot be offloaded; leave offloading out")

    def reset(self) -> None:
        self.length = self.forgotten = 0
        self.tensors, self.is_initialized = [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.tensors = [
            tensor.index_select(0, indices.to(tensor.device)) for tensor in self.tensors
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.tensors = [tensor.repeat_interleave(repeats, dim=0) for tensor in self.tensors]

    def activate_past_recording(self) -> None:
        """Forget nothing before a :meth:`crop` has said which tokens stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget this many of the last tokens, given as a negative number.

        Raises:
            CaptureError: tokens that would come into sight again are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        left = self.length + tokens_to_remove
        if self.window is not None and self.forgotten and left < self.window - 1:
            raise CaptureError(
                f"a cache with a sliding window of {self.window} tokens, some of which are out of"
                " it, cannot go back; call its activate_past_recording() before they are written"
            )
        self.length = max(0, left)
        self._forget()


def round_up(slots: int) -> int:
    """The number of slots that attention reads to see this many."""
    return (slots + SLOTS - 1) // SLOTS * SLOTS


def packed_layer(cache: Cache, number: int) -> PackedLayer:
    """The layer of a cache, which is made a packed one while it is empty.

    Whatever cache transformers made for a call, an empty dynamic one or one of ours, ends up with
    packed layers, of the same windows.

    Raises:
        CaptureError: the cache is of a kind that cannot be packed, or has float tokens already.
    """
    layers: list[Any] = cache.layers
    while len(layers) <= number:
        layers.append(DynamicLayer())
    layer = layers[number]
    if isinstance(layer, PackedLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_initialized:
        raise CaptureError(
            f"a {type(cache).__name__} with {type(layer).__name__} cannot hold packed K and V;"
            " leave cache_implementation out, or pass an empty DynamicCache"
        )
    packed = PackedLayer(_window(layer))
    packed.record_past = getattr(layer, "record_past", False)
    layers[number] = packed
    return packed


def windows_of(config: Any) -> list[int | None] | None:
    """The tokens that a query of each layer sees, as transformers' own cache knows it.

    As :attr:`PackedLayer.window`; a cache that was made without the config does not know them. None
    where transformers has no cache for the config.
    """
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except KeyError:  # a kind of layer of somebody's own
        return None
    return [_window(layer) for layer in layers]


def _window(layer: Any) -> int | None:
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def cache_values(template: Template) -> list[Tensor]:
    """Examples ``[B, Hkv, T, D]`` of the keys and the values that a graph writes to its cache."""
    return [source.meta["val"] for source in cache_attention(template.graph_module.graph).args[1:3]]  # type: ignore[union-attr]


def cache_tensors(template: Template) -> list[tuple[tuple[int, int], torch.dtype]]:
    """Heads, last dimension and dtype of the cache tensors that a graph takes."""
    node = cache_attention(template.graph_module.graph)
    found = []
    for value, name in zip(cache_values(template), ("spec", "value_spec"), strict=True):
        heads, width = int(value.shape[1]), int(value.shape[3])
        if node.target is cached_attention:
            found.append(((heads, width), value.dtype))
            continue
        shapes = cache_shapes(spec_of(node, name), width)
        found += [((heads, last), dtype) for last, dtype in shapes]
    return found


def cache_attention(graph: Graph) -> Node:
    """The attention over a cache in a lowered layer's graph."""
    nodes: list[Node] = list(graph.nodes)
    return next(n for n in nodes if n.target in (cached_attention, quantized_attention))
