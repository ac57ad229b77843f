"""An output that is there already, what lies in a folder, and who holds it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qatc.storage.directories import complete_directory
from qatc.storage.locks import locked

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


@contextmanager
def held_by_another_process(place: Path) -> Iterator[int]:
    """The number of a process that holds ``place`` for as long as the block runs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(place):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # the block ended it
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


NEW = {"out": "/", "out/new.txt": "new", "out/qatc.json": OLD, "out/sub": "/", "out/sub/a": "a"}


def replace(path: Path) -> None:
    with complete_directory(path, overwrite=True) as staging:
        for name, text in (("new.txt", "new"), ("qatc.json", OLD), ("sub/a", "a")):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)
