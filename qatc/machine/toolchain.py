"""The C compiler of this machine, and what it is remembered to have built, or failed to.

The C files of ``csrc/`` become libraries on first use, for the very processor, and are kept in the
user's cache. What cannot be built is remembered there too, for a day: a compiler without its
headers costs its attempts once, and is tried again after it may have been mended.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from qatc.machine import cpu

FOLDER = Path(__file__).parents[1] / "csrc"

FAILURES_LAST = 24 * 3600
"""Seconds for which what did not work is not tried again."""

_TIMEOUT = 300
"""Seconds after which a compiler hangs; ours take one or two."""

_PASSING = ("No space left", "quota exceeded", "Killed", "memory exhausted", "Cannot allocate")
"""Failures that are not the compiler's, and are not remembered."""

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_OPENMP = (("-fopenmp",), ("-fopenmp-simd",), ())
"""From the best to the least: several cores, vectors of sums, neither."""

_TYPES = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}


def compilers() -> list[tuple[str, ...]]:
    """The C compilers of this machine: that of the environment variable CC, or the usual ones.

    Each is a command with its arguments: CC may be ``ccache gcc`` or ``gcc -m64``.
    """
    try:
        own = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quote that is not closed names no program
        return []
    commands = [own] if own else [["cc"], ["gcc"], ["clang"]]
    return [
        (found, *arguments)
        for program, *arguments in commands
        if (found := shutil.which(program)) is not None
    ]


class Library:
    """Functions in C, built and loaded when they are first asked for.

    Args:
        sources: names of files in ``csrc/``; they may include the headers there.
        functions: the parameters of each function, a letter apiece: ``p`` a pointer, ``n`` a 64-bit
            size, ``i`` an int, ``f`` a float; spaces are for the eye. They return nothing, except
            ``qatc_is_parallel``, an int, which every library may have.
    """

    def __init__(self, sources: tuple[str, ...], functions: Mapping[str, str]) -> None:
        self.sources = tuple(FOLDER / name for name in sources)
        self.functions = dict(functions)
        self.failure: str | None = None
        """Why it could not be built, in the compiler's words, once that was tried."""

    def load(self) -> ctypes.CDLL | None:
        """The functions, or None where they cannot be built; not kept in memory here."""
        self.failure = None
        try:
            return self._load()
        except (OSError, RuntimeError) as error:  # no home, a full or noexec disk
            self.failure = str(error)
            return None

    def _load(self) -> ctypes.CDLL | None:
        commands = compilers()
        if not commands:
            return None
        path = cache_folder() / f"{self.sources[0].stem}-{self._key(commands)}.so"
        if not path.exists():
            self.failure = recall_failure(path)
            if self.failure is not None:
                return None
            self.failure = self._build(commands, path)
            if self.failure is not None:
                if not any(words in self.failure for words in _PASSING):
                    remember_failure(path, self.failure)
                return None
        return self._open(path)

    def _open(self, path: Path) -> ctypes.CDLL:
        loaded = ctypes.CDLL(str(path))
        for name, letters in self.functions.items():
            function = getattr(loaded, name)
            function.restype = None
            function.argtypes = [_TYPES[letter] for letter in letters if letter != " "]
        return loaded

    def _build(self, commands: list[tuple[str, ...]], path: Path) -> str | None:
        """Put the best library that the compilers can build at ``path``, or say why there is none.

        Whether one can be loaded is part of that: a compiler may take -fopenmp where the OpenMP
        library is missing.
        """
        reason = ""
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            for number, (openmp, command) in enumerate(itertools.product(_OPENMP, commands)):
                built = Path(scratch) / f"{number}.so"
                failed = _run([*command, *_FLAGS, *openmp, "-o", str(built), *self._files()])
                if failed is None:
                    try:
                        ctypes.CDLL(str(built))
                    except OSError as error:
                        failed = str(error)
                if failed is None:
                    built.replace(path)
                    return None
                reason = reason or failed
        return reason

    def _files(self) -> list[str]:
        return [str(source) for source in self.sources]

    def _key(self, commands: list[tuple[str, ...]]) -> str:
        """What decides the machine code: the sources, the compilers and the processor."""
        headers = sorted(FOLDER.glob("*.h"))
        flags = repr((_FLAGS, _OPENMP))
        return digest(
            *(path.name.encode() + path.read_bytes() for path in (*self.sources, *headers)),
            *(identity(command) for command in commands),
            " ".join(sorted(cpu.features())).encode(),
            flags.encode(),
        )


def digest(*parts: bytes) -> str:
    """A name for these parts, in this order."""
    whole = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(whole).hexdigest()[:24]


def identity(command: tuple[str, ...]) -> bytes:
    """What tells a compiler from another one, or from another version of it."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, check=False, timeout=_TIMEOUT
        )
        version = done.stdout
    except (OSError, subprocess.TimeoutExpired):
        version = b""
    program = Path(shutil.which(command[0]) or command[0])
    found = program.stat() if program.exists() else None
    stamp = (found.st_size, found.st_mtime_ns) if found else None
    return repr((command, stamp)).encode() + version


def _run(command: list[str]) -> str | None:
    """What a compiler has to say about its failure, in a line; None if it succeeds."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # for _PASSING
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line]
    return (errors or said or [f"{command[0]} ended with status {done.returncode}"])[0]


def recall_failure(path: Path) -> str | None:
    """Why ``path`` could not be made within the last day, or None if nothing is known of it."""
    note = _note(path)
    try:
        age = time.time() - note.stat().st_mtime
        return note.read_text(encoding="utf-8") if 0 <= age < FAILURES_LAST else None
    except OSError:
        return None


def remember_failure(path: Path, reason: str) -> None:
    """Keep in mind that ``path`` cannot be made, and why."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(reason)
    Path(file.name).replace(_note(path))


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".failed")


def cache_folder() -> Path:
    """A folder that nobody else can write to: the user's cache, or one for this process."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "qatc"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
        if own and not found.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or none that can be written to
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="qatc-"))
