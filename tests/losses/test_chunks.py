"""Losses in chunks of tokens are those of whole logits, in value and gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatc.losses.chunks import Chunks, chunk_size, find_chunks
from qatc.losses.objective import distillation_losses
from qatc.losses.tails import Tail, check
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from tests.conftest import make_llama, make_small
from tests.training.conftest import CONFIG, distiller, losses

IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(7) < torch.tensor([[7], [4], [6]])
LABELLED = REAL & (torch.arange(7) > 1) & (torch.arange(7) < torch.tensor([[6], [3], [5]]))
MIX = {"logits": 0.25, "label": 0.5, "reverse": 1.5}


def pair(vocabulary: int = 40, **changes: Any) -> Any:
    student = make_llama(vocabulary, **changes)
    teacher = copy.deepcopy(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, teacher


def gradients(student: Any, teacher: Any, mix: Any, size: int, **how: Any) -> Any:
    """Weighted sum, KL and gradients by name."""
    student.zero_grad()
    autocast = how.get("autocast", nullcontext)
    chunks = Chunks(Tail(student, autocast), Tail(teacher), size) if size else None
    found, kl = distillation_losses(
        student, teacher, IDS, REAL, LABELLED, [*mix], chunks=chunks, mix=mix, **how
    )
    total = torch.stack([mix[name] * value for name, value in found.items()]).sum()
    total.backward()
    own = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return float(total.detach()), float(kl), own


def assert_alike(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert found[:2] == pytest.approx(expected[:2], rel=rtol)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        error = (found[2][name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < rtol, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "mix", [{"logits": 0.1}, MIX, {"label": 2.0, "hidden": 0.5, "attention": 3.0}]
)
def test_chunks_are_the_whole(tied: bool, mix: dict[str, float]) -> None:
    student, teacher = pair(tie_word_embeddings=tied)
    whole = gradients(student, teacher, mix, 0)
    for size in (1, 5, 21, 64):
        assert_alike(gradients(student, teacher, mix, size), whole)


def test_gradient_in_float64() -> None:
    """Of the soft cross-entropy, by hand: softmax of the student less the teacher's."""
    student, teacher = pair(tie_word_embeddings=False)
    _, _, found = gradients(student, teacher, {"logits": 1.0}, 4)
    exact, other = (copy.deepcopy(model).double() for model in (student, teacher))
    hidden = exact.model(input_ids=IDS).last_hidden_state[REAL]
    with torch.no_grad():
        target = other(input_ids=IDS).logits[REAL].softmax(-1)
        difference = (hidden @ exact.lm_head.weight.T).softmax(-1) - target
    assert_alike((0, 0, {"w": found["lm_head.weight"]}), (0, 0, {"w": difference.T @ hidden}), 1e-5)
    exact.zero_grad()
    hidden.backward(difference @ exact.lm_head.weight)
    expected = {n: p.grad for n, p in exact.model.named_parameters()}
    own = {n.removeprefix("model."): g for n, g in found.items() if n != "lm_head.weight"}
    assert_alike((0, 0, own), (0, 0, expected), 1e-5)


@pytest.mark.parametrize("recipe", [{}, {"head_bits": 8}])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_of_a_quantized_student(
    recipe: dict[str, Any], compute: torch.dtype | None, compile: bool
) -> None:
    """Masters in fp32, the head plain or quantized, computed in fp32 or bf16."""
    if compile and (recipe or compute):
        pytest.skip("one compiled case")
    student, teacher = pair(tie_word_embeddings=False)
    prepare(student, Recipe.from_bits("4-8-4", **recipe), compile=False, compute_dtype=compute)
    autocast = nullcontext if compute is None else partial(torch.autocast, "cpu", compute)
    how: dict[str, Any] = {"autocast": autocast, "compile": compile}
    mix = {"logits": 0.5} if compile else MIX  # each compiled loss takes seconds
    whole = gradients(student, teacher, mix, 0, **how)
    for size in (5, 21):
        found = gradients(student, teacher, mix, size, **how)
        assert_alike(found, whole, 1e-5 if compute is None else 2e-2)


def test_bfloat16_masters_add_up_their_gradient_in_float32() -> None:
    student, teacher = (model.bfloat16() for model in pair(tie_word_embeddings=False))
    whole, found = (gradients(student, teacher, {"logits": 1.0}, size) for size in (0, 1))
    assert found[2]["lm_head.weight"].dtype is torch.bfloat16
    assert_alike(found, whole, 1e-2)


def test_a_frozen_head_has_no_gradient() -> None:
    student, teacher = pair(tie_word_embeddings=False)
    student.lm_head.weight.requires_grad_(False)
    whole, found = (gradients(student, teacher, {"logits": 1.0}, size) for size in (0, 5))
    assert "lm_head.weight" not in found[2]
    assert_alike(found, whole)


def test_never_more_logits_than_of_a_chunk() -> None:
    sizes: list[int] = []
    student, teacher = pair()
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda *call: sizes.append(call[-1].shape[-2]))
    gradients(student, teacher, {"logits": 1.0}, 5)
    assert sorted(sizes) == [1] * 2 + [5] * 8


ARCHITECTURES = [
    *("llama", "qwen3", "gemma2", "granite", "cohere", "gpt_neox", "opt", "gpt2", "phi"),
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_come_from_the_models_own_code(kind: str) -> None:
    """Capped, scaled and turned logits, biases, and heads by other names."""
    own: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
        "granite": {"logits_scaling": 7.0},
        "cohere": {"logit_scale": 0.1},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    }
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = make_small(kind, attention=attention, **own.get(kind, {}))
    tail = Tail(model)
    assert check(tail, IDS) is None
    assert "forward" not in vars(model).keys() | vars(tail.trunk).keys(), "left as it was"


class TestFallsBack:
    def find(self, student: Any, teacher: Any) -> tuple[Any, list[str]]:
        said: list[str] = []
        found = find_chunks(student, teacher, IDS, 4, 21, note=said.append)
        return found, said

    def test_not_where_all_is_well(self) -> None:
        found, said = self.find(*pair())
        assert found is not None and found.size == 4 and not said

    def test_a_tail_that_reads_more_than_hidden_states(self) -> None:
        student, teacher = pair()
        forward = type(student).forward

        def with_a_bonus(**call: Any) -> Any:
            out = forward(student, **call)
            out.logits = out.logits + call["input_ids"].float().mean()
            return out

        student.forward = with_a_bonus
        found, (line,) = self.find(student, teacher)
        assert found is None and "the student's tail" in line and "logits differ by" in line

    def test_a_model_that_transformers_does_not_know(self) -> None:
        teacher = pair()[1]
        found, (line,) = self.find(nn.Linear(2, 2), teacher)
        assert found is None and "whole logits" in line


@pytest.mark.parametrize(
    ("asked", "tokens", "vocabulary", "size"),
    [
        (None, 2048, 512, 0),
        (None, 2048, 49_152, 256),
        (None, 2048, 128_256, 128),
        (None, 2048, 2**30, 16),
        (0, 2048, 128_256, 0),
        (7, 10, 10, 7),
    ],
)
def test_size_of_a_chunk(asked: int | None, tokens: int, vocabulary: int, size: int) -> None:
    assert chunk_size(asked, tokens, vocabulary) == size


def test_a_run_in_chunks(tmp_path: Path) -> None:
    whole = distiller(tmp_path / "whole")
    parts = distiller(tmp_path / "parts", replace(CONFIG, loss_chunk=10))
    assert whole.chunks is None and parts.chunks is not None
    for a, b in zip(losses(whole.run()), losses(parts.run()), strict=True):
        assert (b.loss, b.kl) == pytest.approx((a.loss, a.kl), rel=1e-3)


@pytest.mark.parametrize("compile", [False, True])
def test_checkpointed_activations_have_the_same_gradients(compile: bool) -> None:
    """Bit for bit, and what is kept for the backward pass is the layers' inputs and little more."""
    found: list[Any] = []
    kept: list[int] = []
    for checkpoint in (False, True):
        student, teacher = pair()
        own = {p.data_ptr() for p in student.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, own: Any = own, storages: Any = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        recipe = Recipe.from_bits("4-8-4")
        prepare(student, recipe, compile=compile, checkpoint_activations=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student.model(input_ids=IDS, use_cache=False)
        kept.append(sum(storages.values()))
        mix = {"logits": 0.5} if compile else {"logits": 0.5, "hidden": 1.0, "attention": 0.1}
        found.append(gradients(student, teacher, mix, 0))
    assert found[0][:2] == found[1][:2]
    for name, gradient in found[0][2].items():
        assert torch.equal(found[1][2][name], gradient), name
    assert kept[1] < 0.3 * kept[0]


def test_without_gradients() -> None:
    student, teacher = pair()
    chunks = Chunks(Tail(student), Tail(teacher), 5)
    with torch.no_grad():
        values, kl = distillation_losses(
            student, teacher, IDS, REAL, LABELLED, ["logits"], chunks=chunks
        )
    assert not values["logits"].requires_grad and not kl.requires_grad
