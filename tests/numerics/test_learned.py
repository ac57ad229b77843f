"""Trained scales, against LSQ's formulas and searches in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatc.numerics.fake_quant import fake_quantize
from qatc.numerics.learned import (
    LEAST,
    MOST,
    fake_quantize_by,
    learned_scale,
    least_error_scale,
    quantize,
)
from qatc.numerics.minmax import compute_scale, quantize_by
from qatc.recipe.spec import QuantSpec

SIGNED = QuantSpec(4, range="signed", clip="learned")


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def lsq(x: Tensor, scale: Tensor, spec: QuantSpec) -> tuple[Any, Any, Any]:
    """Quantized values, and their derivatives in x and in the scale, of whole rows in fp64."""
    low, high = {"signed": -8, "restricted": -7}[spec.range], 7
    ratio = (x.double() / scale.double()).float().double().numpy()
    codes = np.clip(np.rint(ratio), low, high)
    inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
    return codes * scale.double().numpy(), inside, codes - np.where(inside, ratio, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["signed", "restricted"]),
    st.floats(0.02, 0.5),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_the_gradient_is_that_of_lsq(range_: Any, step: float, negative: bool, seed: int) -> None:
    spec = QuantSpec(4, range=range_, clip="learned")
    x, gradient = random(3, 10, seed=seed), random(3, 10, seed=seed + 1)
    scale = torch.full((3, 1), -step if negative and range_ == "signed" else step)
    x.requires_grad_()
    scale.requires_grad_()
    got = fake_quantize_by(x, scale, spec)
    got.backward(gradient)
    values, inside, slope = lsq(x.detach(), scale.detach(), spec)
    np.testing.assert_array_equal(got.detach().numpy(), values.astype(np.float32))
    assert x.grad is not None and scale.grad is not None
    np.testing.assert_array_equal(x.grad.numpy() != 0, inside & (gradient.numpy() != 0))
    np.testing.assert_allclose(x.grad.numpy(), gradient.numpy() * inside, rtol=1e-6)
    wanted = (gradient.double().numpy() * slope).sum(-1, keepdims=True)
    np.testing.assert_allclose(scale.grad.numpy(), wanted, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.sampled_from(["bfloat16", "float16"]))
def test_a_scale_is_a_product_that_bf16_holds(seed: int, held: Any) -> None:
    """Two roundings to fp32 and one to bf16: nothing that two devices compute differently."""
    spec = QuantSpec(4, range="signed", clip="learned", scale_dtype=held)
    start = random(50, 1, seed=seed, size=1e-3)
    gain = random(50, 1, seed=seed + 1, size=0.3).clamp(min=-0.9)
    got = learned_scale(start, gain.requires_grad_(), spec, snap=True)
    one = (1 + gain.detach().double()).float().double().clamp(LEAST, MOST)
    wanted = (start.double() * one).float()
    if held == "float16":
        small = wanted.abs() < 2.0**-17
        stepped = (wanted.double().abs() * 2**24).ceil() * 2.0**-24 * wanted.sign()
        wanted = torch.where(small, stepped.float(), wanted.bfloat16().float())
        assert torch.equal(got.half().float(), got)
    assert torch.equal(got, wanted.bfloat16().float())
    got.sum().backward()
    assert gain.grad is not None
    assert torch.equal(gain.grad, start)  # straight through the rounding


def test_the_start_has_the_least_error_of_what_is_tried() -> None:
    weight = torch.cat([random(20, 64), random(20, 64, seed=1).abs().pow(3)])
    for range_, signs in (("signed", (1, -1)), ("restricted", (1,)), ("full", (1,))):
        spec = QuantSpec(4, range=range_, group_size=32)  # type: ignore[arg-type]
        got = least_error_scale(weight, spec)
        assert torch.equal(got, got.bfloat16().float())
        groups = weight.double().unflatten(-1, (2, 32)).numpy()
        minmax = compute_scale(weight, spec, snap=True)

        def error(scale: Tensor) -> Any:
            ratio = groups / scale.double().numpy()[..., None]  # noqa: B023
            low, high = spec.code_min, spec.code_max  # noqa: B023
            codes = np.clip(np.rint(ratio), low, high)
            return ((codes * scale.double().numpy()[..., None] - groups) ** 2).sum(-1)  # noqa: B023

        shares = [1.0] + [share / 100 for share in range(125, 62, -3)]
        tried = [error((minmax * s * sign).bfloat16().float()) for s in shares for sign in signs]
        np.testing.assert_allclose(error(got), np.min(tried, 0), rtol=1e-4)
        assert (error(got) <= error(minmax) * 1.0001).all()
        assert (error(got) < error(minmax)).mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_get_codes_of_their_own_rows_scales_times_a_factor(dtype: torch.dtype) -> None:
    keys, gain = random(2, 3, 5, 8).to(dtype), torch.tensor([0.0, -0.3, 40.0]).view(3, 1, 1)
    codes, scale = quantize(keys, SIGNED, gain)
    rows = keys.double()
    extreme = torch.where(rows.amax(-1) >= -rows.amin(-1), rows.amax(-1), rows.amin(-1))
    factors = torch.tensor([1.0, 0.7, 16.0]).view(3, 1)
    wanted = (extreme / -8).float() * factors
    assert torch.equal(scale.squeeze(-1), wanted)
    values = np.clip(np.rint((rows / wanted.double().unsqueeze(-1)).float().numpy()), -8, 7)
    np.testing.assert_array_equal(codes.numpy(), values)
    assert torch.equal(fake_quantize(keys, SIGNED, gain=gain), (codes.float() * scale).to(dtype))
    assert torch.equal(quantize_by(keys, scale, SIGNED), codes)
