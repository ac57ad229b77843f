"""How far a model moves another's answers by the end of each layer."""

from __future__ import annotations

import copy

import pytest
import torch

from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.sensitivity.answers import Answers
from tests.sensitivity.conftest import make_model, make_rows


@torch.no_grad()
def test_divergence_by_depth_is_that_of_a_model_of_two_parts() -> None:
    """Its first layers and embedding from one model, the others and the head from the other."""
    model, rows = make_model(), make_rows()
    other = copy.deepcopy(model)
    for number, parameter in enumerate(other.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter += 0.02 * noise
    plain = copy.deepcopy(model).double()
    ids, real = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.real)
    before = plain(input_ids=ids, use_cache=False).logits[real].log_softmax(-1)
    wanted = []
    for end in range(1, len(model.model.layers) + 1):
        mixed = copy.deepcopy(plain)
        mixed.set_input_embeddings(copy.deepcopy(other.get_input_embeddings()).double())
        mixed.lm_head = copy.deepcopy(plain.lm_head)
        for number in range(end):
            mixed.model.layers[number] = copy.deepcopy(other.model.layers[number]).double()
        after = mixed(input_ids=ids, use_cache=False).logits[real].log_softmax(-1)
        wanted.append(float((before.exp() * (before - after)).sum(-1).mean()))
    found = Answers(model, rows, batch_size=2).divergence_by_depth(other)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert min(abs(a - b) / b for a, b in zip(wanted[1:], wanted, strict=False)) > 0.01


def test_what_is_quantized_and_computes_in_bf16() -> None:
    model, rows = make_model(), make_rows()
    student = prepare(make_model(), Recipe.from_bits("4-8-4"), compile=False)
    answers = Answers(model, rows, batch_size=3)
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    exact = answers.divergence_by_depth(student)
    rounded = answers.divergence_by_depth(student, lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(exact) == 3 and 0 < exact[0] < exact[-1]
    assert rounded == pytest.approx(exact, rel=0.3)
    assert [vars(layer).get("forward") for layer in model.model.layers] == forwards
    assert answers.divergence() == 0
