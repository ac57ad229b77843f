from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc import files
from qatc.errors import CheckpointError, ConfigError, DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


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
    (path / "old.txt").write_text("old")
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
        with files.complete_directory(path) as staging:
            (staging / "a.txt").write_text("a")
            assert not path.exists()
            assert staging.parent == path.parent, "a rename must not cross file systems"
        assert tree(tmp_path / "deep") == {"out": "/", "out/a.txt": "a"}

    def test_replaces_the_old_one_at_the_end(self, tmp_path: Path, output: Path) -> None:
        with files.complete_directory(output, overwrite=True) as staging:
            (staging / "new.txt").write_text("new")
            assert tree(output) == {"old.txt": "old"}
        assert tree(tmp_path) == {"out": "/", "out/new.txt": "new"}

    def test_refuses_an_existing_one(self, tmp_path: Path, output: Path) -> None:
        with pytest.raises(ConfigError, match=r"pass --overwrite") as raised:
            with files.complete_directory(output):
                pytest.fail("the block must not run")
        assert str(output) in str(raised.value)
        assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}

    def test_refuses_a_file_even_with_overwrite(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.write_text("mine")
        with pytest.raises(ConfigError, match="not a directory"):
            with files.complete_directory(path, overwrite=True):
                pytest.fail("the block must not run")
        assert tree(tmp_path) == {"out": "mine"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_failure_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error):
            with files.complete_directory(tmp_path / "out") as staging:
                (staging / "half.txt").write_text("half")
                raise error
        assert tree(tmp_path) == {}

    def test_failure_keeps_the_old_one(self, tmp_path: Path, output: Path) -> None:
        with pytest.raises(RuntimeError):
            with files.complete_directory(output, overwrite=True) as staging:
                (staging / "half.txt").write_text("half")
                raise RuntimeError
        assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}

    @pytest.mark.parametrize("fails", ["out", "out.writing"])
    def test_failing_swap_keeps_the_old_one(
        self, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        fail_rename_of(monkeypatch, fails)
        with pytest.raises(CheckpointError):
            with files.complete_directory(output, overwrite=True) as staging:
                (staging / "new.txt").write_text("new")
        monkeypatch.undo()
        assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}

    def test_clears_what_a_killed_run_left(self, tmp_path: Path, output: Path) -> None:
        for left in ("out.writing", "out.replaced"):
            (tmp_path / left).mkdir()
            (tmp_path / left / "stale.txt").write_text("stale")
        with files.complete_directory(output, overwrite=True) as staging:
            (staging / "new.txt").write_text("new")
        assert tree(tmp_path) == {"out": "/", "out/new.txt": "new"}

    def test_a_link_can_be_replaced_again_and_again(self, tmp_path: Path, output: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(output)
        for text in ("first", "second"):
            with files.complete_directory(link, overwrite=True) as staging:
                (staging / "new.txt").write_text(text)
            assert tree(link) == {"new.txt": text}
        assert not list(tmp_path.glob("link.*"))

    @pytest.mark.parametrize("here", [".", ".."])
    def test_a_place_without_a_name_of_its_own_is_refused(
        self, output: Path, monkeypatch: pytest.MonkeyPatch, here: str
    ) -> None:
        monkeypatch.chdir(output)
        with pytest.raises(ConfigError):
            with files.complete_directory(Path(here), overwrite=True):
                pytest.fail("the block must not run")

    def test_full_disk_is_a_user_error_that_names_the_output(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        with pytest.raises(CheckpointError) as raised:
            with files.complete_directory(path):
                raise OSError(28, "No space left on device")
        assert str(raised.value).startswith(f"cannot write {path}: No space left on device;")
        assert tree(tmp_path) == {}


class TestWriteAtomically:
    @given(content=st.binary())
    def test_holds_the_content(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("write") / "file"
        for _ in range(2):
            files.write_atomically(path, content)
            assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == ["file"]

    def test_failure_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def fail(descriptor: int) -> Iterator[None]:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            files.write_atomically(path, b"new")
        assert tree(tmp_path) == {"file": "old"}

    def test_missing_folder_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "absent" / "file"
        with pytest.raises(CheckpointError) as raised:
            files.write_atomically(path, b"")
        assert str(path) in str(raised.value)


class TestJson:
    @given(value=json_values)
    def test_round_trip(self, tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
        path = tmp_path_factory.mktemp("json") / "value.json"
        files.write_json(path, value)
        assert files.read_json(path) == value
        assert path.read_bytes().endswith(b"\n")

    @pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\xff\xfe\x00"])
    def test_damaged_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "value.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match="was it cut off") as raised:
            files.read_json(path)
        assert str(path) in str(raised.value)

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "value.json"
        with pytest.raises(DataError) as raised:
            files.read_json(path)
        assert str(raised.value) == f"cannot read {path}: No such file or directory"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * 8192
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


def test_json_is_what_every_parser_reads(tmp_path: Path) -> None:
    def refuses(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": True, "e": None}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    wanted = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": True, "e": None}
    assert json.loads(text, parse_constant=refuses) == wanted


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_json(tmp_path / "x.json") == {}


def test_an_output_whose_name_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        files.refuse_existing(tmp_path / "out\udcff", False)
