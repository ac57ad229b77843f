"""Commands of qatc as processes, one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qatc.errors import BUSY, BusyError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")

Command = Callable[[Sequence[str], Path, Path], int]
"""Runs ``qatc`` with these arguments, its stdout and its stderr in files; returns its status."""


def in_a_process(arguments: Sequence[str], out: Path, log: Path) -> int:
    """Run a command of qatc as a process.

    When this process is asked to end, the child is too, and comes to its checkpoint first.
    """
    with (
        out.open("w", encoding="utf-8") as stdout,
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "qatc.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_environment(os.environ),
            start_new_session=True,  # Ctrl-C reaches it once, from here
        ) as child,
    ):
        try:
            return child.wait()
        except BaseException:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait()
            except BaseException:
                child.kill()
            raise


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """For a child that is no rank of ours, with the GPU of our local rank alone."""
    found = {name: value for name, value in ours.items() if name not in _LAUNCHER}
    if "LOCAL_RANK" in ours:
        rank = int(ours["LOCAL_RANK"])
        visible = [gpu for gpu in ours.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        found["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)] if visible else str(rank)
    return found


def run(command: Command, arguments: Sequence[str], out: Path, log: Path) -> str | None:
    """Run a command; the error that it ended with, if any.

    Raises:
        BusyError: another process writes to a place that it needs.
    """
    status = command(arguments, out, log)
    if not status:
        return None
    error = _last_error(log, status)
    if status == BUSY:
        raise BusyError(error)
    return error


def _last_error(log: Path, status: int) -> str:
    """The line that a command ended with."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or [line for line in lines if line.strip("│╭╮╰╯─ ")] or [""])[-1]
    return last.removeprefix("error:").strip("│ ") or f"ended with status {status}"
