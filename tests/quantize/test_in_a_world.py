"""Two processes make of a model what one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qatc.quantize.given import why_whole
from qatc.recipe.recipe import Recipe
from qatc.storage.files import read_json
from qatc.training.config import TrainingConfig
from tests.in_a_world import RUNS
from tests.quantize.conftest import make, weights


@pytest.mark.parametrize("name", RUNS)
def test_the_same_output_of_the_same_corpus(in_a_world: Path, name: str) -> None:
    """Generated, calibrated, trained with batches divided between them, and written."""
    alone, together = in_a_world / f"{name} alone", in_a_world / name
    assert weights(together) == weights(alone)
    for file in ("manifest.json", *(f"shard-0000{number}.parquet" for number in range(5))):
        mine, other = (out.with_name(f"{out.name}.data") / file for out in (together, alone))
        assert mine.read_bytes() == other.read_bytes(), file
    names = {path.name for path in together.iterdir()}
    assert names == {path.name for path in alone.iterdir()}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_figures_and_the_same_model(in_a_world: Path, name: str) -> None:
    """Of an odd number of rows, which each process sees some of."""
    alone, together = (
        read_json(in_a_world / output / "qatc.json") for output in (f"{name} alone", name)
    )
    for text, models in alone["figures"].items():
        for model, figures in models.items():
            assert together["figures"][text][model] == pytest.approx(figures, rel=1e-6), model
    inputs = ({k: v for k, v in r["inputs"].items() if "/" in k} for r in (alone, together))
    mine, other = ({k: v for k, v in found.items() if "model" in k} for found in inputs)
    assert mine == other and len(mine) == 1


def test_nothing_is_left(in_a_world: Path) -> None:
    for name in RUNS:
        beside = {path.name for path in in_a_world.glob(f"{name}*")}
        assert beside == {name, f"{name}.data", f"{name} alone", f"{name} alone.data"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"method": "rtn"}, None),
        ({"method": "gptq+qat"}, "--method gptq+qat changes whole weights"),
        ({"budget": 4.5}, "--budget"),
        ({"recipe": Recipe.from_bits("4-8-4", preset="best")}, "learned scales"),
        ({"training": TrainingConfig(train="norms")}, "--train norms"),
        ({"training": TrainingConfig(offload="parameters")}, "--offload parameters"),
        ({"recipe": Recipe.from_bits("4-8-4", target="llama.cpp")}, "target llama.cpp"),
    ],
)
def test_why_models_stay_whole(tmp_path: Path, changes: dict[str, Any], says: str | None) -> None:
    reason = why_whole(replace(make(tmp_path / "model", tmp_path / "out"), **changes))
    assert reason == says if says is None or reason is None else says in reason
