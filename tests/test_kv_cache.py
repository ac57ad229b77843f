from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc.kv_cache import cached_attention


def reference(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """Attention of one query ``[D]`` to keys and values ``[S, D]``, in fp64."""
    scores = key @ query * scale
    weights = np.exp(scores - scores.max())
    return weights @ value / weights.sum()


@settings(deadline=None, max_examples=25)
@given(
    ratio=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 2),
    new=st.integers(1, 3),
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    scale=st.none() | st.just(0.3),
    seed=st.integers(0, 99),
)
def test_rows_at_their_own_positions(
    ratio: int, kv_heads: int, new: int, starts: list[int], scale: float | None, seed: int
) -> None:
    """Every row has ``start`` old tokens and gets ``new`` ones; beyond them lies garbage."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads, width, slots = len(starts), kv_heads * ratio, 4, 9
    query = torch.randn(rows, heads, new, width, generator=generator)
    key, value = torch.randn(2, rows, kv_heads, new, width, generator=generator).unbind()
    caches = torch.randn(2, rows, kv_heads, slots, width, generator=generator) * 100
    key_cache, value_cache = caches.clone().unbind()
    positions = torch.tensor([[start + t for t in range(new)] for start in starts])
    out = cached_attention(query, key, value, key_cache, value_cache, positions, scale)
    assert out.shape == query.shape

    for row, start in enumerate(starts):
        for cache, fresh, old in ((key_cache, key, caches[0]), (value_cache, value, caches[1])):
            assert torch.equal(cache[row, :, start : start + new], fresh[row])
            assert torch.equal(cache[row, :, :start], old[row, :, :start])
            assert torch.equal(cache[row, :, start + new :], old[row, :, start + new :])
        for head in range(heads):
            for t in range(new):
                seen = slice(0, start + t + 1)
                wanted = reference(
                    query[row, head, t].double().numpy(),
                    key_cache[row, head // ratio, seen].double().numpy(),
                    value_cache[row, head // ratio, seen].double().numpy(),
                    width**-0.5 if scale is None else scale,
                )
                np.testing.assert_allclose(out[row, head, t].numpy(), wanted, atol=2e-4, rtol=1e-4)


def test_a_position_beyond_the_cache_is_an_error() -> None:
    key = torch.zeros(1, 1, 1, 4)
    cache = torch.zeros(1, 1, 3, 4)
    with pytest.raises(IndexError):
        cached_attention(key, key, key, cache, cache.clone(), torch.tensor([[3]]))
