"""Runs that train layer after layer, or less than everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qatc.output import open_output
from qatc.progress import Observer
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig, as_options
from qatc.recipe.recipe import Recipe
from qatc.report.first_steps import StepCost
from qatc.training.config import TrainingConfig
from tests.quantize.conftest import Notes, NothingTrained, Stopped, interrupted, make, weights

TRAINING = TrainingConfig(
    steps=4, blockwise_steps=3, batch_size=4, checkpoint_every=2, train="blockwise+full"
)


class AtLayer(Observer):
    """Stops a run at a step of a layer."""

    def __init__(self, layer: int, step: int) -> None:
        self.at = layer, step

    def trained_layer(self, metrics: Any, layers: int, steps: int) -> None:
        assert (layers, steps) == (2, 3)
        if (metrics.layer, metrics.step) == self.at:
            raise Stopped


@pytest.fixture(scope="module")
def both(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of both stages."""
    output = tmp_path_factory.mktemp("blockwise") / "out"
    return quantize(make(shared_model_path, output, training=TRAINING))


def test_both_stages(both: Any) -> None:
    report = (both.output / "report.md").read_text()
    assert "First, each of 2 decoder layers was trained for 3 steps, one after the" in report
    assert "\n4 steps, " in report and "loss `logits`" in report
    lines = (both.output / "blockwise.jsonl").read_text().splitlines()
    assert [json.loads(line)["layer"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert len((both.output / "metrics.jsonl").read_text().splitlines()) == 4


class Ahead(Notes):
    """Stops a run once it has said what is ahead."""

    def stage(self, title: str) -> None:
        if title.startswith("Evaluating"):
            raise Stopped


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ("blockwise", ["training 2 layers for 3 steps of 4 x 16 each: 192 tokens, about 7 min"]),
        (
            "blockwise+full",
            [
                "training 2 layers for 3 steps of 4 x 16 each: 192 tokens, about 7 min",
                "training 4 steps of 4 x 16: 256 tokens, about 2 min",
            ],
        ),
    ],
)
def test_what_is_ahead_of_both_stages(
    both: Any,
    shared_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    wanted: list[str],
) -> None:
    """Six steps of 30 s, and what layers read: two models by six batches of 10 s, twice."""
    took: list[bool] = []

    def measured(*args: Any, backward: bool = True) -> StepCost:
        took.append(backward)
        return StepCost(10.0, 30.0)

    monkeypatch.setattr("qatc.quantize.forecast.measure_step", measured)
    training = replace(TRAINING, train=train)
    config = make(shared_model_path, tmp_path / "out", training=training, data=both.data)
    seen = Ahead()
    with pytest.raises(Stopped):
        quantize(config, seen)
    ahead = [n.partition(";")[0] for n in seen.notes if n.startswith("training ")][1:]
    assert ahead == wanted
    assert took == [True, train == "blockwise+full"], "else it is only run end to end"


def test_its_run_file_says_so() -> None:
    options = as_options(QuantizeConfig("m", Path("o"), training=TRAINING))
    assert options is not None
    assert options["train"] == "blockwise+full" and options["blockwise-steps"] == 3


def test_an_interrupted_run_ends_the_same(
    both: Any, shared_model_path: Path, tmp_path: Path
) -> None:
    config = make(shared_model_path, tmp_path / "out", training=TRAINING, data=both.data)
    with pytest.raises(Stopped):
        quantize(config, AtLayer(2, 3))
    assert weights(quantize(config).output) == weights(both.output)


def test_layers_alone(both: Any, shared_model_path: Path, tmp_path: Path) -> None:
    training = replace(TRAINING, train="blockwise")
    config = make(shared_model_path, tmp_path / "out", training=training, data=both.data)
    output = quantize(config, NothingTrained()).output
    assert not (output / "metrics.jsonl").exists() and not (output / "loss.png").exists()
    report = (output / "report.md").read_text()
    assert "Each of 2 decoder layers was trained for 3 steps" in report and "In all " in report
    name = "model.embed_tokens.weight"
    before = AutoModelForCausalLM.from_pretrained(shared_model_path).state_dict()
    assert torch.equal(open_output(output).state[name], before[name])


def test_updates_of_weights(both: Any, shared_model_path: Path, tmp_path: Path) -> None:
    training = TrainingConfig(steps=3, batch_size=4, train="lora", lora_rank=2, checkpoint_every=2)
    config = make(shared_model_path, tmp_path / "out", training=training, data=both.data)
    interrupted(config, step=3)
    result = quantize(config)
    assert "\n3 steps of updates of rank 2 alone, " in (result.output / "report.md").read_text()
    (figures,) = result.figures.values()
    assert figures["QAT"].kl != figures["RTN"].kl
    whole = quantize(replace(config, output=tmp_path / "whole"))
    assert weights(whole.output) == weights(result.output) and whole.figures == result.figures
    options = as_options(QuantizeConfig("m", Path("o"), training=training))
    assert options is not None and (options["train"], options["lora-rank"]) == ("lora", 2)


@pytest.mark.parametrize("train", ["scales", "norms"])
def test_less_than_everything(
    both: Any, shared_model_path: Path, tmp_path: Path, train: str
) -> None:
    config = make(
        shared_model_path,
        tmp_path / "out",
        training=TrainingConfig(steps=2, batch_size=4, train=train),
        data=both.data,
        recipe=Recipe.from_bits("4-8-4", preset="best"),
    )
    output = quantize(config).output
    assert f"\n2 steps of {train} alone, " in (output / "report.md").read_text()
