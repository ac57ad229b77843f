"""How quantized weights lie in a safetensors file: codes and scales to named tensors, and back.

==================  ==========  ====================================================================
layout              for bits    tensors of a layer ``X``
==================  ==========  ====================================================================
``pack-quantized``  2 to 4      ``X.weight_packed`` int32 ``[N, ceil(K / 8)]``, ``X.weight_scale``
                                ``[N, G]``, ``X.weight_shape`` int64 ``[2]``
``int-quantized``   5 to 8      ``X.weight`` int8 ``[N, K]``, ``X.weight_scale`` ``[N, G]``
``torchao``         2 to 8      ``X._weight_qdata`` int8 ``[N, K]``, ``X._weight_scale`` fp32
                                ``[N, G]``
==================  ==========  ====================================================================

Packed codes are stored as code + 8, eight to an int32, the first one in the lowest four bits. The
first two layouts are those of compressed-tensors, which also gave them their names; the third is
that of torchao's ``Int8Tensor``, which an output gets by export only. By export for vLLM codes of 2
to 4 bits may lie in the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_values

from qatc.errors import CheckpointError
from qatc.output.codes import QuantizedWeight
from qatc.recipe.spec import QuantSpec

PACKED_BITS = 4
PLAIN_BITS = 8

PACKED, PLAIN, TORCHAO = "pack-quantized", "int-quantized", "torchao"

_CODES = {PACKED: ".weight_packed", PLAIN: ".weight", TORCHAO: "._weight_qdata"}
"""What the name of a layer's codes ends with."""

LAYOUTS = tuple(_CODES)

Form = Literal["qatc", "transformers", "torchao", "vllm", "vllm-marlin"]
"""Whom a directory is written for; see :func:`qatc.output.directory.write_output`."""

_CODES_PER_WORD = 8
_OFFSET = 8  # makes the codes -8..7 unsigned


def layout_of(spec: QuantSpec) -> str:
    """The name of the layout of weights quantized by ``spec``, by name."""
    return PACKED if spec.bits <= PACKED_BITS else PLAIN


def tensor_names(name: str, layout: str) -> tuple[str, ...]:
    """The names under which the weight ``name`` (``X.weight``) is stored in a layout."""
    assert name.endswith(".weight"), f"{name} is not the weight of a layer"
    if layout == PACKED:
        return (f"{name}_packed", f"{name}_scale", f"{name}_shape")
    if layout == TORCHAO:
        layer = name.removesuffix(".weight")
        return (f"{layer}._weight_qdata", f"{layer}._weight_scale")
    return (name, f"{name}_scale")


def to_tensors(
    weights: Mapping[str, QuantizedWeight],
    *,
    dtype: torch.dtype = torch.float32,
    layouts: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that hold ``weights``.

    Args:
        weights: quantized weights by parameter name (``X.weight``).
        dtype: dtype of the model's float weights, in which the scales are stored too; scales that
            it cannot hold exactly (fp16 above 65504) are stored in fp32, and so are torchao's.
        layouts: those of weights that are not stored in the layout of their bits.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        codes, spec = weight.codes.detach().cpu(), weight.spec
        low, high = codes.aminmax()
        assert spec.code_min <= low and high <= spec.code_max, f"{name}: codes {low} to {high}"
        layout = (layouts or {}).get(name, layout_of(spec))
        held = torch.float32 if layout == TORCHAO else dtype
        scale = _lossless(name, weight.scale.detach().cpu(), held)
        stored = [codes.contiguous(), scale]
        if layout == PACKED:
            stored = [_pack_nibbles(codes), scale, torch.tensor(codes.shape)]
        tensors.update(zip(tensor_names(name, layout), stored, strict=True))
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], spec: QuantSpec, layout: str | None = None
) -> dict[str, QuantizedWeight]:
    """The inverse of :func:`to_tensors`, bit for bit.

    Args:
        tensors: the tensors of quantized weights, and nothing else.
        spec: the spec of the weights.
        layout: of the weights; ``None`` for that of their bits.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape or dtype.
    """
    layout = layout or layout_of(spec)
    suffix = _CODES[layout]
    names = [f"{k.removesuffix(suffix)}.weight" for k in tensors if k.endswith(suffix)]
    expected = {stored for name in names for stored in tensor_names(name, layout)}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise CheckpointError(
            f"{len(odd)} tensors are missing or left over for the layout {layout},"
            f" among them {odd[0]}; write the model again"
        )
    return {name: _unpack_one(name, tensors, spec, layout) for name in names}


def _unpack_one(
    name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, layout: str
) -> QuantizedWeight:
    stored, scale, *shape = (tensors[key] for key in tensor_names(name, layout))
    if shape:
        _expect(name, stored.dtype == torch.int32 and stored.dim() == 2, stored)
        _expect(name, shape[0].dtype == torch.int64 and shape[0].shape == (2,), shape[0])
        rows, width = shape[0].tolist()
        _expect(name, stored.shape == (rows, -(-width // _CODES_PER_WORD)), stored)
        codes = _unpack_nibbles(stored, width)
    else:
        _expect(name, stored.dtype == torch.int8 and stored.dim() == 2, stored)
        codes = stored
        rows, width = codes.shape
    groups = 1 if spec.group_size is None else width // spec.group_size
    _expect(name, scale.is_floating_point() and scale.shape == (rows, groups), scale)
    return QuantizedWeight(codes, scale.float(), spec)


def _expect(name: str, valid: bool, tensor: Tensor) -> None:
    if not valid:
        raise CheckpointError(
            f"the quantized weight {name} is damaged or does not belong to this recipe: it holds"
            f" {tensor.dtype} {list(tensor.shape)}; write the model again"
        )


def _pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes ``[N, K]`` to int32 ``[N, ceil(K / 8)]``.

    Works on bytes, which keeps the temporary memory at one byte a code. An int32 lies in memory
    with its lowest byte first on every machine that torch runs on, and in safetensors.
    """
    unsigned = pad_values((codes + _OFFSET).view(torch.uint8), (0, -codes.shape[1] % 8))
    packed = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return packed.contiguous().view(torch.int32)


def _unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    pairs = packed.contiguous().view(torch.uint8)
    unsigned = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)
    return unsigned[:, :width].view(torch.int8) - _OFFSET


def loads_exactly_in(weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> bool:
    """Whether a runtime that casts all scales to the model's dtype, as transformers does, may."""
    return all(_exact_in(dtype, weight.scale) for weight in weights.values())


def _exact_in(narrow: torch.dtype, scale: Tensor) -> bool:
    return torch.equal(scale.to(narrow).float(), scale)


def _lossless(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    assert _exact_in(torch.bfloat16, scale), f"{name}: the scales are not snapped to bf16"
    narrow = dtype in (torch.bfloat16, torch.float16) and _exact_in(dtype, scale)
    return scale.to(dtype if narrow else torch.float32).contiguous()
