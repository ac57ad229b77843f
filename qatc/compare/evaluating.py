"""What a cell is measured on besides its own corpus: further texts, and the tasks of lm-eval.

Each entry of ``evaluate`` in a grid file is a run of ``qatc evaluate`` on the output of a cell, and
one on its model in full precision, which all cells of that model share.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qatc.compare.grid import Cell, fingerprint
from qatc.compare.processes import Command, run
from qatc.storage.files import read_json
from qatc.storage.locks import locked

_TAKEN_OVER = ("device", "compile", "trust-remote-code")
"""Options of ``qatc quantize`` that hold for ``qatc evaluate`` as well."""


def evaluate(cell: Cell, output: Path, shared: Path, command: Command) -> str | None:
    """Run what is not there yet of a cell's evaluations; the error, if there was one.

    Args:
        cell: which one.
        output: of the cell.
        shared: directory for what is measured of models in full precision.
        command: runs ``qatc evaluate``.

    Raises:
        BusyError: another process measures the same model in full precision.
    """
    for number, options in enumerate(cell.evaluations):
        teacher = [] if "tasks" in options else ["--teacher", str(cell.options["model"])]
        error = _measure(cell, str(output), [*_spelled(options), *teacher],
                         _of_output(output, number), command)  # fmt: skip
        if error is None:
            with locked(_of_model(cell, shared, number)):
                error = _measure(cell, str(cell.options["model"]), _spelled(options),
                                 _of_model(cell, shared, number), command)  # fmt: skip
        if error is not None:
            return error
    return None


def figures(cell: Cell, output: Path, shared: Path, result: str) -> dict[str, Any]:
    """Metrics of full precision and of the result by text, as ``qatc.json`` has them.

    Args:
        cell, output, shared: as of :func:`evaluate`.
        result: what the result is called.
    """
    found: dict[str, Any] = {}
    for number, options in _of_kind(cell, "text"):
        full = read_json(_of_model(cell, shared, number)) | {"kl": 0.0, "top1_agreement": 1.0}
        own = read_json(_of_output(output, number))
        found[Path(str(options["text"])).name] = {"full precision": full, result: own}
    return found


def accuracies(cell: Cell, output: Path, shared: Path) -> list[dict[str, Any]]:
    """What lm-eval found, of full precision and of the result, for each entry with tasks."""
    return [
        {
            "full precision": read_json(_of_model(cell, shared, number)),
            "result": read_json(_of_output(output, number)),
        }
        for number, _ in _of_kind(cell, "tasks")
    ]


def _of_kind(cell: Cell, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    return [(n, options) for n, options in enumerate(cell.evaluations) if name in options]


def _of_output(output: Path, number: int) -> Path:
    return output / f"evaluation-{number}.json"


def _of_model(cell: Cell, shared: Path, number: int) -> Path:
    own = {name: cell.options.get(name) for name in ("model", *_TAKEN_OVER)}
    return shared / f"{fingerprint({**own, **cell.evaluations[number]})}.json"


def _measure(
    cell: Cell, what: str, options: Sequence[str], place: Path, command: Command
) -> str | None:
    """Run ``qatc evaluate``; its result appears in one piece."""
    if place.exists():
        return None
    of_cell = {name: cell.options[name] for name in _TAKEN_OVER if name in cell.options}
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(".partial")
    arguments = ["evaluate", what, *options, *_spelled(of_cell), "--json"]
    error = run(command, arguments, beside, place.with_suffix(".log"))
    if error is None:
        os.replace(beside, place)
    return error


def _spelled(options: Mapping[str, Any]) -> list[str]:
    """Options as a command takes them; those of a list are joined by commas."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            several = isinstance(value, Iterable) and not isinstance(value, str)
            found += [f"--{name}", ",".join(map(str, value)) if several else str(value)]
    return found
