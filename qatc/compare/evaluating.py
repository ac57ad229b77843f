"""What a cell is measured on besides its own corpus: further texts, and the tasks of lm-eval.

Each entry of ``evaluate`` in a grid file is a run of ``qatc evaluate`` on the output of a cell, and
one on its model in full precision, which all cells of that model share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qatc.compare.grid import Cell, fingerprint
from qatc.compare.processes import Command, run
from qatc.quantize.provenance import versions
from qatc.storage.files import read_json, sha256
from qatc.storage.locks import locked


def evaluate(
    cell: Cell, output: Path, metadata: Mapping[str, Any], shared: Path, command: Command
) -> str | None:
    """Run what is not there yet of a cell's evaluations; the error, if there was one.

    Args:
        cell: which one.
        output: of the cell.
        metadata: what ``qatc.json`` says of it.
        shared: directory for what is measured of models in full precision.
        command: runs ``qatc evaluate``.

    Raises:
        BusyError: another process measures the same model in full precision.
    """
    model = str(cell.options["model"])
    for options in cell.evaluations:
        teacher = {} if "tasks" in options else {"teacher": model}
        place = _of_output(output, options)
        error = _measure(cell, str(output), {**options, **teacher}, place, command)
        if error is None:
            place = _of_model(cell, metadata, shared, options)
            with locked(place):
                error = _measure(cell, model, _of_any(options), place, command)
        if error is not None:
            return error
    return None


def collect(
    cell: Cell, output: Path, metadata: Mapping[str, Any], shared: Path
) -> dict[str, Mapping[str, Any]]:
    """What :func:`evaluate` found: the options, full precision and the result, by a key of each."""
    return {
        fingerprint(options): {
            "options": dict(options),
            "full precision": read_json(_of_model(cell, metadata, shared, options)),
            "result": read_json(_of_output(output, options)),
        }
        for options in cell.evaluations
    }


def is_measured(cell: Cell, record: Mapping[str, Any]) -> bool:
    """Whether the record of a cell has all that is asked for."""
    known = record.get("evaluated", {})
    return all(fingerprint(options) in known for options in cell.evaluations)


def with_evaluations(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a cell with what it was asked for among its ``figures``, and ``accuracy``."""
    found: dict[str, Any] = dict(record["figures"])
    accuracy = []
    (*_, result) = next(iter(found.values()))
    for options in cell.evaluations:
        measured = record["evaluated"][fingerprint(options)]
        full, own = measured["full precision"], measured["result"]
        if "tasks" in options:
            accuracy.append({"full precision": full, "result": own})
            continue
        name = Path(str(options["text"])).name
        name = f"{name} (evaluate)" if name in found else name
        found[name] = {"full precision": full | {"kl": 0.0, "top1_agreement": 1.0}, result: own}
    return {**record, "figures": found, "accuracy": accuracy}


def _of_output(output: Path, options: Mapping[str, Any]) -> Path:
    return output / f"evaluation-{fingerprint(options)}.json"


def _of_any(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a model in full precision takes as well."""
    return {name: value for name, value in options.items() if name != "runtime"}


def _of_model(
    cell: Cell, metadata: Mapping[str, Any], shared: Path, options: Mapping[str, Any]
) -> Path:
    """Another file for another model, text or version, whatever they are called."""
    known: Mapping[str, str] = metadata.get("inputs") or {}
    decides = {
        "model": cell.options["model"],
        "fingerprints": {name: value for name, value in known.items() if "model" in name},
        "options": _of_any(options),
        "cell": _taken_over(cell),
        "text": sha256(Path(str(options["text"]))) if "text" in options else None,
        "versions": versions(),
    }
    return shared / f"{fingerprint(decides)}.json"


def _measure(
    cell: Cell, what: str, options: Mapping[str, Any], place: Path, command: Command
) -> str | None:
    """Run ``qatc evaluate``; its result appears in one piece."""
    if place.exists():
        return None
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(".partial")
    arguments = ["evaluate", what, *_spelled(options), *_taken_over(cell), "--json"]
    error = run(command, arguments, beside, place.with_suffix(".log"))
    if error is None:
        os.replace(beside, place)
    return error


def _spelled(options: Mapping[str, Any]) -> list[str]:
    """Options as a command takes them; those of a list are joined by commas."""
    found: list[str] = []
    for name, value in options.items():
        found += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return found


def _taken_over(cell: Cell) -> list[str]:
    """What is said of ``qatc quantize`` and holds for ``qatc evaluate`` as well."""
    found = ["--device", str(cell.options["device"])] if "device" in cell.options else []
    if (compile := cell.options.get("compile")) is not None:
        found.append("--compile" if compile else "--no-compile")
    return found + (["--trust-remote-code"] if cell.options.get("trust-remote-code") else [])
