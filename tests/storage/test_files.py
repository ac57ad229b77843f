from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.storage import files
from qatc.storage.directories import refuse_existing

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def tree(folder: Path) -> dict[str, str]:
    """Everything in a folder: relative path to text, ``"/"`` for a folder."""
    return {
        str(path.relative_to(folder)): "/" if path.is_dir() else path.read_text()
        for path in folder.rglob("*")
    }


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

    def test_the_new_name_is_on_the_disk_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        fsync, replace = os.fsync, os.replace

        def syncing(descriptor: int) -> None:
            kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            events.append(f"sync {kind}")
            fsync(descriptor)

        def replacing(source: Any, target: Any) -> None:
            events.append("rename")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "replace", replacing)
        files.write_atomically(tmp_path / "file", b"new")
        assert events == ["sync file", "rename", "sync directory"]

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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_directory_may_be_one_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        files.sync(tmp_path / "file")
    with pytest.raises(OSError) if number == errno.EIO else contextlib.nullcontext():
        files.sync(tmp_path)


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
        refuse_existing(tmp_path / "out\udcff", False)
