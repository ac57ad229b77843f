"""Directories that are complete or absent, and whose place was nobody else's.

A directory is written beside its place, as ``OUT.writing``, and takes it in the end. What it
replaces is renamed to ``OUT.replaced`` first, and deleted last. Whoever comes after a crash settles
what it left: before the first rename the old directory stands, after it the new one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qatc.errors import ConfigError
from qatc.storage import markers
from qatc.storage.files import sync, sync_tree, writing_to
from qatc.storage.locks import locked
from qatc.storage.markers import Mark

EXPORT_FILE = "qatc-export.json"
"""What an export that is no output of qatc any more is known by."""


def is_replaceable(path: Path) -> bool:
    """Whether ``--overwrite`` may have it: an output or a corpus of qatc, or an empty directory."""
    return (
        _holds(path / "qatc.json", "format_version", "recipe")
        or _holds(path / EXPORT_FILE, "format", "recipe")
        or _holds(path / "manifest.json", "format_version", "tokenizer_fingerprint")
        or markers.is_empty(path)
    )


def _holds(file: Path, *keys: str) -> bool:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and plain.keys() >= set(keys)


def refuse_existing(
    path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = is_replaceable
) -> None:
    """Raise ``ConfigError`` if ``path`` is there already and may not be replaced.

    What an interrupted replacement left is settled first.

    Args:
        path: where a directory is to be written.
        overwrite: whether one that is there may be replaced, if
        replaceable: says so.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # safetensors would find that out, at the very end
        raise ConfigError(
            f"the output {path} has a name that is not UTF-8; choose another, or set a UTF-8 locale"
            " such as LC_ALL=C.UTF-8"
        ) from error
    if path.name in ("", ".."):
        raise ConfigError(f"the output {path} is not a name for a new directory; choose another")
    for aside in _beside(path.resolve()):
        refuse_foreign(aside)
    recover(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"the output {path} exists and is not a directory")
    if not replaceable(path):
        raise ConfigError(
            f"the output {path} exists and is no output of qatc, which is all that --overwrite"
            " replaces; choose another --output, or move it away"
        )
    if not overwrite:
        raise ConfigError(
            f"the output {path} exists; choose another --output, or pass --overwrite to replace it"
        )


def refuse_foreign(path: Path) -> None:
    """Raise ``ConfigError`` if there is something at ``path`` that qatc did not put there."""
    if (path.exists() or path.is_symlink()) and not markers.is_ours(path):
        raise ConfigError(
            f"qatc would work in {path}, but that is there already and not its own; move it away,"
            " or choose another --output"
        )


def refuse_overlap(places: Mapping[str, Path], sources: Mapping[str, str | Path | None]) -> None:
    """Raise ``ConfigError`` if a place to be written is, holds or lies in something to be read.

    Args:
        places: directories by what they are to the user, such as ``the output``.
        sources: files and directories by what they are, such as ``the model``. Text that is no
            path, such as a name on a hub, is passed over.
    """
    for title, place in places.items():
        for name, given in sources.items():
            if given is None or (isinstance(given, str) and not Path(given).exists()):
                continue
            source = Path(given)
            replaces = _lies_in(source, place)
            if replaces or _lies_in(place, source):
                raise ConfigError(
                    f"{title} {place} {'would replace' if replaces else 'lies in'} {name} {given};"
                    " choose another place"
                )


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether ``inner``, which need not exist, is ``outer`` or below it, whatever leads there."""
    inner = inner.resolve()
    return any(_same(folder, outer) for folder in (inner, *inner.parents))


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


@contextlib.contextmanager
def complete_directory(
    path: Path,
    *,
    overwrite: bool = False,
    replaceable: Callable[[Path], bool] = is_replaceable,
) -> Iterator[Path]:
    """Yield a fresh directory beside ``path`` that takes its place when the block succeeds.

    An existing ``path`` is refused unless ``overwrite``; then it is replaced only at the very end.
    When the block raises, nothing is left behind and an existing ``path`` is as it was. All is on
    the disk before it takes its place. Nobody else may write to ``path`` meanwhile; see
    :func:`qatc.storage.locks.locked`.

    Raises:
        ConfigError: ``path`` exists, and ``overwrite`` is false or it is not ``replaceable``.
        CheckpointError: the disk is full or not writable.
    """
    refuse_existing(path, overwrite, replaceable)
    path = path.resolve()
    staging, replaced = _beside(path)
    with writing_to(path):
        for aside in (staging, replaced):
            markers.remove(aside)
        try:
            staging.mkdir(parents=True)
            markers.put(staging, Mark.WRITING)
            yield staging
            sync_tree(staging)
            markers.change(staging, Mark.COMPLETE)
            sync(staging)
            if path.exists():
                markers.put(path, Mark.REPLACED)
                sync(path)
                path.rename(replaced)
                sync(path.parent)
            staging.rename(path)
            sync(path.parent)
        except OSError:
            if markers.mark_of(staging) is not None:  # it cannot take its place
                markers.change(staging, Mark.REMOVING)
            _settle(path)
            raise
        except BaseException:
            _settle(path)
            raise
        _settle(path)


def recover(path: Path) -> None:
    """Settle what an interrupted replacement of ``path`` left, if anything.

    Raises:
        ConfigError: another process is replacing it right now.
    """
    path = path.resolve()
    if markers.mark_of(path) is None and not any(map(markers.is_ours, _beside(path))):
        return
    with locked(path), writing_to(path):
        _settle(path)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".writing"), path.with_name(path.name + ".replaced")


def _settle(path: Path) -> None:
    """Let the old or the new directory stand at ``path``, and nothing beside it."""
    staging, replaced = _beside(path)
    if not path.exists() and markers.mark_of(replaced) is Mark.REPLACED:
        whole = markers.mark_of(staging) is Mark.COMPLETE
        (staging if whole else replaced).rename(path)
        sync(path.parent)
    gone = [replaced, staging]
    if markers.mark_of(path) is Mark.REMOVING:
        gone.append(path)
    elif path.exists():
        markers.strip(path)
    for aside in gone:
        if aside.exists() and markers.is_ours(aside):
            # A marked directory that cannot be deleted now is deleted by the next run.
            with contextlib.suppress(OSError):
                markers.remove(aside)
