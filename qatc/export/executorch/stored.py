"""The codes and scales in a ``.pte``, by the digests under which ExecuTorch stores data.

What XNNPACK multiplies lies there under the SHA-256 of its bytes: codes of 4 bits as unsigned
nibbles, the even ones low, with bf16 scales, codes of 8 bits as they are with fp32 ones. A table of
the embedding is a constant of the program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qatc.export.executorch.modules import QuantizedEmbedding, QuantizedLinear
from qatc.output import QuantizedWeight
from qatc.recipe.spec import read_spec_arg


def describe(module: QuantizedLinear | QuantizedEmbedding) -> dict[str, Any]:
    """How the codes and scales of a module are found in a file: their keys, and the layout."""
    codes, scale, bits = module.codes, module.scale, 8
    if isinstance(module, QuantizedLinear) and module.bits == 4:
        bits, scale = 4, scale.to(torch.bfloat16)
        unsigned = codes.to(torch.uint8) + 8
        codes = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return {
        "codes": _key(codes),
        "scale": _key(scale),
        "bits": bits,
        "rows": len(module.codes),
        "scale_dtype": str(scale.dtype).removeprefix("torch."),
    }


def _key(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def keys_of(module: QuantizedLinear | QuantizedEmbedding) -> set[str]:
    """The digests of a module's codes and scales."""
    told = describe(module)
    return {told["codes"], told["scale"]}


def products_of(content: bytes) -> dict[str, bytes]:
    """What a file stores for XNNPACK, by its digests."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    data = deserialize_pte_binary(content).named_data
    if data is None:
        return {}
    return {
        key.removeprefix("scale_"): data.buffers[entry.buffer_index]
        for key, entry in data.pte_data.items()
    }


def tables_of(content: bytes) -> dict[str, bytes]:
    """The constants of a file's program, by their digests."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    buffers = deserialize_pte_binary(content).program.constant_buffer
    return {hashlib.sha256(own.storage).hexdigest(): own.storage for own in buffers}


def weight_in(data: Mapping[str, bytes], told: Mapping[str, Any]) -> QuantizedWeight:
    """A weight that :func:`describe` told of.

    Raises:
        KeyError: the file does not hold these codes, or these scales.
    """
    spec, rows = read_spec_arg(told["spec"]), told["rows"]
    dtype = getattr(torch, told["scale_dtype"])
    scale = torch.frombuffer(bytearray(data[told["scale"]]), dtype=dtype).float().view(rows, -1)
    held = torch.frombuffer(bytearray(data[told["codes"]]), dtype=torch.uint8).view(rows, -1)
    if told["bits"] == 4:
        codes = torch.stack([held & 15, held >> 4], -1).flatten(1).to(torch.int8) - 8
    else:
        codes = held.view(torch.int8)
    if spec.group_size is None:
        scale = scale[:, :1].contiguous()
    return QuantizedWeight(codes[:, : told["width"]].contiguous(), scale, spec)
