"""What a name that a user gives is: a model, an output of qatc, or a corpus."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from qatc.errors import ConfigError
from qatc.storage.directories import recover
from qatc.storage.markers import Mark, is_empty, mark_of


class Kind(Enum):
    """What :func:`kind_of` found; the value is the file that tells it."""

    OUTPUT = "qatc.json"
    MODEL = "config.json"
    CORPUS = "manifest.json"


_EXPECTED = "give a model (directory or hub name), an output of qatc quantize, or a corpus"


def kind_of(name: str) -> Kind:
    """What is there; a name that is nowhere on the disk may be one of a hub, and so a model.

    Raises:
        ConfigError: it is a file, an unfinished run or a directory of something else.
    """
    path = Path(name)
    if not os.path.lexists(path):  # unlike Path.exists, it raises for no name
        recover(path)
        if not os.path.lexists(path):
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise ConfigError(f"there is no {name}; {_EXPECTED}")
            return Kind.MODEL
    if not path.is_dir():
        if _tells(path.parent) is not None:
            raise ConfigError(f"{name} is a file; give its directory, {path.parent}")
        raise ConfigError(f"{name} is not a directory; {_EXPECTED}")
    if mark_of(path) is Mark.UNFINISHED:
        raise ConfigError(
            f"{name} is the state of an unfinished run; the same qatc quantize command goes on"
            f" with it and writes {path.resolve().with_suffix('').name}"
        )
    found = _tells(path)
    if found is None and (path / "adapter_config.json").exists():
        return Kind.MODEL  # which is refused as what it is
    if found is None:
        held = "is empty" if is_empty(path) else f"has no {', '.join(k.value for k in Kind)}"
        raise ConfigError(f"the directory {name} {held}; {_EXPECTED}")
    return found


def _tells(directory: Path) -> Kind | None:
    return next((kind for kind in Kind if (directory / kind.value).is_file()), None)
