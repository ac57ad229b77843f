"""The documentation says what is: messages, options and files that it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from qatc.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

FOREIGN = {
    "--cache-type-k", "--cache-type-v", "--cases", "--ctx-size",
    "--extra-index-url", "--held-out", "--help", "--index-url", "--kv-cache-dtype",
    "--linear-backend", "--local-dir", "--nnodes",
    "--no-python", "--no-speeds",
    "--nproc-per-node", "--parts", "--rdzv-endpoint", "--sample", "--shapes", "--threads", "--tune",
}  # fmt: skip
"""Options of pip, torchrun, vLLM, llama.cpp and the benchmarks."""


def strings() -> list[str]:
    """Every constant string of the sources, parts of f-strings by themselves."""
    sources = [p for folder in ("qatc", "passes", "cli") for p in (ROOT / folder).rglob("*.py")]
    nodes = (node for p in sources for node in ast.walk(ast.parse(p.read_text(encoding="utf-8"))))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def messages() -> list[str]:
    """The messages that the troubleshooting page quotes, each in one line."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"(?:^> .*\n)+", text, re.MULTILINE)
    return [" ".join(line[2:] for line in quote.splitlines()) for quote in quotes]


def test_quoted_messages_are_those_of_the_code() -> None:
    known, quoted = strings(), messages()
    assert len(quoted) > 50
    missing = [
        (part.strip(), message)
        for message in quoted
        for part in message.split("…")
        if not any(part.strip() in text for text in known)
    ]
    assert not missing


def test_options_exist() -> None:
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {o for c in commands for p in c.params for o in (*p.opts, *p.secondary_opts)}
    text = "\n".join(path.read_text(encoding="utf-8") for path in READ)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))
    assert named - options - FOREIGN == set()


@pytest.mark.parametrize("path", READ, ids=lambda p: p.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?:benchmarks/results|tests|examples)/[\w/.-]+\.(?:json|py)", text)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing + [link for link in links if not (path.parent / link).exists()]


def test_every_result_is_on_the_page() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    results = (ROOT / "benchmarks/results").glob("*.json")
    assert not [path.name for path in results if f"`{path.name}`" not in page]


def test_examples_are_shown() -> None:
    """A formatter that takes a marker for Python puts spaces into it, and nothing is shown."""
    page = (ROOT / "docs/guide/python.md").read_text(encoding="utf-8")
    shown = {*re.findall(r'^--8<-- "examples/([\w.]+)"$', page, re.M)}
    assert shown == {path.name for path in (ROOT / "examples").glob("*.py")} - {
        "train_demo_model.py"  # which made the model beside them
    }
