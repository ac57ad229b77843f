"""One query against a cache of 4- and 8-bit codes, split over the slots, in Triton.

A program of :func:`attend` reads some slots of one K/V head for up to ``HEADS`` of the query heads
that share it, all in fp32. In its loop nothing is summed over slots: each of ``BLOCK_S`` slots at a
time has a softmax of its own, with its own maximum, and they are joined when the program ends, as
those of all programs are by :func:`join`. Before, :func:`store` puts the codes of a new token into
the cache.
"""

import triton
import triton.language as tl

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU

NOTHING = tl.constexpr(-1.0e30)
"""The score of a slot that is not seen: finite, so that differences are."""


@triton.jit
def values_of(held, PART: tl.constexpr, BITS: tl.constexpr):
    """Signed codes of a part, in fp32, of bytes.

    An integer below 2^23 in the last bits of 2^23 is a float that much larger; unlike a conversion,
    which a GPU does at a quarter of the rate, this takes one operation on bits and a subtraction.
    """
    wide = held.to(tl.uint8, bitcast=True).to(tl.uint32)
    if BITS == 8:
        wide = wide ^ 0x80
    else:
        wide = (wide >> (PART * BITS)) & ((1 << BITS) - 1)
    return (wide | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))


@triton.jit
def store_one(
    new, codes, scale, slot,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Quantize a row of ``WIDTH`` values as :mod:`qatc.numerics.minmax` does, and pack it.

    Args:
        new: the row.
        codes, scale: where its bytes and its scale go, if ``slot`` is one of the cache.
        STEPS, LEAST, MOST: of the spec, from zero to the largest value, and the outermost codes.
        SMALLEST, LARGEST: scales that there are.
    """
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PARTS
    at = tl.arange(0, BLOCK)
    inside = at < BYTES
    low = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
    high = low
    if PARTS == 2:
        high = tl.load(new + BYTES + at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.max(((low != low) | (high != high)).to(tl.int32), 0)
    most = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0)
    most = tl.where(odd != 0, float("nan"), most)
    exact = most.to(tl.float64) / tl.full((), STEPS, tl.float64)
    step = tl.where(exact < SMALLEST, 1.0, exact).to(tl.float32)
    step = tl.where(most < float("inf"), tl.minimum(step, LARGEST), most)
    values = code_of(low, step, LEAST, MOST)
    if PARTS == 2:
        half: tl.constexpr = 1 << (BITS - 1)
        values = (values + half) | ((code_of(high, step, LEAST, MOST) + half) << BITS)
    tl.store(codes + at, values.to(codes.dtype.element_ty), mask=inside & slot)
    tl.store(scale, step, mask=slot)


@triton.jit
def code_of(values, step, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The nearest code, ties to even: a float of 1.5 * 2^23 and more has no places behind one."""
    exact = tl.div_rn(values, tl.zeros_like(values) + step)
    nearest = (exact + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(nearest, LEAST), MOST).to(tl.int32)


@triton.jit
def store(
    key, value, key_codes, key_scale, value_codes, value_scale, positions, groups, slots,
    kb, kh, ks, kb_scale, kh_scale, ks_scale, vb, vh, vs, vb_scale, vh_scale, vs_scale,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    K_STEPS: tl.constexpr, K_LEAST: tl.constexpr, K_MOST: tl.constexpr,
    V_STEPS: tl.constexpr, V_LEAST: tl.constexpr, V_MOST: tl.constexpr,
    SMALLEST: tl.constexpr, K_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr,
):  # fmt: skip
    """The codes of one token of each row. The grid is rows times K/V heads, and keys and values.

    Args: ``key`` and ``value`` are ``[B, Hkv, width]``, and the rest is as of :func:`attend` and
    :func:`store_one`.
    """
    head = tl.program_id(0)
    b, h = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    at = tl.load(positions + b)
    slot = (at >= 0) & (at < slots)
    if tl.program_id(1) == 0:
        store_one(
            key + head * K_WIDTH,
            key_codes + b * kb + h * kh + at * ks,
            key_scale + b * kb_scale + h * kh_scale + at * ks_scale,
            slot, K_BITS, K_WIDTH, BLOCK_K, K_STEPS, K_LEAST, K_MOST, SMALLEST, K_LARGEST,
        )  # fmt: skip
    else:
        store_one(
            value + head * V_WIDTH,
            value_codes + b * vb + h * vh + at * vs,
            value_scale + b * vb_scale + h * vh_scale + at * vs_scale,
            slot, V_BITS, V_WIDTH, BLOCK_V, V_STEPS, V_LEAST, V_MOST, SMALLEST, V_LARGEST,
        )  # fmt: skip


@triton.jit
def seen_of(s, last, own, mask, HAS_MASK: tl.constexpr):
    """Which slots ``s`` a query sees: below ``last``, by its row of the mask, and its own."""
    seen = s < last
    if HAS_MASK:
        given = tl.load(mask + s, mask=seen, other=0)
        seen = seen & ((given != 0) | (s == own))
    return seen


@triton.jit
def attend(
    query, key_codes, key_scale, value_codes, value_scale, positions, mask, sums, tops, totals,
    groups, shared, slots, split,
    kb, kh, ks, kb_scale, kh_scale, ks_scale, vb, vh, vs, vb_scale, vh_scale, vs_scale, mask_row,
    factor,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The grid is splits, rows times K/V heads, and blocks of the query heads that share one.

    Args:
        query: ``[B, Hq, K_WIDTH]``.
        key_codes, value_codes: bytes ``[B, Hkv, S, width * bits / 8]``, with strides over rows,
            heads and slots; scales fp32 ``[B, Hkv, S]``, with theirs.
        positions: int64 ``[B]``, the last slot that each row sees.
        mask: bytes ``[B, S]`` with a stride over rows, with ``HAS_MASK``: 0 for slots that are not
            seen, except a row's last.
        sums, tops, totals: fp32 ``[B * Hq, splits, V_WIDTH]`` and twice ``[B * Hq, splits]``.
        groups, shared, slots, split: Hkv, Hq / Hkv, S, and slots of a split.
        factor: on the scores.
        BLOCK_K, BLOCK_V: powers of two, not below the bytes of a key and of a value.
    """
    which = tl.program_id(0)
    b, h = tl.program_id(1) // groups, tl.program_id(1) % groups
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    K_PARTS: tl.constexpr = 8 // K_BITS
    V_PARTS: tl.constexpr = 8 // V_BITS
    K_BYTES: tl.constexpr = K_WIDTH // K_PARTS
    V_BYTES: tl.constexpr = V_WIDTH // V_PARTS
    k_at = tl.arange(0, BLOCK_K)[None, None, :]
    v_at = tl.arange(0, BLOCK_V)[None, None, :]
    head = tl.program_id(1) * shared + g
    real = (g < shared)[:, None, None]
    of_head = query + head[:, None, None] * K_WIDTH + k_at
    q0 = tl.load(of_head, mask=real & (k_at < K_BYTES), other=0.0).to(tl.float32) * factor
    q1 = q0
    if K_PARTS == 2:
        q1 = tl.load(of_head + K_BYTES, mask=real & (k_at < K_BYTES), other=0.0)
        q1 = q1.to(tl.float32) * factor
    key_codes += b.to(tl.int64) * kb + h.to(tl.int64) * kh
    key_scale += b.to(tl.int64) * kb_scale + h.to(tl.int64) * kh_scale
    value_codes += b.to(tl.int64) * vb + h.to(tl.int64) * vh
    value_scale += b.to(tl.int64) * vb_scale + h.to(tl.int64) * vh_scale
    own = tl.load(positions + b).to(tl.int32)
    top = tl.full((HEADS, BLOCK_S), NOTHING, tl.float32)
    total = tl.zeros((HEADS, BLOCK_S), tl.float32)
    sum0 = tl.zeros((HEADS, BLOCK_S, BLOCK_V), tl.float32)
    sum1 = sum0
    first = which * split
    last = tl.minimum(tl.minimum(first + split, slots), own + 1)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        seen = seen_of(s, last, own, mask + b * mask_row, HAS_MASK)
        at = s.to(tl.int64)[None, :, None]
        among = seen[None, :, None]
        keys = tl.load(key_codes + at * ks + k_at, mask=among & (k_at < K_BYTES), other=0)
        values = tl.load(value_codes + at * vs + v_at, mask=among & (v_at < V_BYTES), other=0)
        k_scale = tl.load(key_scale + s * ks_scale, mask=seen, other=0.0)
        v_scale = tl.load(value_scale + s * vs_scale, mask=seen, other=0.0)
        products = q0 * values_of(keys, 0, K_BITS)
        if K_PARTS == 2:
            products += q1 * values_of(keys, 1, K_BITS)
        scores = tl.where(seen[None, :], tl.sum(products, 2) * k_scale[None, :], NOTHING)
        higher = tl.maximum(top, scores)
        fade = tl.exp(top - higher)
        weights = tl.where(seen[None, :], tl.exp(scores - higher), 0.0)
        total = total * fade + weights
        weights = (weights * v_scale[None, :])[:, :, None]
        sum0 = sum0 * fade[:, :, None] + weights * values_of(values, 0, V_BITS)
        if V_PARTS == 2:
            sum1 = sum1 * fade[:, :, None] + weights * values_of(values, 1, V_BITS)
        top = higher
    highest = tl.max(top, 1)
    fade = tl.exp(top - highest[:, None])
    to = head * tl.num_programs(0) + which
    tl.store(tops + to, highest, mask=g < shared)
    tl.store(totals + to, tl.sum(total * fade, 1), mask=g < shared)
    v_to = tl.arange(0, BLOCK_V)[None, :]
    inside = (g < shared)[:, None] & (v_to < V_BYTES)
    of_split = sums + to.to(tl.int64)[:, None] * V_WIDTH + v_to
    tl.store(of_split, tl.sum(sum0 * fade[:, :, None], 1), mask=inside)
    if V_PARTS == 2:
        tl.store(of_split + V_BYTES, tl.sum(sum1 * fade[:, :, None], 1), mask=inside)


@triton.jit
def as_bf16(values):
    """The nearest bf16 numbers; on a CPU, where Triton has no products of those, in fp32."""
    if EMULATED:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(tl.bfloat16)


@triton.jit
def in_three(values, others, sums):
    """``sums`` and ``values @ others``, of bf16 numbers: what they miss of ``values`` comes after.

    Three bf16 numbers have the 24 bits of one in fp32.
    """
    for _ in tl.static_range(3):
        part = as_bf16(values)
        sums = tl.dot(part, others, sums)
        values -= part.to(tl.float32)
    return sums


@triton.jit
def attend_in_tiles(
    query, key_codes, key_scale, value_codes, value_scale, positions, mask, sums, tops, totals,
    groups, shared, slots, split,
    kb, kh, ks, kb_scale, kh_scale, ks_scale, vb, vh, vs, vb_scale, vh_scale, vs_scale, mask_row,
    factor,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """:func:`attend` on tensor cores, for queries in bf16: heads are the rows of a tile.

    Codes are bf16 numbers, and their products with the query exact, summed in fp32; so are those of
    the probabilities, in three parts.
    """
    which = tl.program_id(0)
    b, h = tl.program_id(1) // groups, tl.program_id(1) % groups
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    K_PARTS: tl.constexpr = 8 // K_BITS
    V_PARTS: tl.constexpr = 8 // V_BITS
    K_BYTES: tl.constexpr = K_WIDTH // K_PARTS
    V_BYTES: tl.constexpr = V_WIDTH // V_PARTS
    k_at, v_at = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    head = tl.program_id(1) * shared + g
    of_head = query + head[:, None] * K_WIDTH + k_at[None, :]
    real = (g < shared)[:, None] & (k_at < K_BYTES)[None, :]
    q0 = as_bf16(tl.load(of_head, mask=real, other=0.0).to(tl.float32))
    q1 = q0
    if K_PARTS == 2:
        q1 = as_bf16(tl.load(of_head + K_BYTES, mask=real, other=0.0).to(tl.float32))
    key_codes += b.to(tl.int64) * kb + h.to(tl.int64) * kh
    key_scale += b.to(tl.int64) * kb_scale + h.to(tl.int64) * kh_scale
    value_codes += b.to(tl.int64) * vb + h.to(tl.int64) * vh
    value_scale += b.to(tl.int64) * vb_scale + h.to(tl.int64) * vh_scale
    own = tl.load(positions + b).to(tl.int32)
    top = tl.full((HEADS,), NOTHING, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sum0 = tl.zeros((HEADS, BLOCK_V), tl.float32)
    sum1 = sum0
    first = which * split
    last = tl.minimum(tl.minimum(first + split, slots), own + 1)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        seen = seen_of(s, last, own, mask + b * mask_row, HAS_MASK)
        at = s.to(tl.int64)
        of_keys = key_codes + at[None, :] * ks + k_at[:, None]
        keys = tl.load(of_keys, mask=seen[None, :] & (k_at < K_BYTES)[:, None], other=0)
        of_values = value_codes + at[:, None] * vs + v_at[None, :]
        values = tl.load(of_values, mask=seen[:, None] & (v_at < V_BYTES)[None, :], other=0)
        k_scale = tl.load(key_scale + at * ks_scale, mask=seen, other=0.0)
        v_scale = tl.load(value_scale + at * vs_scale, mask=seen, other=0.0)
        products = tl.dot(q0, as_bf16(values_of(keys, 0, K_BITS)))
        if K_PARTS == 2:
            products = tl.dot(q1, as_bf16(values_of(keys, 1, K_BITS)), products)
        scores = tl.where(seen[None, :], products * (k_scale * factor)[None, :], NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp(top - higher)
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        total = total * fade + tl.sum(weights, 1)
        weights *= v_scale[None, :]
        sum0 = in_three(weights, as_bf16(values_of(values, 0, V_BITS)), sum0 * fade[:, None])
        if V_PARTS == 2:
            sum1 = in_three(weights, as_bf16(values_of(values, 1, V_BITS)), sum1 * fade[:, None])
        top = higher
    to = head * tl.num_programs(0) + which
    tl.store(tops + to, top, mask=g < shared)
    tl.store(totals + to, total, mask=g < shared)
    inside = (g < shared)[:, None] & (v_at < V_BYTES)[None, :]
    of_split = sums + to.to(tl.int64)[:, None] * V_WIDTH + v_at[None, :]
    tl.store(of_split, sum0, mask=inside)
    if V_PARTS == 2:
        tl.store(of_split + V_BYTES, sum1, mask=inside)


@triton.jit
def join(
    sums, tops, totals, out, splits,
    V_WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The splits of a query head, one program for each: ``[B * Hq, splits, V_WIDTH]`` to one row.

    Args: as of :func:`attend`; ``BLOCK`` is a power of two not below ``V_WIDTH``.
    """
    head = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    top = tl.full((AT_ONCE,), NOTHING, tl.float32)
    for start in range(0, splits, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        held = tl.load(tops + head * splits + i, mask=i < splits, other=NOTHING)
        top = tl.maximum(top, held)
    highest = tl.max(top, 0)
    total = tl.zeros((AT_ONCE,), tl.float32)
    values = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for start in range(0, splits, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        real = i < splits
        fade = tl.exp(tl.load(tops + head * splits + i, mask=real, other=NOTHING) - highest)
        total += tl.load(totals + head * splits + i, mask=real, other=0.0) * fade
        at = sums + (head * splits + i)[:, None] * V_WIDTH + e[None, :]
        values += (
            tl.load(at, mask=real[:, None] & (e < V_WIDTH)[None, :], other=0.0) * fade[:, None]
        )
    one = tl.sum(values, 0)
    one = tl.div_rn(one, tl.zeros_like(one) + tl.sum(total, 0))
    tl.store(out + head * V_WIDTH + e, one.to(out.dtype.element_ty), mask=e < V_WIDTH)
