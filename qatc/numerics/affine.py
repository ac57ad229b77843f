"""Affine MinMax of activations: a scale and a whole zero point for each token, as XNNPACK has them.

For a row ``x`` of ``b`` bits, whose codes go from ``least = -2**(b-1)`` to ``most = 2**(b-1) - 1``,

1. ``low = min(x, 0)`` and ``high = max(x, 0)``, so that zero is always in the range.
2. ``factor = float32((2**b - 1) / float32(high - low))`` and ``scale = float32(1 / factor)``, each
   quotient in fp64 first. Where ``(high - low) / (2**b - 1)`` is below 2^-124 both are 1, and the
   row is one of zeros.
3. ``zero``, a code, is ``least - below`` with ``below = float32(low * factor)``; or, where
   ``(least + below) + (most + above)`` is not positive, ``most - above`` with ``above =
   float32(high * factor)``. It is cut off at both ends and rounded, half to even.
4. ``code = round_half_to_even(float32(x) * factor) + zero``, cut off at both ends.
5. The value is ``float32(code - zero) * scale``, rounded once to the dtype of ``x``. Zero stays
   zero.

At 8 bits it is what XNNPACK computes of an input that is quantized dynamically (``qd8``): the very
bits of ExecuTorch 1.5 on a CPU, but for rows whose values are all below 1e-35. PyTorch's
``choose_qparams_per_token_asymmetric`` divides by a scale instead, of at least 2^-23, so that a few
values that lie on a tie get the next code there.

Infinity and NaN in ``x`` give NaN, and so does a range that fp32 does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatc.numerics import minmax
from qatc.recipe.spec import QuantSpec


def quantize(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of every row of ``x``.

    Args:
        x: float tensor ``[..., K]``.
        spec: affine, without groups.

    Returns:
        int8 ``[..., K]``, fp32 ``[..., 1]`` and int32 ``[..., 1]``.
    """
    factor, scale, zero = _parameters(x, spec)
    codes = _from_zero(x, factor, zero, spec) + zero
    return codes.to(torch.int8), scale, zero.to(torch.int32)


def quantize_inputs(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales of the inputs of a linear, by any range, and zero points where it has some.

    Args:
        x: float tensor ``[..., K]``.
        spec: without groups.
    """
    return quantize(x, spec) if spec.affine else (*minmax.quantize(x, spec), None)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(code - zero) * scale``, computed in fp32 and rounded once to ``dtype``.

    Args:
        codes: integers ``[..., K]``.
        scale: fp32 ``[..., 1]``.
        zero: integers ``[..., 1]``, or None for 0.
    """
    if zero is None:
        return minmax.dequantize(codes, scale, dtype)
    return _within((codes.to(torch.int32) - zero).float() * scale, dtype)


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize ``x [..., K]``, as of :mod:`qatc.numerics.fake_quant`.

    Gradients pass straight through.
    """
    values = x.detach()
    factor, scale, zero = _parameters(values, spec)
    return _within(_from_zero(values, factor, zero, spec) * scale, x.dtype) + (x - values)


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, and cut off at the largest of fp16: a rounded zero point goes beyond."""
    if dtype == torch.float16:
        values = values.clamp(*(sign * torch.finfo(dtype).max for sign in (-1, 1)))
    return values.to(dtype)


def _parameters(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """What values are multiplied with, the scale and the zero point: fp32 ``[..., 1]`` each."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = (high - low).double()
    empty = width / spec.steps < minmax.MIN_SCALE
    factor = torch.where(empty, 1.0, spec.steps / width).float()
    scale = torch.where(width.isfinite(), 1.0 / factor.double(), torch.nan).float()
    # A product of two fp32 numbers is exact in fp64. Rounded on its own, it cannot become one
    # operation with the sum behind it, which would be other bits.
    below, above = ((end.double() * factor.double()).float() for end in (low, high))
    nearer = (spec.code_min + below) + (spec.code_max + above) > 0
    zero = torch.where(nearer, spec.code_min - below, spec.code_max - above)
    zero = torch.round(zero.clamp(spec.code_min, spec.code_max))
    return factor, scale, torch.where(width.isfinite(), zero, 0.0)


def _from_zero(x: Tensor, factor: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``code - zero``, in fp32."""
    steps = torch.round(x.float() * factor)  # half to even
    return torch.minimum(torch.maximum(steps, spec.code_min - zero), spec.code_max - zero)
