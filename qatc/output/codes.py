"""A quantized weight as plain tensors: what every export format stores and reads back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatc.numerics import learned, minmax
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

    @classmethod
    def from_float(
        cls, weight: Tensor, spec: QuantSpec, scale: Tensor | None = None
    ) -> QuantizedWeight:
        """Quantize a trained float weight ``[N, K]`` exactly as training did.

        Args:
            weight: the master.
            spec: how.
            scale: fp32 ``[N, G]``, where it is a learned one.

        Raises:
            ConfigError: the group size does not divide K.
        """
        if scale is not None:
            return cls(learned.quantize_by(weight.detach(), scale, spec), scale, spec)
        codes, scale = minmax.quantize(weight.detach(), spec, snap=True)
        return cls(codes, scale, spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * scale`` as ``[N, K]``, computed in fp32 and rounded once to ``dtype``."""
        return minmax.dequantize(self.codes, self.scale, dtype)
