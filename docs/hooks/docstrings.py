"""Docstrings as Markdown: Sphinx's roles become code, its simple tables become tables of Markdown.

Parameters that share a description (``device, dtype: see load``) get one each. A griffe extension,
see ``mkdocs.yml``. It edits what griffe has read, and no source.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", re.MULTILINE)
_RULE = re.compile(r"\s*=+(?: +=+)+\s*")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for modules, classes, functions and attributes."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _tables(_SHARED.sub(_one_each, text))


def _one_each(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}{text}" for name in names.split(", "))


def _tables(text: str) -> str:
    """Replace every table between rules of ``=``; its first line is the header."""
    lines: list[str] = []
    block: list[str] = []
    starts: list[int] = []
    for line in text.splitlines():
        if not _RULE.fullmatch(line):
            (block if starts else lines).append(line)
        elif not starts:
            starts = [match.start() for match in re.finditer("=+", line)]
        elif len(block) == 1:
            block.append("|".join("---" for _ in starts))
        else:
            cells = [_cells(row, starts) if i != 1 else row for i, row in enumerate(block)]
            lines += [f"|{row}|" for row in cells]
            block, starts = [], []
    return "\n".join(lines)


def _cells(row: str, starts: list[int]) -> str:
    ends = [*starts[1:], None]
    parts = [row[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return "|".join(part.replace("|", "\\|") for part in parts)
