"""A quantized weight as plain tensors: what every export format stores and reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qatc.models.scales import learned_scale_of
from qatc.numerics import minmax
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight ``[N, K]`` of a linear layer as integer codes and scales.

    Args:
        codes: int8 ``[N, K]``, between ``spec.code_min`` and ``spec.code_max``.
        scale: fp32 ``[N, G]``, every value exactly representable in bf16; G is 1 for one scale per
            output channel, K / group_size for groups.
        spec: the bits, range and group size behind the codes.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec

    def cpu(self) -> QuantizedWeight:
        """The same in the host's memory."""
        return QuantizedWeight(self.codes.cpu(), self.scale.cpu(), self.spec)

    @classmethod
    def from_float(cls, weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """Quantize a float weight ``[N, K]`` by its MinMax scales, exactly as training does.

        Raises:
            ConfigError: the group size does not divide K.
        """
        codes, scale = minmax.quantize(weight.detach(), spec, snap=True)
        return cls(codes, scale, spec)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], name: str, spec: QuantSpec) -> QuantizedWeight:
        """Quantize a weight of a trained model exactly as training did.

        Args:
            state: the state dict of a prepared model, learned scales and all.
            name: of the weight, ``[N, K]``.
            spec: how it is quantized.

        Raises:
            ConfigError: the group size does not divide K.
        """
        scale = learned_scale_of(state, name, spec)
        if scale is None:
            return cls.from_float(state[name], spec)
        return cls(minmax.quantize_by(state[name].detach(), scale, spec), scale, spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * scale`` as ``[N, K]``, computed in fp32 and rounded once to ``dtype``."""
        return minmax.dequantize(self.codes, self.scale, dtype)
