"""An interrupted training is the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qatc.errors import CheckpointError
from qatc.machine.signals import Terminated, raising
from qatc.training.checkpoint import Checkpoints
from qatc.training.config import StepMetrics
from tests.conftest import kill_at_call, run_until_killed
from tests.training.conftest import CONFIG, assert_equal, distiller, losses, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run."""
    run = distiller(tmp_path_factory.mktemp("distill"))
    run.run()
    return run


def signal_at(step: int, number: int) -> Callable[[StepMetrics], None]:
    """What a user does who ends the training after this step."""

    def end(record: StepMetrics) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return end


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
            run.run(signal_at(6, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is handler
        assert run.checkpoints.latest() == len(run.history) == 6
        self.finish(tmp_path, whole)

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_a_signal_to_end_is_like_ctrl_c(self, tmp_path: Path, whole: Any, name: str) -> None:
        run, number = distiller(tmp_path), getattr(signal, name)
        with raising(), pytest.raises(Terminated, match=name) as raised:
            run.run(signal_at(6, number))
        assert raised.value.number == number
        assert signal.getsignal(number) is signal.SIG_DFL
        assert run.checkpoints.latest() == len(run.history) == 6
        self.finish(tmp_path, whole)

    def test_a_library_user_without_a_handler_ends_by_the_signal(
        self, tmp_path: Path, whole: Any
    ) -> None:
        end = signal_at(6, signal.SIGTERM)
        run_until_killed(lambda: distiller(tmp_path).run(end), by=signal.SIGTERM)
        assert distiller(tmp_path).checkpoints.latest() == 6
        self.finish(tmp_path, whole)

    def test_a_signal_after_the_last_checkpoint_is_not_lost(self, tmp_path: Path) -> None:
        run = distiller(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run.run(signal_at(12, signal.SIGINT))
        assert run.checkpoints.latest() == 12

    def test_steps_without_their_record(self, tmp_path: Path) -> None:
        """The report would be written from what is left of it."""
        distiller(tmp_path).run()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:9]))
        with pytest.raises(CheckpointError, match="records 9 steps, but the checkpoints are of 12"):
            distiller(tmp_path).run()

    def test_the_record_is_on_the_disk_before_the_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        save = Checkpoints.save
        monkeypatch.setattr("qatc.training.records.sync", lambda path: order.append(path.name))

        def saves(*args: Any) -> None:
            order.append("checkpoint")
            save(*args)

        monkeypatch.setattr(Checkpoints, "save", saves)
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
        run = distiller(whole.records.file.parent)
        assert run.run(lambda record: pytest.fail("trained on")) == whole.history
        assert_equal(weights(run.student), weights(whole.student))
