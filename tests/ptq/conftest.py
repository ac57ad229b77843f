"""Calibration rows for tiny models, and what a model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatc.data.corpus import Rows
from tests.conftest import make_small

VOCABULARY = 40


def make_rows(count: int = 8, length: int = 24) -> Rows:
    """Rows of one sequence each; the rest is padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCABULARY, (count, length), dtype=np.int32)
    real = np.arange(length) < random.integers(5, length + 1, (count, 1))
    return Rows((tokens * real).astype(np.int32), real.astype(np.int32), real)


def make_model(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model whose vectors (weights of norms, biases) are none of zeros and ones."""
    model = make_small(kind, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What the model answers to some tokens, ``[2, 24, V]``."""
    ids = torch.from_numpy(make_rows(2).tokens).long()
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def assert_same_function(model: Any, before: Tensor) -> None:
    """To 1e-5 of the largest logit."""
    difference = (logits(model) - before).abs().max() / before.abs().max()
    assert difference < 1e-5
