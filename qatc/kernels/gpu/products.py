"""A linear on int8 codes of its input and packed codes of its weight, as an op for a GPU.

Up to :data:`MOST_GEMV_ROWS` rows go to ``gemv``, more to ``gemm``, see
:mod:`qatc.kernels.gpu.product_kernels`. The op is opaque to Inductor: codes and scales of the input
are computed by what stands before it in a graph, fused with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qatc.kernels.gpu import launch
from qatc.numerics import packing

MOST_GEMV_ROWS = 3
"""For more rows tensor cores are used, whose tiles have 16."""

MOST_ADDED_TO = 64
"""Rows up to which the kernel adds to its product. Above it would need registers of which two
programs of a multiprocessor then have too few, and a kernel more counts little."""

MOST_JOINED = 3
"""Weights that one launch multiplies by."""


@dataclass(frozen=True)
class Tile:
    """What a program of a kernel computes.

    Attributes:
        rows: of the input; 0 for all of them, in ``gemv``.
        outputs: how many.
        step: of the row of a weight, in bytes (``gemm``) or in words of four (``gemv``).
        warps: of 32 threads.
        stages: loads in flight.
    """

    rows: int
    outputs: int
    step: int
    warps: int
    stages: int = 1


def choose_tile(rows: int, outputs: int, width: int, bits: int) -> Tile:
    """The tile for ``[rows, width] @ [outputs, width].T``, by reasoning.

    Few rows are bound by the reading of the weight: tiles are small, for there to be more programs
    than a large GPU has multiprocessors (132), and many bytes are in flight. Where there are enough
    of them, larger ones read ``x`` less often. Many rows are bound by tensor cores, which want
    large tiles.
    """
    if rows <= MOST_GEMV_ROWS:
        words = launch.power_of_two(max(32, packing.packed_width(width, bits) // 4))
        return Tile(0, 8 if rows == 1 and outputs >= 8192 else 4, min(words, 512), 4)
    if rows <= 16:
        tile = Tile(16, 16, 128, 2, 4) if outputs < 8192 else Tile(16, 32, 128, 4, 4)
    elif rows <= 32:
        tile = Tile(32, 32, 128, 4, 4)
    elif rows <= 64:
        tile = Tile(64, 64, 64, 4, 4)
    elif rows <= 256:
        tile = Tile(64, 128, 64, 4, 4)
    else:
        tile = Tile(128, 128, 64, 8, 4)
    if bits in (4, 8):
        return tile
    # Up to eight parts of the input lie in shared memory, of which some GPUs have 99 KB a program.
    return replace(tile, step=min(tile.step, 32 if rows > 256 else 128), stages=2)


def unit_of(width: int, bits: int) -> tuple[int, int]:
    """K over the largest number of parts that its planes are cut into, and that number."""
    parts = 8 // min(packing.PLANES[bits])
    return width // parts, parts


def width_obstacle(width: int, bits: int) -> str | None:
    """Why rows of so many codes cannot be read in words of four, or None if they can."""
    parts = unit_of(width, bits)[1]
    if width % (4 * parts):
        return f"rows of {width} codes are no multiple of {4 * parts}: words of four in each part"
    return None


def kernel_arguments(
    bits: int, width: int, has_bias: bool, rows: int, count: int = 1, has_added: bool = False
) -> dict[str, Any]:
    """The sizes of a packing that are constants of a kernel."""
    planes = (*packing.PLANES[bits], 0, 0)[:3]
    names = dict(zip(("P0", "P1", "P2"), planes, strict=True))
    own = {"ROWS": rows} if rows <= MOST_GEMV_ROWS else {}
    most = unit_of(width, bits)[1]
    has = {"HAS_BIAS": has_bias, "HAS_ADDED": has_added}
    return {"BITS": bits, "MOST": most, "COUNT": count, **has, **names, **own}


def triton_linear(
    codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    added: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Start the kernel for these sizes; what ``torch.ops.qatc.triton_linear`` is on a GPU.

    Args: as of :data:`TRITON_LINEAR`; ``tile`` for another than :func:`choose_tile` has.
    """
    parts = (codes, x_scale, [packed], [scale], [bias], bits, dtype)
    if added is not None and codes.shape[0] > MOST_ADDED_TO:
        return triton_linears(*parts, tile=tile)[0] + added
    return triton_linears(*parts, added=added, tile=tile)[0]


def triton_linears(
    codes: Tensor,
    x_scale: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    bits: int,
    dtype: torch.dtype,
    *,
    added: Tensor | None = None,
    tile: Tile | None = None,
) -> list[Tensor]:
    """:func:`triton_linear` of one input and up to :data:`MOST_JOINED` weights, in one launch.

    Args: as of :data:`TRITON_LINEARS`; ``added`` to the product of a single weight, and ``tile``
        for another than :func:`choose_tile` has.
    """
    from qatc.kernels.gpu import product_kernels

    (rows, width), outputs = codes.shape, [one.shape[0] for one in packed]
    outs = [torch.empty((rows, n), dtype=dtype, device=codes.device) for n in outputs]
    if not rows or not all(outputs):
        return outs
    assert width_obstacle(width, bits) is None and len(packed) <= MOST_JOINED
    assert all(one.shape[1] == width * bits // 8 for one in packed)
    tile = tile or choose_tile(rows, sum(outputs), width, bits)
    assert added is None or (len(packed) == 1 and added.shape == outs[0].shape)
    has_bias, has_added = bias[0] is not None, added is not None
    constants = kernel_arguments(bits, width, has_bias, rows, len(packed), has_added)
    unit, _ = unit_of(width, bits)
    few = rows <= MOST_GEMV_ROWS
    weights = []
    for held, steps, more, out in zip(packed, scale, bias, outs, strict=True):
        held, steps = held.contiguous(), steps.contiguous()
        held = held.view(torch.int32) if few else held
        more = steps if more is None else more.contiguous()
        weights.append((held, steps, more, out, out.shape[1]))
    weights += weights[:1] * (MOST_JOINED - len(weights))
    parts: list[Any] = [part for weight in weights for part in weight]
    parts.append(outs[0] if added is None else added.contiguous())
    codes, x_scale = codes.contiguous(), x_scale.contiguous()
    blocks = sum(-(-n // tile.outputs) for n in outputs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    with launch.on_device_of(codes):
        if few:
            product_kernels.gemv[(blocks,)](
                *(codes.view(torch.int32), x_scale, unit // 4, *parts),
                **constants, BLOCK_N=tile.outputs, BLOCK_W=tile.step, **options,
            )  # fmt: skip
        else:
            product_kernels.gemm[(-(-rows // tile.rows), blocks)](
                *(codes, x_scale, rows, unit, *parts),
                **constants, BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_B=tile.step, **options,
            )  # fmt: skip
    return outs


_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "triton_linear(Tensor codes, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias,"
    " int bits, ScalarType dtype, Tensor? added=None) -> Tensor"
)
_LIBRARY.impl("triton_linear", triton_linear, "CUDA")
torch.library.register_fake(
    "qatc::triton_linear",
    lambda codes, x_scale, packed, scale, bias, bits, dtype, added=None: codes.new_empty(
        (codes.shape[0], packed.shape[0]), dtype=dtype
    ),
    lib=_LIBRARY,
)

TRITON_LINEAR = torch.ops.qatc.triton_linear.default
"""``(codes int8 [M, K], x_scale fp32 [M, 1], packed [N, packed_width(K, bits)], scale fp32 [N, 1],
bias [N] or None, bits, dtype, added [M, N] of ``dtype`` or None) -> [M, N]`` of ``dtype``: bit for
bit :func:`qatc.kernels.integer_linear.scale_sums` of the exact product, and to that, as rounded,
``added``."""

_LIBRARY.define(
    "triton_linears(Tensor codes, Tensor x_scale, Tensor[] packed, Tensor[] scale, Tensor?[] bias,"
    " int bits, ScalarType dtype) -> Tensor[]"
)
_LIBRARY.impl("triton_linears", triton_linears, "CUDA")
torch.library.register_fake(
    "qatc::triton_linears",
    lambda codes, x_scale, packed, scale, bias, bits, dtype: [
        codes.new_empty((codes.shape[0], one.shape[0]), dtype=dtype) for one in packed
    ],
    lib=_LIBRARY,
)

TRITON_LINEARS = torch.ops.qatc.triton_linears.default
""":data:`TRITON_LINEAR` of one input and up to :data:`MOST_JOINED` weights of the same bits, all
with a bias of one dtype or none with one: the very same bits, in one launch."""
