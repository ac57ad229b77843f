"""One run at a time on one place, for as long as its process lives."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qatc.errors import CheckpointError, ConfigError
from qatc.storage.locks import locked
from tests.storage.conftest import held_by_another_process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that holds ``out``."""
    with held_by_another_process(tmp_path / "out") as process:
        yield process


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path, holder: int) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in ("out", "link", "x/../out"):
        with pytest.raises(ConfigError, match=f"is being written by process {holder} on .*; wait"):
            with locked(tmp_path / place):
                pytest.fail("it is held")
    with locked(tmp_path / "other"):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path, holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "out.lock").exists(), "or this test shows nothing"
    with locked(tmp_path / "out"):
        assert f"process {os.getpid()} on" in (tmp_path / "out.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_one_thread_may_hold_it_twice_and_another_not_at_all(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except ConfigError as error:
            refused.append(str(error))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in refused[0]
    other()
    assert len(refused) == 1


def test_folders_above_are_made_and_stay_if_they_are_used(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text("mine")
    with pytest.raises(ConfigError, match="out.lock is in the way of the lock"):
        with locked(tmp_path / "out"):
            pytest.fail("it cannot be held")
    assert (tmp_path / "out.lock").read_text() == "mine"


def test_a_lock_file_deleted_by_its_holder_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locking a file without a name would let a third process lock a new one."""
    real = fcntl.flock
    calls: list[int] = []

    def late(file: int, operation: int) -> None:
        if not calls:
            (tmp_path / "out.lock").unlink()
        calls.append(file)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2 and (tmp_path / "out.lock").exists()


def test_a_file_system_without_locks_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks; start no second run"):
        with locked(tmp_path / "out"):
            pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out.lock").mkdir()
    for place in ("file/out", "out"):
        with pytest.raises(CheckpointError, match="cannot write"):
            with locked(tmp_path / place):
                pytest.fail("it cannot be held")
