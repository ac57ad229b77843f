"""``quantize --fit``: a run with the options that were chosen for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qatc.errors import ConfigError
from qatc.estimate import Setup
from qatc.estimate.fit import OPTIONS
from qatc.estimate.fitting import fitted, setup_of
from qatc.estimate.parts import chunk_of
from qatc.estimate.shapes import read_shape
from qatc.losses.chunks import chunk_size
from qatc.quantize import QuantizeConfig
from qatc.training import TrainingConfig
from tests.estimate.shapes import llama_7b
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


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("asked", [None, 0, 100])
def test_chunks_are_those_that_the_training_takes(rows: int, asked: int | None) -> None:
    for vocabulary in (512, 32000, 128256):
        shape = replace(llama_7b(), vocabulary=vocabulary)
        setup = Setup(batch_size=rows, loss_chunk=asked)
        assert chunk_of(shape, setup) == chunk_size(asked, setup.tokens, vocabulary)


def test_what_fits_is_the_run_itself(config: QuantizeConfig) -> None:
    run, choice = fitted(config, 200e9)
    assert run == config and not choice.options


def test_the_choice_becomes_the_run(config: QuantizeConfig) -> None:
    run, choice = fitted(config, 80e9)
    assert choice.options and run != config
    setup = setup_of(run, read_shape(run.model))
    assert setup == choice.setup
    assert fitted(run, 80e9)[0] == run


def test_what_cannot_fit_is_refused(config: QuantizeConfig) -> None:
    with pytest.raises(ConfigError, match="does not fit into 4.0 GB"):
        fitted(config, 4e9)
