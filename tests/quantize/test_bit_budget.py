"""A run that chooses bits for a budget, once, and says which."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qatc.data.config import CorpusConfig
from qatc.errors import ConfigError
from qatc.output import load_codes
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from tests.quantize.conftest import Notes, make, no_more, weights

BUDGET = 3.4
ASKED = CorpusConfig(sequences=24, max_length=16, batch_size=8)  # what options can say


@pytest.fixture(scope="module")
def mixed(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("budget") / "out"
    notes = Notes()
    return quantize(
        make(shared_model_path, output, budget=BUDGET, generation=ASKED), notes
    ), notes.notes


def test_the_chosen_bits_are_written_with_the_output(mixed: Any) -> None:
    result, notes = mixed
    plain = json.loads((result.output / "qatc.json").read_text())
    chosen, codes = plain["budget"], load_codes(result.output)
    assert plain["recipe"]["weight_bits"] == chosen["weight_bits"]
    assert len({weight.spec.bits for weight in codes.values()}) > 1
    assert all(chosen["weight_bits"].get(n, 4) == w.spec.bits for n, w in codes.items())
    numbers = [weight.codes.numel() for weight in codes.values()]
    bits = sum(w.spec.bits * w.codes.numel() for w in codes.values()) / sum(numbers)
    assert chosen["average"] == pytest.approx(bits) and 3.2 < bits <= BUDGET
    assert any(note.startswith("weights have ") and " 3 bits" in note for note in notes)
    report = (result.output / "report.md").read_text()
    assert f"chosen for a budget of {BUDGET:g}" in report and "at mixed-8-4" in report
    assert "weights of other bits" in (result.output / "README.md").read_text()


def test_its_run_file_repeats_the_bits_without_measuring(
    mixed: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = mixed
    options = yaml.safe_load((result.output / "run.yaml").read_text())
    assert "budget" not in options
    monkeypatch.setattr("qatc.quantize.bit_budget.fit_budget", no_more)
    recipe = Recipe.from_dict(options["recipe"])
    again = quantize(make(shared_model_path, tmp_path / "again", recipe=recipe, generation=ASKED))
    assert weights(again.output) == weights(result.output)


def test_a_resumed_run_goes_on_with_its_bits(
    mixed: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(shared_model_path, tmp_path / "out", budget=BUDGET, generation=ASKED)

    with monkeypatch.context() as patch:
        patch.setattr("qatc.quantize.run.measure_baselines", _stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(config)
    with pytest.raises(ConfigError, match="budget was 3.4 and is 3 now"):
        quantize(dataclasses.replace(config, budget=3))
    monkeypatch.setattr("qatc.quantize.bit_budget.fit_budget", no_more)
    assert weights(quantize(config).output) == weights(mixed[0].output)


def _stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_budget_that_cannot_be_met_is_refused_at_once(tmp_path: Path) -> None:
    for recipe, budget, message in (
        (Recipe(), 1, "2 to 8"),
        (Recipe.from_bits("16-8-4"), 4, "leaves them at 16"),
        (Recipe(weight_bits=(("*", 3),)), 4, "weight_bits"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantizeConfig("some/model", tmp_path, recipe=recipe, budget=budget)
