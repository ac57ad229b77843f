"""Decode attention over a cache of 4- and 8-bit codes, as an op for a GPU.

The slots are split among programs, see :mod:`qatc.kernels.gpu.attention_kernels`. How many splits
there are depends on how many slots are passed, a shape, and on nothing that a GPU would have to be
asked for; a split behind a row's last slot ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatc.kernels.gpu import launch
from qatc.numerics import minmax
from qatc.recipe.spec import QuantSpec, read_spec_arg

BITS = (4, 8)
"""Of the caches that the kernel reads."""

MOST_HEADS = 4
"""Query heads of a program; more of them would not fit its registers."""

TILE_ROWS = 16
"""Of what tensor cores multiply."""

JOINED_AT_ONCE = 16


@dataclass(frozen=True)
class Split:
    """How the work is cut.

    Attributes:
        slots: of a split; a multiple of ``at_once`` or not.
        at_once: slots that a program reads at a time, a power of two.
        heads: query heads of a program, a power of two.
        warps: of 32 threads.
        tiles: whether tensor cores multiply, for which the query must be in bf16.
    """

    slots: int
    at_once: int
    heads: int
    warps: int
    tiles: bool = False


def choose_split(slots: int, shared: int, width: int, tiles: bool = False) -> Split:
    """How to cut ``slots`` for ``shared`` query heads to a K/V head and values of ``width``.

    Short caches are cut finely, for a GPU to have enough to do at a single row. Without ``tiles`` a
    program holds ``heads * at_once`` running sums of values, in 32 registers of a thread, of 128 in
    all; the rows of tiles are the heads, 16 of them.
    """
    length = 64 if slots <= 1024 else 128 if slots <= 8192 else 512
    if tiles:
        return Split(length, 64, TILE_ROWS, 4, tiles=True)
    heads = min(MOST_HEADS, launch.power_of_two(shared))
    at_once = 4096 // (heads * launch.power_of_two(max(32, width)))
    return Split(length, min(64, max(4, at_once)), heads, 4)


def takes_tiles(dtype: torch.dtype, shared: int, bytes_: tuple[int, int]) -> bool:
    """Whether tensor cores are used: query heads in bf16 that share keys of enough bytes."""
    return dtype is torch.bfloat16 and shared > 1 and min(bytes_) >= TILE_ROWS


def obstacle(
    device: str, keys: QuantSpec, values: QuantSpec, widths: tuple[int, int]
) -> str | None:
    """Why the kernel does not read such a cache, or None if it does.

    Args:
        device: its type.
        keys, values: how they are quantized.
        widths: of a key and of a value.
    """
    for what, spec, width in zip(("keys", "values"), (keys, values), widths, strict=True):
        if spec.asymmetric:
            return f"{what} have an offset beside their scale"
        if spec.bits not in BITS:
            return f"{what} have {spec.bits} bits, and it is for 4 and 8"
        if width % (8 // spec.bits):
            return f"{width} codes of {what} do not fill their bytes"
    return launch.obstacle(device)


def code_attention(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    key_bits: int,
    value_bits: int,
    scale: float,
    split: Split | None = None,
) -> Tensor:
    """Start the kernels for these sizes; what ``torch.ops.qatc.code_attention`` is on a GPU.

    Args: as of :data:`CODE_ATTENTION`; ``split`` for another than :func:`choose_split` has.
    """
    from qatc.kernels.gpu import attention_kernels as kernels

    batch, heads, _, width = query.shape
    groups, slots = key_codes.shape[1:3]
    deep = value_codes.shape[3] * 8 // value_bits
    shared = heads // groups
    if split is None:
        tiles = takes_tiles(query.dtype, shared, (key_codes.shape[3], value_codes.shape[3]))
        split = choose_split(slots, shared, deep, tiles)
    count = -(-slots // split.slots)
    out = torch.empty((batch, heads, 1, deep), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    sums = torch.empty((batch * heads, count, deep), device=query.device)
    tops, totals = torch.empty((2, batch * heads, count), device=query.device)
    caches = (key_codes, key_scale, value_codes, value_scale)
    assert all(tensor.stride(3) == 1 or tensor.shape[3] == 1 for tensor in caches)
    seen = positions if mask is None else mask.contiguous().view(torch.uint8)
    mask_row = 0 if mask is None or mask.shape[0] == 1 else slots
    with launch.on_device_of(query):
        attend = kernels.attend_in_tiles if split.tiles else kernels.attend
        attend[(count, batch * groups, -(-shared // split.heads))](
            *(query.contiguous(), *caches, positions.contiguous(), seen, sums, tops, totals),
            *(groups, shared, slots, split.slots),
            *(stride for tensor in caches for stride in tensor.stride()[:3]),
            *(mask_row, scale),
            K_BITS=key_bits, V_BITS=value_bits, K_WIDTH=width, V_WIDTH=deep,
            HEADS=split.heads, BLOCK_S=split.at_once, HAS_MASK=mask is not None,
            BLOCK_K=launch.power_of_two(key_codes.shape[3]),
            BLOCK_V=launch.power_of_two(value_codes.shape[3]), num_warps=split.warps,
        )  # fmt: skip
        kernels.join[(batch * heads,)](
            *(sums, tops, totals, out, count),
            V_WIDTH=deep, BLOCK=launch.power_of_two(deep), AT_ONCE=JOINED_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return out


def store_obstacle(
    device: str, keys: QuantSpec, values: QuantSpec, widths: tuple[int, int]
) -> str | None:
    """Why the kernel does not write to such a cache, or None if it does; as :func:`obstacle`."""
    for what, spec in (("keys", keys), ("values", values)):
        if spec.range == "signed" or spec.rounding != "division":
            return f"the scales of {what} have a rule of their own"
        if spec.clip != "none":
            return f"the scales of {what} are trained"
    return obstacle(device, keys, values, widths)


def store_constants(
    keys: QuantSpec, values: QuantSpec, widths: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """What the kernel that writes to a cache is compiled for."""
    found: dict[str, Any] = {"SMALLEST": minmax.MIN_SCALE}
    for of, spec, width in zip("KV", (keys, values), widths, strict=True):
        found |= {
            f"{of}_BITS": spec.bits, f"{of}_WIDTH": width,
            f"BLOCK_{of}": launch.power_of_two(width * spec.bits // 8),
            f"{of}_STEPS": spec.steps, f"{of}_LEAST": float(spec.code_min),
            f"{of}_MOST": float(spec.code_max),
            f"{of}_LARGEST": minmax.largest_scale(spec, dtype, snap=False),
        }  # fmt: skip
    return found


def store_codes(
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
    """Start the kernel for these sizes; what ``torch.ops.qatc.store_codes`` is on a GPU.

    Args: as of :data:`STORE_CODES`.
    """
    from qatc.kernels.gpu import attention_kernels as kernels

    batch, groups, _, width = key.shape
    if not key.numel():
        return
    caches = (key_codes, key_scale, value_codes, value_scale)
    widths = (width, value.shape[3])
    constants = store_constants(read_spec_arg(spec), read_spec_arg(value_spec), widths, key.dtype)
    assert all(tensor.stride(3) == 1 or tensor.shape[3] == 1 for tensor in caches)
    with launch.on_device_of(key):
        kernels.store[(batch * groups, 2)](
            *(key.contiguous(), value.contiguous(), *caches, positions.contiguous()),
            *(groups, key_codes.shape[2]),
            *(stride for tensor in caches for stride in tensor.stride()[:3]),
            **constants, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "store_codes(Tensor key, Tensor value, Tensor(a!) key_codes, Tensor(b!) key_scale,"
    " Tensor(c!) value_codes, Tensor(d!) value_scale, Tensor positions, str spec, str value_spec)"
    " -> ()",
    tags=(torch.Tag.flexible_layout,),  # as below
)
_LIBRARY.impl("store_codes", store_codes, "CUDA")
torch.library.register_fake("qatc::store_codes", lambda *parts: None, lib=_LIBRARY)

STORE_CODES = torch.ops.qatc.store_codes.default
"""``(key [B, Hkv, 1, D], value [B, Hkv, 1, E], key_codes, key_scale, value_codes, value_scale,
positions int64 [B, 1], spec, value_spec)``: quantize a new token of each row into its slot of the
caches, which are as of :data:`CODE_ATTENTION`. The bits are those of :mod:`qatc.numerics.minmax`,
keys and values being what they are in their own dtype."""

_LIBRARY.define(
    "code_attention(Tensor query, Tensor key_codes, Tensor key_scale, Tensor value_codes,"
    " Tensor value_scale, Tensor positions, Tensor? mask, int key_bits, int value_bits,"
    " float scale) -> Tensor",
    # A graph that writes to a cache and then reads it has it contiguous on paper, as the result of
    # a function. Inductor writes in place, and would otherwise copy the cache to make it so.
    tags=(torch.Tag.flexible_layout,),
)
_LIBRARY.impl("code_attention", code_attention, "CUDA")
torch.library.register_fake(
    "qatc::code_attention",
    lambda query, kc, ks, codes, vs, positions, mask, key_bits, bits, scale: query.new_empty(
        (*query.shape[:3], codes.shape[3] * 8 // bits)
    ),
    lib=_LIBRARY,
)

CODE_ATTENTION = torch.ops.qatc.code_attention.default
"""``(query [B, Hq, 1, D], key_codes [B, Hkv, S, D * key_bits / 8], key_scale fp32 [B, Hkv, S, 1],
value_codes, value_scale, positions int64 [B, 1], mask bool [B or 1, 1, 1, S] or None, key_bits,
value_bits, scale) -> [B, Hq, 1, E]``: attention to the slots up to each row's position that the
mask has, its own among them, summed in fp32."""
