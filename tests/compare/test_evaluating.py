"""Cells are measured on further texts and on tasks, and their model in full precision once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qatc.compare.evaluating import _taken_over
from qatc.compare.grid import Cell
from qatc.compare.results import write_results
from qatc.compare.running import Places, failures, records, run_cells
from qatc.compare.summary import _accuracy, cells_of
from qatc.errors import BUSY
from tests.compare.conftest import Quantizer, operations

TASKS = {"tasks": ["one", "two"], "limit": 3, "runtime": "packed"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    place = tmp_path / "texts" / "wiki.txt"
    place.parent.mkdir()
    place.write_text("some text")
    return place


@pytest.fixture
def asked(cells: list[Cell], text: Path) -> list[Cell]:
    both = ({"text": str(text), "length": 64}, TASKS)
    return [replace(cell, evaluations=both) for cell in cells]


def run(cells: list[Cell], out: Path, command: Quantizer | object) -> None:
    run_cells(cells, out, command=command, operations=operations, pause=0.01)  # type: ignore[arg-type]


def test_each_is_measured_and_full_precision_once(
    asked: list[Cell], text: Path, quantizer: Quantizer, tmp_path: Path
) -> None:
    run(asked, tmp_path, quantizer)
    on_text, on_tasks = ["--text", str(text), "--length", "64"], ["--tasks", "one,two"]
    on_tasks += ["--limit", "3"]
    packed = [*on_tasks, "--runtime", "packed"]  # a model in full precision is not packed
    outputs = [str(Places(tmp_path).output(cell)) for cell in asked]
    assert quantizer.evaluated == [
        (outputs[0], [*on_text, "--teacher", "m", "--json"]),
        ("m", [*on_text, "--json"]),
        (outputs[0], [*packed, "--json"]),
        ("m", [*on_tasks, "--json"]),
        (outputs[1], [*on_text, "--teacher", "m", "--json"]),
        (outputs[1], [*packed, "--json"]),
    ]
    ((_, record), _), _ = records(asked, tmp_path)
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
    ((_, record),), _ = records(asked[:1], tmp_path)
    assert record["accuracy"]


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


def test_what_is_asked_for_later_is_measured_on_kept_weights(
    asked: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    plain, more = [replace(asked[0], evaluations=())], asked[:1]
    run_cells(plain, tmp_path, command=quantizer, operations=operations, keep_models=True)
    assert records(plain, tmp_path)[0] and not records(more, tmp_path)[0]
    run(more, tmp_path, quantizer)
    assert len(quantizer.runs) == 1 and len(quantizer.evaluated) == 4
    assert records(more, tmp_path)[0] and records(plain, tmp_path)[0]
    assert records(plain, tmp_path)[0][0][1]["accuracy"] == []


def test_without_its_weights_a_cell_says_how_to_go_on(
    asked: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run([replace(asked[0], evaluations=())], tmp_path, quantizer)
    run(asked[:1], tmp_path, quantizer)
    (error,) = failures(asked[:1], tmp_path).values()
    assert "its weights are gone; remove" in error and "--keep-models" in error
    assert len(quantizer.runs) == 1 and quantizer.evaluated == []


def test_another_text_of_the_same_name_is_another_measurement(
    asked: list[Cell], text: Path, quantizer: Quantizer, tmp_path: Path
) -> None:
    run(asked[:1], tmp_path, quantizer)
    text.write_text("another text")
    run(asked[1:], tmp_path, quantizer)
    of_model = [options for model, options in quantizer.evaluated if model == "m"]
    assert len([options for options in of_model if "--text" in options]) == 2
    assert len([options for options in of_model if "--tasks" in options]) == 1


def test_accuracy_weighs_tasks_alike() -> None:
    entries = [
        {"result": {"average": {"value": 0.5, "stderr": None, "tasks": 8}}},
        {"result": {"average": {"value": 0.1, "stderr": None, "tasks": 1}}},
        {"result": {"average": {"value": None, "stderr": None, "tasks": 0}}},
    ]
    assert _accuracy({"accuracy": entries}, "result") == pytest.approx((0.5 * 8 + 0.1) / 9)
    assert _accuracy({"accuracy": entries[2:]}, "result") is None


def test_flags_are_spelled_as_the_command_has_them() -> None:
    def flags(**options: object) -> list[str]:
        return _taken_over(Cell("t", {"model": "m", "seed": 0, **options}))

    assert flags() == [] == flags(**{"trust-remote-code": False})
    assert flags(**{"trust-remote-code": True}) == ["--trust-remote-code"]
    assert flags(compile=False, device="cpu") == ["--device", "cpu", "--no-compile"]
    assert flags(compile=True) == ["--compile"]
