"""Attention over a preallocated KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Write new keys and values into the cache, then attend to everything up to each query.

    Every row of the batch has its own positions, so rows may be at different lengths. Slots beyond
    a query's position are masked, whatever they hold: a row is reused by starting at 0 again.

    Args:
        query: ``[B, Hq, T, D]``.
        key: ``[B, Hkv, T, D]``, with Hkv dividing Hq.
        value: ``[B, Hkv, T, D]``.
        key_cache: ``[B, Hkv, S, D]``, changed in place.
        value_cache: ``[B, Hkv, S, D]``, changed in place.
        positions: int64 ``[B, T]``: the slot of each new token, below S.
        scale: factor on the scores; ``None`` for ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, D]``.
    """
    rows = torch.arange(query.shape[0], device=query.device).unsqueeze(1)
    key_cache[rows, :, positions] = key.transpose(1, 2)
    value_cache[rows, :, positions] = value.transpose(1, 2)
    slots = torch.arange(key_cache.shape[2], device=query.device)
    visible = slots <= positions[:, None, :, None]
    return F.scaled_dot_product_attention(
        query, key_cache, value_cache, attn_mask=visible, scale=scale, enable_gqa=True
    )
