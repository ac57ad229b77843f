"""C files become libraries once, where nobody else can write, and failures are remembered."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qatc.kernels import native
from qatc.machine import cpu, toolchain
from qatc.machine.toolchain import Library, cache_folder

built = pytest.mark.skipif(not toolchain.compilers(), reason="no C compiler")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qatc"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A library of two files and a header."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "own.h").write_text("#include <stdint.h>\n#define FACTOR 2\n")
    (folder / "one.c").write_text(
        '#include "own.h"\nvoid other(float *x, float by);\n'
        "void one(float *x, int64_t n, float by) {\n"
        "    for (int64_t i = 0; i < n; i++) other(x + i, by);\n}\n"
    )
    (folder / "two.c").write_text('#include "own.h"\nvoid other(float *x, float by) {\n'
                                  "    *x *= by * FACTOR;\n}\n")  # fmt: skip
    monkeypatch.setattr(toolchain, "FOLDER", folder)
    return Library(("one.c", "two.c"), {"one": "p n f"})


def compiler(tmp_path: Path, body: str) -> tuple[Path, Path]:
    """A command that notes every compilation in a log before it runs ``body``."""
    command, log = tmp_path / "own-cc", tmp_path / "log"
    log.touch()
    command.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo own 1.0; exit 0;; esac\n'
        f'echo "$@" >> {log}\n{body}\n'
    )
    command.chmod(0o755)
    return command, log


def attempts(log: Path) -> int:
    return len(log.read_text().splitlines())


@built
def test_built_once_and_kept(home: Path) -> None:
    assert native.PACKED.load() is not None
    (kept,) = home.iterdir()
    written = kept.stat().st_mtime_ns
    assert native.PACKED.load() is not None and kept.stat().st_mtime_ns == written
    assert [kept] == list(home.iterdir())
    assert home.stat().st_mode & 0o077 == 0


@built
def test_several_files_and_all_kinds_of_parameters(own: Library) -> None:
    import ctypes

    loaded = own.load()
    assert loaded is not None
    values = (ctypes.c_float * 3)(1.0, 2.0, 3.0)
    loaded.one(ctypes.addressof(values), 3, 0.25)
    assert list(values) == [0.5, 1.0, 1.5]


@built
@pytest.mark.parametrize("name", ["one.c", "two.c", "own.h"])
def test_every_file_decides_what_is_found_again(own: Library, name: str, home: Path) -> None:
    assert own.load() is not None
    assert own.load() is not None and len(list(home.iterdir())) == 1
    file = toolchain.FOLDER / name
    file.write_text(file.read_text() + "\n")
    assert own.load() is not None
    assert len(list(home.iterdir())) == 2


@built
def test_the_processor_decides_what_is_found_again(
    own: Library, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home on the network is shared by machines of several kinds."""
    assert own.load() is not None
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"another"}))
    assert own.load() is not None
    assert len(list(home.iterdir())) == 2


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(home: Path, mode: int) -> None:
    home.mkdir(parents=True)
    home.chmod(mode)
    other = cache_folder()
    assert other != home
    found = other.stat()
    assert found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700
    home.chmod(0o755)
    assert cache_folder() == home


def test_a_folder_of_someone_else_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == home
    someone = home.stat().st_uid + 1
    monkeypatch.setattr(os, "getuid", lambda: someone)
    assert cache_folder() != home


def test_a_link_to_a_folder_is_not_used(home: Path, tmp_path: Path) -> None:
    home.parent.mkdir(parents=True)
    home.symlink_to(tmp_path, target_is_directory=True)
    assert cache_folder() != home


def test_what_cannot_be_built_is_tried_once(
    own: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, log = compiler(tmp_path, "echo 'own.c: error: no headers' >&2; exit 1")
    monkeypatch.setenv("CC", str(command))
    assert own.load() is None
    first = attempts(log)
    assert 1 <= first <= 3 and own.failure == "own.c: error: no headers"
    again = Library(("one.c", "two.c"), own.functions)
    assert again.load() is None and again.failure == own.failure
    assert attempts(log) == first


def test_a_failure_is_forgotten_after_a_day_and_with_another_compiler(
    own: Library, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, log = compiler(tmp_path, "exit 1")
    monkeypatch.setenv("CC", str(command))
    assert own.load() is None
    first = attempts(log)
    (note,) = home.iterdir()
    long_ago = note.stat().st_mtime - toolchain.FAILURES_LAST - 60
    os.utime(note, (long_ago, long_ago))
    assert own.load() is None and attempts(log) == 2 * first
    command.write_text(command.read_text().replace("own 1.0", "own 1.1"))
    assert own.load() is None and attempts(log) == 3 * first


@pytest.mark.parametrize("words", ["No space left on device", "Killed signal terminated cc1"])
def test_a_failure_of_the_machine_is_not_remembered(
    own: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    command, log = compiler(tmp_path, f"echo 'error: {words}' >&2; exit 1")
    monkeypatch.setenv("CC", str(command))
    assert own.load() is None
    first = attempts(log)
    assert own.load() is None and attempts(log) == 2 * first


@built
def test_flags_that_fail_are_not_tried_again(
    own: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where OpenMP is missing: what is built without it is found at once by the next process."""
    real = " ".join(toolchain.compilers()[0])
    command, log = compiler(tmp_path, f'case "$*" in *openmp*) exit 1;; esac\nexec {real} "$@"')
    monkeypatch.setenv("CC", str(command))
    assert own.load() is not None
    first = attempts(log)
    assert own.load() is not None and attempts(log) == first


@built
def test_a_library_that_does_not_load_is_no_success(
    own: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler may take -fopenmp where the library for it is missing."""
    real = " ".join(toolchain.compilers()[0])
    lame = 'for o; do case "$o" in *.so) echo no > "$o";; esac; done'
    command, _ = compiler(
        tmp_path, f'case "$*" in *-fopenmp\\ *) {lame}; exit 0;; esac\nexec {real} "$@"'
    )
    monkeypatch.setenv("CC", str(command))
    assert own.load() is not None


@built
def test_a_compiler_may_be_a_command_with_arguments(
    own: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    real = " ".join(toolchain.compilers()[0])
    monkeypatch.setenv("CC", f"{wrapper} {real}")
    assert toolchain.compilers() == [(str(wrapper), *real.split())]
    assert own.load() is not None


def test_no_compiler(own: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("/nowhere/cc", "'unclosed"):
        monkeypatch.setenv("CC", value)
        assert toolchain.compilers() == []
        assert own.load() is None and own.failure is None
