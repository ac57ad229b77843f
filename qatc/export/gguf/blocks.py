"""Codes and scales as the blocks of ggml: 32 neighbouring values of a row, and one scale in fp16.

========  =========  ===================================================  ========================
type      for bits   32 codes                                           value
========  =========  ===================================================  ========================
``Q4_0``  2 to 4     16 bytes of code + 8: the lower four bits are the  ``(code + 8 - 8) * d``
                     codes 0 to 15, the upper four 16 to 31
``Q5_0``  5          4 bytes of the fifth bits of code + 16, that of    ``(code + 16 - 16) * d``
                     code 0 the lowest; then the rest as in Q4_0
``Q8_0``  6 to 8     32 bytes                                           ``code * d``
========  =========  ===================================================  ========================

Each block begins with its scale ``d``. A scale of a whole row, or of more than 32 values, stands in
each of its blocks. What stays float is fp16, bf16 or fp32: the first that holds it exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatc.errors import ConfigError
from qatc.output.codes import QuantizedWeight
from qatc.recipe.spec import QuantSpec

BLOCK = 32
"""Values that share a scale."""

BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
"""Of a block."""

OFFSETS = {"Q4_0": 8, "Q5_0": 16}
"""What is added to a code to store it."""

Bytes = NDArray[np.uint8]


def block_type(spec: QuantSpec) -> str:
    """The type of the blocks that hold weights quantized by ``spec``."""
    if spec.bits == 5:
        return "Q5_0"
    return "Q4_0" if spec.bits < 5 else "Q8_0"


def refuse_unheld(name: str, weight: QuantizedWeight) -> None:
    """Raise ``ConfigError`` if blocks cannot hold a weight as it is."""
    group = weight.spec.group_size
    if group is not None and group % BLOCK:
        raise ConfigError(
            f"GGUF has a scale for every {BLOCK} weights, and {name} has one for every {group};"
            f" quantize with --group-size {BLOCK}, or without groups"
        )
    lost = (weight.scale.half().float() != weight.scale).nonzero()
    if len(lost):
        row, place = lost[0].tolist()
        raise ConfigError(
            f"GGUF has its scales in fp16, which does not hold {len(lost)} of those of {name}, such"
            f" as {float(weight.scale[row, place]):.4g} in row {row}; quantize with --target"
            " llama.cpp, whose scales are fp16 from the start"
        )


def to_blocks(weight: QuantizedWeight) -> Bytes:
    """The rows of a weight as bytes ``[N, K / 32 * BYTES[type]]``; 32 divides K."""
    rows, width = weight.codes.shape
    count = width // BLOCK
    scale = weight.scale.half().repeat_interleave(count // weight.scale.shape[1], dim=1)
    codes = weight.codes.reshape(rows, count, BLOCK)
    kind = block_type(weight.spec)
    parts = [scale.unsqueeze(-1).contiguous().view(torch.uint8)]
    if kind == "Q8_0":
        parts.append(codes.view(torch.uint8))
    else:
        unsigned = (codes + OFFSETS[kind]).view(torch.uint8)
        if kind == "Q5_0":
            parts.append(_bits_to_bytes(unsigned >> 4))
        unsigned = unsigned & 0xF
        parts.append(unsigned[..., : BLOCK // 2] | (unsigned[..., BLOCK // 2 :] << 4))
    blocks: Bytes = torch.cat(parts, dim=-1).flatten(1).numpy()
    return blocks


def _bits_to_bytes(bits: Tensor) -> Tensor:
    """Zeros and ones uint8 ``[..., 32]``, the first the lowest, as four bytes."""
    values: Tensor = bits.unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return values.sum(-1, dtype=torch.uint8)


def _bytes_to_bits(values: Tensor) -> Tensor:
    """The inverse."""
    return (values.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def from_blocks(blocks: Bytes, kind: str) -> tuple[Tensor, Tensor]:
    """The inverse: codes int8 ``[N, K]`` and scales fp32 ``[N, K / 32]``."""
    rows = torch.from_numpy(np.array(blocks)).unflatten(1, (-1, BYTES[kind]))
    scale = rows[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    codes = rows[..., 2:]
    if kind == "Q8_0":
        return codes.contiguous().view(torch.int8).flatten(1), scale
    halves = codes[..., -BLOCK // 2 :]
    unsigned = torch.cat((halves & 0xF, halves >> 4), dim=-1)
    if kind == "Q5_0":
        unsigned |= _bytes_to_bits(codes[..., :4]) << 4
    return unsigned.view(torch.int8).flatten(1) - OFFSETS[kind], scale


def float_type(value: Tensor) -> str:
    """The narrowest type that holds a float tensor exactly; vectors are fp32, as ggml has them."""
    if value.dim() > 1:
        wide = value.float()
        for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
            if torch.equal(wide.to(dtype).float(), wide):
                return name
    return "F32"


def to_bytes(value: Tensor, kind: str) -> Bytes:
    """A float tensor in the type that :func:`float_type` said, as bytes of the same rows."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    plain: Bytes = value.to(dtypes[kind]).contiguous().view(torch.uint8).numpy()
    return plain
