"""Where a model computes, and in which dtype."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.machine import cpu

AMPERE = (8, 0)
"""Compute capability of the first GPUs that have bf16."""

DType = Literal["auto", "float32", "bfloat16"]


def check_dtype(dtype: str) -> None:
    """Raise ``ConfigError`` unless ``dtype`` is one that a user may ask for."""
    if dtype not in get_args(DType):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(DType))}; got {dtype!r}")


def pick_device(device: str) -> str:
    """The device that ``auto`` stands for; another one is checked.

    Raises:
        ConfigError: this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot use the device {device!r}; try --device cpu, or auto ({reason})"
        ) from error
    return device


def pick_dtype(dtype: DType, device: str, config: Any) -> torch.dtype:
    """The compute dtype that ``auto`` stands for.

    It is bf16 on a GPU that has it (from compute capability 8.0 on, Ampere: before that it is
    emulated, and slower than fp32), and on a CPU that multiplies bf16 natively for models of hidden
    size 512 and more; otherwise fp32.
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    kind = torch.device(device)
    if kind.type == "cuda" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability(kind) >= AMPERE else torch.float32
    if kind.type != "cpu":
        return torch.bfloat16
    wide = getattr(config, "hidden_size", 0) >= 512
    return torch.bfloat16 if wide and cpu.multiplies_bf16() else torch.float32


def release_memory(device: str) -> None:
    """Give back what dropped models held: prepared and loaded ones are cycles."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def move(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move parameters and buffers to a device, in place; those that share memory share it there."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    moved: dict[Any, Tensor] = {}
    for tensor in tensors.values():
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if place not in moved:
            moved[place] = _at(tensor.data, device)
        tensor.data = moved[place]


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of host memory on a device, for which neither of them waits where that is a GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far, on the GPU if it uses one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory(device: str) -> int | None:
    """Bytes of the machine, or of its GPU; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # outside Unix
        return None


def device_name(device: str) -> str:
    """What to call the device in a report."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def available_memory(device: str | torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say.

    Of the machine's memory, what a container may have of it.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.mem_get_info(kind)[0]
    info = Path("/proc/meminfo")
    if kind.type != "cpu" or not info.exists():
        return None
    fields = dict(line.split(":") for line in info.read_text(encoding="ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(
        OSError, ValueError
    ):  # no limit reads "max"; version 1 has other files
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(free, 0)
