"""Marks by which qatc knows the directories that it works in from those of somebody else.

A directory that qatc makes for a while (``OUT.partial``, ``OUT.writing``), or moves aside
(``OUT.replaced``), holds an empty file whose name says what it is. Only a directory with such a
mark is ever deleted. To change a mark is to rename that file, which is atomic and needs no space
on a full disk.
"""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path


class Mark(Enum):
    """What a directory is to qatc; the value is the name of the file that says so."""

    UNFINISHED = ".qatc-unfinished"
    """The state of a run that can be gone on with."""
    WRITING = ".qatc-writing"
    """Half written."""
    COMPLETE = ".qatc-complete"
    """Written and on the disk; about to take its place."""
    REPLACED = ".qatc-replaced"
    """What stood in that place before."""
    REMOVING = ".qatc-removing"
    """Being deleted: worth nothing any more."""


NAMES = frozenset(mark.value for mark in Mark)


def put(directory: Path, mark: Mark) -> None:
    """Give a directory without a mark this one."""
    (directory / mark.value).touch()


def change(directory: Path, mark: Mark) -> None:
    """Turn the mark of a directory into another one."""
    found = mark_of(directory)
    assert found is not None, f"{directory} has no mark"
    (directory / found.value).replace(directory / mark.value)


def strip(directory: Path) -> None:
    """Take the mark off a directory, if it has one."""
    for name in NAMES:
        (directory / name).unlink(missing_ok=True)


def mark_of(directory: Path) -> Mark | None:
    """The mark of a directory; None if it has none or is not there."""
    return next((mark for mark in Mark if (directory / mark.value).exists()), None)


def is_ours(directory: Path) -> bool:
    """Whether it may be deleted: it has a mark, or there is nothing in it."""
    return mark_of(directory) is not None or is_empty(directory)


def is_empty(path: Path) -> bool:
    """Whether there is a directory with nothing in it."""
    return path.is_dir() and next(path.iterdir(), None) is None


def remove(directory: Path) -> None:
    """Delete a directory that is ours, if it is there.

    Its mark is changed first, so that nothing goes on with what is left of it, and goes last, so
    that what is left of it can be deleted later.
    """
    if not directory.exists():
        return
    assert is_ours(directory), f"{directory} is not ours"
    if mark_of(directory) is not None:
        change(directory, Mark.REMOVING)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in NAMES:
            path.unlink()
    strip(directory)
    directory.rmdir()
