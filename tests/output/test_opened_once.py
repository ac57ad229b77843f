"""Whoever works on an output opens it once, and every file of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from qatc.evaluation.parity import verify
from qatc.export import export
from qatc.output import load_codes, load_reference, open_output, reading
from qatc.recipe.recipe import Recipe
from qatc.runtime.model import load
from tests.conftest import make_output

OWN = ("qatc.json", "config.json", "generation_config.json", "model.safetensors")

_watched: list[tuple[Path, Counter[str]]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], (str, Path)):
        directory, found = _watched[-1]
        if Path(arguments[0]).parent == directory:
            found[Path(arguments[0]).name] += 1


sys.addaudithook(_note)  # there is no way to take one away


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("once") / "out", Recipe.from_bits("4-8-4"))


@pytest.mark.parametrize(
    ("work", "files"),
    [
        (lambda path, _: load(path, compile=False), OWN),
        (lambda path, _: load_reference(path), OWN),
        (lambda path, _: verify(path, reload=False), OWN),
        (lambda path, other: export(path, other), OWN),
        (lambda path, _: load_codes(path), ("qatc.json", "model.safetensors")),
    ],
    ids=["load", "load_reference", "verify", "export", "load_codes"],
)
def test_every_file_is_opened_once(
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Path, Path], Any],
    files: tuple[str, ...],
) -> None:
    found: Counter[str] = Counter()

    def opened(path: Path, framework: str) -> Any:  # which no audit hook hears of
        found[Path(path).name] += 1
        return safetensors.safe_open(path, framework)

    monkeypatch.setattr(reading, "safe_open", opened)
    _watched.append((output, found))
    try:
        work(output, tmp_path / "other")
    finally:
        _watched.pop()
    if (tmp_path / "other").exists():  # an export copies it, as it is
        found["generation_config.json"] -= 1
    assert {name: found[name] for name in OWN if found[name]} == dict.fromkeys(files, 1)


def test_an_opened_output_serves_several(output: Path) -> None:
    model = open_output(output)
    (output / "qatc.json").rename(output / "aside")
    try:
        assert verify(model, reload=False).passed
        assert load(model, compile=False) is not load(model, compile=False)
        assert load_reference(model).config.hidden_size == model.config.hidden_size
    finally:
        (output / "aside").rename(output / "qatc.json")
