"""The local part of the parity gate: every way to run a lowered model, beside the trained one.

See :mod:`qatc.evaluation.forced` for how the two are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qatc.evaluation.checks import Check
from qatc.evaluation.forced import Difference, Kind, compare
from qatc.evaluation.traces import Trace, record
from qatc.recipe.recipe import Recipe
from qatc.runtime.cache import SLOTS

ROWS = 3
SHORT_WINDOW = 16

LIMITS: dict[Kind, float] = {
    "reads": 1e-4, "linear": 1e-5, "codes": 0.0, "attention": 1e-5, "logits": 1e-4
}  # fmt: skip
"""What float sums of other orders explain, where all that is given is the same."""

INTEGER_LIMITS = LIMITS | {"linear": 1e-6}
"""The same where both sum integers: one rounding is left."""

_WHAT: dict[Kind, str] = {
    "reads": "what a linear, attention or a layer is given, relative to its largest",
    "linear": "the output of a linear, relative to its largest",
    "codes": "the share of K and V codes that are not the trained ones",
    "attention": "the output of attention, relative to its largest",
    "logits": "the logits behind the last layer, relative to the largest",
}


def compare_in_float(reference: Any, lowered: Any, recipe: Recipe, ids: Tensor) -> list[Check]:
    """Compare a lowered model with the trained one in float, in every way that it can be run.

    Args:
        reference: the prepared model, without its integer forward.
        lowered: the model that runs on integers; both are uncompiled.
        recipe: of both.
        ids: int64 ``[B, T]``: text.
    """
    rows, length = ROWS, ids.shape[1]
    half = length - length // 2
    found: list[Difference] = []

    def run(trace: Trace, ways: dict[str, list[int] | None]) -> None:
        for title, chunks in ways.items():
            sizes = None if chunks is None else [size for size in chunks if size > 0]
            found.extend(compare(lowered, trace, recipe, title, sizes))

    singly = [half] + [1] * (length - half)
    ways = {"no cache": None, "prefill": [length], "chunked prefill": [half, length - half]}
    run(record(reference, ids[:rows]), {**ways, "decode": singly})
    ordinal = torch.arange(rows, device=ids.device).unsqueeze(1)
    mask = (torch.arange(length, device=ids.device) >= ordinal).long()
    trace = record(reference, ids[:rows], mask)
    run(trace, {"no cache, with padding": None, "decode with padding": singly})
    with _short_window(reference, lowered) as window:
        # One row that outgrows the first slots of its cache, and after that its window, if any.
        tokens = min(window + SLOTS + 8, _longest(reference), ids.numel())
        row = ids.flatten()[:tokens].unsqueeze(0)
        first = max(1, min(SLOTS - 2, tokens - 6))
        late = tokens - first - 6
        sizes = [first, 1, 1, 1, late, 1, 1, 1] if late >= 0 else [1] * tokens
        run(record(reference, row), {"decode of a long row": sizes})
    return _as_checks(found, LIMITS)


def compare_on_integers(reference: Any, lowered: Any, recipe: Recipe, ids: Tensor) -> list[Check]:
    """Compare a lowered model with the trained one with its integer forward, which is exact."""
    trace = record(reference, ids[:ROWS])
    found = compare(lowered, trace, recipe, "no cache")
    return _as_checks(found, INTEGER_LIMITS, ", both on integers")


def _as_checks(
    found: list[Difference], limits: Mapping[Kind, float], beside: str = ""
) -> list[Check]:
    checks = []
    for kind, what in _WHAT.items():
        mine = [difference for difference in found if difference.kind == kind]
        wrong = [d.place for d in mine if not d.figure <= limits[kind]]
        worst = max((d.figure for d in mine), default=0.0)
        where = wrong[0] if wrong else None
        checks.append(Check("local", what + beside, worst, limits[kind], where))
    return checks


def _longest(model: Any) -> int:
    """How many tokens the model takes."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


@contextmanager
def _short_window(*models: Any) -> Iterator[int]:
    """Give models with a sliding window one that a short text outgrows; its length, or 0."""
    window = getattr(models[0].config, "sliding_window", None) or 0
    changed = models if window > SHORT_WINDOW else ()
    for model in changed:
        model.config.sliding_window = SHORT_WINDOW
    try:
        yield min(window, SHORT_WINDOW)
    finally:
        for model in changed:
            model.config.sliding_window = window
