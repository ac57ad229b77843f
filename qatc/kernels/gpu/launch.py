"""Where the Triton kernels run, and how they are started."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
"""Of a GPU whose tensor cores multiply int8 as the kernels ask for it, and which has bf16."""


def obstacle(device: str) -> str | None:
    """Why no Triton kernel runs on this type of device, or None if they do."""
    if device != "cuda":
        return f"it is Triton for a GPU, and this is {device}"
    if not has_triton():
        return "triton is not installed"
    if torch.version.hip is not None:
        return "it has instructions of NVIDIA's, and this torch is for ROCm"
    if not torch.cuda.is_available():
        return "there is no GPU here whose capability could be asked for"
    least = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if least < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and a GPU here has {least[0]}.{least[1]}"
    return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not, since that takes time."""
    return importlib.util.find_spec("triton") is not None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be that of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
