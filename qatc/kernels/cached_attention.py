"""Attention over a preallocated KV cache, in full precision or as packed integer codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qatc.kernels import row_attention
from qatc.kernels.gpu import attention
from qatc.numerics import asymmetric, learned, minmax, packing
from qatc.recipe.spec import QuantSpec, read_spec_arg


def cached_attention(
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
    """Write new keys and values into the cache, then attend to everything up to each query.

    Every row of the batch has its own positions, so rows may be at different lengths. Slots beyond
    a query's position are masked, whatever they hold: a row is reused by starting at 0 again. A
    single query without a mask goes to :mod:`qatc.kernels.row_attention`.

    Args:
        query: ``[B, Hq, T, D]``.
        key: ``[B, Hkv, T, D]``, with Hkv dividing Hq.
        value: ``[B, Hkv, T, D]``.
        key_cache: ``[B, Hkv, S, D]``, changed in place.
        value_cache: ``[B, Hkv, S, D]``, changed in place.
        positions: int64 ``[B, T]``: the slot of each new token, below S; one after the other.
        mask: bool ``[B or 1, 1, T, S]``: which slots a query may see, besides those up to its own;
            its own it always sees, so that no row is without any.
        scale: factor on the scores; ``None`` for ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, D]``.
    """
    if query.shape[2] == 1 and mask is None:
        out: Tensor = torch.ops.qatc.row_attention(
            *(query, key, value, key_cache, value_cache, positions),
            query.shape[-1] ** -0.5 if scale is None else scale,
        )
        return out
    row_attention.write(key_cache, key, positions)
    row_attention.write(value_cache, value, positions)
    visible = row_attention.visible_on(query, key_cache.shape[2], positions, mask)
    return masked_attention(
        *(query, key_cache, value_cache, visible), scale, expand=query.device.type == "cuda"
    )


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    *,
    spec: str,
    value_spec: str,
    scale: float | None = None,
    key_gain: Tensor | None = None,
    value_gain: Tensor | None = None,
) -> Tensor:
    """:func:`cached_attention` over integer codes, one scale per token and head.

    New keys and values are quantized once, when they are written. A single query reads the codes
    as they are: the scales of the keys are folded into the scores, those of the values into the
    probabilities, and no dequantized copy of the cache is made. On a GPU a kernel of
    :mod:`qatc.kernels.gpu.attention` does that where it can. Several queries at once, a prefill,
    share a dequantized copy of the slots in use. Where codes are asymmetric, an offset stands
    behind each scale.

    Args:
        query, key, value, positions, mask, scale: as for :func:`cached_attention`.
        key_codes, value_codes: ``[B, Hkv, S, packed_width(D, bits)]`` of the own bits, uint8, or
            int8 for 8 bits; changed in place.
        key_scale, value_scale: fp32 ``[B, Hkv, S, 1]``, changed in place; asymmetric
            ``[B, Hkv, S, 2]``.
        spec, value_spec: of the codes of keys and of values, as
            :func:`qatc.recipe.spec.spec_arg` writes them: 2 to 8 bits, of one range.
        key_gain, value_gain: fp32 ``[Hkv, 1, 1]``, of learned scales.

    Returns:
        ``[B, Hq, T, D]``.
    """
    of_keys, of_values = read_spec_arg(spec), read_spec_arg(value_spec)
    caches = (key_codes, key_scale, value_codes, value_scale)
    if query.shape[2] == 1 and query.device.type == "cuda" and key_gain is None:
        torch.ops.qatc.write_token(key, value, *caches, positions, spec, value_spec)
    else:
        for new, own, gain, codes, scales in (
            (key, of_keys, key_gain, key_codes, key_scale),
            (value, of_values, value_gain, value_codes, value_scale),
        ):
            _write(new, own, gain, codes, scales, positions)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[2] == 1 and query.device.type == "cuda":
        out: Tensor = torch.ops.qatc.attend_to_codes(
            *(query, *caches, positions, mask, spec, value_spec, value.shape[-1], factor)
        )
        return out
    visible = row_attention.visible_on(query, key_codes.shape[2], positions, mask)
    if query.shape[2] == 1:
        assert visible is not None
        bits = of_keys.bits, of_values.bits
        return _attend_to_codes(
            *(query, *caches, visible), bits=bits, value_width=value.shape[-1], scale=factor
        )
    dtype = query.dtype
    keys, values = (
        values_of(codes, scales, own, width, dtype)
        for codes, scales, own, width in (
            (key_codes, key_scale, of_keys, key.shape[-1]),
            (value_codes, value_scale, of_values, value.shape[-1]),
        )
    )
    return masked_attention(
        *(query, keys, values, visible), scale, expand=query.device.type == "cuda"
    )


def _write(
    new: Tensor,
    spec: QuantSpec,
    gain: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    positions: Tensor,
) -> None:
    """Quantize new keys or values ``[B, Hkv, T, D]`` into their slots, ``positions`` ``[B, T]``."""
    rows = torch.arange(new.shape[0], device=new.device).unsqueeze(1)
    quantize = asymmetric.quantize if spec.asymmetric else learned.quantize
    new_codes, new_scale = quantize(new, spec, gain)
    codes[rows, :, positions] = packing.pack(new_codes, spec.bits).transpose(1, 2)
    scales[rows, :, positions] = new_scale.transpose(1, 2)


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float | None,
    *,
    expand: bool,
) -> Tensor:
    """SDPA of ``[B, Hq, T, D]`` over ``[B, Hkv, S, D]`` behind a mask, bool ``[B, 1, T, S]``.

    Args:
        visible: the mask; None for the causal one of T = S, which takes no memory and goes to the
            kernels that know it, as flash attention.
        expand: repeat keys and values for the query heads that share them. On a GPU the fused
            kernel that takes a mask takes as many heads of each, and without it all scores of all
            heads are in memory: 537 MB a layer for 2,048 tokens of 32 heads.
    """
    repeats = query.shape[1] // keys.shape[1]
    if expand and repeats > 1:
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
    causal = visible is None
    return F.scaled_dot_product_attention(
        *(query, keys, values), attn_mask=visible, is_causal=causal, scale=scale,
        enable_gqa=not expand,
    )  # fmt: skip


def values_of(
    codes: Tensor, scales: Tensor, spec: QuantSpec, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What slots of a quantized K or V cache stand for.

    Args:
        codes, scales: as of :func:`quantized_attention`, ``[B, Hkv, S, ...]``.
        spec: of the codes.
        width: head dimension.
        dtype: of the result.

    Returns:
        ``[B, Hkv, S, width]``.
    """
    dequantize = asymmetric.dequantize if spec.asymmetric else minmax.dequantize
    return dequantize(packing.unpack(codes, spec.bits, width), scales, dtype)


def _attend_to_codes(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    visible: Tensor,
    *,
    bits: tuple[int, int],
    value_width: int,
    scale: float,
) -> Tensor:
    # Sizes: B rows, Hkv groups of G = Hq / Hkv query heads, S slots, D and E values of a key and of
    # a value, whose codes come in n consecutive parts. All is fp32, the codes as well. A part of
    # the keys, [B, Hkv, 1, S, D/n], times that of the query, [B, Hkv, G, 1, D/n], summed over its
    # last dimension and over the parts, gives the scores [B, Hkv, G, S].
    batch, heads, _, width = query.shape
    dtype = query.dtype
    groups = key_codes.shape[1]
    query = torch.ops.qatc.materialize(query.float() * scale)
    grouped = query.view(batch, groups, heads // groups, 1, width)
    keys = _signed_parts(key_codes, bits[0], width)
    scores = sum(
        (piece.unsqueeze(2) * part).sum(-1)
        for piece, part in zip(keys, grouped.chunk(len(keys), -1), strict=True)
    )
    # Scales are [B, Hkv, S, 1 or 2], here [B, Hkv, 1, S]; visible is bool [B, 1, 1, S].
    scores = scores * key_scale[..., 0].unsqueeze(2)
    if offsets := key_scale.shape[-1] == 2:  # the same number in every value of a key
        scores = scores + grouped.sum(-1) * key_scale[..., 1].unsqueeze(2)
    scores = scores.masked_fill(~visible, -torch.inf)
    probabilities = scores.softmax(-1)
    weights = torch.ops.qatc.materialize(probabilities * value_scale[..., 0].unsqueeze(2))
    # [B, Hkv, G, S, 1] times [B, Hkv, 1, S, E/n], summed over the slots: [B, Hkv, G, E/n].
    values = _signed_parts(value_codes, bits[1], value_width)
    parts = [(weights.unsqueeze(-1) * piece.unsqueeze(2)).sum(-2) for piece in values]
    out = torch.cat(parts, -1)
    if offsets:
        out = out + (probabilities * value_scale[..., 1].unsqueeze(2)).sum(-1, keepdim=True)
    return out.view(batch, heads, 1, -1).to(dtype)


def _on_a_gpu(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    spec: str,
    value_spec: str,
    value_width: int,
    scale: float,
) -> Tensor:
    caches = (key_codes, key_scale, value_codes, value_scale)
    of_keys, of_values = read_spec_arg(spec), read_spec_arg(value_spec)
    widths = (int(query.shape[3]), value_width)
    bits = (of_keys.bits, of_values.bits)
    if attention.obstacle(query.device.type, of_keys, of_values, widths) is None:
        out: Tensor = attention.CODE_ATTENTION(query, *caches, positions, mask, *bits, scale)
        return out
    visible = row_attention.visible(positions, key_codes.shape[2], mask)
    return _attend_to_codes(
        *(query, *caches, visible), bits=bits, value_width=value_width, scale=scale
    )


_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "attend_to_codes(Tensor query, Tensor key_codes, Tensor key_scale, Tensor value_codes,"
    " Tensor value_scale, Tensor positions, Tensor? mask, str spec, str value_spec,"
    " int value_width, float scale) -> Tensor"
)
_LIBRARY.impl("attend_to_codes", _on_a_gpu, "CompositeImplicitAutograd")
"""An op, since what it asks the machine cannot be asked while a graph is compiled from Python."""


def _write_token(
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    spec: str,
    value_spec: str,
) -> None:
    of_keys, of_values = read_spec_arg(spec), read_spec_arg(value_spec)
    widths = (int(key.shape[3]), int(value.shape[3]))
    if attention.store_obstacle(key.device.type, of_keys, of_values, widths) is None:
        caches = (key_codes, key_scale, value_codes, value_scale)
        attention.STORE_CODES(key, value, *caches, positions, spec, value_spec)
        return
    _write(key, of_keys, None, key_codes, key_scale, positions)
    _write(value, of_values, None, value_codes, value_scale, positions)


_LIBRARY.define(
    "write_token(Tensor key, Tensor value, Tensor(a!) key_codes, Tensor(b!) key_scale,"
    " Tensor(c!) value_codes, Tensor(d!) value_scale, Tensor positions, str spec, str value_spec)"
    " -> ()"
)
_LIBRARY.impl("write_token", _write_token, "CompositeImplicitAutograd")

_LIBRARY.define("materialize(Tensor x) -> Tensor")
_LIBRARY.impl("materialize", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("qatc::materialize", torch.empty_like, lib=_LIBRARY)
"""A copy that Inductor does not look into. It would fuse the query, from its projection's integers
on, into the reduction over the keys and compute it anew for each of them (two to three times slower
at 4096 tokens), and likewise the probabilities into that over the values."""


def _signed_parts(codes: Tensor, bits: int, width: int) -> list[Tensor]:
    """The codes as fp32, in consecutive parts of the last dimension where that saves a copy."""
    unsigned = packing.parts(codes, bits, width)
    if unsigned is None:
        return [packing.unpack(codes, bits, width).float()]
    return [(part - (1 << (bits - 1))).float() for part in unsigned]


def first_slots(tensors: list[Tensor], slots: int) -> list[Tensor]:
    """Views of the first slots of cache tensors ``[B, Hkv, S, ...]``, for a compiled graph.

    Their batch and their slots are marked as sizes that change. For one graph to serve all sizes,
    S must be larger than ``slots`` ever is: Inductor compiles a graph of its own for contiguous
    views.
    """
    views = [tensor[:, :, :slots] for tensor in tensors]
    for view in views:
        torch._dynamo.maybe_mark_dynamic(view, (0, 2))
    return views


def cache_shapes(spec: QuantSpec, width: int) -> tuple[tuple[int, torch.dtype], ...]:
    """Last dimension and dtype of the tensors that a quantized K or V cache is made of.

    Args:
        spec: bits of the cache, 2 to 8.
        width: head dimension.
    """
    codes = torch.int8 if spec.bits == 8 else torch.uint8
    numbers = 2 if spec.asymmetric else 1
    return (packing.packed_width(width, spec.bits), codes), (numbers, torch.float32)
