"""Integer linears, against products and gradients in fp64 that share no code with qatc."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatc.kernels import integer_linear, native
from qatc.kernels.integer_linear import INTEGER_LINEAR, LARGEST_WIDTH, int_mm
from qatc.machine import cpu
from qatc.models.preparation import can_compile

ROWS = (1, 2, 15, 16, 17)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_int_mm_is_exact(m: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (n, k))
    got = int_mm(torch.from_numpy(a).to(torch.int8), torch.from_numpy(b).to(torch.int8))
    assert got.dtype is torch.int32
    assert np.array_equal(got.numpy(), a @ b.T)


@pytest.mark.parametrize("m", ROWS)
def test_int_mm_of_the_largest_codes(m: int) -> None:
    a, b = (
        torch.full((m, 4096), -128, dtype=torch.int8),
        torch.full((3, 4096), 127, dtype=torch.int8),
    )
    assert torch.equal(int_mm(a, b), torch.full((m, 3), -128 * 127 * 4096, dtype=torch.int32))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_int_mm_is_exact_when_compiled(m: int, dynamic: bool) -> None:
    """torch's own, compiled, is wrong for one row that comes out of a reshape."""
    if not can_compile():
        pytest.skip("no C++ compiler")

    def product(x: Tensor, b: Tensor) -> Tensor:
        return int_mm((x * 2).to(torch.int8).flatten(0, -2), b)

    x = torch.randint(-60, 60, (1, m, 24)).float()
    b = torch.randint(-128, 128, (5, 24), dtype=torch.int8)
    got = torch.compile(product, dynamic=dynamic)(x, b)
    assert np.array_equal(got.numpy(), (2 * x[0]).double().numpy() @ b.double().numpy().T)


OLD = frozenset({"avx2", "fma", "amx_int8", "x86_64"})
BYTES = OLD | {"avx_vnni"}
ARM = frozenset({"asimddp", "i8mm", "aarch64"})


def never(*arguments: Any) -> Any:
    raise AssertionError("torch's product was called")


@pytest.fixture(params=["C", "C for few rows", "fp32"])
def without_vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which torch's int8 product is a loop, with and without a C compiler."""
    native.library()  # as it is for the processor that there is
    monkeypatch.setattr(cpu, "features", lambda: BYTES if request.param == "C" else OLD)
    monkeypatch.setattr(torch, "_int_mm", never)
    if request.param == "fp32":
        monkeypatch.setattr(native, "obstacle", lambda parallel=False: "there is no C compiler")
        monkeypatch.setattr(native, "packed_product", never)
    elif native.obstacle(parallel=True) is not None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 70), (17, 1, 1), (40, 33, 2500), (2, 3, 8)])
def test_without_torch_the_product_is_exact(m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m)
    a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (n, k))
    got = int_mm(torch.from_numpy(a).to(torch.int8), torch.from_numpy(b).to(torch.int8))
    assert got.dtype is torch.int32 and np.array_equal(got.numpy(), a @ b.T)


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("codes", [(-128, -128), (127, -128), (127, 127), (-127, 127)])
def test_without_torch_the_widest_sums_are_exact(codes: tuple[int, int]) -> None:
    for width in (native.MAX_WIDTH, LARGEST_WIDTH):
        a, b = (
            torch.full((rows, width), c, dtype=torch.int8)
            for rows, c in zip((2, 3), codes, strict=True)
        )
        assert (int_mm(a, b) == codes[0] * codes[1] * width).all()


def test_the_largest_width_is_what_an_int32_holds() -> None:
    assert LARGEST_WIDTH * 128 * 128 < 2**31 <= (LARGEST_WIDTH + 1) * 128 * 128
    for rows in (1, 2):
        a = torch.full((rows, LARGEST_WIDTH), -128, dtype=torch.int8)
        assert (int_mm(a, a) == 128 * 128 * LARGEST_WIDTH).all()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("features", [OLD, BYTES, ARM, frozenset({"AMD64"})])
def test_only_avx512_vnni_makes_it_fast(
    features: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_linear, "_is_exact", lambda: True)
    monkeypatch.setattr(cpu, "features", lambda: features)
    assert not integer_linear.is_fast(torch.device("cpu"))
    assert "loop over scalars" in str(integer_linear.obstacle("cpu"))
    monkeypatch.setattr(cpu, "features", lambda: features | {"avx512_vnni"})
    assert integer_linear.is_fast(torch.device("cpu")) and integer_linear.obstacle("cpu") is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert "without oneDNN" in str(integer_linear.obstacle("cpu"))


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vpmaddubsw does: a is made unsigned, and pairs of products are added in 16 bits."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        products = (a.int() + 128).unsqueeze(1) * b.t().int()
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * b.int().sum(0)).int()

    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512_vnni"}))
    integer_linear._is_exact.cache_clear()
    assert integer_linear.obstacle("cpu") is None
    monkeypatch.setattr(torch, "_int_mm", saturating)
    integer_linear._is_exact.cache_clear()
    try:
        assert "saturates" in str(integer_linear.obstacle("cpu"))
        a, b = (torch.full((rows, 64), 127, dtype=torch.int8) for rows in (17, 3))
        assert (int_mm(a, b) == 127 * 127 * 64).all()
    finally:
        integer_linear._is_exact.cache_clear()


def test_exact_whatever_onednn_is_told_to_use() -> None:
    program = (
        "import torch\nfrom qatc.kernels.integer_linear import int_mm\n"
        "for rows in (1, 17):\n"
        "    for one in (127, -127, -128):\n"
        "        for other in (127, -127, -128):\n"
        "            a = torch.full((rows, 256), one, dtype=torch.int8)\n"
        "            b = torch.full((16, 256), other, dtype=torch.int8)\n"
        "            assert (int_mm(a, b) == one * other * 256).all(), (rows, one, other)\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def reference(
    x: np.ndarray[Any, Any], w: np.ndarray[Any, Any], bias: Any, bits: tuple[int, int]
) -> tuple[Any, Any, Any]:
    """Output, dequantized x and dequantized w, in fp64 from the very codes of fp32 scales."""
    values = []
    for tensor, b, snap in ((x, bits[0], False), (w, bits[1], True)):
        amax = np.abs(tensor).max(-1, keepdims=True)
        scale = (amax / np.float32(2 ** (b - 1) - 1)).astype(np.float32)
        scale[scale == 0] = 1
        if snap:
            scale = torch.from_numpy(scale).bfloat16().float().numpy()
        top = 2 ** (b - 1) - 1
        codes = np.clip(np.round(tensor / scale), -top, top)
        values.append(codes.astype(np.float64) * scale.astype(np.float64))
    return values[0] @ values[1].T + (0 if bias is None else bias), values[0], values[1]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ROWS), st.integers(1, 33), st.integers(1, 70), st.integers(2, 8),
    st.integers(2, 8), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_forward_and_gradients(
    m: int, n: int, k: int, x_bits: int, w_bits: int, has_bias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    bias = rng.standard_normal(n, np.float32) if has_bias else None
    gradient = rng.standard_normal((m, n), np.float32)
    tensors = [torch.from_numpy(t).requires_grad_() for t in (x, w, *([bias] if has_bias else []))]
    specs = (f"int{x_bits}", f"int{w_bits}")
    out = INTEGER_LINEAR(tensors[0], tensors[1], tensors[2] if has_bias else None, *specs)
    out.backward(torch.from_numpy(gradient))
    wanted, x_hat, w_hat = reference(x, w, bias, (x_bits, w_bits))
    g = gradient.astype(np.float64)
    for got, value in zip(
        (out.detach(), *(t.grad for t in tensors)), (wanted, g @ w_hat, g.T @ x_hat, g.sum(0)),
        strict=False,
    ):  # fmt: skip
        assert got is not None
        np.testing.assert_allclose(got.numpy(), value, atol=2e-5 * k**0.5, rtol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_zero_points(compiled: bool) -> None:
    """Forward and gradients are those of the values that codes with zero points stand for."""
    if compiled and not can_compile():
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(0)
    x, w, gradient = (rng.standard_normal(s).astype(np.float32) for s in ((9, 33), (7, 33), (9, 7)))
    x += rng.choice([-3, 0, 3], (9, 1)).astype(np.float32)
    low, high = np.minimum(x.min(1), 0)[:, None], np.maximum(x.max(1), 0)[:, None]
    step = (high.astype(np.float64) - low) / 255
    zero = np.clip(np.round(-128 - low / step), -128, 127)
    x_hat = (np.clip(np.round(x / step) + zero, -128, 127) - zero) * step
    w_hat = reference(x, w, None, (8, 4))[2]
    tensors = [torch.from_numpy(t).requires_grad_() for t in (x, w)]

    def linear(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = INTEGER_LINEAR(x, w, None, "int8,range=affine", "int4")
        return result

    out = (torch.compile(linear) if compiled else linear)(*tensors)
    out.backward(torch.from_numpy(gradient))
    g = gradient.astype(np.float64)
    for got, value in zip(
        (out.detach(), *(t.grad for t in tensors)), (x_hat @ w_hat.T, g @ w_hat, g.T @ x_hat),
        strict=True,
    ):  # fmt: skip
        assert got is not None
        np.testing.assert_allclose(got.numpy(), value, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_leading_dimensions_and_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, 16, dtype=dtype, requires_grad=True), torch.randn(7, 16)
    out = INTEGER_LINEAR(x, w.requires_grad_(), None, "int8", "int4")
    assert out.shape == (2, 3, 5, 7) and out.dtype is dtype
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype is dtype and x.grad.shape == x.shape
    assert w.grad is not None and w.grad.dtype is torch.float32


def test_backward_keeps_codes_and_no_floats() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        INTEGER_LINEAR(x, w, None, "int8", "int4")
    assert sorted(t.numel() for t in kept if t.dtype is torch.int8) == [16 * 32, 64 * 32]
    assert all(t.shape[-1] == 1 for t in kept if t.is_floating_point())


def test_it_serialises(tmp_path: Any) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = INTEGER_LINEAR(x, self.weight, None, "int8", "int4")
            return result

    layer, x = Layer(), torch.randn(3, 8)
    exported = torch.export.export(layer, (x,), strict=False)
    torch.export.save(exported, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2")
    assert any("integer_linear" in str(n.target) for n in again.graph.nodes)
    assert torch.equal(again.module()(x), layer(x))
