"""Outputs of every kind, and what their models compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatc.models.pipelines import recipe_allows_integers
from qatc.models.preparation import prepare
from qatc.output import load_reference, open_output
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.runtime.cache import PackedLayer
from qatc.runtime.cuda import arena
from tests.conftest import make_output

RECIPES = {
    "4-8-4": Recipe.from_bits("4-8-4"),
    "8-8-8": Recipe.from_bits("8-8-8"),
    "3-6-5": Recipe.from_bits("3-6-5"),
    "4-8-16": Recipe.from_bits("4-8-16"),
    "4-16-8": Recipe.from_bits("4-16-8"),
    "4-8-K8V3": Recipe.from_bits("4-8-8", value_bits=3),
    "16-8-2": Recipe.from_bits("16-8-2"),
    "groups": dataclasses.replace(Recipe.from_bits("4-8-4"), weights=QuantSpec(4, 16)),
    "full": dataclasses.replace(
        Recipe.from_bits("4-8-8"),
        activations=QuantSpec(8, None, "full"),
        kv=QuantSpec(8, None, "full"),
    ),
}
IDS = torch.randint(2, 112, (3, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """One output for every recipe."""
    root = tmp_path_factory.mktemp("outputs")
    return {
        name: make_output(root / name, recipe, tokenizer=tokenizer)
        for name, recipe in RECIPES.items()
    }


def trained(directory: Path) -> Any:
    """The graph that was trained, uncompiled, with its integer forward where it has one."""
    recipe = open_output(directory).recipe
    integers = recipe_allows_integers(recipe)
    return prepare(load_reference(directory), recipe, compile=False, integer_forward=integers)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return result


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, chunks: list[int], cache: Any = None) -> Tensor:
    """The logits of a text that is fed in pieces, through a cache."""
    found, start = [], 0
    for size in chunks:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
        start += size
    return torch.cat(found, 1)


def left_padded(lengths: list[int]) -> dict[str, Tensor]:
    width = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, width - length :] = IDS[row, :length]
        mask[row, width - length :] = 1
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)
    }  # fmt: skip


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few slots, and as many for the model's own steps, whose sums are then the very same."""
    monkeypatch.setattr(arena, "FIRST_BUCKET", 8)
    monkeypatch.setattr(
        PackedLayer, "slots_read", lambda self, new: arena.bucket(self.length + new)
    )
