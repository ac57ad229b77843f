"""``x @ codes.T`` of int8 codes and packed codes, scaled, in Triton.

The packing is that of :mod:`qatc.numerics.packing`: plane after plane, and in a plane of p bits
byte j has the j-th value of each of 8 / p equal parts of the row. A kernel goes through the bytes
of a plane, and takes them times each part of ``x``; a sum of integers does not mind the order. All
sizes of a row are multiples of ``unit``, K over the largest number of parts, so that Triton sees
what they divide by.

``GEMV`` has its codes in words of four, for the instruction dp4a, and reads every byte of the
weight once for up to three rows. ``GEMM`` gives tiles of bytes to tensor cores.

The sums are exact. They are scaled in the order of
:func:`qatc.kernels.integer_linear.scale_sums`, and must be compiled with ``enable_fp_fusion=False``
to be the same bits: a bias added in one rounding with the product before it would be others.
"""

import triton
import triton.language as tl

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU there is no assembly


@triton.jit
def dot_of_four(a, b, sums):
    """``sums`` and the products of four bytes with four bytes, all signed."""
    if EMULATED:
        for i in tl.static_range(4):
            sums += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    else:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return sums


@triton.jit
def codes_in_words(
    held, PART: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr, OFF: tl.constexpr
):
    """What one part of a plane adds to codes, four in an int32; ``OFF`` goes off each.

    The sign bit of each byte lends, so that no byte borrows from the next.
    """
    if PLANE == 8:
        return held
    else:
        values = ((held >> (PART * PLANE)) & (0x01010101 * ((1 << PLANE) - 1))) << LOW
        if OFF != 0:
            values = ((values | -0x7F7F7F80) - 0x01010101 * OFF) ^ -0x7F7F7F80
        return values


@triton.jit
def codes_in_bytes(
    held, PART: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr, OFF: tl.constexpr
):
    """:func:`codes_in_words` of a tile of bytes, which the GPU has four in a register."""
    if PLANE == 8:
        return held
    elif EMULATED:
        values = ((held >> (PART * PLANE)) & ((1 << PLANE) - 1)) << LOW
        return (values.to(tl.int32) - OFF).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            f"shr.u32 $0, $1, {PART * PLANE};"
            f"and.b32 $0, $0, {0x01010101 * ((1 << PLANE) - 1)};"
            f"shl.b32 $0, $0, {LOW};"
            f"or.b32 $0, $0, {0x80808080};"
            f"sub.u32 $0, $0, {0x01010101 * OFF};"
            f"xor.b32 $0, $0, {0x80808080};",
            "=r,r",
            [held],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def scaled(sums, x_scale, scale, bias, HAS_BIAS: tl.constexpr):
    """``sums`` in fp32, times the scale of the row, times that of the column, and a bias."""
    values = sums.to(tl.float32) * x_scale * scale
    if HAS_BIAS:
        values += bias.to(tl.float32)
    return values


@triton.jit
def gemv_plane(
    s0, s1, s2, x, w, own, unit,
    BITS: tl.constexpr, MOST: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums over a plane, whose bytes have the bits from ``LOW`` on, added to those before it."""
    PARTS: tl.constexpr = 8 // PLANE
    OFF: tl.constexpr = (1 << (BITS - 1)) if LOW + PLANE == BITS else 0
    count = unit * (MOST * PLANE // 8)
    x_row = unit * MOST
    w += unit * (MOST * LOW // 8)
    for start in range(0, count, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        inside = at < count
        held = tl.load(w + at[None, :], mask=own[:, None] & inside[None, :], other=0)
        for part in tl.static_range(PARTS):
            codes = codes_in_words(held, part, PLANE, LOW, OFF)
            of_x = x + part * count + at
            s0 = dot_of_four(codes, tl.load(of_x, mask=inside, other=0)[None, :], s0)
            if ROWS > 1:
                s1 = dot_of_four(codes, tl.load(of_x + x_row, mask=inside, other=0)[None, :], s1)
            if ROWS > 2:
                more = tl.load(of_x + 2 * x_row, mask=inside, other=0)
                s2 = dot_of_four(codes, more[None, :], s2)
    return s0, s1, s2


@triton.jit
def gemv(
    x, x_scale, w, scale, bias, out, outputs, unit,
    BITS: tl.constexpr, MOST: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program for ``BLOCK_N`` outputs of all rows.

    Args:
        x: int32 ``[ROWS, K / 4]``, four int8 codes each.
        x_scale: fp32 ``[ROWS]``.
        w: int32 ``[outputs, bytes of a row / 4]``.
        scale: fp32 ``[outputs]``.
        bias: ``[outputs]``, or anything without ``HAS_BIAS``.
        out: ``[ROWS, outputs]``.
        unit: words of a row of ``x`` over ``MOST``, the largest number of parts.
        P0, P1, P2: bits of the planes, 0 for none.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = n < outputs
    rows = w + n.to(tl.int64)[:, None] * (unit * (MOST * BITS // 8))
    s0 = tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
    s1, s2 = s0, s0
    s0, s1, s2 = gemv_plane(s0, s1, s2, x, rows, own, unit, BITS, MOST, P0, 0, ROWS, BLOCK_W)
    if P1 > 0:
        s0, s1, s2 = gemv_plane(s0, s1, s2, x, rows, own, unit, BITS, MOST, P1, P0, ROWS, BLOCK_W)
    if P2 > 0:
        s0, s1, s2 = gemv_plane(
            s0, s1, s2, x, rows, own, unit, BITS, MOST, P2, P0 + P1, ROWS, BLOCK_W
        )
    of_n = tl.load(scale + n, mask=own, other=0.0)
    more = of_n
    if HAS_BIAS:
        more = tl.load(bias + n, mask=own, other=0.0)
    for row in tl.static_range(ROWS):
        if row == 0:
            sums = tl.sum(s0, 1)
        elif row == 1:
            sums = tl.sum(s1, 1)
        else:
            sums = tl.sum(s2, 1)
        values = scaled(sums, tl.load(x_scale + row), of_n, more, HAS_BIAS)
        tl.store(out + row * outputs + n, values.to(out.dtype.element_ty), mask=own)


@triton.jit
def gemm_plane(
    sums, x, w, real, own, unit,
    BITS: tl.constexpr, MOST: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """:func:`gemv_plane` for a tile of rows and outputs."""
    PARTS: tl.constexpr = 8 // PLANE
    OFF: tl.constexpr = (1 << (BITS - 1)) if LOW + PLANE == BITS else 0
    count = unit * (MOST * PLANE // 8)
    w += unit * (MOST * LOW // 8)
    for start in range(0, count, BLOCK_B):
        at = start + tl.arange(0, BLOCK_B)
        inside = at < count
        held = tl.load(w + at[:, None], mask=own[None, :] & inside[:, None], other=0)
        for part in tl.static_range(PARTS):
            codes = codes_in_bytes(held, part, PLANE, LOW, OFF)
            of_x = x + part * count + at[None, :]
            values = tl.load(of_x, mask=real[:, None] & inside[None, :], other=0)
            sums = tl.dot(values, codes, sums, out_dtype=tl.int32)
    return sums


@triton.jit
def gemm(
    x, x_scale, w, scale, bias, out, rows, outputs, unit,
    BITS: tl.constexpr, MOST: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program for a tile of ``BLOCK_M`` rows and ``BLOCK_N`` outputs, ``BLOCK_B`` bytes a step.

    Args: as of :func:`gemv`, with ``x`` int8 ``[rows, K]``, ``w`` in bytes, and ``unit`` in bytes.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real, own = m < rows, n < outputs
    x_rows = x + m.to(tl.int64)[:, None] * (unit * MOST)
    w_rows = w + n.to(tl.int64)[None, :] * (unit * (MOST * BITS // 8))
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    sums = gemm_plane(sums, x_rows, w_rows, real, own, unit, BITS, MOST, P0, 0, BLOCK_B)
    if P1 > 0:
        sums = gemm_plane(sums, x_rows, w_rows, real, own, unit, BITS, MOST, P1, P0, BLOCK_B)
    if P2 > 0:
        sums = gemm_plane(sums, x_rows, w_rows, real, own, unit, BITS, MOST, P2, P0 + P1, BLOCK_B)
    of_m = tl.load(x_scale + m, mask=real, other=0.0)
    of_n = tl.load(scale + n, mask=own, other=0.0)
    more = of_n
    if HAS_BIAS:
        more = tl.load(bias + n, mask=own, other=0.0)
    values = scaled(sums, of_m[:, None], of_n[None, :], more[None, :], HAS_BIAS)
    to = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=real[:, None] & own[None, :])
