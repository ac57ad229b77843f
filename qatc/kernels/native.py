"""Products with packed codes in C, built on first use with the machine's own compiler.

Unpacking inside a dot product of bytes is what Inductor cannot generate: it has no pattern for the
processor's dot-product instructions, to which a C compiler turns ``csrc/packed.c``. The library is
built once, in about a second, and kept in the user's cache. Where there is no compiler,
:func:`library` is None and other kernels run; a kernel report says so.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from qatc.machine import toolchain
from qatc.machine.toolchain import compilers

MAX_ROWS = 16
"""Rows that one product of integers takes. Packed codes are unpacked anew for each: for more,
unpacking them to memory once is faster (measured)."""

MAX_WIDTH = 2**16
"""K up to which an int32 holds sums of unsigned bytes, and a thread's stack a row of weights."""

PACKED = toolchain.Library(
    ("packed.c",),
    {
        "qatc_packed_product": "ppp nnnnn ii",
        "qatc_unpack": "pp nnn ii",
        "qatc_scaled_product": "pppp nnnnn iii",
    },
)
"""The functions of ``csrc/packed.c``."""


def obstacle(parallel: bool = False) -> str | None:
    """Why there is no library on this machine, or None if there is.

    Args:
        parallel: whether one that runs on a single core is none.
    """
    if not compilers():
        return "there is no C compiler here"
    loaded = library()
    if loaded is None:
        reason = f" ({PACKED.failure})" if PACKED.failure else ""
        return f"the C compiler here cannot build it{reason}"
    if parallel and not loaded.qatc_is_parallel():
        return "the C compiler here has no OpenMP, so that it would run on one core"
    return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of :data:`PACKED`, built for this processor; None where that fails."""
    return PACKED.load()


def packed_product(x: Tensor, packed: Tensor, bits: int) -> Tensor:
    """``x @ codes.T``, exactly.

    Args:
        x: int8 ``[M, K]``, M up to :data:`MAX_ROWS`.
        packed: ``[N, packed_width(K, bits)]``, contiguous; uint8, or int8 for 8 bits.
        bits: 2 to 8; K up to 2^16 for 8.

    Returns:
        int32 ``[M, N]``.
    """
    loaded = library()
    assert loaded is not None, "checked by obstacle()"
    rows, width = x.shape
    assert rows <= MAX_ROWS and packed.is_contiguous()
    x = x.contiguous() if width % 8 == 0 else torch.nn.functional.pad(x, (0, -width % 8))
    out = x.new_empty((rows, packed.shape[0]), dtype=torch.int32)
    loaded.qatc_packed_product(
        *(x.data_ptr(), packed.data_ptr(), out.data_ptr()),
        *(rows, x.shape[1], packed.shape[0], width, packed.shape[1]),
        *(bits, torch.get_num_threads()),
    )
    return out


def scaled_product(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x @ (codes * scale).T``, summed in fp32; only a row of the weight is dequantized at a time.

    Args:
        x: float ``[M, K]``, K up to :data:`MAX_WIDTH`; weights are rounded to bf16 if it is bf16.
        packed: ``[N, packed_width(K, bits)]``, contiguous; uint8, or int8 for 8 bits.
        scale: ``[N, G]`` with G dividing K.
        bits: 2 to 8.

    Returns:
        fp32 ``[M, N]``.
    """
    loaded = library()
    assert loaded is not None, "checked by obstacle()"
    assert x.shape[1] <= MAX_WIDTH and x.shape[1] % scale.shape[1] == 0 and packed.is_contiguous()
    rounds = x.dtype is torch.bfloat16
    x, scale = x.float().contiguous(), scale.float().contiguous()
    out = x.new_empty((x.shape[0], packed.shape[0]))
    loaded.qatc_scaled_product(
        *(x.data_ptr(), packed.data_ptr(), scale.data_ptr(), out.data_ptr()),
        *(x.shape[0], packed.shape[0], x.shape[1], packed.shape[1], scale.shape[1]),
        *(bits, rounds, torch.get_num_threads()),
    )
    return out


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """:func:`qatc.numerics.packing.unpack` of a matrix, several times as fast.

    Args:
        packed: uint8 ``[N, packed_width(width, bits)]``, contiguous.
        bits: 2 to 7.
        width: K.

    Returns:
        int8 ``[N, K]``.
    """
    loaded = library()
    assert loaded is not None, "checked by obstacle()"
    assert packed.is_contiguous()
    codes = packed.new_empty((packed.shape[0], width), dtype=torch.int8)
    loaded.qatc_unpack(
        *(packed.data_ptr(), codes.data_ptr()),
        *(packed.shape[0], width, packed.shape[1], bits, torch.get_num_threads()),
    )
    return codes
