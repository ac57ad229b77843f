"""Decode attention over a float cache, as an op: one query per row, every row at its own length.

On a CPU with a C compiler ``csrc/attention.c`` runs it, whose cost follows the sum of the rows'
lengths. Elsewhere it is SDPA over all slots that are passed, behind a mask: torch takes that to a
kernel without a flash algorithm, and reads the slots of the longest row for every row.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qatc.machine import toolchain

MAX_VALUES = 2**17
"""Values that a thread may hold on its stack, 4 bytes each: threads have 2 MB on some systems."""

_CHUNK = 64  # CHUNK of csrc/attention.c

ATTENTION = toolchain.Library(("attention.c",), {"qatc_row_attention": "ppppppp nnnnn nnnn f ii"})
"""The functions of ``csrc/attention.c``."""

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "row_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor positions, float scale) -> Tensor"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of :data:`ATTENTION`, built for this processor; None where that fails."""
    return ATTENTION.load()


def write(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """Put new keys or values ``[B, Hkv, T, D]`` into their slots, ``positions`` ``[B, T]``."""
    rows = torch.arange(new.shape[0], device=new.device).unsqueeze(1)
    cache[rows, :, positions] = new.transpose(1, 2)


def visible(positions: Tensor, slots: int, mask: Tensor | None) -> Tensor:
    """Which slots each query sees: bool ``[B, 1, T, S]``."""
    own = positions[:, None, :, None]
    every = torch.arange(slots, device=positions.device)
    return every <= own if mask is None else ((every <= own) & mask) | (every == own)


def visible_on(query: Tensor, slots: int, positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """:func:`visible` to a query ``[B, Hq, T, D]``; None on a GPU if these tokens begin the text.

    There are as many slots as tokens then, and causal attention needs no mask.
    """
    if mask is None and query.is_cuda and query.shape[2] == slots and slots > 1:
        return None
    return visible(positions, slots, mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """:func:`qatc.kernels.cached_attention.cached_attention` in torch's operators alone.

    It is by SDPA for one query as for many, on every device.
    """
    write(key_cache, key, positions)
    write(value_cache, value, positions)
    seen = visible(positions, key_cache.shape[2], mask)
    return F.scaled_dot_product_attention(
        query, key_cache, value_cache, attn_mask=seen, scale=scale, enable_gqa=True
    )


def _anywhere(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    out = attend(query, key, value, key_cache, value_cache, positions, scale=scale)
    return out.contiguous()


def _on_a_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    tensors = (query, key, value, key_cache, value_cache)
    loaded = library() if _fits(tensors) else None
    if loaded is None:
        return _anywhere(*tensors, positions, scale)
    rows, heads, _, width = query.shape
    groups, slots, deep = key.shape[1], key_cache.shape[2], value.shape[3]
    expected = [(rows, heads, 1, width), (rows, groups, 1, width), (rows, groups, 1, deep)]
    expected += [(rows, groups, slots, width), (rows, groups, slots, deep)]
    assert [tuple(t.shape) for t in tensors] == expected and positions.shape == (rows, 1)
    positions = positions.contiguous()
    if rows and not 0 <= int(positions.min()) <= int(positions.max()) < slots:
        raise IndexError(f"positions {positions.flatten().tolist()} of a cache of {slots} slots")
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty((rows, heads, 1, deep))
    loaded.qatc_row_attention(
        *(t.data_ptr() for t in (query, key, value, key_cache, value_cache, positions, out)),
        *(rows, groups, heads // groups, width, deep),
        *(*key_cache.stride()[:2], *value_cache.stride()[:2]),
        scale,
        *(query.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    return out


def _fits(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the kernel takes these: query, key, value and their caches."""
    query, key, value, *caches = tensors
    dtype, widest = query.dtype, -(-max(query.shape[3], value.shape[3]) // 16) * 16
    held = (query.shape[1] // key.shape[1]) * (2 * widest + _CHUNK + 3) + _CHUNK * widest
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype is dtype for t in tensors)
        and all(t.stride(3) == 1 and t.stride(2) == t.shape[3] for t in caches)
        and held <= MAX_VALUES
    )


def _shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_LIBRARY.impl("row_attention", _anywhere, "CompositeExplicitAutograd")
_LIBRARY.impl("row_attention", _on_a_cpu, "CPU")
torch.library.register_fake("qatc::row_attention", _shape, lib=_LIBRARY)
