from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc.numerics.packing import PLANES, pack, packed_width, parts, unpack


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2, 8), st.integers(1, 70), st.lists(st.integers(1, 3), max_size=2), st.integers(0)
)
def test_every_code_survives(bits: int, width: int, leading: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.from_numpy(rng.integers(low, high, (*leading, width))).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (*leading, packed_width(width, bits)) and packed.element_size() == 1
    assert torch.equal(unpack(packed, bits, width), codes)
    pieces = parts(packed, bits, width)
    if pieces is not None:
        assert torch.equal(torch.cat(pieces, -1), codes.int() - low)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_bit_is_spare(bits: int) -> None:
    assert sum(PLANES[bits]) == bits
    assert packed_width(64, bits) == 8 * bits


def test_nibbles_of_a_byte_are_half_a_row_apart() -> None:
    packed = pack(torch.tensor([[-8, -7, 7, 0]], dtype=torch.int8), 4)
    assert packed.tolist() == [[0 | 15 << 4, 1 | 8 << 4]]


def test_parts_are_for_one_plane_and_whole_bytes() -> None:
    assert parts(torch.zeros(1, 4, dtype=torch.uint8), 4, 7) is None
    assert parts(torch.zeros(1, 6, dtype=torch.uint8), 6, 8) is None
