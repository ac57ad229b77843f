"""Integer codes of 2 to 8 bits in bytes, without a bit to spare.

A code of b bits, shifted to be unsigned, is cut into *planes* of 4, 2 and 1 bits (8 bits are one
plane): 3 = 2 + 1, 6 = 4 + 2. A plane of p bits puts 8 / p values into a byte, and not neighbours:
the row is cut into 8 / p equal parts, and byte j holds the j-th value of every part. Unpacking is
then a shift and a mask for each part and one concatenation, with no interleaving, so that a
reduction over the row can be fused with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes that make up a code, by its bits; the low bits come first."""


def packed_width(width: int, bits: int) -> int:
    """Bytes of a packed row of ``width`` codes."""
    return sum(_bytes(width, plane) for plane in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: int8 ``[..., K]``, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: 2 to 8.

    Returns:
        ``[..., packed_width(K, bits)]``, uint8; for 8 bits the codes themselves, int8.
    """
    if bits == 8:
        return codes
    unsigned = codes.to(torch.int16) + (1 << (bits - 1))
    packed, low = [], 0
    for plane in PLANES[bits]:
        parts = 8 // plane
        values = (unsigned >> low) & ((1 << plane) - 1)
        missing = _bytes(codes.shape[-1], plane) * parts - codes.shape[-1]
        values = torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (parts, -1))
        shifted = [values[..., part, :] << (part * plane) for part in range(parts)]
        packed.append(sum(shifted[1:], shifted[0]).to(torch.uint8))
        low += plane
    return packed[0] if len(packed) == 1 else torch.cat(packed, -1)


def unpack(packed: Tensor, bits: int, width: int, *, within: torch.dtype = torch.int32) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: ``[..., packed_width(width, bits)]``, uint8, or int8 for 8 bits.
        bits: 2 to 8.
        width: K.
        within: in which the bits are shifted: Inductor vectorizes int32, and uncompiled uint8 moves
            a quarter of the memory.

    Returns:
        int8 ``[..., K]``.
    """
    if bits == 8:
        return packed
    codes = None
    low = start = 0
    for plane in PLANES[bits]:
        count = _bytes(width, plane)
        held = packed[..., start : start + count].to(within)
        mask = (1 << plane) - 1
        parts = [(held >> (part * plane)) & mask for part in range(8 // plane)]
        values = torch.cat(parts, -1)[..., :width] << low
        codes = values if codes is None else codes | values
        low, start = low + plane, start + count
    assert codes is not None
    return codes.to(torch.int8) - (1 << (bits - 1))


def parts(packed: Tensor, bits: int, width: int) -> list[Tensor] | None:
    """The *unsigned* codes of a row in consecutive parts, to be summed over without a copy.

    The code is the value less 2^(bits-1), so that the sum of ``x * code`` over a row is that of
    ``x * value`` less 2^(bits-1) times the sum of ``x``.

    Returns:
        int32 ``[..., K / n]`` for each of the n parts; ``None`` where the bits take several planes
        or a row is not made up of equal parts.
    """
    if bits == 8 or len(PLANES[bits]) > 1 or width % (8 // bits):
        return None
    held, mask = packed.to(torch.int32), (1 << bits) - 1
    return [(held >> (i * bits)) & mask for i in range(8 // bits)]


def _bytes(width: int, plane: int) -> int:
    parts = 8 // plane
    return (width + parts - 1) // parts
