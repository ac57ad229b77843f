"""The compiled teacher gives what the plain one does, and is plain again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatc.models.preparation import can_compile
from qatc.training.teacher import compiled_layers
from tests.conftest import make_llama


@pytest.mark.skipif(not can_compile(), reason="no compiler")
def test_it_says_what_the_plain_teacher_says() -> None:
    teacher = make_llama()
    ids = torch.randint(3, teacher.config.vocab_size, (2, 24))
    reference = teacher.double()(input_ids=ids).logits
    plain = teacher.float()(input_ids=ids).logits
    layer = teacher.model.layers[0]
    with torch.no_grad(), compiled_layers(teacher, True):
        assert "forward" in vars(layer)
        found = teacher(input_ids=ids, use_cache=False).logits
    error, allowed = (found - reference).abs().max(), (plain - reference).abs().max()
    assert error <= 4 * allowed + 1e-7
    assert "forward" not in vars(layer)
    assert torch.equal(teacher(input_ids=ids).logits, plain)


@pytest.mark.parametrize("compile", [True, False])
def test_what_is_left_as_it_is(compile: bool) -> None:
    teacher = nn.Linear(4, 4) if compile else make_llama()
    with compiled_layers(teacher, compile):
        assert all("forward" not in vars(module) for module in teacher.modules())


def test_no_teacher_at_all() -> None:
    with compiled_layers(None, True):
        pass
