"""What the cells of a grid come to: a row for each setting, its seeds taken together."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qatc.compare.grid import Cell
from qatc.evaluation.metrics import recovery

FULL_PRECISION, ROUNDED = "full precision", "RTN"

FIGURES = {
    "full_precision_perplexity": "full precision",
    "rtn_perplexity": "RTN",
    "perplexity": "perplexity",
    "rtn_kl": "RTN KL",
    "kl": "KL",
    "top1_agreement": "top-1",
    "recovery": "recovery %",
    "full_precision_accuracy": "full precision acc %",
    "accuracy": "acc %",
    "bytes": "MB",
    "operations_per_token": "GBOPs/token",
    "training_seconds": "training s",
}
"""What is told of a setting, and how its column is called in a table."""

BRIEF = ("full_precision_perplexity", "rtn_perplexity", "perplexity", "kl", "recovery", "bytes")
"""Those that a terminal shows."""

_SCALES = {"bytes": 1e-6, "operations_per_token": 1e-9}
_SCALES |= dict.fromkeys(("top1_agreement", "accuracy", "full_precision_accuracy"), 100.0)
_DIGITS = {"kl": 4, "rtn_kl": 4, "top1_agreement": 1, "recovery": 1, "training_seconds": 1}
_DIGITS |= {"accuracy": 2, "full_precision_accuracy": 2}


@dataclass(frozen=True)
class Statistic:
    """A figure over seeds.

    Attributes:
        mean: of all seeds.
        std: sample standard deviation (n - 1); None of a single seed.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Row:
    """A setting on a text.

    Attributes:
        table: name of the grid.
        setting: the options of its cells but for the seed.
        text: what it was evaluated on.
        method: the name of its last model, such as ``QAT``.
        seeds: of its cells.
        figures: those of ``FIGURES``; None where a cell lacks it. Perplexities are of full
            precision, RTN and the result; KL in nats per token; agreement a share; recovery in
            percent of perplexity; accuracies, of full precision and of the result, shares, a mean
            over the tasks of lm-eval whose items are right or wrong; sizes in bytes; operations as
            :func:`qatc.compare.running.operations_per_token` counts them.
        curve: steps and KL of the first seed's training.
        bits: of its recipe, where they are known.
        layers: of the first seed, KL behind each layer, see
            :meth:`qatc.sensitivity.answers.Answers.divergence_by_depth`; none where it was not
            measured.
    """

    table: str
    setting: Mapping[str, Any]
    text: str
    method: str
    seeds: tuple[int, ...]
    figures: Mapping[str, Statistic | None]
    curve: Sequence[Sequence[float]]
    layers: Sequence[float] = ()
    bits: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def rows_of(records: Iterable[tuple[Cell, Mapping[str, Any]]]) -> list[Row]:
    """A row for every setting and text, in the order of the cells.

    Args:
        records: finished cells with what their ``cell.json`` says.
    """
    groups: dict[tuple[str, str], list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, record in records:
        groups.setdefault((cell.table, repr(sorted(cell.setting.items()))), []).append(
            (cell, record)
        )
    rows = []
    for group in groups.values():
        cell, first = group[0]
        for text, models in first["figures"].items():
            found = [_figures(record, text) for _, record in group]
            rows.append(
                Row(
                    table=cell.table,
                    setting=cell.setting,
                    text=text,
                    method=list(models)[-1],
                    seeds=tuple(cell.seed for cell, _ in group),
                    figures={name: statistic([one[name] for one in found]) for name in FIGURES},
                    curve=first["curve"],
                    layers=first.get("layers", []),
                    bits=first.get("bits"),
                )
            )
    return rows


def _figures(record: Mapping[str, Any], text: str) -> dict[str, float | None]:
    models = record["figures"][text]
    full, rounded = models[FULL_PRECISION], models.get(ROUNDED, {})
    result = list(models.values())[-1]
    perplexities = (full["perplexity"], rounded.get("perplexity"), result["perplexity"])
    return {
        "full_precision_perplexity": perplexities[0],
        "rtn_perplexity": perplexities[1],
        "perplexity": perplexities[2],
        "rtn_kl": rounded.get("kl"),
        "kl": result["kl"],
        "top1_agreement": result["top1_agreement"],
        "recovery": None if None in perplexities else recovery(*perplexities),
        "full_precision_accuracy": _accuracy(record, "full precision"),
        "accuracy": _accuracy(record, "result"),
        **{name: record[name] for name in ("bytes", "operations_per_token", "training_seconds")},
    }


def _accuracy(record: Mapping[str, Any], of: str) -> float | None:
    """The mean over all tasks whose items are right or wrong."""
    averages = [entry[of]["average"] for entry in record.get("accuracy", [])]
    tasks = sum(average["tasks"] for average in averages)
    total = sum(average["value"] * average["tasks"] for average in averages if average["tasks"])
    return total / tasks if tasks else None


def statistic(values: Sequence[float | None]) -> Statistic | None:
    """Mean and sample standard deviation; None where a value is missing or not finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def varying(rows: Sequence[Row]) -> list[str]:
    """The options in which the settings differ, in their order; model and bits come first."""
    names = list(dict.fromkeys(["model", "bits", *(n for row in rows for n in row.setting)]))
    return [n for n in names if len({repr(row.setting.get(n)) for row in rows}) > 1]


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every grid, by its name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.table, []).append(row)
    return found


def shown(value: Any) -> str:
    """An option's value in a cell of a table."""
    return "default" if value is None else str(value).rstrip("/").rpartition("/")[2]


def cells_of(rows: Sequence[Row], brief: bool = False) -> list[list[str]]:
    """The table of a grid as text, header first: options that differ, then the figures.

    Args:
        rows: of one grid.
        brief: only what fits a terminal: the means of ``BRIEF``.
    """
    options = varying(rows)
    of_tasks = ("full_precision_accuracy", "accuracy")
    asked = any(row.figures[name] for row in rows for name in of_tasks)
    figures = [*BRIEF, *of_tasks] if brief else [*FIGURES]
    figures = [name for name in figures if asked or name not in of_tasks]
    texts = len({row.text for row in rows}) > 1
    titles = [FIGURES[name] for name in figures]
    lines = [[*options, *(["text"] if texts else []), "result", "seeds", *titles]]
    for row in rows:
        own = [shown(row.setting.get(name)) for name in options] + ([row.text] if texts else [])
        found = [_text(name, row.figures[name], not brief) for name in figures]
        lines.append([*own, row.method, str(len(row.seeds)), *found])
    return lines


def _text(name: str, found: Statistic | None, with_deviation: bool) -> str:
    if found is None:
        return ""
    scale, digits = _SCALES.get(name, 1.0), _DIGITS.get(name, 3)
    deviation = ""
    if with_deviation and found.std is not None:
        deviation = f" ± {found.std * scale:.{digits}f}"
    return f"{found.mean * scale:.{digits}f}{deviation}"


def to_markdown(rows: Sequence[Row], failed: Mapping[str, str]) -> str:
    """The tables of all grids, and what failed."""
    parts = ["# Comparison", "Mean ± sample standard deviation over seeds.", FOOTNOTE]
    for name, own in tables(rows).items():
        header, *lines = [[cell.replace("|", "\\|") for cell in line] for line in cells_of(own)]
        drawn = [header, ["---"] * len(header), *lines]
        parts += [f"## {name}", "\n".join(f"| {' | '.join(line)} |" for line in drawn)]
    if failed:
        parts += ["## Failed", "\n".join(f"- `{name}`: {error}" for name, error in failed.items())]
    return "\n\n".join(parts) + "\n"


FOOTNOTE = (
    "Perplexity, KL (to full precision, nats per token), top-1 agreement (%) and recovery, (RTN -"
    " result) / (RTN - full precision) of perplexity, are of text that was held out. Accuracy is"
    " the mean over the tasks of lm-eval that were asked for. MB (10^6 bytes) are of the weight"
    " files. BOPs are bit operations: multiply-accumulates times weight bits times activation bits,"
    " of linears, attention products and head, per token of 2,048, as qatc inspect counts them;"
    " what is not quantized counts 16 bits."
)


def to_csv(rows: Sequence[Row]) -> str:
    """All rows in one table: options, then mean and standard deviation of each figure."""
    options = list(dict.fromkeys(name for row in rows for name in row.setting))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    figures = [column for name in FIGURES for column in (name, f"{name}_std")]
    writer.writerow(["table", "text", "method", "seeds", *options, *figures])
    for row in rows:
        line = [row.table, row.text, row.method, " ".join(map(str, row.seeds))]
        line += ["" if (v := row.setting.get(name)) is None else str(v) for name in options]
        for name in FIGURES:
            found = row.figures[name]
            line += ["", ""] if found is None else [repr(found.mean), _or_empty(found.std)]
        writer.writerow(line)
    return stream.getvalue()


def _or_empty(value: float | None) -> str:
    return "" if value is None else repr(value)
