"""The figures against a reference in fp64 that shares no code with what computes them."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qatc.data.corpus import Rows, pack_rows
from qatc.errors import DataError, EvaluationError
from qatc.evaluation.metrics import evaluate, recovery
from qatc.machine.world import World
from tests.conftest import make_llama

VOCABULARY = 50


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model and a teacher that agree on much, but not on all."""
    model, teacher = make_llama(VOCABULARY), make_llama(VOCABULARY)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model, teacher


@pytest.fixture(scope="module")
def sequences() -> list[Any]:
    random = np.random.default_rng(0)
    return [random.integers(2, VOCABULARY, n, dtype=np.int32) for n in (9, 5, 12, 3, 11, 4, 7, 2)]


@pytest.fixture(scope="module")
def rows(sequences: list[Any]) -> Rows:
    return pack_rows(sequences, 16, prompt_tokens=2)


def fp64(model: Any) -> dict[str, Any]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def reference_log_p(weights: dict[str, Any], tokens: Any) -> Any:
    """Log-probabilities ``[T, V]`` of a Llama of two layers, written out in numpy."""
    heads, kv_heads, size, count = 4, 2, 8, len(tokens)
    angles = np.arange(count)[:, None] / 10000 ** (np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"]

    def rotated(x: Any) -> Any:
        half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    def split(x: Any, n: int) -> Any:
        return x.reshape(count, n, size).transpose(1, 0, 2)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in ("model.layers.0", "model.layers.1"):
        w = {n: weights[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkvo"}
        h = norm(x, f"{layer}.input_layernorm")
        q, k = rotated(split(h @ w["q"], heads)), rotated(split(h @ w["k"], kv_heads))
        k, v = (np.repeat(part, heads // kv_heads, 0) for part in (k, split(h @ w["v"], kv_heads)))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(size)
        scores[:, np.triu_indices(count, 1)[0], np.triu_indices(count, 1)[1]] = -np.inf
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + (attention @ v).transpose(1, 0, 2).reshape(count, -1) @ w["o"]
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (weights[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (h @ gate / (1 + np.exp(-(h @ gate))) * (h @ up)) @ down
    logits = norm(x, "model.norm") @ weights["lm_head.weight"].T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(models: tuple[Any, Any], sequences: list[Any], length: int) -> dict[str, float]:
    """Perplexity, KL and agreement, row by row; the rows are packed by hand."""
    student, teacher = (fp64(model) for model in models)
    packed: list[list[Any]] = []
    for sequence in sequences:
        if not packed or sum(map(len, packed[-1])) + len(sequence) > length:
            packed.append([])
        packed[-1].append(sequence)
    nll, kl, agreeing = [], [], []
    for members in packed:
        tokens = np.concatenate(members)
        q, p = reference_log_p(student, tokens), reference_log_p(teacher, tokens)
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        agreeing += (p.argmax(-1) == q.argmax(-1)).tolist()
        start = 0
        for member in members:
            scored = range(start + 2, start + len(member))
            nll += [-q[i - 1, tokens[i]] for i in scored]
            start += len(member)
    return {
        "perplexity": math.exp(np.mean(nll)),
        "kl": float(np.mean(kl)),
        "top1_agreement": float(np.mean(agreeing)),
        "tokens": len(nll),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_against_the_reference(
    models: tuple[Any, Any], sequences: list[Any], rows: Rows, batch_size: int
) -> None:
    assert rows.utilization < 1, "some padding is needed"
    found = evaluate(models[0], rows, teacher=models[1], batch_size=batch_size).to_dict()
    expected = reference(models, sequences, 16)
    assert 0.1 < expected["top1_agreement"] < 1 and expected["kl"] > 0.01
    assert found == pytest.approx(expected, rel=1e-5)


def test_of_conversations_answers_alone_count(models: tuple[Any, Any]) -> None:
    """One sequence in a row, so that none has another before it."""
    random = np.random.default_rng(1)
    sequences = [*random.integers(2, VOCABULARY, (6, 12), dtype=np.int32)]
    answers = [random.random(len(s)) < 0.3 for s in sequences]
    student, teacher = (fp64(model) for model in models)
    nll, kl, agreeing = [], [], []
    for tokens, marks in zip(sequences, answers, strict=True):
        q, p = reference_log_p(student, tokens), reference_log_p(teacher, tokens)
        for i in marks[1:].nonzero()[0]:
            nll.append(-q[i, tokens[i + 1]])
            kl.append((np.exp(p[i]) * (p[i] - q[i])).sum())
            agreeing.append(p[i].argmax() == q[i].argmax())
    rows = pack_rows(sequences, 12, 2, answers)
    found = evaluate(models[0], rows, teacher=models[1])
    expected = (math.exp(np.mean(nll)), np.mean(kl), np.mean(agreeing), len(nll))
    assert tuple(found.to_dict().values()) == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher(models: tuple[Any, Any], rows: Rows) -> None:
    alone = evaluate(models[0], rows)
    both = evaluate(models[0], rows, teacher=models[1])
    assert (alone.kl, alone.top1_agreement) == (None, None)
    assert (alone.perplexity, alone.tokens) == (both.perplexity, both.tokens)


def test_a_model_against_itself(models: tuple[Any, Any], rows: Rows) -> None:
    found = evaluate(models[0], rows, teacher=models[0])
    assert (found.kl, found.top1_agreement) == (0, 1)


def test_leaves_no_gradient_and_tells_its_progress(models: tuple[Any, Any], rows: Rows) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(models[0], rows, batch_size=2, on_progress=lambda *done: seen.append(done))
    assert seen == [(min(i + 2, len(rows)), len(rows)) for i in range(0, len(rows), 2)]
    assert all(parameter.grad is None for parameter in models[0].parameters())


class Answers(torch.nn.Module):
    """Random logits, but for one value in the answers to one row."""

    def __init__(self, value: float, row: int, column: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.value, self.row, self.column, self.seen = value, row, column, 0

    def forward(self, input_ids: Any, use_cache: bool) -> Any:
        logits = torch.randn((*input_ids.shape, VOCABULARY))
        if self.seen <= self.row < self.seen + len(logits):
            logits[self.row - self.seen, self.column, 3] = self.value
        self.seen += len(logits)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_no_numbers(rows: Rows, value: float) -> None:
    column = int(rows.labelled[2].nonzero()[0][0])
    with pytest.raises(EvaluationError, match="the model answers NaN or infinity in rows 2 to 3"):
        evaluate(Answers(value, 2, column), rows, batch_size=2)
    with pytest.raises(EvaluationError, match="the model answers"):  # at a token without a label
        evaluate(Answers(value, 2), rows, teacher=Answers(0.0, 0), batch_size=2)
    with pytest.raises(EvaluationError, match="the teacher answers"):
        evaluate(Answers(0.0, 0), rows, teacher=Answers(value, 2), batch_size=2)


def test_a_token_of_no_probability_is_a_number(rows: Rows) -> None:
    found = evaluate(Answers(-math.inf, 2), rows)
    assert math.isfinite(found.perplexity)


def test_padding_may_be_anything(rows: Rows) -> None:
    row, column = (int(where[0]) for where in np.nonzero(~rows.real))
    padded = evaluate(Answers(math.nan, row, column), rows, teacher=Answers(math.nan, row, column))
    assert padded.kl is not None and math.isfinite(padded.kl)


def test_nothing_to_score(models: tuple[Any, Any]) -> None:
    rows = pack_rows([np.asarray([3, 4], np.int32)] * 3, 8, prompt_tokens=2)
    with pytest.raises(DataError, match="none of the 6 tokens to evaluate on can be scored"):
        evaluate(models[0], rows)


def test_recovery() -> None:
    assert recovery(3.0, 13.0, 5.0) == pytest.approx(80.0)
    assert recovery(3.0, 13.0, 15.0) == pytest.approx(-20.0)
    assert recovery(3.0, 3.0, 3.0) is None
    assert recovery(3.0, 2.9, 2.9) is None, "rounding lost nothing"


@pytest.mark.parametrize(("size", "batch_size"), [(2, 2), (3, 6), (4, 4)])
def test_processes_count_every_row_once(
    models: tuple[Any, Any], rows: Rows, size: int, batch_size: int
) -> None:
    """Each runs as many passes of as many rows as any other, also where there are fewer rows."""

    class Counted(World):
        def sum(self, values: Any) -> list[float]:
            totals.append(values)
            return list(values)

    (model, teacher), rows = models, rows[:3]
    passes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    found, shapes = [], []
    for world in (Counted(), *(Counted(rank, size) for rank in range(size))):
        totals: list[Any] = []
        passes.clear()
        with contextlib.suppress(ZeroDivisionError):  # of one that has no row that counts
            evaluate(model, rows, teacher=teacher, batch_size=batch_size, world=world)
        found.append(totals[0])
        shapes.append(list(passes))
    hook.remove()
    whole, *parts = found
    assert len(rows) % batch_size and whole[3] == rows.labelled.sum()
    assert np.sum(parts, axis=0) == pytest.approx(whole, rel=1e-6)
    assert all(shape == shapes[1] for shape in shapes[1:])
    assert set(shapes[1]) == {(batch_size // size, 16)}
