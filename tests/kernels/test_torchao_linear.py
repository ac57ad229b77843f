"""torchao's product against fp64, and against the kernel of torch behind which it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.kernels import integer_linear, torchao_linear
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.kernels.site import Site
from qatc.kernels.table import KERNELS, choose
from qatc.kernels.torchao_linear import LARGEST_WIDTH, da8w4_obstacle, obstacle, torchao_mm
from qatc.machine import cpu
from qatc.models.preparation import can_compile
from qatc.numerics.minmax import quantize
from qatc.numerics.packing import pack
from qatc.recipe.spec import QuantSpec, spec_arg

NAME = "torchao int_scaled_matmul"

needs_torchao = pytest.mark.skipif(obstacle("cpu") is not None, reason=str(obstacle("cpu")))


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    asked = (torchao_linear._is_installed, da8w4_obstacle)
    for question in asked:
        question.cache_clear()
    yield
    for question in asked:
        question.cache_clear()


def codes_of(kind: str, rows: int, width: int, low: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randint(low, 128, (rows, width), generator=generator, dtype=torch.int8)
    value = {"least": low, "greatest": 127}[kind]
    return torch.full((rows, width), value, dtype=torch.int8)


@needs_torchao
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 512])
@pytest.mark.parametrize(("outputs", "width"), [(1, 2), (7, 13), (33, 577), (32, 1536), (5, 16384)])
def test_the_sum_is_exact(rows: int, outputs: int, width: int) -> None:
    if rows == 512 and width > 2000:
        rows = 32
    for left, right in (("random", "random"), ("least", "least"), ("least", "greatest")):
        a = codes_of(left, rows, width, -128, 1)
        b = codes_of(right, outputs, width, -128, 2)
        scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(3)) + 0.01
        sums = (a.double() @ b.double().t()).float()
        assert torch.equal(torchao_mm(a, b, scale), sums * scale)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, at: Site, kernel: str) -> Tensor:
    codes, scale = quantize(weight, at.weights, snap=True)
    result: Tensor = PACKED_LINEAR(
        *(x, pack(codes, at.weights.bits), scale, bias, at.inputs),
        *(spec_arg(at.activations), spec_arg(at.weights)),
        prefill=kernel,
        decode=kernel,
    )
    return result


@needs_torchao
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "rounding"), [(8, "reciprocal"), (4, "division"), (3, "division")]
)
def test_the_bits_are_those_of_torch(
    bits: int, rounding: Any, dtype: torch.dtype, compiled: bool
) -> None:
    """Whatever rule the codes come from, and with a bias."""
    if compiled and not can_compile():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    at = Site(QuantSpec(bits), QuantSpec(8, range="full", rounding=rounding), 24, 40, "cpu")
    weight, bias = torch.randn(24, 40), torch.randn(24)
    call = torch.compile(run) if compiled else run
    for shape in ((1, 1), (3, 1), (2, 17)):
        x = torch.randn(*shape, 40).to(dtype)
        got = call(x, weight, bias.to(dtype), at, NAME)
        assert got.dtype is dtype and got.shape == (*shape, 24)
        wanted = run(x, weight, bias.to(dtype), at, "blocked product")
        assert torch.equal(got, wanted)


def test_auto_takes_the_faster_one_and_torchao_its_own() -> None:
    if obstacle("cpu") is not None:
        pytest.skip(str(obstacle("cpu")))
    at = Site(QuantSpec(8), QuantSpec(8), 24, 40, "cpu")
    grouped = Site(QuantSpec(4, 8), QuantSpec(8), 24, 40, "cpu")
    assert choose(at, "prefill", "torchao").kernel.name == NAME
    for kernels in ("auto", "qatc"):
        assert choose(at, "prefill", kernels).kernel.library != "torchao"
    choice = choose(grouped, "decode", "torchao")
    assert choice.kernel.library != "torchao"
    assert dict(choice.passed_over)[NAME] == "groups have several scales in one sum"
    names = [name for name, _ in choose(at, "prefill", "qatc").passed_over]
    assert not any("torchao" in name for name in names)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (Site(QuantSpec(8), QuantSpec(16), 8, 8, "cpu"), "its input is not quantized"),
        (Site(QuantSpec(8), QuantSpec(8), 8, 1, "cpu"), "rows of 1 codes"),
        (Site(QuantSpec(8), QuantSpec(8), 8, LARGEST_WIDTH + 1, "cpu"), "rows of 65794 codes"),
        (Site(QuantSpec(8), QuantSpec(8), 8, 8, "cuda"), "was not run on cuda"),
    ],
)
def test_what_it_cannot_compute(site: Site, reason: str) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == NAME)
    assert reason in str(kernel.obstacle(site))


def test_it_needs_the_processor_that_torch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked anew each time: what a processor has is not remembered from before."""
    assert obstacle("cpu") == integer_linear.obstacle("cpu")
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    assert "without avx512_vnni" in str(obstacle("cpu"))


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao is not installed" in str(obstacle("cpu"))
    assert "does not know it" in da8w4_obstacle()


def test_a_torchao_with_its_kernels_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are scaled in parts, which is not what was trained."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "da8w4" in name
    )
    assert "scaled sums of at most 128 inputs" in da8w4_obstacle()


@needs_torchao
def test_the_rule_of_the_target_is_that_of_torchao() -> None:
    """Codes and scales of torchao's own tensor, and of the rule written down in numpy."""
    from torchao.quantization import Int8Tensor, PerRow

    draw = np.random.default_rng(0)
    rows = draw.standard_normal((500, 96)).astype(np.float32)
    rows *= np.exp(draw.uniform(-30, 8, (500, 1))).astype(np.float32)
    rows[:3] = 0
    x = torch.from_numpy(rows)
    spec = QuantSpec(8, range="full", rounding="reciprocal")
    codes, scale = quantize(x, spec)
    own: Any = Int8Tensor.from_hp(x, granularity=PerRow())
    assert torch.equal(codes, own.qdata) and torch.equal(scale, own.scale.view(-1, 1))
    amax = np.abs(rows).max(1, keepdims=True)
    wanted = np.maximum(amax / np.float32(127.5), np.float32(2.0**-23))
    assert np.array_equal(scale.numpy(), wanted)
    exact = np.round(rows * (np.float32(1) / wanted)).clip(-128, 127)
    assert np.array_equal(codes.numpy(), exact.astype(np.int8))
    other, _ = quantize(x, QuantSpec(8, range="full"))
    assert (codes != other)[amax[:, 0] > 1e-3].any()  # the reciprocal does make a difference


@needs_torchao
def test_in_bf16_it_is_so_where_it_is_compiled() -> None:
    if not can_compile():
        pytest.skip("no C++ compiler")
    from torchao.quantization import Int8Tensor, PerRow

    def codes_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
        own: Any = Int8Tensor.from_hp(x, granularity=PerRow())
        return own.qdata, own.scale

    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, scale = quantize(x, QuantSpec(8, range="full", rounding="reciprocal"))
    own, own_scale = torch.compile(codes_and_scale)(x)
    assert torch.equal(own, wanted) and torch.equal(own_scale.view(-1, 1).float(), scale)
    eager, _ = codes_and_scale(x)
    assert not torch.equal(eager, wanted)


def test_mm_is_one_node_of_an_exported_graph() -> None:
    class Product(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            return torchao_mm(a, b, scale)

    a, b = torch.zeros(3, 8, dtype=torch.int8), torch.zeros(5, 8, dtype=torch.int8)
    exported = torch.export.export(Product(), (a, b, torch.ones(3, 1)), strict=False)
    assert [n.target for n in exported.graph.nodes].count(torch.ops.qatc.torchao_mm.default) == 1
