"""``quantize --fit``: a run with the options that were chosen for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qatc.errors import ConfigError
from qatc.estimate import Setup
from qatc.estimate.fit import OPTIONS, fit
from qatc.estimate.fitting import fitted, setup_of
from qatc.estimate.shapes import read_shape
from qatc.quantize import QuantizeConfig
from qatc.training import TrainingConfig
from tests.estimate.test_shapes import LLAMA_7B


@pytest.fixture
def config(tmp_path: Path) -> QuantizeConfig:
    model = tmp_path / "7B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_7B | {"model_type": "llama"}))
    return QuantizeConfig(str(model), tmp_path / "out", device="cpu", dtype="bfloat16")


def test_every_option_is_one_of_the_training() -> None:
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert {name for option in OPTIONS for name in option.training} <= known


def test_what_fits_is_the_run_itself(config: QuantizeConfig) -> None:
    run, choice = fitted(config, 200e9)
    assert run == config and not choice.options


def test_the_choice_becomes_the_run(config: QuantizeConfig) -> None:
    run, choice = fitted(config, 80e9)
    assert choice.options and run != config
    setup = setup_of(run, read_shape(run.model))
    assert setup == choice.setup
    assert fitted(run, 80e9)[0] == run


def test_a_corpus_that_is_needed_has_to_be_there(
    config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_shape(config.model)
    before = replace(Setup(verify=False), written_before=True)
    choice = fit(shape, before, 200e9)
    monkeypatch.setattr("qatc.estimate.fitting.require_fit", lambda *_: choice)
    with pytest.raises(ConfigError, match="run qatc generate-data --model .* --samples") as raised:
        fitted(config, 200e9)
    assert str(config.data_directory) in str(raised.value)
    monkeypatch.setattr("qatc.estimate.fitting.is_complete", lambda path: True)
    assert fitted(config, 200e9)[1] == choice


def test_what_cannot_fit_is_refused(config: QuantizeConfig) -> None:
    with pytest.raises(ConfigError, match="does not fit into 4.0 GB"):
        fitted(config, 4e9)


def test_a_recorded_teacher_that_is_needed_has_to_be_there(
    config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing the record in the run itself would take both models at once."""
    monkeypatch.setattr("qatc.estimate.fitting.setup_of", lambda *_: Setup())
    with pytest.raises(ConfigError, match="generate-data --model .* --record-logits 32") as raised:
        fitted(config, 24e9)
    assert str(config.data_directory) in str(raised.value)


@pytest.mark.parametrize(
    "told, closed",
    [
        ({"loss": "logits+hidden"}, ("teacher",)),
        ({"loss_chunk": 0}, ("loss_chunk",)),
        ({"loss": "label"}, ()),
    ],
)
def test_what_a_run_would_refuse_is_not_chosen(
    config: QuantizeConfig, told: dict[str, object], closed: tuple[str, ...]
) -> None:
    run = replace(config, training=replace(config.training, **told))  # type: ignore[arg-type]
    assert setup_of(run, read_shape(run.model)).closed == closed
    wide = fit(read_shape(run.model), replace(Setup(), closed=closed), 36e9)
    assert wide is None or not {c for o in wide.options for c in o.changes} & {*closed}


def test_masters_in_bf16_are_not_chosen_for_a_run_in_fp32(config: QuantizeConfig) -> None:
    found = setup_of(replace(config, dtype="float32"), read_shape(config.model))
    choice = fit(read_shape(config.model), found, 110e9)
    assert choice is not None and choice.setup.master_dtype == "float32"


def test_parts_are_not_reckoned_with(config: QuantizeConfig) -> None:
    part = replace(config, training=replace(config.training, train="norms"))
    with pytest.raises(ConfigError, match="--fit reckons with a training of everything"):
        fitted(part, 80e9)


def test_updates_are(config: QuantizeConfig) -> None:
    """They fit where everything does not."""
    updates = replace(config, training=replace(config.training, train="lora", lora_rank=8))
    run, choice = fitted(updates, 80e9)
    assert choice.setup.lora_rank == 8 and choice.added < fitted(config, 80e9)[1].added
    assert run.training.train == "lora"
