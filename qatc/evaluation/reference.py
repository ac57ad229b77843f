"""What was trained, from an output: the quantized graph on the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qatc.models.preparation import prepare
from qatc.models.scales import of_attention
from qatc.output import Output


@torch.no_grad()
def prepare_reference(model: nn.Module, output: Output, **options: Any) -> nn.Module:
    """Prepare the model of :func:`qatc.output.load_reference` with the scales of its output.

    Args:
        model: of the output.
        output: with the recipe, the learned scales and the centers of keys.
        options: of :func:`qatc.prepare`.

    Returns:
        ``model`` itself, whose fake-quantized weights are the stored codes times their scales.
    """
    scales = {name: weight.scale for name, weight in output.weights.items()}
    prepare(model, output.recipe, start_scales=scales, **options)
    held = dict(model.named_buffers()) | dict(model.named_parameters())
    for name, value in output.state.items():
        if of_attention(name):
            held[name].copy_(value)
    return model
