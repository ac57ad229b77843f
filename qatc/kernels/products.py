"""Products with packed codes, as ops that a graph can call.

On a CPU with a C compiler a few rows take the codes out of registers or of a core's own cache, see
:mod:`qatc.kernels.native`; for more rows, and elsewhere, the codes are unpacked to memory once. All
ops are opaque to Inductor, which has no pattern for the processor's products of bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatc.kernels import native
from qatc.kernels.integer_linear import int_mm
from qatc.numerics import minmax, packing

MAX_SCALED_ROWS = 64
"""For more rows a dequantized copy of the weight is worth its cost (measured)."""

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define("packed_mm(Tensor a, Tensor packed, int bits) -> Tensor")
_LIBRARY.define("scaled_mm(Tensor x, Tensor packed, Tensor scale, int bits) -> Tensor")
_LIBRARY.define("unpack(Tensor packed, int bits, int width) -> Tensor")


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    if bits == 8:
        return packed
    if native.library() is None:
        return packing.unpack(packed, bits, width)
    return native.unpack(packed, bits, width)


def _packed_mm(a: Tensor, packed: Tensor, bits: int) -> Tensor:
    if a.shape[0] <= native.MAX_ROWS and native.library() is not None:
        return native.packed_product(a, packed, bits)
    return int_mm(a, _unpack(packed, bits, a.shape[1]))


def _scaled_mm(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    if x.shape[0] <= MAX_SCALED_ROWS and native.library() is not None:
        return native.scaled_product(x, packed, scale, bits)
    weight = minmax.dequantize(_unpack(packed, bits, x.shape[1]), scale, x.dtype)
    return (x @ weight.t()).float()


def _shape(a: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], packed.shape[0]), dtype=dtype)


_LIBRARY.impl("packed_mm", _packed_mm, "CPU")
_LIBRARY.impl("scaled_mm", _scaled_mm, "CPU")
_LIBRARY.impl("unpack", _unpack, "CPU")
torch.library.register_fake(
    "qatc::packed_mm", lambda a, packed, bits: _shape(a, packed, torch.int32), lib=_LIBRARY
)
torch.library.register_fake(
    "qatc::scaled_mm", lambda x, packed, s, bits: _shape(x, packed, torch.float32), lib=_LIBRARY
)
torch.library.register_fake(
    "qatc::unpack",
    lambda packed, bits, width: packed.new_empty((packed.shape[0], width), dtype=torch.int8),
    lib=_LIBRARY,
)


def packed_mm(a: Tensor, packed: Tensor, bits: int) -> Tensor:
    """``a @ codes.T`` of packed codes, exactly.

    Args:
        a: int8 ``[M, K]`` on a CPU.
        packed: ``[N, packed_width(K, bits)]``, uint8, or int8 for 8 bits.
        bits: 2 to 8; K up to 2^16 for 8.

    Returns:
        int32 ``[M, N]``.
    """
    result: Tensor = torch.ops.qatc.packed_mm(a, packed, bits)
    return result


def scaled_mm(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x @ dequantize(codes, scale, x.dtype).T``, with no dequantized copy for a few rows.

    Args:
        x: float ``[M, K]`` on a CPU, K up to 2^16.
        packed: ``[N, packed_width(K, bits)]``, uint8, or int8 for 8 bits.
        scale: fp32 ``[N, G]`` with G dividing K.
        bits: 2 to 8.

    Returns:
        fp32 ``[M, N]``.
    """
    result: Tensor = torch.ops.qatc.scaled_mm(x, packed, scale, bits)
    return result


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """:func:`qatc.numerics.packing.unpack` of a matrix on a CPU, for 2 to 7 bits; see there."""
    result: Tensor = torch.ops.qatc.unpack(packed, bits, width)
    return result
