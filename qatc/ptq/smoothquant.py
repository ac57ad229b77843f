"""SmoothQuant (arXiv 2211.10438): large activations made smaller, at the cost of the weights.

A channel of a linear's input that is divided by ``s`` where it is made, and multiplied by it in the
weight, computes the same. With

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                                      (equation 4)

the quantizers of both get ranges that are as even. The division is folded into what makes the
channel, so that nothing is left to do at run time: into the weight of a norm, into the rows of V's
projection for the output projection, and into those of the other factor of a gated product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.graph.nodes import Linear
from qatc.ptq.calibrate import See, observe
from qatc.ptq.structure import Chain, Gain, Layer, bias_name, find_chains, find_gains, layer_graphs
from qatc.ptq.weights import assign, largest, owner, scale_inputs, value


def smoothquant(model: Any, rows: Rows, *, alpha: float = 0.5, batch_size: int = 8) -> None:
    """Smooth the inputs of the linears of every decoder layer, in place.

    What the model computes stays as it is, up to rounding of its weights' dtype.

    Args:
        model: a transformers causal LM that is not prepared.
        rows: calibration text.
        alpha: from 0, all difficulty in the activations, to 1, all in the weights.
        batch_size: rows per forward pass.

    Raises:
        ConfigError: ``alpha`` is out of range, or a layer has nothing that can be smoothed.
        CaptureError: a layer cannot be captured.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha of smoothquant must be from 0 to 1; got {alpha}")
    sites = [site for layer in layer_graphs(model) for site in _sites(layer)]
    largest_of = [torch.zeros(0) for _ in sites]

    def note(number: int) -> See:
        def see(x: Tensor) -> None:
            seen = largest(x).double()
            before = largest_of[number]
            largest_of[number] = torch.maximum(before, seen) if len(before) else seen

        return see

    readers = [owner(layer.module, site.readers[0].parameter) for layer, site in sites]
    observe(model, rows, [(m, note(n)) for n, m in enumerate(readers)], batch_size)
    for (layer, site), x in zip(sites, largest_of, strict=True):
        fold = _smooth_norm if isinstance(site, Gain) else _smooth_chain
        fold(layer.module, site, x, alpha)  # type: ignore[arg-type]


def _sites(layer: Layer) -> list[tuple[Layer, Gain | Chain]]:
    """The groups of linears whose input can be scaled where it is made, norms first."""
    gains = [gain for gain in find_gains(layer.graph) if gain.readers]
    found: list[Gain | Chain] = [*gains, *find_chains(layer.graph)]
    if not found:
        raise ConfigError(
            f"{layer.name} ({type(layer.module).__name__}) has no norm that linears alone read, and"
            " no linear whose outputs are another's inputs, so that smoothquant has nothing to fold"
            " into; choose the method gptq"
        )
    return [(layer, site) for site in found]


def _smooth_norm(layer: nn.Module, gain: Gain, x: Tensor, alpha: float) -> None:
    factors = _factors(x, _columns(layer, gain.readers), alpha)
    scaled = (value(layer, gain.weight) + gain.offset) / factors - gain.offset
    assign(layer, gain.weight, scaled)
    if gain.bias is not None:
        assign(layer, gain.bias, value(layer, gain.bias) / factors)
    scale_inputs(layer, gain.readers, factors)


def _smooth_chain(layer: nn.Module, chain: Chain, x: Tensor, alpha: float) -> None:
    w = _columns(layer, chain.readers)
    per_output = _factors(_over_heads(x, chain), _over_heads(w, chain), alpha)
    weight = value(layer, chain.source.parameter)
    assign(layer, chain.source.parameter, weight / per_output.unsqueeze(1))
    bias = bias_name(chain.source)
    if bias is not None:
        assign(layer, bias, value(layer, bias) / per_output)
    scale_inputs(layer, chain.readers, repeat_heads(per_output, chain))


def _columns(layer: nn.Module, linears: tuple[Linear, ...]) -> Tensor:
    """The largest weight of each input channel, over all that read it."""
    return largest(torch.stack([largest(value(layer, own.parameter)) for own in linears]))


def _factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """Equation 4; 1 for channels that are zero."""
    factors = x.pow(alpha) / w.pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), factors, 1.0)


def _over_heads(channels: Tensor, chain: Chain) -> Tensor:
    """The largest value of the channels that come from one output of the source."""
    if chain.heads is None:
        return channels
    query, kv = chain.heads
    return channels.view(kv, query // kv, -1).amax(dim=1).flatten()


def repeat_heads(outputs: Tensor, chain: Chain) -> Tensor:
    """The values of the source's outputs ``[K]``, for every channel that is made of one."""
    if chain.heads is None:
        return outputs
    query, kv = chain.heads
    return outputs.view(kv, 1, -1).expand(-1, query // kv, -1).flatten()
