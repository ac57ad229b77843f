"""Token-by-token decoding with a static KV cache, one compiled step for any depth.

The decoder layers run the graph that their template gives with ``InsertKVCache``: one capture and
one compile for all layers, per-row positions, nothing allocated from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qatc.errors import CaptureError
from qatc.graph.capture import Template
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore, same_for_all
from qatc.kernels.cached_attention import cached_attention, first_slots
from qatc.models import find_regions
from qatc.models.preparation import inductor
from qatc.passes import Canonicalize, InsertKVCache, Pipeline

WINDOW = 64
"""Attention is given the slots up to the longest row, rounded up to this many."""


class Decoder:
    """A causal LM that takes one token per row and step; made by :func:`decoding`.

    Args:
        model: a transformers causal LM.
        forwards: the forwards of its layers.
    """

    def __init__(self, model: nn.Module, forwards: list[_CachedForward]) -> None:
        self._model = model
        self._forwards = forwards

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 ``[B]``, for the first B rows of the cache.
            positions: int64 ``[B]``: the slot of each token in its row.
            longest: an upper bound of ``positions``, known without asking the device.

        Returns:
            ``[B, V]``, in the model's dtype.
        """
        column = positions.unsqueeze(1)
        for forward in self._forwards:
            forward.longest, forward.positions = longest, column
        out = self._model(
            input_ids=tokens.unsqueeze(1), position_ids=column, use_cache=False, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def move(self, source: int, target: int, length: int) -> None:
        """Let row ``target`` hold what the first ``length`` slots of row ``source`` hold."""
        for cache in self._caches():
            cache[target, :, :length] = cache[source, :, :length]

    def resize(self, rows: int) -> None:
        """Have caches of this many rows, empty ones."""
        for forward in self._forwards:
            forward.resize(rows)

    @property
    def row_bytes(self) -> int:
        """Bytes that one row of all caches takes; known after the first step."""
        return sum(cache[0].nbytes for cache in self._caches())

    def _caches(self) -> Iterator[Tensor]:
        return (cache for forward in self._forwards for cache in forward.caches)


class _CachedForward(TemplateForward):
    """A layer's forward with a cache of its own, allocated in the first call."""

    def __init__(self, *args: Any, rows: int, length: int) -> None:
        super().__init__(*args)
        self.longest = 0
        self.positions = torch.empty(0)
        self.caches: list[Tensor] = []
        self._rows, self._length = rows, length
        self._found: tuple[Template, list[Tensor]] | None = None

    def resize(self, rows: int) -> None:
        self.caches, self._rows = [], rows

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        # Always called in one way, with parameters that stay where they are; sizes may differ.
        if self._found is None or not self._found[0].fits(leaves):
            template, _ = self.find(args, kwargs, self.store)
            self._found = template, self.parameters(template)
        template, parameters = self._found
        rows = len(self.positions)
        for leaf in (*leaves, self.positions):
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows:
                torch._dynamo.maybe_mark_dynamic(leaf, 0)
        return template(parameters, leaves, [*self._views(template, rows), self.positions])

    def _views(self, template: Template, rows: int) -> list[Tensor]:
        if not self.caches:
            shape = (self._rows, self._length)
            self.caches = _allocate(template.graph_module, *shape, self.positions.device)
        window = min((self.longest // WINDOW + 1) * WINDOW, self._length)
        return first_slots([cache[:rows] for cache in self.caches], window)


def _allocate(gm: Any, rows: int, length: int, device: torch.device) -> list[Tensor]:
    """Zeroed caches of the shapes that the graph's attention writes.

    One slot more than is ever read, so that what is read is never contiguous: Inductor would
    compile a second graph for that.
    """
    node = next(n for n in gm.graph.nodes if n.target is cached_attention)
    caches = []
    for source in node.args[1:3]:
        value = source.meta["val"]
        shape = (rows, int(value.shape[1]), length + 1, int(value.shape[3]))
        caches.append(torch.zeros(shape, dtype=value.dtype, device=device))
    return caches


@contextmanager
def decoding(model: nn.Module, rows: int, length: int, *, compile: bool) -> Iterator[Decoder]:
    """Let ``model`` decode with a static cache of ``rows`` x ``length`` slots inside the block.

    Raises:
        CaptureError: the layers cannot be captured, or use a sliding window shorter than
            ``length``.
    """
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    if window is not None and window < length:
        raise CaptureError(
            f"the model attends to a sliding window of {window} tokens, which is shorter than the"
            f" {length} asked for; use --max-length {window} or less"
        )
    pipeline = Pipeline((Canonicalize(), InsertKVCache()))
    store = TemplateStore(same_for_all(pipeline), compile=inductor if compile else None)
    forwards = [
        _CachedForward(region, name, store, rows=rows, length=length)
        for name, region in find_regions(model)
    ]
    for forward in forwards:
        forward.install()
    try:
        with torch.inference_mode():
            yield Decoder(model, forwards)
    finally:
        for forward in forwards:
            forward.remove()
            forward.resize(0)  # it is part of a cycle, which would hold its cache for a while
