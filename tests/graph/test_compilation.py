"""Whether Inductor works here is tried once on a machine, and remembered."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from qatc.graph import compilation
from qatc.models import preparation
from qatc.numerics import minmax

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for the GPU"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler of our own, and nothing remembered."""
    command = tmp_path / "own-cxx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(command))
    compilation.obstacle.cache_clear()
    own = {"cpp.cxx": (None, str(command)), "cpp_cache_precompile_headers": False}  # slow, once
    with torch._inductor.config.patch(own):
        yield command
    compilation.obstacle.cache_clear()


def write(command: Path, body: str) -> Path:
    """Make it a compiler that notes every compilation in a log before it runs ``body``."""
    log = command.with_name("log")
    log.touch()
    command.write_text(
        f'#!/bin/sh\ncase "$*" in --version|-v) exec g++ "$@";; esac\necho "$@" >> {log}\n{body}\n'
    )
    command.chmod(0o755)
    return log


def ask_again() -> str | None:
    compilation.obstacle.cache_clear()
    return compilation.obstacle()


def test_a_compiler_without_its_headers_is_tried_once(machine: Path) -> None:
    log = write(machine, "echo 'x.cpp:1:10: fatal error: cmath: No such file' >&2; exit 1")
    reason = compilation.obstacle()
    assert reason is not None and "fatal error: cmath" in reason and "\n" not in reason
    assert not preparation.can_compile() and not preparation.can_compile("cpu")
    assert compilation.obstacle("mps") == reason  # which is no GPU of Triton
    attempts = log.read_text()
    assert attempts
    assert ask_again() == reason and log.read_text() == attempts


def test_a_compiler_that_works_is_tried_once(machine: Path) -> None:
    log = write(machine, 'exec g++ "$@"')
    assert compilation.obstacle() is None and preparation.can_compile()
    attempts = log.read_text()
    assert attempts
    assert ask_again() is None and log.read_text() == attempts
    machine.write_text(machine.read_text() + "exit 1\n")  # another compiler
    assert ask_again() is None and log.read_text() != attempts


def test_no_compiler(machine: Path) -> None:
    assert compilation.obstacle() == "there is no C++ compiler"


def test_a_gpu_needs_triton_and_no_cpp_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, object] = {"triton": object()}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setenv("CC", "gcc -m64")
    assert ask_again() is None and preparation.can_compile("cuda:1")
    assert compilation.obstacle("cpu") == "there is no C++ compiler"
    assert not preparation.can_compile("cpu")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert ask_again() == "there is no C compiler, which Triton needs"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert ask_again() == "Some GPU is too old for Triton"
    del found["triton"]
    assert ask_again() == "triton is not installed"


def test_graphs_are_compiled_with_ieee_division(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own division on a GPU is an approximation; on a CPU there is nothing to see."""
    assert torch._inductor.config.eager_numerics.division_rounding is not None
    calls: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    graph = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    preparation.inductor(graph)
    assert calls == [{"options": minmax.COMPILE_OPTIONS}]
    assert minmax.COMPILE_OPTIONS["eager_numerics.division_rounding"] is True
