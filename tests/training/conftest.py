"""A short training of a tiny student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatc.data.corpus import Rows
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from tests.conftest import make_llama

CONFIG = TrainingConfig(steps=12, batch_size=4, learning_rate=1e-2, checkpoint_every=4)
VOCABULARY = 40


def make(seed: int = 0) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return make_llama(VOCABULARY, seed, tie_word_embeddings=False, **sizes)


def make_rows(count: int = 16, length: int = 12, longest: int = 12) -> Rows:
    """Rows of one sequence each, of 3 to ``longest`` tokens; the rest is padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCABULARY, (count, length), dtype=np.int32)
    real = np.arange(length) < random.integers(3, longest + 1, (count, 1))
    return Rows((tokens * real).astype(np.int32), real.astype(np.int32), real)


def distiller(directory: Path, config: TrainingConfig = CONFIG, rows: Rows | None = None) -> Any:
    return Distiller(make(1), make(0), rows or make_rows(), config, directory)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def losses(history: list[StepMetrics]) -> list[StepMetrics]:
    """All but the seconds."""
    return [replace(record, seconds=0.0) for record in history]


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], **how: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(how or {"rtol": 0, "atol": 0}))
