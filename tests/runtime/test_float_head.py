"""The head in float: the same numbers, without a copy of its weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qatc
from qatc.recipe.recipe import Recipe
from qatc.runtime.float_head import flatten_head
from tests.conftest import make_llama, make_output


class Batches(TorchDispatchMode):
    """Counts products of batches of matrices, which make a contiguous copy of what they get."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_a_prefill_copies_no_head(tie: bool, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=tie)
    loaded: Any = qatc.load(
        make_output(tmp_path / "o", Recipe.from_bits("4-8-4"), model), compile=False
    )
    ids = torch.randint(2, 112, (1, 12))
    hidden = loaded.model(input_ids=ids).last_hidden_state
    weight = loaded.lm_head.weight
    with Batches() as batches:
        logits = loaded(input_ids=ids, logits_to_keep=1).logits
    assert batches.found == 0
    wanted = hidden[:, -1:].double() @ weight.double().t()
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-6)
    plain = torch.nn.Linear(32, 112, bias=False)
    plain.weight = weight
    with Batches() as batches:
        plain(hidden[:, -1:])
    assert batches.found == 1, "else there is nothing to avoid any more"


@torch.no_grad()
def test_shapes_and_copies_of_the_model() -> None:
    model = make_llama(tie_word_embeddings=False)
    inputs = [torch.randn(shape) for shape in ((32,), (3, 32), (2, 3, 32), (2, 0, 32))]
    wanted = [model.lm_head(x) for x in inputs]
    flatten_head(model)
    for x, y in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(model.lm_head(x), y)
    other = copy.deepcopy(model)
    other.lm_head.weight.zero_()
    assert not other.lm_head(inputs[1]).any() and model.lm_head(inputs[1]).any()
