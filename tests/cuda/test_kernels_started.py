"""The Triton kernels as they are started, at sizes that become constants, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.kernels.gpu import attention, launch, products
from qatc.numerics.packing import pack
from qatc.recipe.spec import QuantSpec, spec_arg

pytestmark = pytest.mark.skipif(
    not launch.has_triton(), reason="triton is not installed: make test-cuda installs it"
)


class Driver:
    """Of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names of the kernels that were compiled in place of being started."""
    from triton.runtime import driver, jit

    run, names = jit.JITFunction.run, []

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    monkeypatch.setattr(jit.JITFunction, "run", warm_up)
    return names


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "bits", "kernel"),
    [
        (1, 1, 8, 4, "gemv"),
        (3, 5, 32, 3, "gemv"),
        (4, 1, 8, 4, "gemm"),
        (4, 1, 4, 8, "gemm"),
        (17, 33, 96, 6, "gemm"),
    ],
)
def test_products(
    compiled: Any, rows: int, outputs: int, width: int, bits: int, kernel: str
) -> None:
    codes = torch.zeros(rows, width, dtype=torch.int8)
    packed = pack(torch.zeros(outputs, width, dtype=torch.int8), bits)
    scales = torch.ones(rows, 1), torch.ones(outputs, 1)
    out = products.triton_linear(codes, scales[0], packed, scales[1], None, bits, torch.bfloat16)
    assert out.shape == (rows, outputs) and compiled == [kernel]


@pytest.mark.parametrize(("rows", "kernel"), [(1, "gemv"), (4, "gemm")])
def test_products_in_one_launch(compiled: Any, rows: int, kernel: str) -> None:
    codes = torch.zeros(rows, 32, dtype=torch.int8)
    packed = [pack(torch.zeros(n, 32, dtype=torch.int8), 4) for n in (16, 1, 5)]
    scales = [torch.ones(one.shape[0], 1) for one in packed]
    parts = (codes, torch.ones(rows, 1), packed, scales, [None] * 3, 4, torch.bfloat16)
    outs = products.triton_linears(*parts)
    assert [out.shape for out in outs] == [(rows, 16), (rows, 1), (rows, 5)]
    assert compiled == [kernel]


@pytest.mark.parametrize(
    ("heads", "groups", "width", "slots", "bits", "masked", "dtype"),
    [
        (1, 1, 8, 1, 4, True, torch.float32),
        (9, 3, 64, 64, 8, False, torch.float32),
        (9, 3, 64, 64, 4, True, torch.bfloat16),
        (9, 3, 16, 64, 4, True, torch.bfloat16),  # keys of 8 bytes, too few for a tile
    ],
)
def test_attention(
    compiled: Any, heads: int, groups: int, width: int, slots: int, bits: int, masked: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    codes = torch.zeros(1, groups, slots + 1, width, dtype=torch.int8)
    held: Any = (pack(codes, bits), torch.zeros(1, groups, slots + 1, 1)) * 2
    views = [tensor[:, :, :slots] for tensor in held]
    query, last = torch.zeros(1, heads, 1, width, dtype=dtype), torch.zeros(1, 1).long()
    mask = torch.ones(1, 1, 1, slots, dtype=torch.bool) if masked else None
    out = attention.code_attention(*(query, *views, last, mask, bits, bits, 0.1))
    tiles = dtype is torch.bfloat16 and width == 64
    assert out.shape == query.shape
    assert compiled == ["attend_in_tiles" if tiles else "attend", "join"]


@pytest.mark.parametrize(("bits", "width"), [(4, 8), (8, 64)])
def test_a_token_is_written(compiled: Any, bits: int, width: int) -> None:
    codes = torch.zeros(2, 3, 5, width, dtype=torch.int8)
    held: Any = (pack(codes, bits), torch.zeros(2, 3, 5, 1)) * 2
    views: Any = [tensor[:, :, :4] for tensor in held]
    new, last = torch.zeros(2, 3, 1, width, dtype=torch.bfloat16), torch.zeros(2, 1).long()
    name = spec_arg(QuantSpec(bits))
    attention.store_codes(*(new, new, *views, last, name, name))
    assert compiled == ["store"]
