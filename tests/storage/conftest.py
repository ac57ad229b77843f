"""An output that is there already, and what lies in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatc.storage.directories import complete_directory

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


NEW = {"out": "/", "out/new.txt": "new", "out/qatc.json": OLD, "out/sub": "/", "out/sub/a": "a"}


def replace(path: Path) -> None:
    with complete_directory(path, overwrite=True) as staging:
        for name, text in (("new.txt", "new"), ("qatc.json", OLD), ("sub/a", "a")):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)
