"""Files and directories that are complete or absent: written beside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatc.errors import CheckpointError, ConfigError, DataError

_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.ENOENT,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.ENAMETOOLONG,
}


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ``ConfigError`` if the output ``path`` is there already and may not be replaced."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # safetensors would find that out, at the very end
        raise ConfigError(
            f"the output {path} has a name that is not UTF-8; choose another, or set a UTF-8 locale"
            " such as LC_ALL=C.UTF-8"
        ) from error
    if path.name in ("", ".."):
        raise ConfigError(f"the output {path} is not a name for a new directory; choose another")
    if path.exists() and not overwrite:
        raise ConfigError(
            f"the output {path} exists; choose another --output, or pass --overwrite to replace it"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the output {path} exists and is not a directory")


@contextlib.contextmanager
def complete_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh directory beside ``path`` that takes its place when the block succeeds.

    An existing ``path`` is refused unless ``overwrite``; then it is replaced only at the very end.
    When the block raises, nothing is left behind and an existing ``path`` is as it was.

    Raises:
        ConfigError: ``path`` exists and ``overwrite`` is false.
        CheckpointError: the disk is full or not writable.
    """
    refuse_existing(path, overwrite)
    path = path.resolve()
    staging = path.with_name(path.name + ".writing")
    try:
        with writing_to(path):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            _replace_directory(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _replace_directory(new: Path, path: Path) -> None:
    old = path.with_name(path.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn a failing disk into an error that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another"
            " place, then run the same command again"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one."""
    staging = path.with_name(path.name + ".writing")
    with writing_to(path):
        try:
            with staging.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


def to_json(value: Any) -> str:
    """``value`` as indented JSON that every parser reads: what is not a finite number is null.

    JSON has neither NaN nor infinity, though Python writes both.
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as :func:`to_json` has it, atomically."""
    write_atomically(path, (to_json(value) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one raises ``DataError``."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # editors may leave a BOM
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); was it cut off?") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
