"""Every kernel of the table, against an fp64 product of the same codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc.kernels import native
from qatc.kernels.gpu import launch
from qatc.kernels.integer_linear import LARGEST_AFFINE_WIDTH, LARGEST_WIDTH
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.kernels.site import PHASES, Site
from qatc.kernels.table import KERNELS, choose
from qatc.machine import cpu
from qatc.models.preparation import can_compile
from qatc.numerics.minmax import quantize
from qatc.numerics.packing import pack
from qatc.recipe.spec import QuantSpec, Range, spec_arg


def site(
    w: int, a: int, outputs: int = 8, inputs: int = 64, group: int | None = None,
    range: Range = "restricted",
) -> Site:  # fmt: skip
    return Site(QuantSpec(w, group), QuantSpec(a, range=range), outputs, inputs, "cpu")


def run(x: Any, weight: Any, bias: Any, at: Site, **kernels: str) -> Any:
    codes, scale = quantize(weight, at.weights, snap=True)
    names = kernels or {phase: choose(at, phase).kernel.name for phase in PHASES}
    return PACKED_LINEAR(
        *(x, pack(codes, at.weights.bits), scale, bias, at.inputs),
        *(spec_arg(at.activations), spec_arg(at.weights)),
        prefill=names.get("prefill", ""),
        decode=names["decode"],
    )


def reference(x: Any, weight: Any, bias: Any, at: Site) -> Any:
    """In fp64, from codes and scales computed in numpy."""

    def rounded(values: Any, spec: QuantSpec, snap: bool) -> Any:
        if not spec.quantizes:
            return values.astype(np.float64)
        groups = values.reshape(values.shape[0], -1, spec.group_size or values.shape[1])
        top = 2 ** (spec.bits - 1) - 1
        scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(top)).astype(np.float32)
        scale[scale == 0] = 1
        if snap:
            scale = torch.from_numpy(scale).bfloat16().float().numpy()
        codes = np.clip(np.round(groups / scale), -top, top)
        return (codes.astype(np.float64) * scale).reshape(values.shape)

    values = from_zero if at.activations.affine else rounded
    values = values(x.numpy(), at.activations, False) @ rounded(weight.numpy(), at.weights, True).T
    return values + (0 if bias is None else bias.double().numpy())


def from_zero(values: Any, spec: QuantSpec, snap: bool) -> Any:
    """Rounded to codes with a zero point, as XNNPACK does it."""
    low, high = np.minimum(values.min(1), 0)[:, None], np.maximum(values.max(1), 0)[:, None]
    factor = np.float32(2**spec.bits - 1) / (high - low)
    least, most = np.float32(-(2 ** (spec.bits - 1))), np.float32(2 ** (spec.bits - 1) - 1)
    below, above = low * factor, high * factor
    nearer = (least + below) + (most + above) > 0
    zero = np.rint(np.clip(np.where(nearer, least - below, most - above), least, most))
    codes = np.clip(np.rint(values * factor) + zero, least, most)
    return (codes - zero).astype(np.float64) * (np.float32(1) / factor)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.sampled_from([1, 2, 15, 16, 17]), outputs=st.integers(1, 33),
    inputs=st.integers(1, 70), w=st.integers(2, 8), a=st.sampled_from([2, 4, 8, 16]),
    has_bias=st.booleans(), grouped=st.booleans(), decode=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_packed_linear(
    rows: int, outputs: int, inputs: int, w: int, a: int, has_bias: bool, grouped: bool,
    decode: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    group = None
    if grouped:
        group, inputs = inputs, inputs * 2
    at = site(w, a, outputs, inputs, group)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    got = run(x.unsqueeze(1 if decode else 0), weight, bias, at).flatten(0, 1)
    assert got.shape == (rows, outputs)
    tolerance = 3e-6 * inputs**0.5 * 4
    np.testing.assert_allclose(
        got.numpy(), reference(x, weight, bias, at), atol=tolerance, rtol=1e-5
    )


CASES = [
    *((w, 8, None) for w in (2, 3, 4, 5, 8)),
    *((w, 16, None) for w in (4, 8)),
    *((w, 8, 16) for w in (3, 4, 8)),
]


@pytest.mark.parametrize(("w", "a", "group"), CASES)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_compiled(w: int, a: int, group: int | None, rows: int) -> None:
    if not can_compile():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    at = site(w, a, 24, 48, group)
    names = {phase: choose(at, phase).kernel.name for phase in PHASES}
    x, weight = torch.randn(1, rows, 48), torch.randn(24, 48)
    wanted = reference(x[0], weight, None, at)
    compiled = torch.compile(lambda x, weight: run(x, weight, None, at, **names))
    for got in (compiled(x, weight)[0], compiled(x.transpose(0, 1), weight)[:, 0]):
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("w", "a", "group"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (70, 1)])
def test_every_kernel_that_can_run_computes_the_same(
    shape: tuple[int, int], w: int, a: int, group: int | None
) -> None:
    """In fp32 up to the order of sums; in bf16 up to one rounding of the result."""
    torch.manual_seed(0)
    at = site(w, a, 24, 48, group)
    x, weight, bias = torch.randn(*shape, 48), torch.randn(24, 48), torch.randn(24)
    wanted = reference(x.flatten(0, 1), weight, bias, at).reshape(*shape, 24)
    able = [k.name for k in KERNELS if "decode" in k.phases and k.obstacle(at) is None]
    assert len(able) >= 2 or native.obstacle(parallel=True)
    for name in able:
        got = run(x, weight, bias, at, decode=name)
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4, rtol=1e-5)
    if "scaled product" in able:
        x, bias = x.bfloat16(), bias.bfloat16()
        one, other = (
            run(x, weight, bias, at, decode=name) for name in ("scaled product", able[-1])
        )
        assert able[-1] == "dequantize + linear" and one.dtype is other.dtype is torch.bfloat16
        largest = other.abs().max().item()
        assert (one.float() - other.float()).abs().max().item() <= 2**-7 * largest


@pytest.mark.parametrize(("w", "group"), [(2, None), (3, None), (4, None), (8, None), (4, 16)])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_every_kernel_takes_zero_points(rows: int, w: int, group: int | None) -> None:
    """Inputs far to one side of zero, whose zero points are at an end; and around it."""
    torch.manual_seed(0)
    at = site(w, 8, 24, 48, group, "affine")
    weight, bias = torch.randn(24, 48), torch.randn(24)
    x = torch.randn(rows, 48) + torch.tensor([4.0, -4.0, 0.0]).repeat(rows)[:rows, None]
    wanted = reference(x, weight, bias, at)
    able = [kernel for kernel in KERNELS if kernel.obstacle(at) is None]
    assert len(able) >= 2 or native.obstacle(parallel=True)
    for kernel in able:
        shape = (1, rows, 48) if kernel.phases == ("prefill",) else (rows, 1, 48)
        got = run(x.view(shape), weight, bias, at, decode=kernel.name).view(rows, 24)
        np.testing.assert_allclose(got.numpy(), wanted, atol=2e-4, rtol=1e-5)
    if group is None:
        reasons = dict(choose(at, "decode", "torchao").passed_over)
        assert reasons["torchao int_scaled_matmul"] == "its inputs have a zero point"
        assert choose(at, "prefill").kernel.name == choose(site(w, 8), "prefill").kernel.name


def test_sums_with_zero_points_are_exact_at_their_limits() -> None:
    """Codes of 127 over a zero point of -128, and a weight of -8: as far from zero as it goes."""
    inputs, fused = 2**24 // (256 * 16), next(k for k in KERNELS if k.name == "fused unpack")
    at = site(4, 8, 1, inputs, range="affine")
    assert fused.obstacle(at) is None
    assert fused.obstacle(site(4, 8, 1, inputs + 2, range="affine")) is not None
    x, weight = torch.full((1, 1, inputs), 255.0), torch.full((1, inputs), -7.0)
    assert run(x, weight, None, at, decode="fused unpack").item() == 255.0 * -7.0 * inputs
    widest = site(8, 8, 1, LARGEST_AFFINE_WIDTH, range="affine")
    x, weight = torch.full((1, 2, widest.inputs), 255.0), torch.full((1, widest.inputs), -127.0)
    assert choose(widest, "prefill").kernel.name != "dequantize + linear"
    got = run(x, weight, None, widest).flatten()
    assert (got == torch.tensor(255 * -127 * widest.inputs).float()).all()
    wider = choose(dataclasses.replace(widest, inputs=widest.inputs + 1), "prefill")
    assert wider.kernel.name == "dequantize + linear"


def names(at: Site) -> tuple[str, ...]:
    return tuple(choose(at, phase).kernel.name for phase in PHASES)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    able, shared = native.obstacle() is None, native.obstacle(parallel=True) is None
    packed = ("packed product", "packed product")
    assert names(site(8, 8)) == ("int_mm", "int8 product" if shared else "int_mm")
    assert names(site(8, 8, inputs=2**16 + 1)) == ("int_mm", "int_mm")
    assert names(site(4, 8)) == packed if able else ("unpack + int_mm", "fused unpack")
    assert names(site(3, 8)) == packed if able else ("unpack + int_mm", "unpack + int_mm")
    assert names(site(4, 8, inputs=63)) == packed if able else ("unpack + int_mm",) * 2
    scaled = ("dequantize + linear", "scaled product" if shared else "dequantize + linear")
    for w in (3, 4, 8):
        assert names(site(w, 16)) == names(site(w, 8, group=32)) == scaled
    cuda = dataclasses.replace(site(4, 8), device="cuda")
    assert names(cuda) == ("unpack + int_mm", "fused unpack")
    assert names(dataclasses.replace(cuda, inputs=16384))[1] == "unpack + int_mm"


def test_without_a_compiler_other_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compilers", list)
    assert names(site(4, 8)) == ("unpack + int_mm", "fused unpack")
    assert names(site(3, 8)) == ("unpack + int_mm", "unpack + int_mm")
    assert names(site(4, 8, inputs=63)) == ("unpack + int_mm", "unpack + int_mm")
    assert names(site(4, 16)) == ("dequantize + linear", "dequantize + linear")
    reasons = dict(choose(site(4, 8), "decode").passed_over)
    assert reasons["packed product"] == "there is no C compiler here"


def test_without_vnni_torch_multiplies_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is a loop over scalars, whatever other products of bytes the processor has."""
    able, shared = native.obstacle() is None, native.obstacle(parallel=True) is None
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2", "avx_vnni", "amx_int8"}))
    blocks = "blocked product"
    assert names(site(8, 8)) == (blocks, "int8 product" if shared else blocks)
    assert names(site(8, 8, inputs=2**16 + 1)) == (blocks, blocks)
    assert names(site(3, 8)) == (("packed product",) * 2 if able else (blocks, blocks))
    monkeypatch.setattr(native, "compilers", list)
    assert names(site(4, 8)) == (blocks, "fused unpack")
    reasons = dict(choose(site(8, 8), "prefill").passed_over)
    assert "without avx512_vnni" in reasons["int_mm"]
    for rows in (1, 17):
        torch.manual_seed(0)
        x, weight = torch.randn(1, rows, 64), torch.randn(8, 64)
        got = run(x, weight, None, site(8, 8))[0]
        np.testing.assert_allclose(
            got.numpy(), reference(x[0], weight, None, site(8, 8)), atol=1e-4, rtol=1e-5
        )


def test_a_sum_that_an_int32_does_not_hold_is_one_of_floats() -> None:
    assert "blocked product" in {k.name for k in KERNELS if k.obstacle(site(4, 8)) is None}
    for bits in (4, 8):
        widest, wider = (site(bits, 8, inputs=LARGEST_WIDTH + more) for more in (0, 1))
        assert choose(widest, "prefill").kernel.name != "dequantize + linear"
        assert choose(wider, "prefill").kernel.name == "dequantize + linear"
        reasons = dict(choose(wider, "prefill").passed_over)
        wanted = f"an int32 does not hold the sum of {LARGEST_WIDTH + 1} products"
        assert reasons["blocked product"] == wanted


def test_every_kernel_is_chosen_somewhere_and_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "obstacle", lambda device: None if device == "cuda" else "no")
    on_gpu = dataclasses.replace(site(4, 8), device="cuda")
    assert names(on_gpu) == ("Triton product", "Triton product")
    narrow = choose(dataclasses.replace(on_gpu, inputs=60), "decode")
    why = "rows of 60 codes are no multiple of 8: words of four in each part"
    assert dict(narrow.passed_over)["Triton product"] == why
    monkeypatch.setattr(launch, "obstacle", lambda device: "triton is not installed")
    sites = [site(w, a) for w in (3, 4, 8) for a in (8, 16)]
    sites += [dataclasses.replace(at, device="cuda") for at in sites]
    chosen = {name for at in sites for name in names(at)}
    chosen |= {choose(at, "prefill", "torchao").kernel.name for at in sites}
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    chosen |= {name for at in sites for name in names(at)}
    in_c = {"int8 product", "packed product", "scaled product"}
    assert chosen >= {k.name for k in KERNELS if k.run is not None} - in_c - {"Triton product"}
    for kernel in KERNELS:
        assert kernel.run is not None or all(kernel.obstacle(at) for at in sites)
    assert all(kernel.reason for kernel in KERNELS)
    cuda = dataclasses.replace(site(4, 8), device="cuda")
    passed = dict(choose(cuda, "prefill").passed_over)
    assert passed["int_mm"] == "4 bits are not stored as int8"
    assert passed["packed product"] == "it is C for a CPU, and this is cuda"
    assert passed["fused unpack"] == "it is for decode only"
    assert "rounds the sums" in passed["tinygemm (_weight_int4pack_mm)"]


def test_the_fused_sum_is_exact_at_its_limit() -> None:
    """The largest products that the table lets into an fp32 sum."""
    inputs = 2**24 // (128 * 16)
    fused = next(kernel for kernel in KERNELS if kernel.name == "fused unpack")
    at = site(4, 8, 1, inputs)
    assert fused.obstacle(at) is None and fused.obstacle(site(4, 8, 1, inputs + 2)) is not None
    x, weight = torch.full((1, 1, inputs), 127.0), torch.full((1, inputs), 7.0)
    assert run(x, weight, None, at, decode="fused unpack").item() == 127.0 * 7.0 * inputs
