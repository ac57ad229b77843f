"""``x @ codes.T`` of int8 codes and packed codes, scaled, in Triton.

The packing is that of :mod:`qatc.numerics.packing`: plane after plane, and in a plane of p bits
byte j has the j-th value of each of 8 / p equal parts of the row. A kernel goes through the bytes
of a plane, and takes them times each part of ``x``; a sum of integers does not mind the order. All
sizes of a row are multiples of ``unit``, K over the largest number of parts, so that Triton sees
what they divide by.

``GEMV`` has its codes in words of four, for the instruction dp4a, and reads every byte of the
weight once for up to three rows. ``GEMM`` gives tiles of bytes to tensor cores. Both multiply one
input by up to three weights in one launch, each with its outputs, scales and biases.

The sums are exact. They are scaled in the order of
:func:`qatc.kernels.integer_linear.scale_sums`, and must be compiled with ``enable_fp_fusion=False``
to be the same bits: a bias added in one rounding with the product before it would be others.
"""

import triton
import triton.language as tl

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU there is no assembly


@triton.jit
def dot_of_four(a, b, sums, SIGNED: tl.constexpr):
    """``sums`` and the products of four bytes, ``SIGNED`` or not, with four signed bytes."""
    if EMULATED:
        for i in tl.static_range(4):
            byte = (a << (24 - 8 * i)) >> 24
            sums += (byte if SIGNED else byte & 0xFF) * ((b << (24 - 8 * i)) >> 24)
    else:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return sums


@triton.jit
def codes_in_words(held, PART: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr):
    """What one part of a plane adds to codes, four in an int32: unsigned, but for whole bytes."""
    if PLANE == 8:
        return held
    else:
        return ((held >> (PART * PLANE)) & (0x01010101 * ((1 << PLANE) - 1))) << LOW


@triton.jit
def codes_in_bytes(
    held, PART: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr, OFF: tl.constexpr
):
    """:func:`codes_in_words` of a tile of bytes, of which a register has four, less ``OFF``.

    The sign bit of each byte lends, so that no byte borrows from the next.
    """
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
def of_three(which, a, b, c, COUNT: tl.constexpr):
    """The one of the first ``COUNT`` that ``which`` says: numbers, or pointers of one type."""
    if COUNT > 1:
        a = tl.where(which == 1, b, a)
    if COUNT > 2:
        a = tl.where(which == 2, c, a)
    return a


@triton.jit
def weight_of(
    program,
    w0, scale0, bias0, out0, outputs0, w1, scale1, bias1, out1, outputs1,
    w2, scale2, bias2, out2, outputs2, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The one of ``COUNT`` weights that a program is for, and which block of its outputs."""
    which = 0
    if COUNT > 1:
        first = tl.cdiv(outputs0, BLOCK_N)
        which = (program >= first).to(tl.int32)
        if COUNT > 2:
            second = tl.cdiv(outputs1, BLOCK_N)
            which += (program >= first + second).to(tl.int32)
            program -= tl.where(which == 2, second, 0)
        program -= tl.where(which > 0, first, 0)
    w = of_three(which, w0, w1, w2, COUNT)
    scale = of_three(which, scale0, scale1, scale2, COUNT)
    bias = of_three(which, bias0, bias1, bias2, COUNT)
    out = of_three(which, out0, out1, out2, COUNT)
    outputs = of_three(which, outputs0, outputs1, outputs2, COUNT)
    return w, scale, bias, out, outputs, program


@triton.jit
def with_added(values, added):
    """The sum of two of one dtype, rounded to it."""
    return (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)


@triton.jit
def gemv_plane(
    s0, s1, s2, x, w, own, unit,
    BITS: tl.constexpr, MOST: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums over a plane, whose bytes have the bits from ``LOW`` on, added to those before it.

    Codes are multiplied unsigned. What that adds, ``OFF`` times the sum of ``x``, goes off for all
    outputs at once, in the plane that has the highest bit.
    """
    PARTS: tl.constexpr = 8 // PLANE
    OFF: tl.constexpr = (1 << (BITS - 1)) if PLANE < 8 and LOW + PLANE == BITS else 0
    LESS: tl.constexpr = 0x01010101 * (256 - OFF) - (1 << 32)  # four bytes of -OFF
    count = unit * (MOST * PLANE // 8)
    x_row = unit * MOST
    w += unit * (MOST * LOW // 8)
    t0 = tl.zeros((BLOCK_W,), tl.int32)
    t1, t2 = t0, t0
    for start in range(0, count, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        inside = at < count
        held = tl.load(w + at[None, :], mask=own[:, None] & inside[None, :], other=0)
        for part in tl.static_range(PARTS):
            codes = codes_in_words(held, part, PLANE, LOW)
            of_x = x + part * count + at
            values = tl.load(of_x, mask=inside, other=0)
            s0 = dot_of_four(codes, values[None, :], s0, PLANE == 8)
            if OFF > 0:
                t0 = dot_of_four(tl.full((BLOCK_W,), LESS, tl.int32), values, t0, True)
            if ROWS > 1:
                values = tl.load(of_x + x_row, mask=inside, other=0)
                s1 = dot_of_four(codes, values[None, :], s1, PLANE == 8)
                if OFF > 0:
                    t1 = dot_of_four(tl.full((BLOCK_W,), LESS, tl.int32), values, t1, True)
            if ROWS > 2:
                values = tl.load(of_x + 2 * x_row, mask=inside, other=0)
                s2 = dot_of_four(codes, values[None, :], s2, PLANE == 8)
                if OFF > 0:
                    t2 = dot_of_four(tl.full((BLOCK_W,), LESS, tl.int32), values, t2, True)
    return s0 + t0[None, :], s1 + t1[None, :], s2 + t2[None, :]


@triton.jit
def gemv(
    x, x_scale, unit,
    w0, scale0, bias0, out0, outputs0, w1, scale1, bias1, out1, outputs1,
    w2, scale2, bias2, out2, outputs2, added,
    BITS: tl.constexpr, MOST: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program for ``BLOCK_N`` outputs of one of ``COUNT`` weights, and all rows.

    Args:
        x: int32 ``[ROWS, K / 4]``, four int8 codes each.
        x_scale: fp32 ``[ROWS]``.
        unit: words of a row of ``x`` over ``MOST``, the largest number of parts.
        w0, w1, w2: int32 ``[outputs, bytes of a row / 4]``; anything from the ``COUNT``-th on.
        scale0, scale1, scale2: fp32 ``[outputs]``.
        bias0, bias1, bias2: ``[outputs]``, or anything without ``HAS_BIAS``.
        out0, out1, out2: ``[ROWS, outputs]``.
        added: with ``HAS_ADDED``, and one weight: like ``out0``, what is added to the product.
        P0, P1, P2: bits of the planes, 0 for none.
    """
    w, scale, bias, out, outputs, block = weight_of(
        tl.program_id(0),
        w0, scale0, bias0, out0, outputs0, w1, scale1, bias1, out1, outputs1,
        w2, scale2, bias2, out2, outputs2, BLOCK_N, COUNT,
    )  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
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
        at = row * outputs + n
        values = values.to(out.dtype.element_ty)
        if HAS_ADDED:
            values = with_added(values, tl.load(added + at, mask=own, other=0.0))
        tl.store(out + at, values, mask=own)


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
    x, x_scale, rows, unit,
    w0, scale0, bias0, out0, outputs0, w1, scale1, bias1, out1, outputs1,
    w2, scale2, bias2, out2, outputs2, added,
    BITS: tl.constexpr, MOST: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program for a tile of ``BLOCK_M`` rows and ``BLOCK_N`` outputs, ``BLOCK_B`` bytes a step.

    Args: as of :func:`gemv`, with ``x`` int8 ``[rows, K]``, and weights and ``unit`` in bytes.
    """
    w, scale, bias, out, outputs, block = weight_of(
        tl.program_id(1),
        w0, scale0, bias0, out0, outputs0, w1, scale1, bias1, out1, outputs1,
        w2, scale2, bias2, out2, outputs2, BLOCK_N, COUNT,
    )  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    values = values.to(out.dtype.element_ty)
    at, inside = m.to(tl.int64)[:, None] * outputs + n[None, :], real[:, None] & own[None, :]
    if HAS_ADDED:
        values = with_added(values, tl.load(added + at, mask=inside, other=0.0))
    tl.store(out + at, values, mask=inside)
