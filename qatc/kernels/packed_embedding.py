"""Embedding tables as packed codes: rows are looked up, unpacked and scaled.

``torch.ops.qatc.packed_embedding`` computes what a lookup in the quantized table computes. Only
the rows of a batch are unpacked; the table itself is never there in float.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qatc.numerics import minmax, packing
from qatc.recipe.spec import read_spec_arg

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "packed_embedding(Tensor ids, Tensor packed, Tensor scale, int width, str spec, *,"
    " ScalarType dtype) -> Tensor"
)


def packed_embedding(
    ids: Tensor, packed: Tensor, scale: Tensor, width: int, spec: str, *, dtype: torch.dtype
) -> Tensor:
    codes = packing.unpack(F.embedding(ids, packed), read_spec_arg(spec).bits, width)
    return minmax.dequantize(codes, F.embedding(ids, scale), dtype)


_LIBRARY.impl("packed_embedding", packed_embedding, "CompositeImplicitAutograd")

PACKED_EMBEDDING = torch.ops.qatc.packed_embedding.default
"""``(ids [...], packed [V, bytes], scale [V, G], K, spec, *, dtype) -> [..., K]``: ``code * scale``
of the rows that ``ids`` names, computed in fp32 and rounded once to ``dtype``."""
