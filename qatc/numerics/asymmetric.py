"""Asymmetric MinMax of keys and values: all levels lie between the least and the greatest value.

For a row ``x`` of ``b`` bits, which is a token of one head,

1. ``scale = float32((max - min) / (2**b - 1))``, of fp64 numbers; below 2^-124 it becomes 1, and
   the row is one of equal values.
2. ``offset = middle + scale / 2`` with ``middle = float32((min + max) / 2)``, so that the least
   value gets the least code and the greatest the greatest; of equal values it is ``middle``, and
   their code 0.
3. ``code = round_half_to_even((float32(x) - offset) / scale)``, from ``-2**(b-1)`` to
   ``2**(b-1) - 1``.
4. The value is ``float32(code) * scale + offset``, rounded once to the dtype of ``x``.

A trained gain (see :mod:`qatc.numerics.learned`) changes the scale and leaves ``middle`` where it
is. Scale and offset travel as one tensor, ``[..., 2]``, in the place of a scale.

Infinity and NaN in ``x`` give NaN or infinity, so that they are noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatc.numerics import learned, minmax
from qatc.recipe.spec import QuantSpec


def compute_parameters(x: Tensor, spec: QuantSpec, gain: Tensor | None = None) -> Tensor:
    """Scale and offset of every row, differentiable in the gain.

    Args:
        x: float tensor ``[..., K]``.
        spec: asymmetric, without groups.
        gain: fp32, broadcast to ``[..., 1]``.

    Returns:
        fp32 ``[..., 2]``.
    """
    low, high = (end.double() for end in x.detach().float().aminmax(dim=-1, keepdim=True))
    exact = (high - low) / spec.steps
    equal = exact < minmax.MIN_SCALE
    scale = torch.where(equal, 1.0, exact).float()
    if gain is not None:
        scale = learned.learned_scale(scale, gain, spec, snap=False)
    middle = ((low + high) / 2).float()
    offset = middle + torch.where(equal, 0.0, scale * 0.5)
    return torch.cat([scale, offset], -1)


def quantize(x: Tensor, spec: QuantSpec, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes ``[..., K]``, and scale and offset, fp32 ``[..., 2]``."""
    parameters = compute_parameters(x, spec, gain)
    scale, offset = parameters.split(1, -1)
    codes = minmax.round_to_codes(x.float() - offset, scale, spec)
    return codes.to(torch.int8), parameters


def dequantize(codes: Tensor, parameters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * scale + offset``, computed in fp32 and rounded once to ``dtype``.

    Args:
        codes: integer tensor ``[..., K]``.
        parameters: fp32 ``[..., 2]``.
    """
    scale, offset = parameters.split(1, -1)
    return torch.add(codes.float() * scale, offset).to(dtype)


def fake_quantize(x: Tensor, spec: QuantSpec, gain: Tensor | None) -> Tensor:
    """Quantize and dequantize ``x [..., K]``, as of :mod:`qatc.numerics.fake_quant`.

    Gradients pass straight through to ``x``; with a gain, LSQ's for what is not cut off.
    """
    scale, offset = compute_parameters(x, spec, gain).split(1, -1)
    if gain is not None:
        moved = learned.fake_quantize_by(x.float() - offset, scale, spec)
        return torch.add(moved, offset).to(x.dtype)
    values = x.detach()
    codes = minmax.round_to_codes(values.float() - offset, scale, spec)
    return torch.add(codes * scale, offset).to(x.dtype) + (x - values)
