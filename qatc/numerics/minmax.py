"""The numerics: scales and codes.

All functions work on the last dimension. ``group_size`` values of it share a scale; 0 stands for
the whole row.

**The contract**, bit for bit the same on every device, compiled and not, for a row of ``x``:

1. ``scale = float32(float64(max|x|) / steps)``. In fp64 it does not matter whether a device divides
   or, as CUDA and Inductor for it do, multiplies by the rounded reciprocal: the quotient of an
   fp32 number and ``steps`` is never within two units of fp64's last place of a value at which the
   rounding to fp32 turns over. On a CPU it is what an fp32 division gives.
2. A scale below 2^-124 becomes 1, and the codes zero: the row is one of zeros. Devices differ in
   whether they flush numbers below 2^-126 to zero, and no code depends on it then.
3. A scale is no larger than lets the largest code times it stay finite in the dtype of ``x``.
4. A weight's scale is then rounded to the nearest bf16 value, ties to even; where fp16 must hold it
   as well (``spec.scale_dtype``), one below 2^-17 is rounded up to a multiple of 2^-24 instead.
5. ``code = round_half_to_even(float32(x) / scale)``, clamped to the range, with the division of
   IEEE 754, ``div.rn.f32``. Eager divisions of two tensors are that; those that Inductor makes for
   a GPU are it with :data:`COMPILE_OPTIONS` only.
   Where ``spec.rounding`` is ``reciprocal``, the rule of torchao's activations: ``code =
   round_half_to_even(float32(x) * (1 / scale))``, and a scale below 2^-23 becomes 2^-23 in place
   of 2.
6. The value is ``float32(code) * scale``, rounded once to the dtype of ``x``.

Where the range is signed the scale's sign is set last, between 4 and 5: minus where the value of
the largest magnitude is positive, or as large as any negative one.

Infinity and NaN in ``x`` give NaN, so that they are noticed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatc.errors import ConfigError
from qatc.recipe.spec import QuantSpec

MIN_SCALE = 2.0**-124
"""The smallest scale, of weights and others: values that devices may flush are less than half of
it."""

SMALLEST_OF_RECIPROCAL = 2.0**-23
"""The smallest scale where ``spec.rounding`` is ``reciprocal``: torchao's."""

FP16_STEP = 2.0**-24
"""The distance of neighbouring fp16 numbers below 2^-14."""

COMPILE_OPTIONS: dict[str, bool] = {"eager_numerics.division_rounding": True}
"""Options of ``torch.compile`` with which compiled graphs keep the contract on every device."""


def compute_scale(x: Tensor, spec: QuantSpec, *, snap: bool = False) -> Tensor:
    """MinMax scale of every row or group of ``x``.

    Args:
        x: float tensor ``[..., K]``.
        spec: bits, range and group size; ``group_size`` must divide K.
        snap: round the scale to the nearest value that bf16 and ``spec.scale_dtype`` hold, as
            weights need it, so that every runtime stores the very scale that was trained with.

    Returns:
        fp32 tensor ``[..., K / group_size]`` (``[..., 1]`` for whole rows), of a magnitude of at
        least :data:`MIN_SCALE`, and negative only where the range is signed. A row of zeros, or of
        less than a scale can hold, has scale 1 or -1.
    """
    assert not spec.affine, "its codes have a zero point, see qatc.numerics.affine"
    values = _in_groups(x, spec.group_size or 0).float()
    amax = values.abs().amax(dim=-1)
    exact = amax.double() / spec.steps
    if spec.rounding == "reciprocal":
        scale = exact.float().clamp(min=SMALLEST_OF_RECIPROCAL)
    else:
        scale = torch.where(exact < MIN_SCALE, 1.0, exact).float()
    if snap:
        scale = snap_scale(scale, spec)
    scale = scale.clamp(max=largest_scale(spec, x.dtype, snap=snap))
    if spec.range == "signed":  # the largest value gets the code that is furthest from zero
        scale = torch.where(values.amax(dim=-1) >= amax, -scale, scale)
    return torch.where(amax.isfinite(), scale, amax)


def largest_scale(spec: QuantSpec, dtype: torch.dtype, *, snap: bool) -> float:
    """The largest scale that ``spec`` allows values of ``dtype``; see :func:`compute_scale`."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / -spec.code_min
    if snap and spec.scale_dtype == "float16":
        largest = min(largest, torch.finfo(torch.float16).max)
    digits = 8 if snap else 24
    unit = 2.0 ** (math.frexp(largest)[1] - digits)
    return math.floor(largest / unit) * unit


def why_scales_are_lost(weight: Tensor, spec: QuantSpec) -> str | None:
    """Why ``spec.scale_dtype`` cannot hold the scales of a weight, or None if it can.

    Single rows or groups that are small get the smallest steps there are, and lose little beside
    the others; a weight that is small as a whole would be lost.
    """
    if not spec.quantizes or spec.scale_dtype != "float16":
        return None
    largest = float(weight.detach().abs().max())
    scale = largest / spec.steps
    if 0 < scale < 2.0**-17 or scale > largest_scale(spec, weight.dtype, snap=True):
        return f"its largest value is {largest:.3g}, whose scale fp16 cannot hold"
    return None


def snap_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest values of the same sign that bf16 and ``spec.scale_dtype`` hold, as fp32."""
    snapped = round_to_bf16(scale)
    if spec.scale_dtype == "bfloat16":
        return snapped
    # Multiples of fp16's step: seven bits of them at most, which bf16 holds as well. Upwards, since
    # a step may be much of the scale, and a smaller scale cuts off the largest values.
    magnitude = scale.abs()
    stepped = ((magnitude / FP16_STEP).ceil() * FP16_STEP).copysign(scale)
    return torch.where(magnitude < 2.0**-17, stepped, snapped)


def round_to_bf16(scale: Tensor) -> Tensor:
    """The nearest bf16 values of fp32 numbers, ties to even, as fp32.

    Done on the bits, since Inductor leaves out a cast to bf16 and back.
    """
    bits = scale.view(torch.int32)
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) & -0x10000).view(torch.float32)


def quantize(x: Tensor, spec: QuantSpec, *, snap: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``.

    Returns:
        ``(codes, scale)``: int8 ``[..., K]`` and fp32 ``[..., K / group_size]``.
    """
    assert spec.quantizes, "16 bits have no codes"
    scale = compute_scale(x, spec, snap=snap)
    return quantize_by(x, scale, spec), scale


def quantize_by(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """int8 codes ``[..., K]`` of ``x`` for given scales ``[..., G]``, with G dividing K."""
    groups = x.unflatten(-1, (scale.shape[-1], -1))
    return round_to_codes(groups, scale.unsqueeze(-1), spec).flatten(-2).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * scale``, computed in fp32 and rounded once to ``dtype``.

    Args:
        codes: integer tensor ``[..., K]``.
        scale: fp32 tensor ``[..., G]`` with G dividing K.
    """
    groups: Tensor = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return torch.flatten(groups * scale.unsqueeze(-1), -2).to(dtype)


def _in_groups(x: Tensor, group_size: int) -> Tensor:
    if group_size == 0:
        return x.unsqueeze(-2)
    width = x.shape[-1]
    if width % group_size:
        raise ConfigError(
            f"group_size {group_size} does not divide the {width} values of a row;"
            " choose a divisor, or null for one scale per row"
        )
    groups: Tensor = x.unflatten(-1, (width // group_size, group_size))
    return groups


def round_to_codes(groups: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The codes, as fp32, of values whose scales are broadcast to them."""
    values = groups.float()
    exact = values * (1.0 / scale) if spec.rounding == "reciprocal" else values / scale
    codes = torch.round(exact)  # half to even
    return codes.clamp(spec.code_min, spec.code_max)
