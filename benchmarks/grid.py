"""The figures of a grid of ``qatc compare``, finished or not, as one raw result.

    python -m benchmarks.grid small examples/paper/small.yaml OUT

A row for each setting with the mean and the sample standard deviation over those of its seeds that
are finished, without curves and KL by layer, which ``OUT/compare.html`` shows; and how many cells
ran with what. The result is ``results/NAME.json``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from benchmarks import common
from qatc.cli.compare import quantize_options
from qatc.cli.main import app
from qatc.compare.grid import Cell, read_grid
from qatc.compare.running import Places, records, unique
from qatc.compare.summary import Row, rows_of


def main() -> None:
    """Read what is finished, and write the result."""
    name, grid, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    context = typer.main.get_command(app).make_context("qatc", [], resilient_parsing=True)
    cells = read_grid(grid, quantize_options(typer.Context(context.command, parent=context)))
    finished, others = records(cells, out)
    ran, missing = unique(cell for cell, _ in finished), len(unique(others))
    places = Places(out)
    print(f"{len(ran)} cells, {missing} not finished")
    common.save(
        name,
        {
            "grid": grid.name,
            "cells": Counter(provenance(places, cell) for cell in ran),
            "not finished": missing,
            "rows": [plain(row) for row in rows_of(finished)],
        },
    )


def provenance(places: Places, cell: Cell) -> str:
    """On what device and with which torch a cell ran."""
    metadata = json.loads((places.output(cell) / "qatc.json").read_text())
    return f"{metadata['device']}, torch {metadata['versions']['torch']}"


def plain(row: Row) -> dict[str, Any]:
    """A row without what is long."""
    found = {n: v for n, v in row.to_dict().items() if n not in ("curve", "layers")}
    model = str(found["setting"]["model"])
    return found | {"setting": {**found["setting"], "model": Path(model).name}}


if __name__ == "__main__":
    main()
