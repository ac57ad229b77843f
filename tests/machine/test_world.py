"""Several processes act together, and end together with one message."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qatc.errors import ConfigError
from qatc.machine.signals import StopRequest
from qatc.machine.world import World, current, joined
from tests.ranks import ended, start_ranks


def test_alone_nothing_is_loaded_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world == World(0, 1) == current() and world.first
        assert world.on_first(lambda x: x + 1, 1) == 2
        assert world.first_before_others(lambda x: x + 1, 1) == 2
        assert world.on_each(lambda x: x + 1, 1) == [2]
        assert world.sum([1.0, 2.5]) == [1.0, 2.5] and world.greatest(3) == 3
    code = (
        "import sys, qatc.training.distill\nfrom qatc.machine.world import joined\n"
        "with joined(): print([m for m in ('fsdp', 'checkpoint', 'tensor')"
        " if f'torch.distributed.{m}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_one_group_of_processes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun --nproc-per-node 1 is nothing else than no torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined() as world:
        assert world.size == 1


def test_an_error_of_a_process_alone_is_its_own() -> None:
    def fail() -> None:
        raise ConfigError("as it is")

    for together in (World().on_first, World().on_each, World().first_before_others):
        with pytest.raises(ConfigError, match="as it is"):
            together(fail)


def test_all_end_where_one_is_to_end() -> None:
    stop = StopRequest()
    stop.agree(lambda number: number)
    assert not stop.requested
    stop.agree(lambda number: 15)
    assert stop.requested


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("second", "the second cannot"),
        ("both", "both cannot"),
        ("killed", "another of the 2 processes ended without a word"),
    ],
)
def test_one_message_and_no_hang(how: str, message: str) -> None:
    found = ended(start_ranks("-m", "tests.machine.fails_in_a_world", how))
    assert all(status != 0 for status, _, _ in found)
    told = "".join(err for _, _, err in found)
    assert told.count("error: ") == 1 and f"error: {message}" in told
    assert "Traceback" not in told


def test_what_processes_do_together(in_a_world: object) -> None:
    """The assertions are in tests.in_a_world, and both processes came to their end."""
