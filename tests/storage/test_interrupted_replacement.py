"""A replacement that is killed, fails, or is watched by another process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatc.errors import CheckpointError, ConfigError
from qatc.storage import markers
from qatc.storage.directories import recover
from qatc.storage.markers import Mark
from tests.conftest import at_disk_call, run_until_killed
from tests.storage.conftest import NEW, OLD, held_by_another_process, replace, tree


def count(folder: Path, existing: bool) -> int:
    """How many calls a replacement makes that change the disk."""
    folder.mkdir()
    if existing:
        start(folder)
    with pytest.MonkeyPatch.context() as patch:
        calls = at_disk_call(patch)
        replace(folder / "out")
    assert calls.count("rename") == 1 + existing and "fsync" in calls
    return len(calls)


def start(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "qatc.json").write_text(OLD)
    (folder / "out" / "old.txt").write_text("old")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device")


class TestInterruptedReplacement:
    """Stopped before any call that changes the disk, one directory stands whole, and it alone."""

    OLD_TREE = {"out": "/", "out/qatc.json": OLD, "out/old.txt": "old"}

    @pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "into nothing"])
    def test_killed(self, tmp_path: Path, existing: bool) -> None:
        outcomes = []
        for number in range(1, count(tmp_path / "count", existing) + 1):
            folder, copy = tmp_path / str(number), tmp_path / f"copy-{number}"
            folder.mkdir()
            if existing:
                start(folder)

            def killed(folder: Path = folder, number: int = number) -> None:
                at_disk_call(pytest.MonkeyPatch(), number, kill)
                replace(folder / "out")

            run_until_killed(killed)
            shutil.copytree(folder, copy)
            recover(folder / "out")
            outcomes.append(tree(folder))
            assert outcomes[-1] in (NEW, self.OLD_TREE if existing else {}), number
            replace(copy / "out")
            assert tree(copy) == NEW, number
        assert NEW in outcomes and (self.OLD_TREE if existing else {}) in outcomes

    @pytest.mark.parametrize("act", [interrupt, fill_the_disk])
    @pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "into nothing"])
    def test_failed(self, tmp_path: Path, existing: bool, act: Callable[[], None]) -> None:
        old, calls = self.OLD_TREE if existing else {}, count(tmp_path / "count", existing)
        for number in range(1, calls + 1):
            folder = tmp_path / str(number)
            folder.mkdir()
            if existing:
                start(folder)
            with pytest.MonkeyPatch.context() as patch:
                at_disk_call(patch, number, act)
                try:
                    replace(folder / "out")
                except (KeyboardInterrupt, CheckpointError):
                    pass
            recover(folder / "out")
            assert tree(folder) in (NEW, old), number

    def test_between_the_renames_ctrl_c_finishes(self, tmp_path: Path, output: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            rename = Path.rename

            def interrupted(self: Path, target: Any) -> Path:
                if self.name == "out.writing" and not (tmp_path / "again").exists():
                    (tmp_path / "again").mkdir()
                    raise KeyboardInterrupt
                return rename(self, target)

            patch.setattr(Path, "rename", interrupted)
            replace(output)
        (tmp_path / "again").rmdir()
        assert tree(tmp_path) == NEW

    def test_everything_is_on_the_disk_before_it_takes_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        fsync, rename = os.fsync, os.rename
        opened, names = os.open, {}

        def opening(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = opened(path, *args, **kwargs)
            names[descriptor] = str(path)
            return descriptor

        def syncing(descriptor: int) -> None:
            events.append(names[descriptor])
            fsync(descriptor)

        def renaming(source: Any, target: Any) -> None:
            events.append(f"rename {target}")
            rename(source, target)

        monkeypatch.setattr(os, "open", opening)
        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "rename", renaming)
        replace(tmp_path / "out")
        moved = events.index(f"rename {tmp_path / 'out'}")
        staging = tmp_path / "out.writing"
        for name in ("new.txt", "qatc.json", "sub/a", "sub", "."):
            assert str(staging / name) in events[:moved], name
        assert str(tmp_path) in events[moved:], "the rename itself"

    def test_a_live_process_is_left_to_finish(self, tmp_path: Path, output: Path) -> None:
        """Whoever looks between its renames is told, and touches nothing."""
        output.rename(tmp_path / "out.replaced")
        markers.put(tmp_path / "out.replaced", Mark.REPLACED)
        with held_by_another_process(tmp_path / "out") as process:
            with pytest.raises(ConfigError, match=f"is being written by process {process} on"):
                recover(tmp_path / "out")
            assert (tmp_path / "out.replaced").exists()
        recover(tmp_path / "out")
        assert (tmp_path / "out" / "qatc.json").read_text() == OLD
