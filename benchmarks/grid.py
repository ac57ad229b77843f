"""The figures of a grid of ``qatc compare``, finished or not, as one raw result.

    python -m benchmarks.grid small examples/paper/small.yaml OUT [EARLIER.json]

A row for each setting with the mean and the sample standard deviation over those of its seeds that
are finished, without curves and KL by layer, which ``OUT/compare.html`` shows; and how many cells
ran with what. The result is ``results/NAME.json``. Seeds that ``OUT`` lacks, since they ran
elsewhere, are taken over from an earlier result of the same grid.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from qatc.cli.compare import quantize_options
from qatc.compare.grid import Cell, read_grid
from qatc.compare.running import Places, records, unique
from qatc.compare.summary import Row, rows_of

Plain = dict[str, Any]


def main() -> None:
    """Read what is finished, and write the result."""
    name, grid, out, *earlier = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    cells = read_grid(grid, quantize_options())
    finished, _ = records(cells, out)
    ran = unique(cell for cell, _ in finished)
    places = Places(out)
    before = json.loads(Path(earlier[0]).read_text()) if earlier else {"rows": [], "cells": {}}
    asked = list(dict.fromkeys((cell.table, model_named(cell.setting)) for cell in cells))
    own = [joined(plain(row), before["rows"]) for row in rows_of(finished)]
    known = {key(row)[:2] for row in own}
    rows = own + [row for row in before["rows"] if key(row)[:2] in {*asked} - known]
    rows.sort(key=lambda row: asked.index(key(row)[:2]))
    missing = {(c.table, model_named(c.setting), c.seed) for c in cells} - {
        (row["table"], model_named(row["setting"]), seed) for row in rows for seed in row["seeds"]
    }
    print(f"{len(ran)} cells here; {len(missing)} of {len(cells)} not finished")
    common.save(
        name,
        {
            "grid": grid.name,
            "cells": Counter(provenance(places, cell) for cell in ran),
            "cells of an earlier result": before["cells"],
            "not finished": len(missing),
            "rows": rows,
        },
    )


def provenance(places: Places, cell: Cell) -> str:
    """On what device and with which torch a cell ran."""
    metadata = json.loads((places.output(cell) / "qatc.json").read_text())
    return f"{metadata['device']}, torch {metadata['versions']['torch']}"


def plain(row: Row) -> Plain:
    """A row without what is long."""
    found = {n: v for n, v in row.to_dict().items() if n not in ("curve", "layers")}
    model = str(found["setting"]["model"])
    return found | {"setting": {**found["setting"], "model": Path(model).name}}


def model_named(setting: Mapping[str, Any]) -> str:
    """A setting as one text, with the model's name in place of its path."""
    named = {**setting, "model": Path(str(setting["model"])).name}
    return json.dumps(named, sort_keys=True)


def key(row: Plain) -> tuple[str, str, str]:
    """What a row is of."""
    return row["table"], model_named(row["setting"]), row["text"]


def joined(row: Plain, earlier: list[Plain]) -> Plain:
    """A row with the seeds of an earlier result as well; of seeds that ran twice, one of the two.

    Raises:
        ValueError: some, not all, of the earlier seeds ran again: their part cannot be taken out.
    """
    other = next((one for one in earlier if key(one) == key(row)), None)
    if other is None or set(other["seeds"]) <= set(row["seeds"]):
        return row
    if set(row["seeds"]) <= set(other["seeds"]):
        return other
    if set(other["seeds"]) & set(row["seeds"]):
        raise ValueError(f"seeds {other['seeds']} and {row['seeds']} of {key(row)} overlap")
    counts = len(other["seeds"]), len(row["seeds"])
    figures = {
        name: pooled(other["figures"][name], found, *counts)
        for name, found in row["figures"].items()
    }
    return {**row, "seeds": sorted([*other["seeds"], *row["seeds"]]), "figures": figures}


def pooled(one: Plain | None, other: Plain | None, n: int, m: int) -> Plain | None:
    """Mean and sample standard deviation of ``n`` and ``m`` values together."""
    if one is None or other is None:
        return None
    total = n + m
    mean = (n * one["mean"] + m * other["mean"]) / total
    squares = (n - 1) * (one["std"] or 0.0) ** 2 + (m - 1) * (other["std"] or 0.0) ** 2
    squares += n * m / total * (one["mean"] - other["mean"]) ** 2
    return {"mean": mean, "std": math.sqrt(squares / (total - 1))}


if __name__ == "__main__":
    main()
