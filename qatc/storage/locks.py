"""Two runs never write to one place: a file lock that ends with the process that holds it.

The lock of ``OUT`` is the file ``OUT.lock`` beside it, held with ``flock``, so that a killed
process leaves no lock behind (its file may stay, and is taken over). The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from qatc.errors import BusyError, ConfigError
from qatc.storage.files import writing_to

_HELD_BY = "locked by qatc, "
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

_held: set[tuple[Path, int]] = set()
"""Places that threads of this process hold, with the thread: it may take them once more."""


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold ``place``, an output or a corpus, for this thread; it may do so more than once.

    Folders above it are made, and those that are still empty at the end are removed.

    Raises:
        BusyError: another run holds it; the message names its process.
        CheckpointError: no lock file can be written there.
    """
    place = place.resolve()
    key = (place, threading.get_ident())
    if key in _held:
        yield
        return
    with _folders_above(place):
        path = place.with_name(place.name + ".lock")
        file = _acquire(path, place)
        _held.add(key)
        try:
            yield
        finally:
            _held.remove(key)
            if sys.platform != "win32":  # where an open file cannot be deleted
                path.unlink(missing_ok=True)
            os.close(file)


@contextlib.contextmanager
def _folders_above(place: Path) -> Iterator[None]:
    missing = [folder for folder in place.parents if not folder.exists()]
    with writing_to(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # something is in it by now
                folder.rmdir()


def _acquire(path: Path, place: Path) -> int:
    """The open and locked file; its holder deletes it, so it may be another one when it is ours."""
    while True:
        with writing_to(place):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, path, place)
            if _is_at(path, file):
                with writing_to(place):
                    os.ftruncate(file, 0)
                    os.write(file, f"{_HELD_BY}{_this_process()}\n".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path, place: Path) -> None:
    content = os.read(file, 1000).decode(errors="replace")
    if content and not content.startswith(_HELD_BY):
        raise ConfigError(
            f"{path} is in the way of the lock of {place}, and is no lock of qatc; move it away, or"
            " choose another place"
        )
    try:
        _try_lock(file)
    except BlockingIOError as error:
        holder = content.removeprefix(_HELD_BY).strip() or "another process"
        raise BusyError(
            f"{place} is being written by {holder}; wait until it has ended, or choose another"
            " place"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"{place} is on a file system without locks; start no second run on it", stacklevel=3
        )


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30
    """A locked byte of a file cannot be read there, so it is one behind the text."""

    def _try_lock(file: int) -> None:
        os.lseek(file, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(errno.EAGAIN, str(error)) from error
        os.lseek(file, 0, os.SEEK_SET)

else:
    import fcntl

    def _try_lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
