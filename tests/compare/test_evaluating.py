"""Cells are measured on further texts and on tasks, and their model in full precision once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qatc.compare.grid import Cell
from qatc.compare.results import write_results
from qatc.compare.running import Places, failures, run_cells
from qatc.compare.summary import cells_of
from qatc.errors import BUSY
from qatc.storage.files import read_json
from tests.compare.conftest import Quantizer, operations

ASKED = (
    {"text": "texts/wiki.txt", "length": 64},
    {"tasks": ["one", "two"], "limit": 3, "runtime": "packed"},
)


@pytest.fixture
def asked(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, evaluations=ASKED) for cell in cells]


def run(cells: list[Cell], out: Path, command: Quantizer | object) -> None:
    run_cells(cells, out, command=command, operations=operations, pause=0.01)  # type: ignore[arg-type]


def test_each_is_measured_and_full_precision_once(
    asked: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(asked, tmp_path, quantizer)
    on_text, on_tasks = ["--text", "texts/wiki.txt", "--length", "64"], ["--tasks", "one,two"]
    on_tasks += ["--limit", "3", "--runtime", "packed"]
    outputs = [str(Places(tmp_path).output(cell)) for cell in asked]
    assert quantizer.evaluated == [
        (outputs[0], [*on_text, "--teacher", "m", "--json"]),
        ("m", [*on_text, "--json"]),
        (outputs[0], [*on_tasks, "--json"]),
        ("m", [*on_tasks, "--json"]),
        (outputs[1], [*on_text, "--teacher", "m", "--json"]),
        (outputs[1], [*on_tasks, "--json"]),
    ]
    record = read_json(Places(tmp_path).record(asked[0]))
    assert record["figures"].keys() == {"generated", "wiki.txt"}
    wiki = record["figures"]["wiki.txt"]
    assert wiki["full precision"]["perplexity"] == 10 and wiki["QAT"]["perplexity"] == 11
    assert wiki["QAT"]["kl"] == 0.2
    run(asked, tmp_path, quantizer)
    assert len(quantizer.evaluated) == 6 and len(quantizer.runs) == 2


def test_the_tables_have_them(asked: list[Cell], quantizer: Quantizer, tmp_path: Path) -> None:
    run(asked, tmp_path, quantizer)
    rows = write_results(asked, tmp_path)
    assert rows is not None and [row.text for row in rows] == ["generated", "wiki.txt"] * 2
    header, first, second, *_ = cells_of(rows)
    column = header.index("acc %")
    assert header[column - 1] == "full precision acc %"
    assert first[column - 1 : column + 1] == second[column - 1 : column + 1] == ["50.00", "40.00"]
    assert second[header.index("perplexity")] == "11.000" and second[header.index("RTN")] == ""
    page = (tmp_path / "compare.html").read_text()
    for up in ("KL", "Perplexity", "Accuracy"):
        assert f"{up} against size" in page and f"{up} against bit operations" in page


def test_without_tasks_there_is_no_column(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(cells, tmp_path, quantizer)
    rows = write_results(cells, tmp_path)
    assert rows is not None and not [name for name in cells_of(rows)[0] if "acc" in name]
    assert "Accuracy against" not in (tmp_path / "compare.html").read_text()


def test_a_failed_evaluation_alone_is_tried_again(
    asked: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    def fails(arguments: Sequence[str], out: Path, log: Path) -> int:
        if "--tasks" not in arguments:
            return quantizer(arguments, out, log)
        out.write_text("half of")
        log.write_text("error: lm-eval has no task 'one'\n")
        return 2

    run(asked[:1], tmp_path, fails)
    assert failures(asked[:1], tmp_path) == {asked[0].name: "lm-eval has no task 'one'"}
    assert (Places(tmp_path).output(asked[0]) / "model.safetensors").exists()
    run(asked[:1], tmp_path, quantizer)
    assert len(quantizer.runs) == 1 and len(quantizer.evaluated) == 4
    assert failures(asked[:1], tmp_path) == {}
    assert read_json(Places(tmp_path).record(asked[0]))["accuracy"]


def test_a_model_that_another_process_measures_is_waited_for(
    asked: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    busy = iter([BUSY, 0])

    def at_first_busy(arguments: Sequence[str], out: Path, log: Path) -> int:
        if arguments[:2] == ["evaluate", "m"] and next(busy, 0):
            log.write_text("error: x is being written by process 7; wait\n")
            return BUSY
        return quantizer(arguments, out, log)

    run(asked[:1], tmp_path, at_first_busy)
    assert failures(asked, tmp_path) == {} and len(quantizer.runs) == 1
