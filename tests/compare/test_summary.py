"""Figures over seeds, against values computed by hand."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from qatc.compare.grid import Cell
from qatc.compare.summary import cells_of, rows_of, statistic, to_csv, to_markdown, varying
from tests.compare.conftest import models


def record(kl: float, seconds: float | None = 2.0) -> dict[str, Any]:
    return {
        "figures": {"generated": models(kl), "wiki.txt": models(2 * kl)},
        "bytes": 2_000_000,
        "operations_per_token": 3e9,
        "training_seconds": seconds,
        "curve": [[1, kl]],
        "layers": [kl / 2, kl],
    }


def cell(seed: int, bits: str = "4-8-4") -> Cell:
    return Cell("t", {"model": "some/m", "bits": bits, "seed": seed})


def test_seeds_are_taken_together() -> None:
    kls = (0.1, 0.2, 0.6)
    rows = rows_of([(cell(seed), record(kl)) for seed, kl in enumerate(kls)])
    assert [(row.text, row.seeds) for row in rows] == [
        ("generated", (0, 1, 2)),
        ("wiki.txt", (0, 1, 2)),
    ]
    kl = rows[0].figures["kl"]
    assert kl is not None and kl.mean == pytest.approx(0.3)
    # ((0.2)^2 + (0.1)^2 + (0.3)^2) / 2 = 0.07
    assert kl.std == pytest.approx(math.sqrt(0.07))
    perplexity, recovered = rows[0].figures["perplexity"], rows[0].figures["recovery"]
    assert perplexity is not None and perplexity.mean == pytest.approx(4 + 4 * 0.3)
    assert recovered is not None and recovered.mean == pytest.approx(70)
    of_text = rows[1].figures["kl"]
    assert of_text is not None and of_text.mean == pytest.approx(0.6)
    assert rows[0].curve == [[1, 0.1]] and rows[0].layers == [0.05, 0.1]


def test_a_single_seed_has_no_deviation_and_a_missing_figure_no_mean() -> None:
    assert statistic([2.0]).std is None  # type: ignore[union-attr]
    assert statistic([2.0, None]) is None
    assert statistic([2.0, math.nan]) is None
    assert statistic([]) is None
    (row, _) = rows_of([(cell(0), record(0.1)), (cell(1), record(0.1, None))])
    assert row.figures["training_seconds"] is None and row.figures["kl"] is not None


def test_a_method_without_training_is_its_last_model() -> None:
    rounded = record(0.1)
    del rounded["figures"]["generated"]["QAT"]
    row = rows_of([(cell(0), rounded)])[0]
    kl, recovered = row.figures["kl"], row.figures["recovery"]
    assert row.method == "RTN"
    assert kl is not None and kl.mean == 1.0
    assert recovered is not None and recovered.mean == 0.0


def test_tables_name_the_options_that_differ() -> None:
    rows = rows_of([(cell(0), record(0.1)), (cell(0, "8-8-8"), record(0.01))])
    assert varying(rows) == ["bits"]
    header, first, *_ = cells_of(rows)
    assert header[:4] == ["bits", "text", "result", "seeds"]
    found = dict(zip(header, first, strict=True))
    assert found["KL"] == "0.1000" and found["MB"] == "2.000" and found["GBOPs/token"] == "3.000"
    assert found["top-1"] == "90.0" and found["recovery %"] == "90.0"
    brief, shortest = cells_of(rows_of([(cell(0), record(0.1)), (cell(1), record(0.3))]), True)[:2]
    assert len(brief) < len(header) and dict(zip(brief, shortest, strict=True))["KL"] == "0.2000"
    lines = to_markdown(rows, {"c": "e"}).splitlines()
    assert "## t" in lines and "- `c`: e" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_csv_keeps_every_digit() -> None:
    rows = rows_of([(cell(0), record(1 / 3)), (cell(1), record(0.1))])
    first, second = csv.DictReader(io.StringIO(to_csv(rows)))
    assert float(first["kl"]) == rows[0].figures["kl"].mean  # type: ignore[union-attr]
    assert float(first["kl_std"]) == pytest.approx(abs(1 / 3 - 0.1) / math.sqrt(2))
    assert (first["seeds"], first["bits"], second["text"]) == ("0 1", "4-8-4", "wiki.txt")
