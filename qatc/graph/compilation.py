"""Whether Inductor can compile here, found out by a trial and remembered, and how it is called."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc.machine import cpu, toolchain
from qatc.numerics import minmax


def compile_graph(function: Callable[..., Any], **more: bool) -> Callable[..., Any]:
    """``torch.compile`` with the options that the numerics need, and ``more``."""
    options: Any = minmax.COMPILE_OPTIONS | more
    compiled: Callable[..., Any] = torch.compile(function, options=options)
    return compiled


OLDEST = 7
"""Compute capability from which on Triton compiles for a GPU."""


@functools.cache
def obstacle(kind: str = "auto") -> str | None:
    """Why Inductor cannot build kernels for a kind of device, or None if it can.

    For ``cuda`` it needs Triton, and a C compiler for what launches Triton's kernels; for all else
    a C++ compiler, which may lack its headers or half of its programs. So one kernel is built the
    way that all are, once for each compiler and processor; the outcome is kept in the user's cache,
    a failure for a day.

    Args:
        kind: of torch's devices, or ``auto`` for a GPU of NVIDIA if there is one.
    """
    if kind == "auto":
        return obstacle("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return _obstacle_on_gpu()
    commands = _compilers()
    if not commands:
        return "there is no C++ compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (python3-dev) are not installed"
    return _remembered(commands)


def _obstacle_on_gpu() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability()[0] < OLDEST:
        return f"{torch.cuda.get_device_name()} is too old for Triton"
    own = os.environ.get("CC", "").split()[:1]
    if not any(map(shutil.which, own or ("gcc", "clang", "cc"))):
        return "there is no C compiler, which Triton needs"
    return None


def _compilers() -> list[tuple[str, ...]]:
    """What may be Inductor's compiler; which one it takes and whether that works, a trial tells."""
    try:
        own = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        own = []
    commands = [own] if own else [["g++"], ["clang++"]]
    return [(*command,) for command in commands if shutil.which(command[0])]


def _remembered(commands: list[tuple[str, ...]]) -> str | None:
    key = toolchain.digest(
        *(toolchain.identity(command) for command in commands),
        Path(__file__).read_bytes(),  # what is tried
        repr((os.environ.get("CXX"), torch.__version__, sys.version)).encode(),
        " ".join(sorted(cpu.features())).encode(),
    )
    try:
        path = toolchain.cache_folder() / f"inductor-{key}.works"
        if path.exists():
            return None
        failure = toolchain.recall_failure(path)
        if failure is None:
            failure = _try()
            if failure is None:
                path.touch()
            else:
                toolchain.remember_failure(path, failure)
    except OSError:  # a full disk: nothing can be remembered, nor compiled
        return _try()
    return failure


class _Sum(nn.Module):
    """Something whose source no earlier trial has compiled, as Inductor keeps what it built."""

    def __init__(self) -> None:
        super().__init__()
        self.number = time.time_ns() / 1e18

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.number).sum(-1)


def _try() -> str | None:
    """Build and run one kernel; what went wrong, in a line, or None."""
    failed = "the C++ compiler does not work: "
    with torch.inference_mode(False), torch.no_grad():
        module, x = _Sum(), torch.ones(4, 64, device="cpu")
        try:
            from torch.fx.experimental.proxy_tensor import make_fx

            graph = make_fx(module)(x)
            # In this process: processes that compile beside it may be slow to start.
            found = torch._inductor.compile(graph, [x], options={"compile_threads": 1})(x)
        except Exception as error:  # whatever keeps Inductor from working, is why it is not used
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            errors = [line for line in lines if "error:" in line]
            return failed + (errors or lines or [type(error).__name__])[0]
        return None if torch.allclose(found, module(x)) else failed + "its sums are wrong"
