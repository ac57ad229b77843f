"""Asymmetric codes of keys and values, against fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatc.numerics.asymmetric import compute_parameters, dequantize, quantize
from qatc.numerics.fake_quant import fake_quantize
from qatc.recipe.spec import QuantSpec


def spec_of(bits: int = 4, **others: Any) -> QuantSpec:
    return QuantSpec(bits, range="asymmetric", **others)


def random(*shape: int, seed: int = 0, size: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * size + shift


@settings(deadline=None)
@given(
    bits=st.integers(2, 8), width=st.integers(1, 40), seed=st.integers(0, 99),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), shift=st.sampled_from([0.0, -3.0, 40.0]),
    factor=st.none() | st.sampled_from([0.7, 1.0, 1.3]),
)  # fmt: skip
def test_codes_are_those_of_fp64(
    bits: int, width: int, seed: int, size: float, shift: float, factor: float | None
) -> None:
    spec = spec_of(bits, clip="none" if factor is None else "learned")
    x = random(3, width, seed=seed, size=size, shift=shift * size)
    gain = None if factor is None else torch.tensor(factor - 1)
    codes, parameters = quantize(x, spec, gain)
    exact = x.numpy().astype(np.float64)
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    scale[high == low] = 1
    scale *= 1 if gain is None else float(1 + gain)
    offset = (low + high) / 2 + np.where(high == low, 0, scale / 2)
    np.testing.assert_allclose(parameters[..., :1].numpy(), scale, rtol=1e-6)
    top = np.abs(exact).max(-1, keepdims=True)
    assert (np.abs(parameters[..., 1:].numpy() - offset) <= 2e-7 * (top + scale)).all()
    position = (exact - offset) / scale
    wanted = np.clip(np.round(position), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    slack = 0.5 + 1e-3 + 4e-7 * top / scale  # at a tie, and where a row is narrow and far from 0
    inside = np.clip(position, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (np.abs(codes.numpy() - inside) <= slack).all()
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-3 + 4e-7 * top / scale
    assert (codes.numpy() == wanted)[clear].all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_levels_are_used_and_the_ends_are_kept(bits: int) -> None:
    x = random(20, 64, shift=5.0)
    codes, parameters = quantize(x, spec_of(bits))
    assert (codes.amin(-1) == -(2 ** (bits - 1))).all()
    assert (codes.amax(-1) == 2 ** (bits - 1) - 1).all()
    values = dequantize(codes, parameters)
    for ends in ("amin", "amax"):
        assert torch.allclose(getattr(values, ends)(-1), getattr(x, ends)(-1), rtol=1e-6)
    step = parameters[..., :1]
    assert ((values - x).abs() <= step / 2 * (1 + 1e-4)).all()


def test_it_loses_less_than_any_symmetric_range_where_rows_are_not_centered() -> None:
    x = random(50, 64, shift=2.0)
    errors = {}
    for range_ in ("restricted", "full", "signed", "asymmetric"):
        spec = QuantSpec(4, range=range_)
        errors[range_] = float((fake_quantize(x, spec) - x).square().mean())
    assert errors.pop("asymmetric") < 0.5 * min(errors.values())


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.5, 1e30])
def test_a_row_of_equal_values_is_kept(value: float) -> None:
    x = torch.full((2, 8), value)
    codes, parameters = quantize(x, spec_of())
    assert torch.equal(dequantize(codes, parameters), x) and not codes.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_noticed(value: float) -> None:
    x = random(2, 8)
    x[0, 3] = value
    got = fake_quantize(x, spec_of())
    assert not got[0].isfinite().any() and got[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_fake_quant_gives_what_codes_stand_for(
    dtype: torch.dtype, learned: bool, compiled: bool
) -> None:
    spec = spec_of(clip="learned" if learned else "none")
    x = random(2, 3, 5, 16, shift=1.0).to(dtype)
    gain = torch.tensor([0.2, -0.1, 0.0]).view(3, 1, 1) if learned else None
    function = torch.compile(fake_quantize) if compiled else fake_quantize
    got = function(x, spec, gain=gain)
    assert torch.equal(got, dequantize(*quantize(x, spec, gain), dtype))


def test_gradients() -> None:
    """Straight through; of a gain what LSQ has, the offset moving with the scale."""
    x = random(4, 16, shift=1.0).requires_grad_()
    fake_quantize(x, spec_of()).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    gain = torch.tensor(-0.3, requires_grad=True)  # some are cut off
    x, weights = random(4, 16, shift=1.0).requires_grad_(), random(4, 16, seed=1)
    spec = spec_of(clip="learned")
    (fake_quantize(x, spec, gain=gain) * weights).sum().backward()
    start = compute_parameters(x, spec)[..., :1].double()
    scale, offset = compute_parameters(x, spec, gain.detach()).double().split(1, -1)
    position = ((x - offset) / scale).detach()
    codes = position.round().clamp(-8, 7)
    inside = (position >= -8.5) & (position <= 7.5)
    # value = code * scale + middle + scale / 2, position = (x - middle) / scale - 1 / 2
    slope = torch.where(inside, codes - position, codes + 0.5) * start
    assert gain.grad is not None and x.grad is not None
    assert torch.allclose(gain.grad.double(), (slope * weights).sum(), rtol=1e-4)
    assert torch.allclose(x.grad, torch.where(inside, weights, 0.0), atol=1e-6)
    assert not inside.all()
