"""Codes with a zero point, against XNNPACK's own steps in numpy and against fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatc.models.preparation import can_compile
from qatc.numerics import minmax
from qatc.numerics.affine import dequantize, quantize
from qatc.numerics.fake_quant import fake_quantize
from qatc.recipe.spec import QuantSpec


def spec_of(bits: int = 8) -> QuantSpec:
    return QuantSpec(bits, range="affine")


def random(*shape: int, seed: int = 0, size: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + shift) * size


def by_xnnpack(x: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """Codes, scales and zero points of fp32 rows ``[N, K]``, in fp32 throughout, of 8 bits."""
    one, least, most = np.float32(1), np.float32(-128), np.float32(127)
    low, high = np.minimum(x.min(1), 0)[:, None], np.maximum(x.max(1), 0)[:, None]
    factor = np.where(low == high, one, np.float32(255) / np.where(low == high, one, high - low))
    below, above = low * factor, high * factor
    nearer = (least + below) + (most + above) > 0
    zero = np.rint(np.clip(np.where(nearer, least - below, most - above), least, most))
    return np.clip(np.rint(x * factor) + zero, least, most), one / factor, zero


def on_ties(rows: int) -> Tensor:
    """Rows of values beside the middle of two codes, where a quotient and a product may differ."""
    rng = np.random.default_rng(0)
    low, high = -rng.random((rows, 1), np.float32), rng.random((rows, 1), np.float32)
    step = (high - low) / np.float32(255)
    near = (np.floor(rng.uniform(low, high, (rows, 62)) / step) + 0.5).astype(np.float32) * step
    near = np.nextafter(near, rng.choice([-9, 9], near.shape).astype(np.float32))
    return torch.from_numpy(np.concatenate([low, high, np.clip(near, low, high)], 1))


def with_zero_on_a_tie(rows: int) -> Tensor:
    """Rows whose zero point lies in the middle of two codes, seen from either end."""
    rng = np.random.default_rng(0)
    width = rng.random((rows, 1), np.float32) + np.float32(0.1)
    low = -(rng.integers(1, 254, (rows, 1)) + np.float32(0.5)) * width / np.float32(255)
    return torch.from_numpy(np.concatenate([low, low + width], 1).astype(np.float32))


KINDS = ["normal", "one-sided", "far from zero", "ties", "zero on a tie", "tiny", "huge"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_xnnpack(kind: str) -> None:
    x = {
        "normal": random(500, 61), "far from zero": random(500, 61, shift=9.0),
        "one-sided": random(500, 61).abs() * torch.tensor([[1], [-1]] * 250), "ties": on_ties(4000),
        "zero on a tie": with_zero_on_a_tie(4000),
        "tiny": random(500, 61, size=1e-30), "huge": random(500, 61, size=1e36),
    }[kind]  # fmt: skip
    codes, scale, zero = quantize(x, spec_of())
    for got, wanted in zip((codes, scale, zero), by_xnnpack(x.numpy()), strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)
    quotient = (torch.round(x / scale) + zero).clamp(-128, 127)
    assert kind != "ties" or (quotient != codes).any()  # what would catch a division


@settings(deadline=None)
@given(
    bits=st.integers(2, 8), width=st.integers(1, 40), seed=st.integers(0, 99),
    size=st.sampled_from([1e-20, 1.0, 1e6]), shift=st.sampled_from([0.0, -1.0, 9.0]),
)  # fmt: skip
def test_codes_are_those_of_fp64(
    bits: int, width: int, seed: int, size: float, shift: float
) -> None:
    x = random(3, width, seed=seed, size=size, shift=shift)
    codes, scale, zero = quantize(x, spec_of(bits))
    exact = x.numpy().astype(np.float64)
    low, high = np.minimum(exact.min(1), 0)[:, None], np.maximum(exact.max(1), 0)[:, None]
    step = (high - low) / (2**bits - 1)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    np.testing.assert_allclose(scale.numpy(), step, rtol=3e-7)
    assert (np.abs(zero.numpy() - (least - low / step)) <= 0.5 + 1e-4).all()
    assert ((least <= zero.numpy()) & (zero.numpy() <= most)).all()
    wanted = np.clip(exact / step, least - zero.numpy(), most - zero.numpy())
    assert (np.abs(codes.numpy() - zero.numpy() - wanted) <= 0.5 + 1e-4).all()
    values = dequantize(codes, scale, zero).numpy()
    assert (np.abs(values - exact) <= step * (1 + 1e-3)).all()  # half a step, and half of zero's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_fake_quant_gives_what_codes_stand_for(dtype: torch.dtype, compiled: bool) -> None:
    if compiled and not can_compile():
        pytest.skip("no C++ compiler")
    x = torch.cat([random(7, 5, 64, shift=0.5), on_ties(35).view(7, 5, 64)]).to(dtype)
    got = (torch.compile(fake_quantize) if compiled else fake_quantize)(x, spec_of())
    codes, scale, zero = (
        torch.compile(quantize)(x, spec_of()) if compiled else quantize(x, spec_of())
    )
    wanted, of_scale, of_zero = by_xnnpack(x.float().flatten(0, 1).numpy())
    values = torch.from_numpy((wanted - of_zero) * of_scale).to(dtype).view_as(x)
    assert torch.equal(got, values) and torch.equal(dequantize(codes, scale, zero, dtype), values)


def test_zero_stays_zero_and_a_second_time_changes_little() -> None:
    x = random(200, 64, shift=0.7)
    x[:, ::3] = 0
    once = fake_quantize(x, spec_of(4))
    assert not once[:, ::3].any() and once.unique().numel() > 100
    codes, scale, zero = quantize(x, spec_of(4))
    again = quantize(once, spec_of(4))
    used = codes.amax(1) - codes.amin(1) == 15  # of the others, the range has become smaller
    assert used.float().mean() > 0.8
    for first, second in zip((codes, zero), (again[0], again[2]), strict=True):
        assert torch.equal(first[used], second[used])
    assert torch.allclose(scale[used], again[1][used], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-38])
def test_rows_of_less_than_a_scale_holds_are_zeros(value: float) -> None:
    assert not fake_quantize(torch.full((2, 8), value), spec_of()).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_noticed(value: float) -> None:
    x = random(2, 8)
    x[0, 3] = value
    got = fake_quantize(x, spec_of())
    assert not got[0].isfinite().any() and got[1].isfinite().all()


def test_gradients_pass_straight_through() -> None:
    x, weights = random(4, 16, shift=3.0).requires_grad_(), random(4, 16, seed=1)
    (fake_quantize(x, spec_of(4)) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_it_loses_less_where_values_are_on_one_side() -> None:
    x = random(50, 64).abs()
    errors = {
        name: float((fake_quantize(x, QuantSpec(8, range=name)) - x).square().mean())
        for name in ("restricted", "full", "affine")
    }
    assert errors.pop("affine") < 0.3 * min(errors.values())


def test_nothing_takes_it_for_a_range_without_zero_point() -> None:
    with pytest.raises(AssertionError, match="zero point"):
        minmax.quantize(random(2, 8), spec_of())


@pytest.mark.parametrize("low", [-30000.0, -65504.0, 0.0])
def test_the_ends_of_fp16_stay_in_it(low: float) -> None:
    x = torch.tensor([[low, 65504.0, 3.0]], dtype=torch.float16)
    for found in (fake_quantize(x, spec_of()), dequantize(*quantize(x, spec_of()), x.dtype)):
        assert found.isfinite().all() and (found - x).abs().max() <= (65504 - low) / 255


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_nan_in_codes_too(value: float) -> None:
    x = torch.tensor([[1.0, value, 3.0], [1.0, 2.0, 3.0]])
    codes, scale, zero = quantize(x, spec_of())
    found = dequantize(codes, scale, zero)
    assert found[0].isnan().all() and found[1].isfinite().all() and zero[0] == 0
