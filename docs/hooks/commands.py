"""The options of every command, read off the commands themselves.

A hook of mkdocs: a line ``<!-- options of NAME -->`` gives way to a table. No torch is loaded.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from qatc.cli.main import app

_MARK = re.compile(r"^<!-- options of ([a-z-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs with the text of every page."""
    return _MARK.sub(lambda found: _table(found[1]), markdown)


def _table(name: str) -> str:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    rows = ["| | what | default |", "|---|---|---|"]
    for option in command.params:
        text, default = option.help or "", _default(option)
        if default == "" and (found := re.search(r" ?Default: (.*)$", text)):
            text, default = text[: found.start()], found[1].rstrip(".")
        rows.append(f"| {_names(option)} | {text} | {default} |")
    return "\n".join(rows)


def _names(option: Any) -> str:
    if option.param_type_name == "argument":
        return f"`{option.name.upper()}`"
    return " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    default = option.default
    if default is None or default is False or not getattr(option, "show_default", True):
        return ""
    return f"`{option.opts[0] if default is True else default}`"
