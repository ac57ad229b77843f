"""No cell is run twice, whatever ends a grid, and no failed cell ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qatc.compare import processes, running
from qatc.compare.grid import Cell
from qatc.compare.results import write_results
from qatc.compare.running import CURVE_POINTS, Places, failures, run_cells, unique
from qatc.errors import BUSY, QatcError
from qatc.progress import Observer
from qatc.storage.files import read_json, write_json
from qatc.storage.locks import locked
from tests.compare.conftest import Quantizer, operations
from tests.conftest import run_until_killed


def run(cells: list[Cell], out: Path, quantize: Any, **settings: Any) -> None:
    run_cells(cells, out, command=quantize, operations=operations, pause=0.01, **settings)


def test_a_second_run_computes_nothing(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(cells, tmp_path, quantizer)
    assert [options["bits"] for options in quantizer.runs] == ["4-8-4", "8-8-8"]
    assert len({options["data"] for options in quantizer.runs}) == 1
    run(cells, tmp_path, quantizer)
    assert len(quantizer.runs) == 2
    record = read_json(Places(tmp_path).record(cells[0]))
    assert record["bytes"] == 1000 and record["operations_per_token"] == 5e6
    curve = record["curve"]
    assert len(curve) <= CURVE_POINTS + 1 and curve[0] == [1, 1.0] and curve[-1] == [500, 0.002]


def test_cells_of_other_versions_are_named(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(cells, tmp_path, quantizer)
    place = Places(tmp_path).record(cells[0])
    record = read_json(place)
    assert record["inputs"] == {"the model": "abc"}
    write_json(place, record | {"versions": record["versions"] | {"torch": "1.0"}})
    notes: list[str] = []

    class Notes(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    run(cells, tmp_path, quantizer, observer=Notes())
    name = cells[0].name
    wanted = f"finished before by torch 1.0; remove {name} from cells/ to run it anew"
    assert notes == [f"cell 1/2: {name}: {wanted}", f"cell 2/2: {cells[1].name}: finished before"]
    assert len(quantizer.runs) == 2


def test_a_file_in_the_place_of_the_results(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(QatcError, match="results.csv is a file"):
        run(cells, tmp_path / "results.csv", quantizer)
    assert not quantizer.runs and (tmp_path / "results.csv").read_text() == "mine"


@pytest.mark.parametrize("keep", [False, True])
def test_weights_of_a_finished_cell_go(
    keep: bool, cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(cells, tmp_path, quantizer, keep_models=keep)
    for cell in cells:
        left = {path.name for path in Places(tmp_path).output(cell).iterdir()}
        always = {"cell.json", "metrics.jsonl", "qatc.json", "report.md"}
        assert left == always | ({"model.safetensors"} if keep else set())


def test_tables_may_have_a_cell_in_common(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    again = [*cells, Cell("other", dict(cells[0].options))]
    assert unique(again) == cells
    run(again, tmp_path, quantizer)
    assert len(quantizer.runs) == 2
    rows = write_results(again, tmp_path)
    assert rows is not None and [row.table for row in rows] == ["t", "t", "other"]


def test_a_killed_grid_goes_on(cells: list[Cell], quantizer: Quantizer, tmp_path: Path) -> None:
    def killed_in_the_second(arguments: Sequence[str], out: Path, log: Path) -> int:
        if len(quantizer.runs) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return quantizer(arguments, out, log)

    run_until_killed(lambda: run(cells, tmp_path, killed_in_the_second))
    assert write_results(cells, tmp_path) is None and not (tmp_path / "compare.md").exists()
    run(cells, tmp_path, quantizer)
    assert [options["bits"] for options in quantizer.runs] == ["8-8-8"]
    assert write_results(cells, tmp_path) is not None


def test_an_output_without_a_record_is_not_made_again(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(running, "_finish", kill)
        run_until_killed(lambda: run(cells, tmp_path, quantizer))
    run(cells, tmp_path, quantizer)
    assert [options["bits"] for options in quantizer.runs] == ["8-8-8"]
    assert read_json(Places(tmp_path).record(cells[0]))["bytes"] == 1000


def test_a_failed_cell_is_recorded_and_tried_again(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    def fails(arguments: Sequence[str], out: Path, log: Path) -> int:
        if cells[0].name not in arguments[2]:
            return quantizer(arguments, out, log)
        log.write_text("0:00 Loading\nerror: the loss is NaN; lower --lr\n")
        return 1

    run(cells, tmp_path, fails)
    assert failures(cells, tmp_path) == {cells[0].name: "the loss is NaN; lower --lr"}
    rows = write_results(cells, tmp_path)
    assert rows is not None and len(rows) == 1
    for ending in ("md", "html", "json"):
        assert "the loss is NaN" in (tmp_path / f"compare.{ending}").read_text()
    run(cells, tmp_path, quantizer)
    assert failures(cells, tmp_path) == {} and len(quantizer.runs) == 2


def test_shards_share_the_cells_and_the_last_one_writes(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    run(cells, tmp_path, quantizer, shard=(1, 2))
    assert [options["bits"] for options in quantizer.runs] == ["8-8-8"]
    assert write_results(cells, tmp_path) is None
    run(cells, tmp_path, quantizer, shard=(0, 2))
    assert [options["bits"] for options in quantizer.runs] == ["8-8-8", "4-8-4"]
    assert write_results(cells, tmp_path) is not None


def test_what_another_process_writes_is_waited_for(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    busy = iter([BUSY, BUSY, 0])

    def at_first_busy(arguments: Sequence[str], out: Path, log: Path) -> int:
        if status := next(busy):
            log.write_text("error: out/data/x is being written by process 7 on here; wait\n")
            return status
        return quantizer(arguments, out, log)

    run(cells[:1], tmp_path, at_first_busy)
    assert next(busy, None) is None and failures(cells, tmp_path) == {}


def test_a_cell_that_another_grid_runs_is_waited_for(
    cells: list[Cell], quantizer: Quantizer, tmp_path: Path
) -> None:
    place = Places(tmp_path).cells / f"{cells[0].name}.cell"
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(place):
            held.set()
            enough.wait(10)
            assert not quantizer.runs

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    threading.Timer(0.1, enough.set).start()
    run(cells[:1], tmp_path, quantizer)
    holder.join()
    assert len(quantizer.runs) == 1


def test_a_child_is_no_rank_and_has_the_gpu_of_ours() -> None:
    rank = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "HOME": "/home"}
    assert processes._environment({"HOME": "/home"}) == {"HOME": "/home"}
    assert processes._environment(rank) == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "1"}
    some = rank | {"CUDA_VISIBLE_DEVICES": "4,6"}
    assert processes._environment(some)["CUDA_VISIBLE_DEVICES"] == "6"


def test_ctrl_c_ends_the_child_with_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets one signal that it can obey, and is waited for."""
    script = tmp_path / "child"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time, pathlib\n"
        "def end(*_):\n    time.sleep(0.2)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'began')!r}).write_text(str(os.getpgid(0)))\n"
        "time.sleep(30)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        processes.in_a_process([], tmp_path / "out", tmp_path / "log")
    assert (tmp_path / "saved").exists()
    assert int((tmp_path / "began").read_text()) != os.getpgid(0), "a terminal would signal it too"
