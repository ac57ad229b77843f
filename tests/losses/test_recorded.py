"""A recorded teacher in a training: losses and gradients of the one that runs, in expectation."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatc.data.config import Recording
from qatc.data.corpus import Corpus, Rows
from qatc.data.shards import write_shard
from qatc.data.teacher_logits import Recorded, record_teacher
from qatc.data.teacher_rows import sample_distribution
from qatc.errors import ConfigError
from qatc.losses.distances import compiled, sampled_cross_entropy
from qatc.losses.objective import distillation_losses, parse_loss, recorded_losses
from qatc.models.load import LoadedModel
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from tests.training.conftest import CONFIG, VOCABULARY, assert_equal, losses, make, weights

RECORDED = replace(CONFIG, teacher="recorded")


def make_corpus(path: Path) -> Corpus:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 13, 40)
    sequences = [random.integers(1, VOCABULARY, n, dtype=np.int32) for n in lengths]
    path.mkdir()
    shard = write_shard(path, 0, sequences)
    return Corpus(path, {"shards": [shard], "prompt_tokens": 1, "max_length": 20, "seed": 3})


def make_rows(path: Path, recording: Recording) -> Rows:
    """Rows of several sequences, with what is recorded of the teacher ``make(0)``."""
    corpus = make_corpus(path)
    teacher = LoadedModel(make(0), "tiny", torch.float32)
    recorded: Recorded = record_teacher(teacher, corpus, recording, fingerprint="")
    return recorded.attach(corpus.rows(20))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """With all of the teacher's distribution."""
    return make_rows(tmp_path_factory.mktemp("whole") / "c", Recording(VOCABULARY, 1))


@pytest.mark.parametrize("loss", ["logits", "label", "logits+0.5*label"])
def test_of_the_whole_distribution_it_is_the_one_that_runs(rows: Rows, loss: str) -> None:
    batch, found = rows[3:9], {}
    assert batch.recorded is not None and int(batch.sequence.max()) > 1
    ids = torch.from_numpy(batch.tokens).long()
    counted, labelled = (torch.from_numpy(m) for m in (batch.counted, batch.labelled))
    terms = [term.name for term in parse_loss(loss)]
    for name in ("online", "recorded"):
        student = make(1)
        if name == "online":
            values, kl = distillation_losses(student, make(0), ids, counted, labelled, terms)
        else:
            targets = batch.recorded.read(batch.counted)
            values, kl = recorded_losses(student, targets, ids, counted, labelled, terms)
        torch.stack(list(values.values())).sum().backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        found[name] = ({**values, "kl": kl}, gradients)
    # As far as log-probabilities in 16 bits go.
    assert_equal(found["recorded"][0], found["online"][0], rtol=1e-3, atol=0)
    scale = max(float(g.abs().max()) for g in found["online"][1].values())
    assert_equal(found["recorded"][1], found["online"][1], rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_loss_and_gradient_are_those_of_the_definition(compile: bool) -> None:
    """Padding, whatever its logits, adds nothing; a token may have no weight."""
    torch.manual_seed(0)
    student = (torch.randn(7, 30) * 2).requires_grad_()
    ids = torch.stack([torch.randperm(30)[:6] for _ in range(7)])
    target, entropy = torch.rand(7, 6), torch.rand(7)
    target[:, 2] = 0
    target /= target.sum(-1, keepdim=True)
    real = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    loss, kl = compiled(sampled_cross_entropy, compile)(student, ids, target, entropy, real)
    loss.backward()
    p = torch.zeros(7, 30).double().scatter_(-1, ids, target.double())
    log_q = student.detach().double().log_softmax(-1)
    wanted = -(p * log_q).sum(-1)
    assert loss.item() == pytest.approx(float(wanted[real].sum()), rel=1e-5)
    assert float(kl) == pytest.approx(float((wanted - entropy)[real].sum()), rel=1e-5)
    gradient = ((log_q.exp() - p) * real[:, None]).float()
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


def test_draws_leave_loss_and_gradient_unbiased() -> None:
    """In fp64, over all numbers that may decide the draws; the head alone is far off."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 60, dtype=torch.float64) * 2
    student.requires_grad_()
    log_p, real = teacher.log_softmax(-1), torch.ones(5, dtype=torch.bool)
    (online,) = torch.autograd.grad(-(log_p.exp() * student.log_softmax(-1)).sum(), student)
    exact = (log_p.exp() * (log_p - student.detach().log_softmax(-1))).sum()
    recording, count, kl = Recording(4, 6), 1000, torch.zeros((), dtype=torch.float64)
    gradient, alone = torch.zeros_like(student), torch.zeros_like(student)
    for number in range(count):
        uniform = torch.full((5, 6), (number + 0.5) / count, dtype=torch.float64)
        found = sample_distribution(log_p, recording, uniform)
        ids, target = torch.cat([found.head, found.draws], -1), found.weights()
        entropy = -(target * log_p.gather(-1, ids)).sum(-1)
        loss, divergence = sampled_cross_entropy(student, ids, target, entropy, real)
        gradient += torch.autograd.grad(loss, student)[0] / count
        kl += divergence / count
    head = found.log_head.exp()
    head /= head.sum(-1, keepdim=True)
    loss, _ = sampled_cross_entropy(student, found.head, head, torch.zeros(5), real)
    (alone,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, online, rtol=0, atol=2e-3)
    assert float((alone - online).abs().max()) > 0.05
    assert float(kl) == pytest.approx(float(exact), rel=2e-3)


def test_a_perfect_student_has_no_kl(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "c", Recording(3, 4))
    assert rows.recorded is not None
    ids = torch.from_numpy(rows.tokens).long()
    masks = [torch.from_numpy(m) for m in (rows.counted, rows.labelled)]
    targets = rows.recorded.read(rows.counted)
    with torch.no_grad():
        _, kl = recorded_losses(make(0), targets, ids, *masks)
        _, other = recorded_losses(make(1), targets, ids, *masks)
    assert abs(float(kl)) / rows.counted.sum() < 1e-5
    assert float(other) / rows.counted.sum() > 0.1


def train(directory: Path, rows: Rows, config: TrainingConfig = RECORDED) -> Any:
    teacher = None if config.teacher == "recorded" else make(0)
    return Distiller(make(1), teacher, rows, config, directory)


def test_a_run_learns_what_the_teacher_that_runs_teaches(tmp_path: Path, rows: Rows) -> None:
    online, recorded = (train(tmp_path / c.teacher, rows, c) for c in (CONFIG, RECORDED))
    for one, other in zip(online.run(), recorded.run(), strict=True):
        assert other.tokens == one.tokens
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
        assert other.kl == pytest.approx(one.kl, rel=1e-2)
    first, last = recorded.history[0].kl, recorded.history[-1].kl
    assert last < 0.8 * first
    assert_equal(weights(recorded.student), weights(online.student), rtol=0, atol=1e-2)


def test_interrupted_it_ends_the_same(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "c", Recording(3, 8))
    whole = train(tmp_path / "whole", rows)
    history = whole.run()

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", rows).run(stop)
    again = train(tmp_path / "parts", rows)
    assert losses(again.run()) == losses(history)
    assert_equal(weights(again.student), weights(whole.student))


@pytest.mark.parametrize("term", ["hidden", "attention", "reverse"])
def test_terms_that_need_the_teacher_are_refused(term: str) -> None:
    with pytest.raises(ConfigError, match=f"term {term} .* --teacher online"):
        TrainingConfig(loss=f"logits+{term}", teacher="recorded")


def test_without_a_teacher_it_is_refused(tmp_path: Path, rows: Rows) -> None:
    bare = Rows(rows.tokens, rows.sequence, rows.labelled)
    with pytest.raises(ConfigError, match="no teacher to learn from"):
        train(tmp_path, bare)
    with pytest.raises(ConfigError, match="no teacher to learn from"):
        Distiller(make(1), None, rows, CONFIG, tmp_path)
    with pytest.raises(ConfigError, match="teacher must be online or recorded; got 'both'"):
        TrainingConfig(teacher="both")  # type: ignore[arg-type]
