"""The memory of decoding steps that are replayed: its addresses and shapes stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from qatc.graph.capture import Template
from qatc.runtime.cache import PackedLayer

FIRST_BUCKET = 256
"""Slots that the shortest graphs read."""


def bucket(slots: int) -> int:
    """The number of slots that a replayed step reads to see this many.

    Two to a power of two, so that a text of any length takes few graphs and a graph reads at most
    half more than it has to.
    """
    parts = -(-slots // FIRST_BUCKET)
    power = 1 << (parts - 1).bit_length()
    fewer = 3 * power // 4
    return FIRST_BUCKET * (fewer if power > 2 and parts <= fewer else power)


class FixedLayer(PackedLayer):
    """One layer's cache as a step sees it whose number of slots and whose addresses never change.

    Where the new token goes stands in a tensor, and all slots up to there are seen.

    Args:
        tensors: of the cache, ``[B, Hkv, S, ...]`` each.
        slots: how many of them are read.
        positions: int64 ``[B, 1]``: the slot of the new token.
    """

    sees_all = True

    def __init__(self, tensors: list[Tensor], slots: int, positions: Tensor) -> None:
        super().__init__()
        self.tensors, self.is_initialized = tensors, True
        self.length = self._slots = slots  # whatever is held: a step is not to depend on it
        self._positions = positions

    def reserve(self, template: Template, batch: int, slots: int, device: torch.device) -> None:
        """There is room."""

    def advance(self, new: int) -> None:
        """How many are held is known outside."""

    def slots_read(self, new: int) -> int:
        return self._slots

    def positions(self, batch: int, new: int, device: torch.device) -> Tensor:
        return self._positions


class Arena:
    """The tensors of a cache that stay where they are, and what a step over them reads.

    The layers of a cache get views of them. Once nobody has any of these views, the tensors may
    serve another cache, and with them the graphs that know their addresses.

    Args:
        layers: of the cache, whose tensors become those of the arena.

    Attributes:
        graphs: recorded steps, by the number of slots that they read, and of rows of positions.
        ids, slots: int64 ``[B, 1]``: the new tokens, and where they stand in the cache.
        positions: where they stand in their text, ``[1, 1]`` for all rows or ``[B, 1]``, by the
            number of rows.
    """

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self._tensors = [[_plain(tensor) for tensor in layer.tensors] for layer in layers]
        first = self._tensors[0][0]
        self.batch, self.capacity = first.shape[0], first.shape[2] - 1
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        with torch.inference_mode(False):
            self.ids, self.slots = (_zeros(self.batch, first.device) for _ in range(2))
            self.positions = {rows: _zeros(rows, first.device) for rows in (1, self.batch)}
        self._lend(layers)

    def holds(self, layers: Sequence[PackedLayer]) -> bool:
        """Whether the tensors of these layers are the arena's."""
        return all(
            len(layer.tensors) == len(lent)
            and all(one() is tensor for one, tensor in zip(lent, layer.tensors, strict=True))
            for layer, lent in zip(layers, self._lent, strict=True)
        )

    def is_free(self) -> bool:
        """Whether nobody has the arena's tensors."""
        return all(one() is None for lent in self._lent for one in lent)

    def take(self, layers: Sequence[PackedLayer]) -> None:
        """Hold what these layers hold, in the place of their own tensors."""
        for layer, own in zip(layers, self._tensors, strict=True):
            for mine, theirs in zip(own, layer.tensors, strict=True):
                mine[:, :, : layer.length].copy_(theirs[:, :, : layer.length])
                mine[:, :, layer.length :].zero_()  # what is hidden counts 0 times, if it is finite
        self._lend(layers)

    def fill(self, ids: Tensor, positions: Tensor | None, held: int) -> None:
        """Set what the next step reads: the tokens, and how many are held before them."""
        self.ids.copy_(ids)
        self.slots.fill_(held)
        if positions is None:
            self.positions[1].fill_(held)
        else:
            self.positions[len(positions)].copy_(positions)

    @contextmanager
    def untouched(self, slot: int) -> Iterator[None]:
        """What a slot holds is in it again behind the block."""
        tensors = [tensor[:, :, slot] for own in self._tensors for tensor in own]
        held = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, kept in zip(tensors, held, strict=True):
                tensor.copy_(kept)

    def cache(self, slots: int) -> Cache:
        """A cache over the arena's tensors, of which the first slots are read."""
        cache = DynamicCache()
        cache.layers = [FixedLayer(own, slots, self.slots) for own in self._tensors]
        return cache

    def _lend(self, layers: Sequence[PackedLayer]) -> None:
        self._lent: list[list[weakref.ref[Tensor]]] = []
        for layer, own in zip(layers, self._tensors, strict=True):
            with torch.inference_mode(False):
                layer.tensors = [tensor.view(tensor.shape) for tensor in own]
            self._lent.append([weakref.ref(tensor) for tensor in layer.tensors])


def _zeros(rows: int, device: torch.device) -> Tensor:
    return torch.zeros((rows, 1), dtype=torch.long, device=device)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that only inference mode may write to."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return torch.empty_like(tensor).copy_(tensor)
