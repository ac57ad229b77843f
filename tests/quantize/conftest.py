"""A finished run on a tiny model, and runs that end before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatc.data.config import CorpusConfig
from qatc.progress import Observer
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.distill import TrainingConfig


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
    output = tmp_path_factory.mktemp("quantize") / "out"
    return quantize(make(shared_model_path, output, verify=True))


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
