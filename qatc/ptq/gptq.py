"""GPTQ (arXiv 2210.17323): weights rounded column by column, later columns making up for it.

For a linear with inputs ``X [n, K]``, rounding a weight ``w`` to ``q`` costs ``|X w - X q|^2``, a
quadratic form with the Hessian ``H = X^T X``. Columns are rounded in order; with ``U`` the upper
Cholesky factor of the inverse of ``H``, the error ``e_j = (w_j - q_j) / U_jj`` of column ``j`` is
taken off the columns behind it, ``w_k -= e_j U_jk`` (algorithm 1 of the paper).

Scales are computed first, from the weights as they were. Fake-quant computes MinMax scales again,
and finds the same ones, see :func:`reproducible`; learned scales are given to it as their start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qatc.data.corpus import Rows
from qatc.errors import ConfigError, TrainingError
from qatc.graph.nodes import Linear, find_quantizable
from qatc.numerics import learned, minmax
from qatc.ptq.calibrate import LayerByLayer
from qatc.ptq.rotation import rotated_inputs
from qatc.ptq.structure import Layer, layer_graphs, uncast
from qatc.ptq.weights import assign, owner
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec


def gptq(
    model: Any,
    rows: Rows,
    recipe: Recipe,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Put the weights of all decoder layers onto codes that keep what the linears compute.

    The weights stay float tensors; ``recipe.weights`` takes them to the chosen codes and scales.
    Layer by layer, and within a layer linear by linear, inputs are those that the quantized weights
    before give. Activations and K/V are not rounded meanwhile; head and embedding are left alone.

    Args:
        model: a transformers causal LM that is not prepared.
        rows: calibration text.
        recipe: which weights are quantized and how. Those of its ``rotate_inputs`` have been
            turned by :func:`qatc.ptq.rotate_inputs`.
        act_order: round the columns with the largest inputs first.
        damping: added to the diagonal of the Hessian, as a share of its mean.
        block_size: columns whose errors are passed on to all columns behind at once.
        batch_size: rows per forward pass.
        dtype: of the Hessians and of the weights while they are rounded.
        on_layer: called with the layers done and all layers.

    Returns:
        The scales, fp32 ``[N, G]``, by the full names of the weights: where the recipe has learned
        scales, :func:`qatc.models.preparation.prepare` needs them as ``start_scales``.

    Raises:
        ConfigError: the recipe quantizes no weights, or an argument is out of range, or layers do
            not follow one another.
        CaptureError: a layer cannot be captured.
    """
    if not recipe.weights.quantizes:
        raise ConfigError("gptq rounds weights, and the recipe leaves them at 16 bits")
    if damping <= 0 or block_size < 1:
        raise ConfigError(
            f"gptq needs a damping above 0 and a block_size of at least 1; got {damping} and"
            f" {block_size}"
        )
    layers = layer_graphs(model)
    with rotated_inputs(layers, recipe):
        return _round_layers(
            layers,
            LayerByLayer(model, layers, rows, batch_size),
            recipe,
            {"act_order": act_order, "damping": damping, "block_size": block_size},
            dtype,
            on_layer,
        )


def _round_layers(
    layers: Sequence[Layer],
    run: LayerByLayer,
    recipe: Recipe,
    options: Mapping[str, Any],
    dtype: torch.dtype,
    on_layer: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """Round the layers one after the other; options are those of :func:`round_columns`."""
    scales: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        for group in _groups(layer, recipe):
            hessian = _Hessian(dtype)
            run.observe(number, [(owner(layer.module, group[0].parameter), hessian.add)])
            for linear in group:
                weight = layer.module.get_parameter(linear.parameter).detach()
                name = f"{layer.name}.{linear.parameter}"
                spec = recipe.weights_of(name)
                codes, scale = round_columns(weight, hessian.value, spec, **options)
                values = reproducible(weight, codes, scale, spec)
                assign(layer.module, linear.parameter, values)
                scales[name] = scale
        run.advance(number)
        if on_layer is not None:
            on_layer(number + 1, len(layers))
    return scales


def _groups(layer: Layer, recipe: Recipe) -> list[list[Linear]]:
    """The linears to be rounded, those of one input together, in the order of the graph."""
    own = recipe.exceptions(layer.name, dict(layer.module.named_parameters()))
    groups: dict[Any, list[Linear]] = {}
    for linear in find_quantizable(layer.graph, own.skip):
        reads = uncast(linear.input), linear.parameter in own.rotated
        groups.setdefault(reads, []).append(linear)
    return list(groups.values())


class _Hessian:
    """``X^T X / n`` over all rows that were added."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sum = torch.zeros(0)
        self._count = 0

    def add(self, x: Tensor) -> None:
        x = x.to(self._dtype)
        product = x.T @ x
        self._sum = self._sum + product if self._count else product
        self._count += len(x)

    @property
    def value(self) -> Tensor:
        return self._sum / max(self._count, 1)


@torch.no_grad()
def round_columns(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Codes of a weight that keep its products with inputs of this Hessian.

    Args:
        weight: ``[N, K]``.
        hessian: ``X^T X`` of its inputs, up to a factor, ``[K, K]``; its dtype is computed in.
        spec: of the weight.
        act_order, damping, block_size: as of :func:`gptq`.

    Returns:
        ``(codes, scale)``, int8 ``[N, K]`` and fp32 ``[N, G]``; the scale is the MinMax one, or of
        least squared error where scales are learned.
    """
    dtype, width = hessian.dtype, weight.shape[1]
    if spec.learned:
        scale = learned.least_error_scale(weight, spec)
    else:
        scale = minmax.compute_scale(weight, spec, snap=True)
    steps, low, high = _limits(weight, scale, spec, dtype)
    nearest = minmax.quantize_by(weight, scale, spec).to(dtype)
    pinned = _pinned(weight, scale.shape[1], spec)
    order = torch.arange(width, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    left = weight.to(dtype)[:, order]
    steps, low, high, nearest, pinned = (t[:, order] for t in (steps, low, high, nearest, pinned))
    factor = _inverse_factor(hessian[order][:, order], damping)
    codes = torch.empty_like(left)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        errors = torch.empty_like(left[:, start:end])
        for j in range(start, end):
            found = torch.round(left[:, j] / steps[:, j])
            found = torch.maximum(torch.minimum(found, high[:, j]), low[:, j])
            codes[:, j] = torch.where(pinned[:, j], nearest[:, j], found)
            error = (left[:, j] - codes[:, j] * steps[:, j]) / factor[j, j]
            left[:, j:end] -= torch.outer(error, factor[j, j:end])
            errors[:, j - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes[:, order.argsort()].to(torch.int8), scale


def reproducible(weight: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Float weights that the quantizer takes to just these codes and scales.

    MinMax computes scales from the largest value of a row or group. So that one is left as it is,
    which is why :func:`round_columns` gives it the code next to it, and no other value exceeds it.

    Args:
        weight: ``[N, K]``, of which ``scale`` was computed.
        codes: int8 ``[N, K]``.
        scale: fp32 ``[N, G]``.
        spec: of the weight.
    """
    if spec.learned:
        return minmax.dequantize(codes, scale, weight.dtype)
    groups = scale.shape[1]
    bound = _grouped(weight.float(), groups).abs().amax(dim=-1, keepdim=True)
    values = _grouped(minmax.dequantize(codes, scale), groups)
    values = torch.maximum(torch.minimum(values, bound), -bound).flatten(-2)
    return torch.where(_pinned(weight, groups, spec), weight, values.to(weight.dtype))


def _pinned(weight: Tensor, groups: int, spec: QuantSpec) -> Tensor:
    """Which values ``[N, K]`` the scales are computed from: a largest one of each group.

    Where two of both signs are as large, a signed scale follows the positive one.
    """
    values = _grouped(weight.float(), groups)
    places = torch.zeros_like(values, dtype=torch.bool)
    if spec.learned:
        return places.flatten(-2)
    positive = values.amax(dim=-1) >= values.abs().amax(dim=-1)
    place = torch.where(positive, values.argmax(dim=-1), values.argmin(dim=-1))
    return places.scatter_(-1, place.unsqueeze(-1), True).flatten(-2)


def _limits(
    weight: Tensor, scale: Tensor, spec: QuantSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For every weight its scale, and the codes that values no larger than its group's can have."""
    groups = scale.shape[1]
    bound = _grouped(weight.float(), groups).abs().amax(dim=-1)
    reach = torch.full_like(scale, torch.inf) if spec.learned else torch.round(bound / scale.abs())
    width = weight.shape[1] // groups
    low, high = reach.neg().clamp(min=spec.code_min), reach.clamp(max=spec.code_max)
    steps, low, high = (t.to(dtype).repeat_interleave(width, -1) for t in (scale, low, high))
    return steps, low, high


def _grouped(values: Tensor, groups: int) -> Tensor:
    """``[N, K]`` as ``[N, G, K / G]``."""
    result: Tensor = values.unflatten(-1, (groups, -1))
    return result


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, computed in fp64."""
    damped = hessian.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * torch.where(mean > 0, mean, 1.0))
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:
        raise TrainingError(
            f"GPTQ cannot invert the products of a linear's {len(hessian)} inputs ({error}): some"
            " are not finite, or all but the same; calibrate on more rows (--calibration-rows), or"
            " leave gptq out of --method"
        ) from error
    return factor.to(hessian.dtype)
