"""Directories that are written: complete or absent, and in the place of nothing but outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatc.errors import CheckpointError, ConfigError
from qatc.storage import markers
from qatc.storage.directories import complete_directory, recover, refuse_existing, refuse_overlap
from qatc.storage.markers import Mark
from tests.storage.conftest import NEW, OLD, replace, tree

CORPUS = '{"format_version": 1, "tokenizer_fingerprint": ""}'


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
