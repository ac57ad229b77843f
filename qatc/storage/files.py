"""Files that are complete or absent, and on the disk: written beside, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
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
    errno.EISDIR,
    errno.EEXIST,
}


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
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one.

    That holds after a crash of the machine as well.
    """
    staging = path.with_name(path.name + ".writing")
    with writing_to(path):
        try:
            with staging.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
            sync(path.parent)
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


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # it opens no directories, and orders their changes
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no directories; what they do is done by then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """:func:`sync` a directory and all that is in it."""
    for path in directory.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(directory)


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


def read_yaml(path: Path, what: str, otherwise: str) -> Mapping[Any, Any]:
    """Read a YAML mapping that a user wrote.

    Args:
        path: the file.
        what: what to call it in errors.
        otherwise: what to say of a file that holds no mapping.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what} {path} is not valid YAML: {reason}") from error
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{what} {path} {otherwise}")
    return plain


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
