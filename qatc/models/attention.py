"""What the attention of a running model is called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What the attention probabilities of a layer are computed from.

    Attributes:
        query: ``[B, H, T, D]``.
        key: ``[B, G, S, D]``, of which H / G query heads share one.
        mask: bool (True: may be attended to) or float (added to the scores), broadcast to
            ``[B, H, T, S]``; None for none.
        causal: whether a query sees no key behind it.
        scale: factor of the scores; None for 1 / sqrt(D).
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    def log_probabilities(self) -> Tensor:
        """fp32 ``[B, H, T, S]``; finite, very low, where nothing is attended to."""
        query, key = self.query.float(), self.key.float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        scores = query @ key.mT * scale
        lowest = torch.finfo(scores.dtype).min  # not -inf, of which two differ by NaN
        if self.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, lowest)
        if self.mask is not None and self.mask.dtype is torch.bool:
            scores = scores.masked_fill(~self.mask, lowest)
        elif self.mask is not None:
            scores = (scores + self.mask.float()).clamp(min=lowest)
        return scores.log_softmax(-1)


class AttentionCalls(TorchFunctionMode):
    """Shows every SDPA of a forward pass, be it called by a module or by a captured graph.

    Args:
        see: is given what its probabilities are computed from, in the order of the calls.
    """

    def __init__(self, see: Callable[[AttentionMap], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ATTENTION and not torch.compiler.is_exporting():  # while a graph is captured
            self._see(_attention_map(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


_ATTENTION = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionMap:
    """The arguments of SDPA that its map depends on."""
    return AttentionMap(query, key, attn_mask, is_causal, scale)
