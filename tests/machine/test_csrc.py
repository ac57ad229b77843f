"""The C files: what they include decides the name of what is built, and is shipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qatc.kernels import native, row_attention
from qatc.machine import toolchain
from qatc.runtime import program

LIBRARIES = [native.PACKED, row_attention.ATTENTION, program.LIBRARY]


def included(file: Path) -> set[Path]:
    """All that a file includes with quotes, and what that includes."""
    names = re.findall(r'^#include "(.+)"$', file.read_text(), re.MULTILINE)
    direct = {file.parent / name for name in names}
    return direct.union(*map(included, direct))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.sources[0].name)
def test_every_included_file_decides_the_name(
    library: toolchain.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = set(library.sources).union(*map(included, library.sources))
    headers = {file for file in files if file.suffix == ".h"}
    assert files == headers | set(library.sources), "another suffix is neither hashed nor shipped"
    assert {file.parent for file in files} == {toolchain.FOLDER}
    copies = {file: tmp_path / file.name for file in files}
    for file, copied in copies.items():
        copied.write_bytes(file.read_bytes())
    monkeypatch.setattr(toolchain, "FOLDER", tmp_path)
    same = toolchain.Library(tuple(s.name for s in library.sources), library.functions)
    keys = {same._key([])}
    for count, copied in enumerate(copies.values(), 2):
        copied.write_text(copied.read_text() + "\n")
        keys.add(same._key([]))
        assert len(keys) == count, copied.name


def test_every_header_is_of_use() -> None:
    sources = {source for library in LIBRARIES for source in library.sources}
    used = sources.union(*map(included, sources))
    assert {path for path in toolchain.FOLDER.iterdir() if path.is_file()} == used


def test_a_file_holds_one_idea() -> None:
    for path in toolchain.FOLDER.glob("*.[ch]"):
        assert len(path.read_text().splitlines()) <= 350, path.name
