"""Trained scales: where they start, what they are, and how gradients reach them.

A trained scale is ``start * (1 + gain)``. ``start`` is fixed: of a weight the scale of the least
squared error, of keys and values the MinMax scale of the very row. ``gain`` is trained from 0 on;
relative to ``start``, so that one learning rate suits the scales of all layers, as it suits the
weights. Only products and sums are involved, which are rounded alike on every device: exported
codes are those of training, whatever computes them. Its factor stays between :data:`LEAST` and
:data:`MOST`.

Gradients are those of LSQ (Esser et al., arXiv 1902.08153, equations 3 and 5): with ``v = x / s``
and codes from ``low`` to ``high``,

    d(code s)/dx = 1 inside, 0 outside          d(code s)/ds = code - v inside, code outside

where inside means that ``v`` is at most half a step beyond the outermost codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatc.numerics import minmax
from qatc.recipe.spec import QuantSpec

LEAST, MOST = 1 / 16, 16.0
"""Bounds of what a scale is multiplied with."""

_SHARES = tuple(percent / 100 for percent in range(125, 62, -3))
"""Of the MinMax scale: where the search for a weight's scale looks."""


def factor(gain: Tensor) -> Tensor:
    """What a scale with this gain is multiplied with."""
    return (1 + gain).clamp(LEAST, MOST)


def learned_scale(start: Tensor, gain: Tensor, spec: QuantSpec, *, snap: bool) -> Tensor:
    """The scale that a gain makes of another, differentiable in the gain.

    Args:
        start: fp32 ``[..., G]``.
        gain: fp32, broadcast to ``start``.
        spec: whose ``scale_dtype`` a snapped scale fits.
        snap: round as the scales of weights are, straight through.
    """
    scale = start.float() * factor(gain.float())
    if snap:
        exact = scale.detach()
        scale = scale + (minmax.snap_scale(exact, spec) - exact)
    return scale


def quantize(x: Tensor, spec: QuantSpec, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``: MinMax ones, or what a gain has made of them."""
    if gain is None:
        return minmax.quantize(x, spec)
    scale = learned_scale(minmax.compute_scale(x, spec), gain, spec, snap=False)
    return minmax.quantize_by(x, scale, spec), scale


def fake_quantize_by(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize ``x [..., K]`` by scales ``[..., G]``, differentiable in both."""
    steps = scale.unsqueeze(-1)
    values = x.unflatten(-1, (scale.shape[-1], -1)).float() / steps
    inside = values.clamp(spec.code_min - 0.5, spec.code_max + 0.5)
    codes = inside.detach().round().clamp(spec.code_min, spec.code_max)
    through: Tensor = inside + (codes - inside.detach())  # the codes themselves, to the bit
    return (through * steps).flatten(-2).to(x.dtype)


def gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Gradients in ``x`` and in ``scale`` of :func:`fake_quantize_by`, whole rows at a time.

    Args:
        gradient: ``[N, K]``, in the quantized values.
        x: ``[N, K]``, what was quantized.
        codes: int8 ``[N, K]``.
        scale: fp32 ``[N, 1]``.
        spec: of the codes.
    """
    values = x.float() / scale
    inside = (values >= spec.code_min - 0.5) & (values <= spec.code_max + 0.5)
    slope = codes.float() - torch.where(inside, values, 0.0)
    for_scale = (gradient.float() * slope).sum(-1, keepdim=True)
    return torch.where(inside, gradient, 0.0), for_scale


@torch.no_grad()
def least_error_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The snapped scale of every row or group with the least squared error, of those tried.

    Tried are shares of the MinMax scale from 1.25 to 0.65, which cuts off a third of the largest
    value, and where the range is signed both signs.

    Args:
        weight: ``[N, K]``.
        spec: of the weight.

    Returns:
        fp32 ``[N, G]``.
    """
    groups = weight.unflatten(-1, (-1, spec.group_size or weight.shape[-1])).float()
    start = best = minmax.compute_scale(weight, spec, snap=True)
    least = torch.full_like(best, torch.inf)
    signs = (1, -1) if spec.range == "signed" else (1,)
    for share in (sign * share for sign in signs for share in (1.0, *_SHARES)):
        tried = minmax.snap_scale(start * share, spec)
        steps = tried.unsqueeze(-1)
        error = (minmax.round_to_codes(groups, steps, spec) * steps - groups).square().sum(-1)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best
