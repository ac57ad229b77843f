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
from qatc.storage.directories import complete_directory, recover, refuse_existing, refuse_overlap
from qatc.storage.locks import locked
from qatc.storage.markers import Mark
from tests.conftest import at_disk_call, run_until_killed

CORPUS = '{"format_version": 1, "tokenizer_fingerprint": ""}'
OLD = '{"format_version": 2, "recipe": {}}'


def tree(folder: Path) -> dict[str, str]:
    """Everything in a folder: relative path to text, ``"/"`` for a folder."""
    return {
        str(path.relative_to(folder)): "/" if path.is_dir() else path.read_text()
        for path in folder.rglob("*")
    }


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "qatc.json").write_text(OLD)
    return path


def fail_rename_of(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if self.name.endswith(suffix):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


class TestCompleteDirectory:
    def test_appears_only_when_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "out"
        with complete_directory(path) as staging:
            (staging / "a.txt").write_text("a")
            assert not path.exists()
            assert staging.parent == path.parent, "a rename must not cross file systems"
        assert tree(tmp_path / "deep") == {"out": "/", "out/a.txt": "a"}

    def test_replaces_the_old_one_at_the_end(self, tmp_path: Path, output: Path) -> None:
        with complete_directory(output, overwrite=True) as staging:
            (staging / "new.txt").write_text("new")
            assert tree(output) == {"qatc.json": OLD}
        assert tree(tmp_path) == {"out": "/", "out/new.txt": "new"}

    def test_refuses_an_existing_one(self, tmp_path: Path, output: Path) -> None:
        with pytest.raises(ConfigError, match=r"pass --overwrite") as raised:
            with complete_directory(output):
                pytest.fail("the block must not run")
        assert str(output) in str(raised.value)
        assert tree(tmp_path) == {"out": "/", "out/qatc.json": OLD}

    def test_refuses_a_file_even_with_overwrite(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.write_text("mine")
        with pytest.raises(ConfigError, match="not a directory"):
            with complete_directory(path, overwrite=True):
                pytest.fail("the block must not run")
        assert tree(tmp_path) == {"out": "mine"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_failure_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error):
            with complete_directory(tmp_path / "out") as staging:
                (staging / "half.txt").write_text("half")
                raise error
        assert tree(tmp_path) == {}

    def test_failure_keeps_the_old_one(self, tmp_path: Path, output: Path) -> None:
        with pytest.raises(RuntimeError):
            with complete_directory(output, overwrite=True) as staging:
                (staging / "half.txt").write_text("half")
                raise RuntimeError
        assert tree(tmp_path) == {"out": "/", "out/qatc.json": OLD}

    @pytest.mark.parametrize("fails", ["out", "out.writing"])
    def test_failing_swap_keeps_the_old_one(
        self, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        fail_rename_of(monkeypatch, fails)
        with pytest.raises(CheckpointError):
            with complete_directory(output, overwrite=True) as staging:
                (staging / "new.txt").write_text("new")
        monkeypatch.undo()
        assert tree(tmp_path) == {"out": "/", "out/qatc.json": OLD}

    def test_clears_what_a_killed_run_left(self, tmp_path: Path, output: Path) -> None:
        for left, mark in (("out.writing", Mark.WRITING), ("out.replaced", Mark.REPLACED)):
            (tmp_path / left).mkdir()
            (tmp_path / left / "stale.txt").write_text("stale")
            markers.put(tmp_path / left, mark)
        with complete_directory(output, overwrite=True) as staging:
            (staging / "new.txt").write_text("new")
        assert tree(tmp_path) == {"out": "/", "out/new.txt": "new"}

    def test_a_link_can_be_replaced_again_and_again(self, tmp_path: Path, output: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(output)
        for text in ("first", "second"):
            with complete_directory(link, overwrite=True) as staging:
                (staging / "new.txt").write_text(text)
                (staging / "qatc.json").write_text(OLD)
            assert tree(link) == {"new.txt": text, "qatc.json": OLD}
        assert not list(tmp_path.glob("link.*"))

    @pytest.mark.parametrize("here", [".", ".."])
    def test_a_place_without_a_name_of_its_own_is_refused(
        self, output: Path, monkeypatch: pytest.MonkeyPatch, here: str
    ) -> None:
        monkeypatch.chdir(output)
        with pytest.raises(ConfigError):
            with complete_directory(Path(here), overwrite=True):
                pytest.fail("the block must not run")

    def test_full_disk_is_a_user_error_that_names_the_output(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        with pytest.raises(CheckpointError) as raised:
            with complete_directory(path):
                raise OSError(28, "No space left on device")
        assert str(raised.value).startswith(f"cannot write {path}: No space left on device;")
        assert tree(tmp_path) == {}


NEW = {"out": "/", "out/new.txt": "new", "out/qatc.json": OLD, "out/sub": "/", "out/sub/a": "a"}


def replace(path: Path) -> None:
    with complete_directory(path, overwrite=True) as staging:
        for name, text in (("new.txt", "new"), ("qatc.json", OLD), ("sub/a", "a")):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)


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
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with locked(tmp_path / "out"):
                os.write(write, b"x")
                signal.pause()
        os.read(read, 1)
        try:
            with pytest.raises(ConfigError, match=f"is being written by process {child} on"):
                recover(tmp_path / "out")
            assert (tmp_path / "out.replaced").exists()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        recover(tmp_path / "out")
        assert (tmp_path / "out" / "qatc.json").read_text() == OLD


class TestOnlyItsOwn:
    @pytest.mark.parametrize("aside", ["out.writing", "out.replaced"])
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_what_has_no_mark_is_never_deleted(
        self, tmp_path: Path, aside: str, overwrite: bool
    ) -> None:
        """Not even an output of qatc: somebody may have moved it there."""
        (tmp_path / aside).mkdir()
        (tmp_path / aside / "qatc.json").write_text(OLD)
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=f"{aside}, but that is there already and not its"):
            with complete_directory(tmp_path / "out", overwrite=overwrite):
                pytest.fail("the block must not run")
        recover(tmp_path / "out")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
    def test_what_is_no_directory_is_in_the_way_too(self, tmp_path: Path, kind: str) -> None:
        aside = tmp_path / "out.writing"
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "text").write_text("mine")
        if kind == "file":
            aside.write_text("mine")
        else:
            aside.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
        with pytest.raises(ConfigError, match="move it away"):
            refuse_existing(tmp_path / "out", True)
        assert (tmp_path / "mine" / "text").exists() and aside.is_symlink() == (kind != "file")

    @pytest.mark.parametrize(
        "content",
        [
            {"config.json": "{}", "model.safetensors": "weights"},
            {"qatc.json": "cut o"},
            {"qatc.json": "[]"},
            {"qatc.json": '{"format_version": 1}'},
            {"manifest.json": '{"format_version": 1, "name": "of a web page"}'},
            {"sub/qatc.json": OLD},
        ],
    )
    def test_overwrite_replaces_no_other_directory(
        self, tmp_path: Path, content: dict[str, str]
    ) -> None:
        for name, text in content.items():
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).write_text(text)
        before = tree(tmp_path)
        for overwrite in (True, False):
            with pytest.raises(ConfigError, match="is no output of qatc") as raised:
                with complete_directory(tmp_path / "out", overwrite=overwrite):
                    pytest.fail("the block must not run")
            assert "pass --overwrite" not in str(raised.value)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        "content",
        [
            {"qatc.json": OLD},
            {"manifest.json": CORPUS},
            {},
        ],
        ids=["an output", "a corpus", "nothing"],
    )
    def test_overwrite_replaces(self, tmp_path: Path, content: dict[str, str]) -> None:
        (tmp_path / "out").mkdir()
        for name, text in content.items():
            (tmp_path / "out" / name).write_text(text)
        replace(tmp_path / "out")
        assert tree(tmp_path) == NEW


class TestOverlap:
    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "models" / "mine"
        path.mkdir(parents=True)
        (tmp_path / "link").symlink_to(path)
        (tmp_path / "up").symlink_to(tmp_path / "models")
        monkeypatch.chdir(tmp_path)
        return path

    @pytest.mark.parametrize("source", ["{}", "models/mine", "link", "models/../models/mine/"])
    @pytest.mark.parametrize(
        ("place", "how"),
        [
            ("{}", "would replace"),
            ("models/mine", "would replace"),
            ("link", "would replace"),
            ("link/../mine", "would replace"),
            ("models", "would replace"),
            (".", "would replace"),
            ("up", "would replace"),
            ("models/mine/out", "lies in"),
            ("link/deep/out", "lies in"),
            ("models/other/../mine/out", "lies in"),
        ],
    )
    def test_refused(self, model: Path, source: str, place: str, how: str) -> None:
        with pytest.raises(ConfigError, match=f"^the output .* {how} the model .*; choose another"):
            refuse_overlap(
                {"the output": Path(place.format(model))}, {"the model": source.format(model)}
            )

    @pytest.mark.parametrize("place", ["models/mine2", "models/min", "mine", "out/models/mine"])
    def test_fine(self, model: Path, place: str) -> None:
        refuse_overlap({"the output": Path(place)}, {"the model": str(model), "the text": None})

    def test_a_name_on_a_hub_is_no_path(self, tmp_path: Path) -> None:
        place = Path("some/model")
        refuse_overlap({"the output": place / "out"}, {"the model": "some/model"})
        with pytest.raises(ConfigError, match="lies in the corpus some/model"):
            refuse_overlap({"the output": place / "out"}, {"the corpus": place})
