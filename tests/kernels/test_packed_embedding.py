from __future__ import annotations

import pytest
import torch

from qatc.kernels.packed_embedding import PACKED_EMBEDDING
from qatc.models.preparation import can_compile
from qatc.numerics import packing


@pytest.mark.parametrize(
    ("bits", "width", "groups", "compiled"),
    [(8, 7, 1, False), (4, 7, 1, False), (3, 12, 4, False), (4, 6, 1, True)],
)
def test_against_a_table_in_fp64(bits: int, width: int, groups: int, compiled: bool) -> None:
    if compiled and not can_compile():
        pytest.skip("no C++ compiler")
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (11, width), dtype=torch.int8)
    scale = torch.rand(11, groups) + 0.1
    table = codes.double() * scale.double().repeat_interleave(width // groups, 1)
    packed = packing.pack(codes, bits)
    look_up = torch.compile(PACKED_EMBEDDING) if compiled else PACKED_EMBEDDING
    for shape in ((2, 3), (1, 1)) if compiled else ((2, 3), (1, 1), (5,)):
        ids = torch.randint(11, shape)
        for dtype in (torch.float32, torch.bfloat16):
            rows = look_up(ids, packed, scale, width, f"int{bits}", dtype=dtype)
            assert rows.dtype is dtype and rows.shape == (*shape, width)
            assert torch.equal(rows, table[ids].float().to(dtype))


def test_ids_beyond_the_table_are_an_error() -> None:
    packed, scale = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3, 1)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            PACKED_EMBEDDING(torch.tensor([number]), packed, scale, 4, "int8", dtype=torch.float32)
