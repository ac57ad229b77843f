"""What the files of an output hold, tensor by tensor, for its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """What the weight files of an output hold.

    Attributes:
        weights: how many quantized weight tensors there are.
        parameters: numbers in them.
        code_bytes, scale_bytes: that their codes and scales take.
        scales: how many scales there are.
        float_parameters: numbers that are not quantized.
        float_bytes: that these take.
        float_dtypes: their dtypes, the one of most numbers first.
    """

    weights: int
    parameters: int
    code_bytes: int
    scale_bytes: int
    scales: int
    float_parameters: int
    float_bytes: int
    float_dtypes: tuple[str, ...]


def measure(directory: Path) -> Stored:
    """Count the tensors of an output, from the headers of its weight files."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                view = file.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
                if name.endswith("_shape"):
                    shapes[name.removesuffix("_shape")] = math.prod(file.get_tensor(name).tolist())
    scales = [name for name in found if name.endswith((".weight_scale", "._weight_scale"))]
    quantized = [name.removesuffix("_scale") for name in scales]
    # Of the three names that codes have in the layouts, the one that is there.
    forms = [(f"{name}_packed", f"{name}_qdata", name) for name in quantized]
    codes = [next(name for name in form if name in found) for form in forms]
    aside = {*codes, *scales, *(f"{name}_shape" for name in shapes)}
    by_dtype: dict[str, int] = {}
    for name, (dtype, shape) in found.items():
        if name not in aside:
            label = _DTYPES.get(dtype, dtype.lower())
            by_dtype[label] = by_dtype.get(label, 0) + math.prod(shape)

    def size(names: Sequence[str]) -> int:
        return sum(_BYTES[found[name][0]] * math.prod(found[name][1]) for name in names)

    return Stored(
        weights=len(quantized),
        parameters=sum(
            shapes.get(name) or math.prod(found[own][1])
            for name, own in zip(quantized, codes, strict=True)
        ),
        code_bytes=size(codes),
        scale_bytes=size(scales),
        scales=sum(math.prod(found[name][1]) for name in scales),
        float_parameters=sum(by_dtype.values()),
        float_bytes=size([name for name in found if name not in aside]),
        float_dtypes=tuple(sorted(by_dtype, key=lambda label: -by_dtype[label])),
    )
