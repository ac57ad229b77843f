"""A finished run on a tiny model, and runs that end before."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatc.data.config import CorpusConfig
from qatc.progress import Observer
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from tests.conftest import made_once


def make(model: Path, output: Path, **changes: Any) -> QuantizeConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "recipe": Recipe.from_bits("4-8-4"),
        "generation": CorpusConfig(sequences=24, max_length=16, batch_size=8, shard_size=8),
        "training": TrainingConfig(steps=6, batch_size=4, checkpoint_every=2),
        "eval_sequences": 8,
        "compile": False,
        "verify": False,  # seconds a run; tests of the gate ask for it
    }
    return QuantizeConfig(**(settings | changes))


@pytest.fixture(scope="session")
def done(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run."""

    def run(directory: Path) -> None:
        result = quantize(make(shared_model_path, directory / "out", verify=True))
        (directory / "result").write_bytes(pickle.dumps(result))

    directory = made_once(tmp_path_factory, "quantized", run)
    return pickle.loads((directory / "result").read_bytes())


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


class Stopped(BaseException):
    """Stands for a kill."""


def no_more(*args: Any, **kwargs: Any) -> None:
    pytest.fail("computed again")


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class AfterStep(Observer):
    """Does something at the end of a step of the training, before its checkpoint is written."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def trained(self, metrics: Any, total: int) -> None:
        if metrics.step == self.step:
            self.act()


class NothingTrained(Observer):
    """Fails where a step is taken."""

    def trained(self, metrics: Any, total: int) -> None:
        no_more()


class NothingComputed(NothingTrained):
    """Fails where a step is taken or a row evaluated."""

    def evaluated(self, done: int, total: int) -> None:
        no_more()


class NothingBegun(Observer):
    """Fails where a first stage begins."""

    def stage(self, title: str) -> None:
        pytest.fail(f"{title}: refused too late")


def interrupted(config: QuantizeConfig, step: int = 5) -> None:
    """Run until this step, which is in no checkpoint."""

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        quantize(config, AfterStep(step, stop))


@pytest.fixture
def config(tmp_path: Path) -> QuantizeConfig:
    return QuantizeConfig("some/model", tmp_path / "out")
