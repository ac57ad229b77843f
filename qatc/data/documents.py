"""Text files: plain ones, and JSON lines with a document in each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatc.errors import ConfigError


def is_documents(path: Path) -> bool:
    """Whether a file has a document in each line, which its name says: ``.jsonl``."""
    return path.suffix.lower() == ".jsonl"


def read_text(path: Path) -> str:
    """A text without its byte-order mark; documents are joined by empty lines.

    Raises:
        ConfigError: it cannot be read.
    """
    if is_documents(path):
        return "\n\n".join(documents(path))
    with _readable(path):
        return path.read_text(encoding="utf-8-sig")


def documents(path: Path) -> Iterator[str]:
    """The field ``text`` of every line.

    Raises:
        ConfigError: the file cannot be read, or a line has no such field.
    """
    with _readable(path), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can spell half of a surrogate pair, a tokenizer not
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"line {number} of the text {path} is no document: each line of a .jsonl file"
                    f' has to be an object such as {{"text": "..."}} ({error})'
                ) from error
            yield text


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What keeps a text from being read in the block raises ``ConfigError``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text {path} is not UTF-8: {error.reason}") from error
