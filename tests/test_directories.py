from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatc.directories import complete_directory
from qatc.errors import CheckpointError, ConfigError

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
        for left in ("out.writing", "out.replaced"):
            (tmp_path / left).mkdir()
            (tmp_path / left / "stale.txt").write_text("stale")
        with complete_directory(output, overwrite=True) as staging:
            (staging / "new.txt").write_text("new")
        assert tree(tmp_path) == {"out": "/", "out/new.txt": "new"}

    def test_a_link_can_be_replaced_again_and_again(self, tmp_path: Path, output: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(output)
        for text in ("first", "second"):
            with complete_directory(link, overwrite=True) as staging:
                (staging / "new.txt").write_text(text)
            assert tree(link) == {"new.txt": text}
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
