"""Small random models and what is computed with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatc.recipe.recipe import Recipe

FLOAT = Recipe.from_bits("16-16-16")
QUANTIZED = Recipe.from_bits("4-8-4")


@pytest.fixture(autouse=True)
def _captured_anew(captured_anew: None) -> None:
    """How captures are made is what is tested here."""


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(rows))


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **kwargs).logits
    return out


def padded() -> tuple[Tensor, Tensor]:
    """Ids and mask of three rows: whole, padded on the left, padded on the right."""
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    return ids, mask


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=ids).logits.float()
    F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class Factor(nn.Module):
    """Multiplies by a factor that an attribute holds in some way."""

    def __init__(self, inner: nn.Module, held: Any) -> None:
        super().__init__()
        self.inner, self.held = inner, held

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * _factor(self.held)
        return out


def _factor(held: Any) -> float:
    if isinstance(held, dict):
        return float(held["factor"])
    if isinstance(held, (tuple, list)):
        return _factor(held[0])
    return float(getattr(held, "factor", held))
