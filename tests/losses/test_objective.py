"""Losses and their sums: what they read, what they mean, and how they are trained on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.losses.distances import soft_cross_entropy
from qatc.losses.objective import TERMS, Term, distillation_losses, parse_loss
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from tests.conftest import kill_at_call, make_llama, make_small, run_until_killed
from tests.training.conftest import (
    CONFIG,
    assert_equal,
    distiller,
    losses,
    make,
    make_rows,
    weights,
)

IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(7) < torch.tensor([[7], [4], [6]])
LABELLED = REAL & (torch.arange(7) > 1) & (torch.arange(7) < torch.tensor([[6], [3], [5]]))


def found(student: nn.Module, teacher: nn.Module, ids: Tensor = IDS, **how: Any) -> Any:
    return distillation_losses(student, teacher, ids, REAL, LABELLED, TERMS, **how)


def wanted(student: Any, teacher: Any) -> dict[str, Tensor]:
    """Every term by its definition, in float64, from what transformers itself gives out.

    The student is a copy in float64, the gradients of which are its.
    """

    def outputs(model: Any) -> Any:
        model.set_attn_implementation("eager")
        layers: list[Tensor] = []
        for layer in model.model.layers:  # the last of hidden_states is behind the final norm
            layer.register_forward_hook(
                lambda layer, args, out: layers.append(out[0] if isinstance(out, tuple) else out)
            )
        return model(input_ids=IDS, use_cache=False, output_attentions=True), layers

    own, own_layers = outputs(student)
    with torch.no_grad():
        its, its_layers = outputs(copy.deepcopy(teacher).double())
    q, p = own.logits.softmax(-1)[REAL], its.logits.softmax(-1)[REAL]
    label = sum(
        -own.logits[b, t].log_softmax(-1)[IDS[b, t + 1]] for b, t in LABELLED.nonzero().tolist()
    )
    hidden = [
        sum(((a[b, t] - c[b, t]).norm() / c[b, t].norm()) ** 2 for b, t in REAL.nonzero().tolist())
        for a, c in zip(own_layers, its_layers, strict=True)
    ]
    maps = []
    for a, c in zip(own.attentions, its.attentions, strict=True):
        logs = (c.clamp(min=1e-300).log() - a.clamp(min=1e-300).log()).where(c > 0, 0)
        divergence = (c * logs).sum(-1)  # B, H, T
        maps.append(divergence.mean(1)[REAL].sum())
    return {
        "logits": -(p * q.log()).sum(),
        "label": torch.as_tensor(label),
        "hidden": torch.stack([torch.as_tensor(h) for h in hidden]).mean(),
        "attention": torch.stack(maps).mean(),
        "reverse": (q * (q / p).log()).sum(),
    }


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt_neox"])
def pair(request: pytest.FixtureRequest) -> Any:
    """Student and teacher; with grouped queries, and of an architecture without."""
    kind = request.param
    sizes: dict[str, Any] = {} if kind == "gpt_neox" else {"head_dim": 8}
    models = [make_small(kind, **sizes) for _ in range(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for model in models if kind == "gpt_neox" else ():
        model.model = model.gpt_neox  # the name that the reference knows
    return models


@pytest.mark.parametrize("compile", [False, True])
def test_terms_are_those_of_their_definitions(pair: Any, compile: bool) -> None:
    with torch.no_grad():
        values, kl = found(*pair, compile=compile)
    with torch.no_grad():
        reference = wanted(copy.deepcopy(pair[0]).double(), pair[1])
    assert set(values) == set(TERMS)
    for name, value in values.items():
        assert float(value) == pytest.approx(float(reference[name]), rel=2e-4), name
    entropy = float(soft_cross_entropy(*[pair[1](input_ids=IDS).logits[REAL]] * 2)[0])
    assert float(kl) == pytest.approx(float(reference["logits"]) - entropy, rel=1e-3)


@pytest.mark.parametrize("name", TERMS)
def test_padding_and_what_stands_there_do_not_count(pair: Any, name: str) -> None:
    """Neither in the value nor in the gradient."""
    gradients = []
    others = IDS.where(REAL, 39 - IDS)
    for ids in IDS, others:
        values, kl = distillation_losses(pair[0], pair[1], ids, REAL, LABELLED, [name])
        pair[0].zero_grad()
        values[name].backward()
        flat = [p.grad.flatten() for p in pair[0].parameters() if p.grad is not None]
        gradients.append(torch.cat([*flat, values[name].detach()[None], kl[None]]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_gradient_is_that_of_the_term(pair: Any, name: str) -> None:
    student: nn.Module
    teacher: nn.Module
    student, teacher = pair
    values, _ = distillation_losses(student, teacher, IDS, REAL, LABELLED, [name])
    student.zero_grad()
    values[name].backward()
    exact = copy.deepcopy(student).double()
    exact.zero_grad()
    wanted(exact, teacher)[name].backward()
    for (own, parameter), other in zip(student.named_parameters(), exact.parameters(), strict=True):
        gradient = torch.zeros_like(other) if parameter.grad is None else parameter.grad.double()
        reference = torch.zeros_like(other) if other.grad is None else other.grad
        error = (gradient - reference).norm() / max(float(reference.norm()), 1e-2)
        assert error < 1e-4, own
    assert all(p.grad is None for p in teacher.parameters())


def test_of_a_prepared_student() -> None:
    """Hooks see what the captured graph computes; a student that is not rounded equals it."""
    teacher = make_small("llama")
    rounded: Any = prepare(make_small("llama"), Recipe.from_bits("4-8-4"), compile=False)
    values, _ = found(rounded, teacher)
    assert all(float(value) > 1e-3 for value in values.values())
    for value in values.values():
        rounded.zero_grad()
        value.backward(retain_graph=True)
        assert all(
            layer.self_attn.k_proj.weight.grad.norm() > 0 for layer in rounded.model.layers[:-1]
        )
    same, _ = found(make_small("llama"), teacher)
    for name in ("hidden", "attention", "reverse"):
        assert abs(float(same[name])) < 1e-5


def test_of_a_compiled_student() -> None:
    """The compiler traces what watches the attention, on every call."""
    teacher, seen = make_small("llama"), []
    for compile in False, True:
        student: Any = prepare(make_small("llama"), Recipe.from_bits("4-8-4"), compile=compile)
        for ids in IDS, 39 - IDS:
            terms = ["hidden", "attention"]
            values, _ = distillation_losses(student, teacher, ids, REAL, LABELLED, terms)
            student.zero_grad()
            torch.stack(list(values.values())).sum().backward()
            gradient = [p.grad.flatten() for p in student.model.layers.parameters()]
            seen.append(torch.cat([*(v.detach()[None] for v in values.values()), *gradient]))
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[3], seen[1], rtol=1e-3, atol=1e-4)


def test_attention_that_is_not_sdpa() -> None:
    student, teacher = make_small("llama"), make_small("llama", attention="eager")
    with pytest.raises(ConfigError, match="of which the student shows 2 and the teacher 0"):
        distillation_losses(student, teacher, IDS, REAL, LABELLED, ["attention"])


def test_in_bf16_over_masters() -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    student = prepare(
        make_llama(40),
        Recipe.from_bits("8-16-16"),
        compile=False,
        compute_dtype=torch.bfloat16,
    )
    values, _ = found(student, make_llama(40).bfloat16(), autocast=autocast)
    for name in ("hidden", "attention", "reverse"):
        assert values[name].dtype is torch.float32 and 0 < float(values[name]) < 2, name


class TestTraining:
    def test_logits_are_trained_on_as_ever(self, tmp_path: Path) -> None:
        """The loss by itself, bit for bit: cross-entropy over tokens, AdamW, cosine."""
        run = distiller(tmp_path, replace(CONFIG, accumulate=2))
        student, teacher, rows = make(1), make(0), make_rows()
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        for step, record in enumerate(run.run(), 1):
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 12))
            batches = [rows[numbers] for numbers in run._batches(step)]
            tokens, loss = sum(int(b.real.sum()) for b in batches), 0.0
            for batch in batches:
                ids = torch.from_numpy(batch.tokens).long()
                with torch.no_grad():
                    target = teacher(input_ids=ids).logits.flatten(0, 1)
                logits = student(input_ids=ids).logits.flatten(0, 1)
                real = torch.from_numpy(batch.real).flatten()
                value, _ = soft_cross_entropy(logits, target, real)
                (value / tokens).backward()
                loss += float(value) / tokens
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert record.loss == loss
        assert_equal(weights(run.student), weights(student))

    @pytest.mark.parametrize("loss", ["label", "hidden", "attention", "reverse", "logits+2*label"])
    def test_accumulation_equals_a_larger_batch(self, tmp_path: Path, loss: str) -> None:
        config = replace(CONFIG, loss=loss, steps=3)
        one = distiller(tmp_path / "one", replace(config, batch_size=8)).run()
        two = distiller(tmp_path / "two", replace(config, batch_size=4, accumulate=2)).run()
        for large, small in zip(one, two, strict=True):
            assert small.loss == pytest.approx(large.loss, rel=1e-3)
            assert small.gradient_norm == pytest.approx(large.gradient_norm, rel=3e-3)
            assert small.kl == pytest.approx(large.kl, rel=1e-3)

    def test_a_sum_is_the_sum_of_its_terms(self, tmp_path: Path) -> None:
        """With the weights of the step: the first step of each sees the same weights."""

        def first(loss: str) -> StepMetrics:
            return distiller(tmp_path / loss, replace(CONFIG, steps=1, loss=loss)).run()[0]

        alone = {name: first(name).loss for name in ("logits", "hidden", "reverse")}
        both = first("logits+0.5*hidden:decay + 3*reverse")
        assert both.loss == pytest.approx(
            alone["logits"] + 0.5 * alone["hidden"] + 3 * alone["reverse"], rel=1e-5
        )
        assert both.kl == pytest.approx(first("logits").kl, rel=1e-6)

    def test_a_label_is_a_mean_over_labels(self, tmp_path: Path) -> None:
        rows = make_rows()
        rows = replace(rows, labelled=rows.labelled & (rows.tokens % 3 == 0))
        config = replace(CONFIG, steps=1, loss="label", batch_size=16)
        run = distiller(tmp_path, config, rows)
        ids = torch.from_numpy(rows.tokens).long()
        with torch.no_grad():
            scores = run.student(input_ids=ids).logits.double().log_softmax(-1)
        taken = scores.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
        mean = -float(taken[torch.from_numpy(rows.labelled)].mean())
        assert run.run()[0].loss == pytest.approx(mean, rel=1e-5)

    def test_a_term_decays_from_its_weight_towards_nothing(self) -> None:
        term = Term("hidden", 0.5, decays=True)
        assert [term.weight_at(s, 4) for s in (1, 2, 3, 4)] == [0.5, 0.375, 0.25, 0.125]
        assert Term("hidden", 0.5).weight_at(4, 4) == 0.5

    def test_resumes_where_it_has_decayed_to(self, tmp_path: Path) -> None:
        config = replace(CONFIG, loss="logits+hidden:decay")
        whole = distiller(tmp_path / "whole", config)
        whole.run()
        kill = kill_at_call(lambda _: None, 6)
        run_until_killed(lambda: distiller(tmp_path / "cut", config).run(kill))
        run = distiller(tmp_path / "cut", config)
        assert losses(run.run()) == losses(whole.history)
        assert_equal(weights(run.student), weights(whole.student))
        constant = distiller(tmp_path / "other", replace(config, loss="logits+hidden")).run()
        assert constant[0] == replace(whole.history[0], seconds=constant[0].seconds)
        assert constant[-1].loss > whole.history[-1].loss

    @pytest.mark.parametrize("name", TERMS)
    def test_every_term_brings_the_student_nearer(self, tmp_path: Path, name: str) -> None:
        run = distiller(tmp_path, replace(CONFIG, steps=30, loss=name))
        history = run.run()
        entropy = history[0].loss - history[0].kl if name == "logits" else 0.0
        assert history[-1].loss - entropy < 0.8 * (history[0].loss - entropy)

    def test_a_model_without_layers(self, tmp_path: Path) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(40, 40)

            def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
                return type("Output", (), {"logits": self.table(input_ids)})

        config = replace(CONFIG, loss="logits+hidden")
        run = Distiller(Flat(), Flat(), make_rows(), config, tmp_path)
        with pytest.raises(ConfigError, match="compares layers, of which the student shows 0"):
            run.run()


class TestParsing:
    def test_terms_and_weights(self) -> None:
        assert parse_loss("logits") == (Term("logits"),)
        assert parse_loss("logits + 0.5 * reverse+1e-2*hidden:decay") == (
            Term("logits"),
            Term("reverse", 0.5),
            Term("hidden", 0.01, decays=True),
        )

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("logit", "has no term 'logit'; terms are logits, label, hidden, attention, reverse"),
            ("", "has no term ''"),
            ("logits+", "has no term ''"),
            ("logits:grow", "has no term 'logits:grow'"),
            ("logits+-1*hidden", "must be a positive number; got '-1'"),
            ("0*logits", "must be a positive number; got '0'"),
            ("x*logits", "must be a positive number; got 'x'"),
            ("nan*logits", "must be a positive number; got 'nan'"),
            ("logits+2*logits", "has the term logits twice"),
            ("logits:decay+hidden:decay", "every term .* decays"),
        ],
    )
    def test_mistakes(self, text: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says.replace("*", r"\*").replace(r".\*", ".*")):
            TrainingConfig(loss=text)
