"""The compressed-tensors format, which transformers and vLLM load.

============  ====================  ==========  ===============================================
weight bits   format                declared    tensors of a layer ``X``
============  ====================  ==========  ===============================================
2 to 4        ``pack-quantized``    4 bits      ``X.weight_packed`` int32 ``[N, ceil(K / 8)]``,
                                                ``X.weight_scale`` ``[N, G]``,
                                                ``X.weight_shape`` int64 ``[2]``
5 to 8        ``int-quantized``     8 bits      ``X.weight`` int8 ``[N, K]``,
                                                ``X.weight_scale`` ``[N, G]``
============  ====================  ==========  ===============================================

Packed codes are stored as code + 8, eight to an int32, the first one in the lowest four bits.
Narrower codes are valid codes of the declared width, so a runtime needs no support for 3 or 6
bits; the true bits are in ``qatc.json``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_values

from qatc.errors import CheckpointError, ConfigError
from qatc.output.codes import QuantizedWeight
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

PACKED_BITS = 4
PLAIN_BITS = 8

PACKED, PLAIN = "pack-quantized", "int-quantized"

OWN_LAYOUT = "not for this runtime; run: qatc export"
"""Where compressed-tensors expects the name of a format, this one makes it refuse the checkpoint
and quote it, instead of reading codes as if they were weights."""

_CODES_PER_WORD = 8
_OFFSET = 8  # makes the codes -8..7 unsigned


def layout_of(spec: QuantSpec) -> str:
    """The name of the layout of weights quantized by ``spec``, as compressed-tensors calls it."""
    return PACKED if spec.bits <= PACKED_BITS else PLAIN


def joined(layouts: Collection[str]) -> str:
    """What a checkpoint that holds weights in these layouts is called as a whole."""
    return next(iter(layouts)) if len(set(layouts)) == 1 else "mixed-precision"


def tensor_names(name: str, layout: str) -> tuple[str, ...]:
    """The names under which the weight ``name`` (``X.weight``) is stored in a layout."""
    assert name.endswith(".weight"), f"{name} is not the weight of a layer"
    if layout == PACKED:
        return (f"{name}_packed", f"{name}_scale", f"{name}_shape")
    return (name, f"{name}_scale")


def pack(
    weights: Mapping[str, QuantizedWeight],
    *,
    dtype: torch.dtype = torch.float32,
    layouts: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that hold ``weights``.

    Args:
        weights: quantized weights by parameter name (``X.weight``).
        dtype: dtype of the model's float weights, in which the scales are stored too; scales that
            it cannot hold exactly (fp16 above 65504) are stored in fp32.
        layouts: those of weights that are not stored in the layout of their bits.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        codes, spec = weight.codes.detach().cpu(), weight.spec
        low, high = codes.aminmax()
        assert spec.code_min <= low and high <= spec.code_max, f"{name}: codes {low} to {high}"
        scale = _lossless(name, weight.scale.detach().cpu(), dtype)
        stored, layout = [codes.contiguous(), scale], (layouts or {}).get(name, layout_of(spec))
        if layout == PACKED:
            stored = [_pack_nibbles(codes), scale, torch.tensor(codes.shape)]
        tensors.update(zip(tensor_names(name, layout), stored, strict=True))
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], spec: QuantSpec, layout: str | None = None
) -> dict[str, QuantizedWeight]:
    """The inverse of :func:`pack`, bit for bit.

    Args:
        tensors: the tensors of quantized weights, and nothing else.
        spec: the spec of the weights.
        layout: of the weights; ``None`` for that of their bits.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape or dtype.
    """
    layout = layout or layout_of(spec)
    suffix = "_packed" if layout == PACKED else ""
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(f".weight{suffix}")]
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


def quantization_config(
    recipe: Recipe,
    ignore: list[str],
    ends: Mapping[str, tuple[QuantSpec, QuantSpec, str]] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        recipe: what the model was trained with; weights must be quantized.
        ignore: names of the linear modules that stay float, the output head among them.
        ends: of output head and token embedding, if they are quantized, the spec of weight and
            input and the layout, by name of the module.
    """
    targets = dict(sorted((ends or {}).items()))  # names of modules go before their class
    if recipe.weights.quantizes:
        layout = layout_of(recipe.weights)
        targets["Linear"] = (recipe.weights, recipe.activations, layout)
    groups = {f"group_{i}": _group(target, *how) for i, (target, how) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": joined({group["format"] for group in groups.values()}),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _group(target: str, weights: QuantSpec, inputs: QuantSpec, layout: str) -> dict[str, Any]:
    declared = PLAIN_BITS if layout == PLAIN else PACKED_BITS
    group: dict[str, Any] = {
        "targets": [target],
        "weights": _arguments(declared, weights.group_size, "channel", dynamic=False),
        "input_activations": None,
        "output_activations": None,
        # Without it transformers infers int-quantized for every layer with quantized inputs, and
        # finds no weights where they are packed.
        "format": layout,
    }
    if inputs.quantizes:
        group["input_activations"] = _arguments(
            inputs.bits, inputs.group_size, "token", dynamic=True
        )
    return group


def find_float_linears(model: torch.nn.Module, weights: Collection[str]) -> list[str]:
    """Names of the linear modules of ``model`` whose weight is not among ``weights``.

    Raises:
        ConfigError: one of ``weights`` belongs to another kind of module, which a runtime would
            not dequantize.
    """
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    tables = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    others = sorted(set(weights) - {f"{name}.weight" for name in (*linears, *tables)})
    if others:
        owner = type(model.get_submodule(others[0].removesuffix(".weight"))).__name__
        raise ConfigError(
            f"the quantized weight {others[0]} belongs to a {owner}, and compressed-tensors holds"
            f" torch.nn.Linear and torch.nn.Embedding only; add {others[0]!r} to the recipe's skip"
        )
    return [name for name in linears if f"{name}.weight" not in weights]


def _arguments(bits: int, group_size: int | None, per_row: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": per_row if group_size is None else "group",
        "group_size": group_size,
        "dynamic": dynamic,
    }
