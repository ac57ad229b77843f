"""The loss, its schedule, and that an interrupted run is the uninterrupted one."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data.corpus import Rows, derived_seed, pack_rows
from qatc.errors import CheckpointError, ConfigError, TrainingError
from qatc.machine.signals import Terminated, raising
from qatc.training.checkpoint import Checkpoints
from qatc.training.distill import (
    Distiller,
    StepMetrics,
    TrainingConfig,
    default_learning_rate,
)
from tests.conftest import kill_at_call, make_llama, run_until_killed

CONFIG = TrainingConfig(steps=12, batch_size=4, learning_rate=1e-2, checkpoint_every=4)
VOCABULARY = 40


def make(seed: int = 0) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return make_llama(VOCABULARY, seed, tie_word_embeddings=False, **sizes)


def make_rows(count: int = 16, length: int = 12, longest: int = 12) -> Rows:
    """Rows of one sequence each, of 3 to ``longest`` tokens; the rest is padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCABULARY, (count, length), dtype=np.int32)
    real = np.arange(length) < random.integers(3, longest + 1, (count, 1))
    return Rows((tokens * real).astype(np.int32), real.astype(np.int32), real)


def distiller(directory: Path, config: TrainingConfig = CONFIG, rows: Rows | None = None) -> Any:
    return Distiller(make(1), make(0), rows or make_rows(), config, directory)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def losses(history: list[StepMetrics]) -> list[StepMetrics]:
    """All but the seconds."""
    return [replace(record, seconds=0.0) for record in history]


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], **how: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(how or {"rtol": 0, "atol": 0}))


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

    def test_padding_carries_no_gradient(self, tmp_path: Path) -> None:
        """Token 0 stands in padding only, so that nothing may move its embedding."""
        run = distiller(tmp_path)
        before = weights(run.student)["model.embed_tokens.weight"]
        run.run()
        moved = (weights(run.student)["model.embed_tokens.weight"] != before).any(1)
        rows = make_rows()
        assert moved.nonzero().flatten().tolist() == np.unique(rows.tokens[rows.real]).tolist()

    def test_an_epoch_reads_every_row_once(self, tmp_path: Path) -> None:
        run, seen = distiller(tmp_path, replace(CONFIG, steps=8)), []
        run.student.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()),
            with_kwargs=True,
        )
        run.run()
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
        def order(seed: int) -> Any:
            run = distiller(tmp_path, replace(CONFIG, seed=seed))
            return np.concatenate(list(run._batches(1)) + list(run._batches(5))).tolist()

        assert order(seed) == order(seed)
        assert order(seed) != order(0) and order(seed) != order(seed - 2**43), "every bit counts"

    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_a_step_of_nan_is_not_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """Neither the parameters nor the moments of AdamW, which would keep it for good."""
        run = distiller(tmp_path)
        run._step(1)
        before, moments = weights(run.student), copy.deepcopy(run.optimizer.state_dict()["state"])
        if where == "loss":
            losses = run._losses
            monkeypatch.setattr(run, "_losses", lambda batch: (losses(batch)[0] * math.nan, 0.0))
        else:
            run.student.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        record = run._step(2)
        assert math.isfinite(record.loss) == (where == "gradient")
        assert not math.isfinite(record.gradient_norm)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run."""
    run = distiller(tmp_path_factory.mktemp("distill"))
    run.run()
    return run


class TestResume:
    def finish(self, directory: Path, whole: Any) -> None:
        run = distiller(directory)
        assert losses(run.run()) == losses(whole.history)
        assert_equal(weights(run.student), weights(whole.student))
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))

    @pytest.mark.parametrize("step", [1, 4, 6, 12])
    def test_killed_after_a_step(self, tmp_path: Path, whole: Any, step: int) -> None:
        kill = kill_at_call(lambda _: None, step)
        run_until_killed(lambda: distiller(tmp_path).run(kill))
        self.finish(tmp_path, whole)

    @pytest.mark.parametrize("checkpoint", [1, 2])
    def test_killed_while_a_checkpoint_is_written(
        self, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: int
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", kill_at_call(Path.rename, checkpoint))
            run_until_killed(lambda: distiller(tmp_path).run())
        kept = [p.name for p in (tmp_path / "checkpoints").glob("step-??????")]
        assert kept == ["step-000004"][: checkpoint - 1]
        self.finish(tmp_path, whole)

    def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(
        self, tmp_path: Path, whole: Any
    ) -> None:
        run, handler = distiller(tmp_path), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run.run(lambda record: record.step == 6 and os.kill(os.getpid(), signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is handler
        assert run.checkpoints.latest() == len(run.history) == 6
        self.finish(tmp_path, whole)

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_a_signal_to_end_is_like_ctrl_c(self, tmp_path: Path, whole: Any, name: str) -> None:
        run, number = distiller(tmp_path), getattr(signal, name)
        with raising(), pytest.raises(Terminated, match=name) as raised:
            run.run(lambda record: record.step == 6 and os.kill(os.getpid(), number))
        assert raised.value.number == number
        assert signal.getsignal(number) is signal.SIG_DFL
        assert run.checkpoints.latest() == len(run.history) == 6
        self.finish(tmp_path, whole)

    def test_a_library_user_without_a_handler_ends_by_the_signal(
        self, tmp_path: Path, whole: Any
    ) -> None:
        def end(record: StepMetrics) -> None:
            if record.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        run_until_killed(lambda: distiller(tmp_path).run(end), by=signal.SIGTERM)
        assert distiller(tmp_path).checkpoints.latest() == 6
        self.finish(tmp_path, whole)

    def test_a_signal_after_the_last_checkpoint_is_not_lost(self, tmp_path: Path) -> None:
        run = distiller(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run.run(lambda record: record.step == 12 and os.kill(os.getpid(), signal.SIGINT))
        assert run.checkpoints.latest() == 12

    def test_steps_without_their_record(self, tmp_path: Path) -> None:
        """The report would be written from what is left of it."""
        distiller(tmp_path).run()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:9]))
        with pytest.raises(CheckpointError, match="records 9 steps, .* is of step 12"):
            distiller(tmp_path).run()

    def test_the_record_is_on_the_disk_before_the_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        save = Checkpoints.save
        monkeypatch.setattr("qatc.training.distill.sync", lambda path: order.append(path.name))
        monkeypatch.setattr(
            Checkpoints, "save", lambda *args: (order.append("checkpoint"), save(*args))
        )
        distiller(tmp_path, replace(CONFIG, steps=4)).run()
        assert order == ["metrics.jsonl", "checkpoint"]

    def test_second_ctrl_c_stops_at_once(self, tmp_path: Path, whole: Any) -> None:
        def twice(record: StepMetrics) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            distiller(tmp_path).run(twice)
        assert not (tmp_path / "checkpoints").exists()
        self.finish(tmp_path, whole)

    def test_nothing_is_left_to_do(self, whole: Any) -> None:
        run = distiller(whole.metrics_file.parent)
        assert run.run(lambda record: pytest.fail("trained on")) == whole.history
        assert_equal(weights(run.student), weights(whole.student))


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
        again = distiller(tmp_path)
        assert again._resume() == 4
        assert_equal(weights(again.student), good)

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
