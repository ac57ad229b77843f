"""Several processes act together, and end together with one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from qatc.errors import ConfigError
from qatc.machine.signals import StopRequest
from qatc.machine.world import World, current, joined
from tests.ranks import ended, start_ranks


def test_alone_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world == World(0, 1) == current() and world.first
        assert world.on_first(lambda x: x + 1, 1) == 2
        assert world.first_before_others(lambda x: x + 1, 1) == 2
        assert world.on_each(lambda x: x + 1, 1) == [2]
        assert world.sum([1.0, 2.5]) == [1.0, 2.5] and world.greatest(3) == 3
    assert not torch.distributed.is_initialized()


def test_one_group_of_processes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun --nproc-per-node 1 is nothing else than no torchrun."""
    told = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with joined() as world:
        assert world.size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR")  # a scheduler's
    with joined() as world:
        assert world.size == 1


def test_an_error_of_a_process_alone_is_its_own() -> None:
    def fail() -> None:
        raise ConfigError("as it is")

    for together in (World().on_first, World().on_each, World().first_before_others):
        with pytest.raises(ConfigError, match="as it is"):
            together(fail)


def test_all_end_where_one_is_to_end() -> None:
    with StopRequest() as stop:
        assert not stop.agree(lambda number: number) and not stop.requested
        assert stop.agree(lambda number: 15) and stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # its own comes later, and is no second one
        assert stop.agree(lambda number: number)


def test_a_signal_while_they_agree_waits_for_the_next_time() -> None:
    """Else this process would end, and the others would not."""

    def late(number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return number

    with StopRequest() as stop:
        assert not stop.agree(late)
        assert stop.agree(lambda number: number)


KILLED = """
import os, signal, sys, typer
from qatc.cli.errors import readable_errors
from qatc.machine.world import joined
try:
    with readable_errors(), joined("cpu") as world:
        if not world.first:
            os.kill(os.getpid(), signal.SIGKILL)
        world.on_first(lambda: None)
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


def test_a_process_that_is_killed_is_noticed() -> None:
    (first, _, told), (second, _, unheard) = ended(start_ranks("-c", KILLED))
    assert (first, second) == (1, -signal.SIGKILL) and not unheard
    assert told.startswith("error: another of the 2 processes ended without a word")
    assert told.count("\n") == 1


def test_what_processes_do_together(in_a_world: Path) -> None:
    """What each does is asserted there, as is that an error of one ends both with one message."""
    assert in_a_world.is_dir()
