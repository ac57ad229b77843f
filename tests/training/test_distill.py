"""What a step does, the schedule, and what stops a training."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data.corpus import Rows, derived_seed, pack_rows
from qatc.errors import CheckpointError, ConfigError, TrainingError
from qatc.training.config import StepMetrics, TrainingConfig, default_learning_rate
from qatc.training.distill import Distiller
from tests.training.conftest import (
    CONFIG,
    VOCABULARY,
    assert_equal,
    distiller,
    make_rows,
    weights,
)


def rows_read(run: Distiller) -> list[Any]:
    """The tokens of the rows that a run trains on, in the order in which it does."""
    seen: list[Any] = []
    run.student.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    run.run()
    return seen


class TestStep:
    def test_accumulation_equals_a_larger_batch(self, tmp_path: Path) -> None:
        """Rows of very different lengths, so that a mean of means would differ."""
        one = distiller(tmp_path / "one", replace(CONFIG, batch_size=8))
        two = distiller(tmp_path / "two", replace(CONFIG, batch_size=4, accumulate=2))
        for large, small in zip(one.run(), two.run(), strict=True):
            assert small.tokens == large.tokens
            assert small.loss == pytest.approx(large.loss, rel=1e-4)
            assert small.gradient_norm == pytest.approx(large.gradient_norm, rel=1e-3)
        # AdamW divides by the gradient's size, which magnifies the rounding of tiny ones.
        assert_equal(weights(two.student), weights(one.student), rtol=1e-2, atol=2e-4)

    def test_does_not_depend_on_padding(self, tmp_path: Path) -> None:
        rows = make_rows(length=12)
        wide = [np.pad(part, ((0, 0), (0, 8))) for part in (rows.tokens, rows.sequence)]
        padded = Rows(wide[0], wide[1], wide[1] > 0)
        config = replace(CONFIG, steps=1)
        narrow = distiller(tmp_path / "narrow", config, rows).run()[0]
        record = distiller(tmp_path / "wide", config, padded).run()[0]
        assert record.tokens == narrow.tokens == int(rows.real[_first_batch(config)].sum())
        assert record.loss == pytest.approx(narrow.loss, rel=1e-5)
        assert record.gradient_norm == pytest.approx(narrow.gradient_norm, rel=1e-4)

    def test_of_conversations_answers_alone_count(self, tmp_path: Path) -> None:
        """The figures of a step, by a reference in fp64."""
        answers = [np.isin(np.arange(12), where) for where in ([3, 4, 5], [9], [2, 11], [6, 7])]
        plain = np.random.default_rng(0).integers(1, VOCABULARY, (4, 12), dtype=np.int32)
        rows = pack_rows([*plain], 12, 1, answers)
        before = [(n, marks.nonzero()[0] - 1) for n, marks in enumerate(answers)]
        run = distiller(tmp_path, replace(CONFIG, steps=1), rows)
        outputs = [
            model.double()(torch.from_numpy(plain).long())
            for model in (copy.deepcopy(run.student), copy.deepcopy(run.teacher))
        ]
        log_q, log_p = (out.logits.log_softmax(-1) for out in outputs)
        at = [(n, int(i)) for n, places in before for i in places]
        kl = [(log_p[i].exp() * (log_p[i] - log_q[i])).sum().item() for i in at]
        cross_entropy = [-(log_p[i].exp() * log_q[i]).sum().item() for i in at]
        record = run.run()[0]
        assert record.kl == pytest.approx(np.mean(kl), rel=1e-5)
        assert record.tokens == 6 + 10 + 12 + 8, "what an answer stands behind is context"
        assert record.loss == pytest.approx(np.mean(cross_entropy), rel=1e-5)

    def test_padding_carries_no_gradient(self, tmp_path: Path) -> None:
        """Token 0 stands in padding only, so that nothing may move its embedding."""
        run = distiller(tmp_path)
        before = weights(run.student)["model.embed_tokens.weight"]
        run.run()
        moved = (weights(run.student)["model.embed_tokens.weight"] != before).any(1)
        rows = make_rows()
        assert moved.nonzero().flatten().tolist() == np.unique(rows.tokens[rows.real]).tolist()

    def test_an_epoch_reads_every_row_once(self, tmp_path: Path) -> None:
        seen = rows_read(distiller(tmp_path, replace(CONFIG, steps=8)))
        rows = sorted(make_rows().tokens.tolist())
        assert sorted(seen[:16]) == sorted(seen[16:]) == rows
        assert seen[:16] != seen[16:], "a new order every epoch"

    def test_gradient_is_clipped(self, tmp_path: Path) -> None:
        run, clipped = distiller(tmp_path, replace(CONFIG, gradient_clip=0.1, steps=3)), []

        def measure(optimizer: Any, *_: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            clipped.append(float(torch.cat([g.flatten() for g in grads]).norm()))

        run.optimizer.register_step_pre_hook(measure)
        assert all(record.gradient_norm > 0.1 for record in run.run())
        assert clipped == pytest.approx([0.1] * 3, rel=1e-4)

    def test_warm_up_and_cosine(self, tmp_path: Path) -> None:
        run = distiller(tmp_path, replace(CONFIG, steps=10, warmup_steps=3))
        rates = [record.learning_rate for record in run.run()]
        cosine = [0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
        assert rates == pytest.approx([0.01 * f for f in (0.25, 0.5, 0.75, *cosine)])

    @pytest.mark.parametrize("seed", [2**43, 2**63, 2**64, 10**40])
    def test_a_seed_of_any_size(self, tmp_path: Path, seed: int) -> None:
        def order(seed: int) -> list[Any]:
            """The rows of two epochs; every run is one in a directory of its own."""
            number = len(list(tmp_path.iterdir()))
            run = distiller(tmp_path / str(number), replace(CONFIG, steps=8, seed=seed))
            return rows_read(run)

        assert order(seed) == order(seed)
        assert order(seed) != order(0) and order(seed) != order(seed - 2**43), "every bit counts"

    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_a_step_of_nan_is_not_taken(self, tmp_path: Path, where: str) -> None:
        """Neither the parameters nor the moments of AdamW, which would keep it for good."""
        run = distiller(tmp_path)
        before: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}

        def poison(record: StepMetrics) -> None:
            before.update(weights(run.student))
            moments.update(copy.deepcopy(run.optimizer.state_dict()["state"]))
            if where == "loss":
                run.student.lm_head.register_forward_hook(lambda *call: call[-1] * math.nan)
            else:
                run.student.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)

        with pytest.raises(TrainingError, match="the loss is not a number at step 2"):
            run.run(poison)
        assert moments
        assert_equal(weights(run.student), before)
        after = run.optimizer.state_dict()["state"]
        for number, slots in moments.items():
            assert all(torch.equal(after[number][key], value) for key, value in slots.items())

    def test_learns(self, tmp_path: Path) -> None:
        history = distiller(tmp_path, replace(CONFIG, steps=40)).run()
        assert history[-1].kl < 0.5 * history[0].kl
        for record in history:
            assert record.loss > record.kl > 0

    @pytest.mark.parametrize(
        ("width", "kl", "rate"),
        [(64, 1.4, 1.28e-3), (4096, 2.0, 2e-5), (64, 0.01, 1.28e-4), (64, 0.0, 1.28e-5)],
    )
    def test_default_learning_rate(self, width: int, kl: float, rate: float) -> None:
        assert default_learning_rate(width, kl) == pytest.approx(rate, rel=0.01)


def _first_batch(config: TrainingConfig) -> Any:
    generator = torch.Generator().manual_seed(derived_seed(config.seed, 0))
    return torch.randperm(16, generator=generator)[: config.batch_size].numpy()


class TestFailure:
    def test_not_a_number(self, tmp_path: Path) -> None:
        run = distiller(tmp_path)
        good: dict[str, Tensor] = {}

        def break_it(record: StepMetrics) -> None:
            if record.step == 4:
                good.update(weights(run.student))
            if record.step == 6:
                next(run.student.parameters()).data.fill_(math.nan)

        with pytest.raises(TrainingError, match=r"not a number at step 7; .*step 4, is kept") as e:
            run.run(break_it)
        assert "a lower --lr than 0.01" in str(e.value)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
        again, began = distiller(tmp_path), []
        again.student.register_forward_pre_hook(lambda *_: began.append(weights(again.student)))
        assert len(again.run()) == 12 and len(began) == 8, "it goes on with step 5"
        assert_equal(began[0], good)

    def test_divergence(self, tmp_path: Path) -> None:
        config = replace(CONFIG, steps=80, learning_rate=1e-4)
        run = distiller(tmp_path, config)

        def break_it(record: StepMetrics) -> None:
            if record.step == 40:
                run.student.lm_head.weight.data.mul_(100)

        with pytest.raises(TrainingError, match=r"the loss diverges: .*, is kept. Start over"):
            run.run(break_it)
        assert 40 < len(run.history) < 80

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run, open_file = distiller(tmp_path), Path.open

        def full(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == "metrics.jsonl":
                raise OSError(28, "No space left on device")
            return open_file(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(CheckpointError, match="cannot write .*metrics.jsonl: No space left"):
            run.run()

    def test_fewer_rows_than_a_batch(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has 3 rows to train on, fewer than one batch of 4"):
            distiller(tmp_path, rows=make_rows(3))

    def test_unknown_width(self, tmp_path: Path) -> None:
        student = torch.nn.Linear(2, 2)
        config = replace(CONFIG, learning_rate=None)
        with pytest.raises(ConfigError, match="pass a learning rate"):
            Distiller(student, copy.deepcopy(student), make_rows(), config, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"steps": 0},
            {"batch_size": 0},
            {"accumulate": 0},
            {"checkpoint_every": 0},
            {"keep_checkpoints": 0},
            {"warmup_steps": -1},
            {"seed": -1},
            {"learning_rate": 0.0},
            {"learning_rate": math.nan},
            {"gradient_clip": math.inf},
        ],
    )
    def test_config(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must"):
            TrainingConfig(**change)


def test_rows_of_a_corpus_train(tmp_path: Path) -> None:
    """Several sequences in a row, as they come out of a corpus."""
    sequences = [np.arange(1, 1 + n, dtype=np.int32) for n in (5, 9, 3, 12, 7, 2, 11, 4)]
    rows = pack_rows(sequences, 12)
    record = distiller(tmp_path, replace(CONFIG, steps=1, batch_size=len(rows)), rows).run()[0]
    assert record.tokens == sum(map(len, sequences))
