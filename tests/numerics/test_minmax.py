"""The numerics contract, against a reference in numpy that shares no code with qatc."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qatc.errors import ConfigError
from qatc.numerics import minmax
from qatc.numerics.fake_quant import FAKE_QUANTIZE, fake_quantize
from qatc.numerics.minmax import compute_scale, dequantize, quantize
from qatc.recipe.spec import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 5),
    range=st.sampled_from(["restricted", "full", "signed"]),
    scale_dtype=st.sampled_from(["bfloat16", "float16"]),
)


@st.composite
def cases(draw: Any) -> tuple[Tensor, QuantSpec, bool]:
    """Rows of any width, any float dtype and any size of value, subnormal and huge included."""
    spec = draw(specs)
    dtype = draw(st.sampled_from(DTYPES))
    width = (spec.group_size or draw(st.integers(1, 9))) * draw(st.integers(1, 3))
    largest = draw(st.sampled_from([1e-40, 1e-36, 1e-30, 1e-5, 1.0, 1e4, 1e38, 3.5e38]))
    largest = float(np.float32(min(largest, torch.finfo(dtype).max)))
    elements = st.just(0.0) | st.floats(-largest, largest, width=32)
    rows = draw(hnp.arrays(np.float32, (draw(st.integers(1, 3)), width), elements=elements))
    return torch.from_numpy(rows).to(dtype), spec, draw(st.booleans())


def bf16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest number of eight significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def largest_scale(x: Tensor, lowest_code: int, snap: bool, half: bool) -> float:
    """The largest bf16 or fp32 number whose product with the lowest code ``x``'s dtype holds."""
    bound = Fraction(torch.finfo(x.dtype).max) / -lowest_code
    bound = min(bound, Fraction(65504)) if snap and half else bound
    step = torch.tensor(float(bound)).to(torch.bfloat16 if snap else torch.float32)
    while step.isinf() or Fraction(step.item()) > bound:
        step = torch.nextafter(step, torch.zeros_like(step))
    return step.item()


def reference(
    x: Tensor, spec: QuantSpec, snap: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes and scales as design and module documentation state them.

    Computed in fp64; what the contract says to be fp32 (the scale and the quotient) is rounded to
    fp32 once, which for a quotient is what a division in fp32 gives.
    """
    bits, group_size = spec.bits, spec.group_size
    values = x.double().numpy()
    values = values.reshape(values.shape[0], -1, group_size or values.shape[-1])
    largest = 2 ** (bits - 1)
    steps = {"restricted": largest - 1, "full": (2**bits - 1) / 2, "signed": largest}[spec.range]
    low = 1 - largest if spec.range == "restricted" else -largest
    exact = np.abs(values).max(axis=-1) / steps
    exact[exact < 2.0**-124] = 1
    scale = exact.astype(np.float32).astype(np.float64)
    if snap:
        rough = bf16(scale)
        if spec.scale_dtype == "float16":
            rough = np.where(scale < 2.0**-17, np.ceil(scale * 2.0**24) * 2.0**-24, rough)
        scale = rough
    scale = np.minimum(scale, largest_scale(x, low, snap, spec.scale_dtype == "float16"))
    if spec.range == "signed":
        scale = np.where(values.max(axis=-1) >= -values.min(axis=-1), -scale, scale)
    ratio = (values / scale[..., None]).astype(np.float32)
    codes = np.clip(np.rint(ratio), low, 2 ** (bits - 1) - 1)
    return codes.reshape(x.shape), scale


@settings(deadline=None, max_examples=300)
@given(cases())
def test_codes_and_scales(case: tuple[Tensor, QuantSpec, bool]) -> None:
    x, spec, snap = case
    codes, scale = quantize(x, spec, snap=snap)
    wanted = reference(x, spec, snap)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    np.testing.assert_array_equal(codes.numpy(), wanted[0])
    np.testing.assert_array_equal(scale.double().numpy(), wanted[1])
    assert torch.equal(compute_scale(x, spec, snap=snap), scale)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_fake_quantize_is_code_times_scale_in_the_dtype_of_the_input(
    case: tuple[Tensor, QuantSpec, bool],
) -> None:
    x, spec, snap = case
    codes, scale = reference(x, spec, snap)
    groups = codes.reshape(*scale.shape, -1) * scale[..., None]
    wanted = torch.from_numpy(groups.astype(np.float32).reshape(x.shape)).to(x.dtype)
    assert wanted.isfinite().all()
    assert torch.equal(fake_quantize(x, spec, snap_scale=snap), wanted)
    assert torch.equal(dequantize(*quantize(x, spec, snap=snap), x.dtype), wanted)


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 9))
def test_the_gradient_is_the_identity(case: tuple[Tensor, QuantSpec, bool], seed: int) -> None:
    x, spec, snap = case
    x.requires_grad_()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    fake_quantize(x, spec, snap_scale=snap).backward(gradient)
    assert x.grad is not None and torch.equal(x.grad, gradient)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_sixteen_bits_are_the_identity(case: tuple[Tensor, QuantSpec, bool]) -> None:
    x, spec, snap = case
    assert fake_quantize(x, QuantSpec(), snap_scale=snap) is x
    assert torch.equal(FAKE_QUANTIZE(x, "int16", snap_scale=snap), x)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_a_snapped_scale_is_exact_in_its_dtypes(case: tuple[Tensor, QuantSpec, bool]) -> None:
    x, spec, _ = case
    scale = compute_scale(x, spec, snap=True)
    assert (scale.abs() >= minmax.MIN_SCALE).all()
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    if spec.scale_dtype == "float16":
        assert torch.equal(scale.to(torch.float16).float(), scale)


@pytest.mark.parametrize(
    ("scale", "snapped"),
    [
        (1 + 2**-8, 1.0),  # a tie goes to the even neighbour below ...
        (1 + 3 * 2**-8, 1 + 2**-6),  # ... and above
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (2.0**-20, 2.0**-20),  # as small as it may be
        (2.0**-120, 2.0**-120),
        (2.0**-125, 1.0),  # a row of zeros, on every device
        (0.0, 1.0),
    ],
)
def test_rounding_of_weight_scales(scale: float, snapped: float) -> None:
    row = torch.tensor([[scale * 7, 0.0]])
    assert compute_scale(row, QuantSpec(4), snap=True).item() == snapped


@pytest.mark.parametrize(
    ("scale", "snapped"),
    [
        (1 + 2**-8, 1.0),
        (2.0**-17 * (1 + 2**-8), 2.0**-17),
        (2.0**-18, 2.0**-18),
        (2.0**-18 + 2.0**-25, 2.0**-18 + 2.0**-24),  # upwards, to a step of fp16
        (2.0**-24 * 1.25, 2.0**-23),
        (2.0**-40, 2.0**-24),
        (0.0, 1.0),
        (1e6, 65280.0),
    ],
)
def test_rounding_of_weight_scales_that_fp16_holds(scale: float, snapped: float) -> None:
    row = torch.tensor([[scale * 7, 0.0]])
    spec = QuantSpec(4, scale_dtype="float16")
    assert compute_scale(row, spec, snap=True).item() == snapped
    assert compute_scale(row, QuantSpec(4), snap=False).item() == pytest.approx(scale or 1.0)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_small_weights_keep_their_precision(scale_dtype: Any) -> None:
    """Of weights a ten-thousandth as large the codes are the same, or one step of fp16's off."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    spec = QuantSpec(4, scale_dtype=scale_dtype)
    error = [
        float((fake_quantize(w, spec, snap_scale=True) - w).norm() / w.norm())
        for w in (weight, weight * 1e-4)
    ]
    assert error[1] <= error[0] * (1.01 if scale_dtype == "bfloat16" else 1.15)


@settings(deadline=None, max_examples=300)
@given(
    st.floats(2.0**-100, 2.0**127, width=32),
    st.integers(2, 8),
    st.sampled_from(["restricted", "full"]),
)
def test_dividing_and_multiplying_by_the_reciprocal_give_one_scale(
    amax: float, bits: int, range_: Any
) -> None:
    """What the contract rests on: in fp64 it does not matter which of the two a device does."""
    spec = QuantSpec(bits, range=range_)
    value = torch.tensor([amax])
    scale = compute_scale(value, spec)
    if amax / spec.steps > minmax.largest_scale(spec, torch.float32, snap=False):
        return
    reciprocal = (value.double() * (1.0 / spec.steps)).float()
    assert torch.equal(scale, reciprocal)
    exact = Fraction(amax) / Fraction(spec.steps)
    below = np.nextafter(np.float32(scale.item()), np.float32(0))
    above = np.nextafter(np.float32(scale.item()), np.float32(np.inf))
    distance = abs(Fraction(scale.item()) - exact)
    assert all(distance <= abs(Fraction(float(other)) - exact) for other in (below, above))


def test_the_quotient_of_a_scale_is_one_of_fp64() -> None:
    """An fp32 division by a number is a product with its rounded reciprocal on a GPU."""
    graph = make_fx(lambda x: compute_scale(x, QuantSpec(4), snap=True))(torch.randn(3, 8)).graph
    divisions = [node for node in graph.nodes if "div" in str(node.target)]
    assert divisions
    for node in divisions:
        assert node.args[0].meta["val"].dtype is torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("range_", ["restricted", "full"])
def test_the_largest_numbers_stay_finite(dtype: torch.dtype, bits: int, range_: Any) -> None:
    largest = torch.finfo(dtype).max
    for spec, snap in itertools.product(
        (QuantSpec(bits, range=range_), QuantSpec(bits, None, range_, "float16")), (False, True)
    ):
        for sign in (1, -1):
            row = torch.tensor([[sign * largest, largest / 2, 0.0]], dtype=dtype)
            assert fake_quantize(row, spec, snap_scale=snap).isfinite().all()


def test_ties_go_to_even_codes() -> None:
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, _ = quantize(row, QuantSpec(4))
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_has_scale_one(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.5]], dtype=dtype)
    assert compute_scale(rows, QuantSpec(4)).tolist() == [[1.0], [0.5]]
    assert fake_quantize(rows, QuantSpec(4))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_lowest_code_occurs_in_the_full_range_alone(bits: int) -> None:
    lowest = -(2 ** (bits - 1))
    row = torch.tensor([[lowest + 0.5, -lowest - 0.5, 0.3]])
    assert quantize(row, QuantSpec(bits, range="full"))[0].min() == lowest
    assert quantize(row, QuantSpec(bits))[0].min() == lowest + 1


def test_groups_do_not_see_each_other() -> None:
    row = torch.tensor([[7.0, 1.0, 0.07, 0.01]])
    codes, scale = quantize(row, QuantSpec(4, group_size=2))
    assert codes.tolist() == [[7, 1, 7, 1]]
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.01]]))


def test_a_group_size_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="group_size 3 does not divide the 8 values"):
        fake_quantize(torch.ones(2, 8), QuantSpec(4, group_size=3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("snap", [False, True])
def test_not_a_number_stays_one(value: float, snap: bool) -> None:
    """So that a diverged training is noticed."""
    for spec in (QuantSpec(4), QuantSpec(4, scale_dtype="float16")):
        row = torch.tensor([[1.0, value]])
        assert fake_quantize(row, spec, snap_scale=snap).isnan().any()
        assert not compute_scale(row, spec, snap=snap).isfinite().any()
