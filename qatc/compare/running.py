"""Cells are run one after another, each in a process of its own, and none twice.

``OUT/cells/NAME`` is the output of a cell. Its ``cell.json`` appears last: a cell that has one is
finished. A cell without is run again, and goes on from its own checkpoint. ``NAME.failed.json``
says why one could not be finished; the next run tries it anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qatc.compare.evaluating import collect, evaluate, is_measured, with_evaluations
from qatc.compare.grid import Cell
from qatc.compare.processes import Command, in_a_process, run
from qatc.errors import BusyError, ConfigError, QatcError
from qatc.progress import Observer
from qatc.quantize.provenance import package_version
from qatc.storage import markers
from qatc.storage.files import read_json, write_atomically, write_json, writing_to
from qatc.storage.locks import locked

KEPT = (
    *("qatc.json", "report.md", "loss.png", "metrics.jsonl", "blockwise.jsonl"),
    *("run.yaml", "cell.json"),
)
"""What stays of a finished cell, whose weights are removed."""

CURVE_POINTS = 200


class Places:
    """Where the files of a grid are.

    Args:
        out: directory of the grid.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.cells = out / "cells"
        self.models = out / "full-precision"

    def output(self, cell: Cell) -> Path:
        """Directory of a cell."""
        return self.cells / cell.name

    def record(self, cell: Cell) -> Path:
        """The file that a finished cell has."""
        return self.output(cell) / "cell.json"

    def failure(self, cell: Cell) -> Path:
        """The file that says why a cell failed."""
        return self.cells / f"{cell.name}.failed.json"


def finished(cell: Cell, places: Places) -> Any:
    """The record of a cell that has been run and measured on all that is asked for, or None."""
    if not places.record(cell).exists():
        return None
    record = read_json(places.record(cell))
    return record if is_measured(cell, record) else None


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """One cell of those with equal options, in order: tables may have cells in common.

    It is measured on whatever one of them is.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        known = found.setdefault(cell.name, cell)
        more = tuple(own for own in cell.evaluations if own not in known.evaluations)
        found[cell.name] = replace(known, evaluations=known.evaluations + more)
    return list(found.values())


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    keep_models: bool = False,
    command: Command = in_a_process,
    operations: Callable[[Mapping[str, Any], bool], float] | None = None,
    observer: Observer | None = None,
    pause: float = 5.0,
) -> None:
    """Run the cells of a shard that are not finished yet.

    Args:
        cells: all cells of the grid.
        out: directory of the grid.
        shard: (i, n): the cells whose number modulo n is i.
        keep_models: keep the weights of finished cells.
        command: runs ``qatc``.
        operations: counts the bit operations per token of an output, given its ``qatc.json`` and
            whether to trust remote code; ``None`` for :func:`operations_per_token`.
        observer: is told of every cell.
        pause: seconds until a cell or corpus that another process writes is looked at again.

    Raises:
        ConfigError: ``out`` is a file.
        CheckpointError: ``out`` cannot be written.
    """
    places, observer = Places(out), observer or Observer()
    mine = unique(cells)[shard[0] :: shard[1]]
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --output")
    with writing_to(places.cells):
        places.cells.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(mine, start=1):
        title = f"cell {number}/{len(mine)}: {cell.name}"
        if (record := finished(cell, places)) is not None:
            observer.note(f"{title}: finished before{_by_others(record)}")
            continue
        observer.stage(title)
        error = _compute(
            cell, places, command, operations or operations_per_token, keep_models, pause
        )
        if error is None:
            places.failure(cell).unlink(missing_ok=True)
            observer.note(_summary(read_json(places.record(cell))))
        else:
            options = dict(cell.options)
            write_json(places.failure(cell), {"options": options, "error": error})
            observer.note(f"failed: {error}")


def _by_others(record: Mapping[str, Any]) -> str:
    """Which other versions of what computes a cell has been computed by, in words."""
    then = record.get("versions") or {}
    other = [f"{name} {v}" for name, v in then.items() if package_version(name) != v]
    if not other:
        return ""
    return f" by {', '.join(other)}; remove {record['name']} from cells/ to run it anew"


def _compute(
    cell: Cell,
    places: Places,
    command: Command,
    operations: Callable[[Mapping[str, Any], bool], float],
    keep_models: bool,
    pause: float,
) -> str | None:
    """Run and record a cell, once nobody else writes to its place or corpus; its error, if any."""
    output = places.output(cell)
    while True:
        try:
            with locked(places.cells / f"{cell.name}.cell"):
                if finished(cell, places) is not None:
                    return None
                if places.record(cell).exists() and not [*output.glob("*.safetensors")]:
                    return (
                        "was finished without all that evaluate asks for, and its weights are gone;"
                        f" remove {output} to run it anew (--keep-models keeps weights)"
                    )
                started = time.time()
                error = None if (output / "qatc.json").exists() else _run(cell, places, command)
                if error is None:
                    metadata = read_json(output / "qatc.json")
                    error = evaluate(cell, output, metadata, places.models, command)
                if error is None:
                    seconds = time.time() - started
                    _finish(cell, places, metadata, operations, keep_models, seconds)
                return error
        except BusyError:
            time.sleep(pause)
        except QatcError as refused:
            return str(refused)


def _run(cell: Cell, places: Places, command: Command) -> str | None:
    """Run ``qatc quantize`` for a cell; its error if it failed.

    Raises:
        BusyError: another process writes to its place or corpus.
    """
    log, run_file = (places.cells / f"{cell.name}.{ending}" for ending in ("log", "yaml"))
    options = {"data": str(places.out / "data" / cell.corpus), **cell.options}
    write_atomically(run_file, yaml.safe_dump(options, sort_keys=False).encode())
    arguments = ["quantize", "--config", str(run_file), "--output", str(places.output(cell))]
    error = run(command, arguments, Path(os.devnull), log)
    if error is None:
        run_file.unlink()
    return error


def _finish(
    cell: Cell,
    places: Places,
    metadata: Mapping[str, Any],
    operations: Callable[[Mapping[str, Any], bool], float],
    keep_models: bool,
    seconds: float,
) -> None:
    """Record what an output says of itself, then remove its weights."""
    output = places.output(cell)
    before = read_json(places.record(cell)) if places.record(cell).exists() else {}
    record = {
        "name": cell.name,
        "options": dict(cell.options),
        "figures": metadata["figures"],
        "evaluated": before.get("evaluated", {}) | collect(cell, output, metadata, places.models),
        "bits": _bits(metadata),
        "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "operations_per_token": operations(metadata, bool(cell.options.get("trust-remote-code"))),
        "training_seconds": metadata.get("training_seconds"),
        "seconds": before.get("seconds", round(seconds, 1)),
        "curve": _curve(output / "metrics.jsonl"),
        "layers": metadata.get("divergence_by_layer", []),
        **{name: metadata.get(name) for name in ("inputs", "versions", "device")},
    }
    write_json(places.record(cell), record)
    markers.remove(output.with_name(output.name + ".partial"))
    if not keep_models:
        for path in output.iterdir():
            if path.is_file() and path.name not in KEPT:
                path.unlink()


def _bits(metadata: Mapping[str, Any]) -> str | None:
    """What the bits of an output's recipe are called."""
    from qatc.recipe.recipe import Recipe

    recipe = metadata.get("recipe")
    return None if recipe is None else Recipe.from_dict(recipe).bits


def operations_per_token(metadata: Mapping[str, Any], trust_remote_code: bool) -> float:
    """Bit operations per token: MACs x weight bits x activation bits, as ``qatc inspect`` counts.

    It is the mean over ``PAPER_LENGTH`` tokens, of the linears, the attention products and the
    output head (LLM-QAT, arXiv 2305.17888, table 1); what is not quantized counts 16 bits.
    """
    from qatc.recipe.recipe import Recipe
    from qatc.report.plan import PAPER_LENGTH, inspect_model

    plan = inspect_model(
        metadata["model"],
        Recipe.from_dict(metadata["recipe"]),
        trust_remote_code=trust_remote_code,
    )
    return plan.operations[1] / PAPER_LENGTH


def _curve(path: Path) -> list[list[float]]:
    """Steps and KL of training, at most ``CURVE_POINTS`` and the last one."""
    if not path.exists():
        return []
    steps = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    stride = max(1, -(-len(steps) // CURVE_POINTS))
    chosen = steps[::stride] + (steps[-1:] if (len(steps) - 1) % stride else [])
    return [[step["step"], step["kl"]] for step in chosen if step.get("kl") is not None]


def _summary(record: Mapping[str, Any]) -> str:
    models = next(iter(record["figures"].values()))
    name, metrics = list(models.items())[-1]
    return f"{name}: perplexity {metrics['perplexity']:.4g}, KL {metrics['kl']:.4f}"


def records(cells: Sequence[Cell], out: Path) -> tuple[list[tuple[Cell, Any]], list[Cell]]:
    """The finished cells of a grid with what ``cell.json`` says of them, and the others."""
    places = Places(out)
    known = [(cell, finished(cell, places)) for cell in cells]
    done = [(cell, with_evaluations(cell, record)) for cell, record in known if record is not None]
    return done, [cell for cell, record in known if record is None]


def failures(cells: Sequence[Cell], out: Path) -> dict[str, str]:
    """Name of a cell that failed -> its error, of those that are not finished."""
    places = Places(out)
    return {
        cell.name: read_json(places.failure(cell))["error"]
        for cell in cells
        if places.failure(cell).exists() and finished(cell, places) is None
    }
