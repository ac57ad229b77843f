"""Several processes that do one thing together, as ``torchrun`` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from qatc.machine.world import World, joined

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process."""
    usual = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return usual | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}


def start_ranks(*command: str, size: int = 2) -> list[subprocess.Popen[str]]:
    """Start ``python`` with these arguments in every process of a world."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment(rank, size, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each, once all have ended."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=900)
        found.append((process.returncode, out, err))
    return found


def in_a_new_process(module: str, function: str, directory: Path) -> None:
    """Call a function of a test module with a directory, in a process that has done nothing yet.

    What another test left behind, a process group say, may hang or end a copy of its process.
    """
    code = f"from pathlib import Path; from {module} import {function} as act"
    command = [sys.executable, "-c", f"{code}; act(Path({str(directory)!r}))"]
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=usual, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def fork_ranks(act: Callable[[World], object], size: int) -> None:
    """Let so many copies of this process, which have loaded all it has, do one thing together.

    For a process by itself, see :func:`in_a_new_process`.
    """
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= environment(rank, size, port)
            try:
                with joined("cpu") as world:
                    act(world)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), statuses
