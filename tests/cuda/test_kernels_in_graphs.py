"""How compiled graphs hand tensors to the kernels' ops, seen on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.kernels import cached_attention
from qatc.kernels.gpu import attention
from qatc.models.preparation import can_compile
from qatc.recipe.spec import QuantSpec, spec_arg


def test_without_triton_the_op_computes_what_the_graph_does() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(4)
    query, positions = torch.randn(2, 4, 1, 64), torch.tensor([[100], [3]])
    codes = torch.randint(0, 256, (2, 2, 128, 32), dtype=torch.uint8)
    held: Any = (codes, torch.rand(2, 2, 128, 1), codes.flip(2), torch.rand(2, 2, 128, 1))
    names = (spec_arg(spec), spec_arg(spec), 64, 0.125)
    got = torch.ops.qatc.attend_to_codes(query, *held, positions, None, *names)
    seen = (torch.arange(128) <= positions)[:, None, None]
    wanted = cached_attention._attend_to_codes(
        *(query, *held, seen), bits=(4, 4), value_width=64, scale=0.125
    )
    assert torch.equal(got, wanted)


def test_a_graph_that_writes_to_a_cache_hands_over_the_cache_itself() -> None:
    """Not a copy, which would take longer than the attention."""
    if not can_compile():
        pytest.skip("no C++ compiler")
    seen: list[int] = []

    def kernel(query: Any, *tensors: Any) -> Any:
        seen.extend(tensor.data_ptr() for tensor in tensors[:4])
        return query.clone()

    def decode(query: Any, new: Any, caches: Any, positions: Any) -> Any:
        rows = torch.arange(2).unsqueeze(1)
        for cache in caches:
            cache[rows, :, positions] = new[..., : cache.shape[3]].to(cache.dtype)
        return attention.CODE_ATTENTION(*(query, *caches, positions, None, 4, 4, 0.125))

    kinds: tuple[Any, ...] = ((32, torch.uint8), (1, torch.float32)) * 2
    held = [torch.zeros(2, 2, 129, size, dtype=kind) for size, kind in kinds]
    query, new, positions = torch.randn(2, 4, 1, 64), torch.ones(2, 1, 2, 64), torch.tensor([[9]])
    with (
        torch.library._scoped_library("qatc", "FRAGMENT") as library,
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        library.impl("code_attention", kernel, "CPU")
        views = cached_attention.first_slots(held, 128)
        torch.compile(decode)(query, new, views, positions.expand(2, 1))
    assert seen == [tensor.data_ptr() for tensor in held]
    assert all(tensor[:, :, 9].all() for tensor in held)


def test_a_graph_hands_the_cache_itself_to_what_writes_a_token() -> None:
    """Both kernels of a decoding step get it, whatever stands in its place in the graph."""
    if not can_compile():
        pytest.skip("no C++ compiler")
    seen: list[list[int]] = []

    def store(key: Any, value: Any, *tensors: Any) -> None:
        seen.append([tensor.data_ptr() for tensor in tensors[:4]])
        for tensor, new in zip(tensors[:4], (key, key, value, value), strict=True):
            tensor[:, :, 9] = new[:, :, 0, : tensor.shape[3]].to(tensor.dtype)

    def attend(query: Any, *tensors: Any) -> Any:
        seen.append([tensor.data_ptr() for tensor in tensors[:4]])
        return query + tensors[1][:, :1, 9:10]

    def decode(query: Any, key: Any, value: Any, caches: Any, positions: Any) -> Any:
        attention.STORE_CODES(key * 2, value, *caches, positions, "int4", "int4")
        return attention.CODE_ATTENTION(*(query * 2, *caches, positions, None, 4, 4, 0.125)) + 1

    kinds: tuple[Any, ...] = ((32, torch.uint8), (1, torch.float32)) * 2
    held = [torch.zeros(2, 2, 129, size, dtype=kind) for size, kind in kinds]
    query, key = torch.randn(2, 4, 1, 64), torch.ones(2, 2, 1, 64)
    with (
        torch.library._scoped_library("qatc", "FRAGMENT") as library,
        torch._inductor.config.patch(force_disable_caches=True),
        torch.no_grad(),
    ):
        library.impl("store_codes", store, "CPU")
        library.impl("code_attention", attend, "CPU")
        run = torch.compile(decode)
        for slots in (64, 128):  # the second graph takes any number of them
            views = cached_attention.first_slots(held, slots)
            out = run(query, key, 3 * key, views, torch.tensor([[9], [9]]))
            torch.testing.assert_close(out, query * 2 + 3)
    assert seen == [[tensor.data_ptr() for tensor in held]] * 4
    assert [int(tensor[0, 0, 9, 0]) for tensor in held] == [2, 2, 3, 3]
