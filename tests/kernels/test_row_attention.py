"""Decode attention with rows of their own lengths, against fp64, with and without the C library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatc.kernels import row_attention
from qatc.machine import toolchain

built = pytest.mark.skipif(not toolchain.compilers(), reason="no C compiler")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def attend(*arguments: object) -> Tensor:
    result: Tensor = torch.ops.qatc.row_attention(*arguments)
    return result


def reference(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> np.ndarray:
    """One query ``[D]`` and the keys and values up to it, in fp64."""
    q, k, v = (t.double().numpy() for t in (query, keys, values))
    scores = k @ q * scale
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


@built
@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 5), groups=st.integers(1, 3), width=st.integers(1, 70),
    deep=st.sampled_from([None, 64, 128, 130]),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    dtype=st.sampled_from([*DTYPES]), scale=st.sampled_from([0.1, 3.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_against_fp64(
    heads: int, groups: int, width: int, deep: int | None, lengths: list[int], dtype: torch.dtype,
    scale: float, seed: int,
) -> None:  # fmt: skip
    """The caches are views of larger ones, and what lies beyond a row's length is garbage."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots, deep = len(lengths), 200, deep or width

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(rows, 1, groups * heads, width).transpose(1, 2)
    key, value = random(rows, groups, 1, width), random(rows, groups, 1, deep)
    all_keys = random(rows + 1, groups, slots + 1, width)
    all_values = random(rows + 1, groups, slots + 1, deep)
    for row, length in enumerate(lengths):
        all_keys[row, :, length:], all_values[row, :, length:] = torch.nan, torch.nan
    keys, values = all_keys[:rows, :, :slots], all_values[:rows, :, :slots]
    before = keys.clone(), values.clone()
    positions = torch.tensor(lengths).unsqueeze(1) - 1
    out = attend(query, key, value, keys, values, positions, scale)
    assert out.shape == (rows, groups * heads, 1, deep) and out.dtype is dtype
    for row, length in enumerate(lengths):
        for cache, old, new in zip((keys, values), before, (key, value), strict=True):
            assert torch.equal(cache[row, :, length - 1], new[row, :, 0])
            kept = torch.arange(slots) != length - 1
            torch.testing.assert_close(
                cache[row][:, kept], old[row][:, kept], rtol=0, atol=0, equal_nan=True
            )
        for head in range(groups * heads):
            held_k, held_v = (t[row, head // heads, :length] for t in (keys, values))
            wanted = reference(query[row, head, 0], held_k, held_v, scale)
            tolerance = DTYPES[dtype] * max(1.0, np.abs(wanted).max())
            np.testing.assert_allclose(out[row, head, 0].float(), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("library", [pytest.param(True, marks=built), False])
def test_the_same_with_and_without_a_library(
    library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(row_attention, "library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 16, generator=generator)
    key, value = torch.randn(2, 3, 2, 1, 16, generator=generator).unbind()
    keys, values = torch.randn(2, 3, 2, 90, 16, generator=generator).unbind()
    positions = torch.tensor([[0], [70], [89]])
    out = attend(query, key, value, keys, values, positions, 0.25)
    for row, last in enumerate([0, 70, 89]):
        for head in range(6):
            held_k, held_v = (t[row, head // 3, : last + 1] for t in (keys, values))
            wanted = reference(query[row, head, 0], held_k, held_v, 0.25)
            np.testing.assert_allclose(out[row, head, 0], wanted, atol=1e-5)


@built
def test_a_row_depends_on_nothing_but_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 3, 1, 64, generator=generator)
    key, value = torch.randn(2, 5, 1, 1, 64, generator=generator).unbind()
    keys, values = torch.randn(2, 5, 1, 150, 64, generator=generator).unbind()
    positions = torch.tensor([[140], [3], [77], [64], [63]])
    together = attend(query, key, value, keys, values, positions, 0.125)
    for row in range(5):
        own = (t[row : row + 1] for t in (query, key, value, keys, values, positions))
        assert torch.equal(attend(*own, 0.125), together[row : row + 1])


@built
@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_cache(position: int) -> None:
    new, cache = torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 4, 8)
    positions = torch.tensor([[0], [position]])
    with pytest.raises(IndexError):
        attend(new, new, new, cache, cache.clone(), positions, 1.0)


@built
def test_nan_does_not_get_lost() -> None:
    new, cache = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 40, 8)
    broken = cache.clone()
    broken[0, 0, 20] = torch.nan
    for keys, values in ((broken, cache), (cache, broken)):
        out = attend(new, new, new, keys.clone(), values.clone(), torch.tensor([[30]]), 1.0)
        assert out.isnan().all()


def test_the_op_is_what_its_schema_says() -> None:
    new, cache = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 4, 8)
    arguments = (new, new, new, cache, cache.clone(), torch.tensor([[0], [3]]), 1.0)
    torch.library.opcheck(torch.ops.qatc.row_attention.default, arguments)
