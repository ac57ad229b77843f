"""An interrupted run goes on where it was, and nothing is computed twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.errors import CheckpointError, ConfigError, ParityError, QatcError
from qatc.evaluation.checks import Check, ParityReport
from qatc.output.reading import why_unverified
from qatc.quantize.run import quantize
from qatc.recipe.recipe import Recipe
from tests.conftest import contents
from tests.quantize.conftest import (
    AfterStep,
    Notes,
    NothingComputed,
    NothingTrained,
    interrupted,
    make,
    no_more,
    weights,
)


def test_interrupted_run_ends_the_same(done: Any, shared_model_path: Path, tmp_path: Path) -> None:
    config = make(shared_model_path, tmp_path / "out")
    interrupted(config)
    assert not config.output.exists()
    with pytest.raises(ConfigError, match="other settings"):
        quantize(dataclasses.replace(config, recipe=Recipe.from_bits("4-8-8")))
    result = quantize(config)
    assert weights(result.output) == weights(done.output)


def test_ctrl_c_leaves_a_checkpoint(done: Any, shared_model_path: Path, tmp_path: Path) -> None:
    config = make(shared_model_path, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(config, AfterStep(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert (tmp_path / "out.partial" / "checkpoints" / "step-000003").is_dir()
    assert weights(quantize(config).output) == weights(done.output)


def written_at(corpus: Path) -> dict[str, int]:
    """When each shard was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in corpus.glob("*.parquet")}


def failing_gate(*args: Any, **kwargs: Any) -> ParityReport:
    return ParityReport((Check("global", "the logits", 0.5, 0.1),))


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def pressed_ctrl_c(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def bug(*args: Any, **kwargs: Any) -> None:
    raise ZeroDivisionError


class TestAfterTraining:
    """Whatever fails then, nothing is computed twice."""

    @pytest.mark.parametrize(
        ("place", "fails", "error"),
        [
            ("verify", failing_gate, ParityError),
            ("write_output", full_disk, CheckpointError),
            ("write_report", pressed_ctrl_c, KeyboardInterrupt),
            ("load", bug, ZeroDivisionError),
        ],
    )
    def test_the_same_command_goes_on(
        self,
        done: Any,
        shared_model_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        place: str,
        fails: Any,
        error: type[BaseException],
    ) -> None:
        gate = place in ("verify", "load")
        config, notes = make(shared_model_path, tmp_path / "out", verify=gate), Notes()
        with monkeypatch.context() as patch, pytest.raises(error) as raised:
            patch.setattr(f"qatc.quantize.writing.{place}", fails)
            quantize(config, notes)
        said = str(raised.value) if issubclass(error, QatcError) else notes.notes[-1]
        kept = f"the trained model is kept in {config.partial}: the same command goes on"
        assert kept in said
        assert ("--no-verify" in said) == (error is ParityError)
        assert {p.name for p in tmp_path.iterdir()} == {"out.data", "out.partial"}
        shards = written_at(config.data_directory)
        with monkeypatch.context() as patch:
            patch.setattr("qatc.quantize.stages.Answers", no_more)
            result = quantize(config, NothingComputed())
        assert shards and written_at(config.data_directory) == shards
        assert weights(result.output) == weights(done.output)
        assert result.figures == done.figures
        assert {p.name for p in tmp_path.iterdir()} == {"out.data", "out"}
        metadata = json.loads((result.output / "qatc.json").read_text())
        assert metadata["parity"]["passed"] is (True if gate else None)
        assert (why_unverified(result.output) is None) == gate

    def test_what_keeps_layers_from_being_measured_ends_no_run(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, notes = make(shared_model_path, tmp_path / "out", data=done.data), Notes()
        monkeypatch.setattr("qatc.quantize.stages.Answers", bug)
        result = quantize(config, notes)
        assert weights(result.output) == weights(done.output)
        assert any("KL layer by layer was not measured: " in note for note in notes.notes)
        report = (result.output / "report.md").read_text()
        assert (
            "## By layer" not in report and "## By layer" in (done.output / "report.md").read_text()
        )

    def test_a_failing_evaluation_keeps_the_training_too(
        self, shared_model_path: Path, tmp_path: Path
    ) -> None:
        class Fails(Notes):
            ended = False

            def trained(self, metrics: Any, total: int) -> None:
                self.ended = metrics.step == total

            def evaluated(self, done: int, total: int) -> None:
                if self.ended:
                    bug()

        config, notes = make(shared_model_path, tmp_path / "out", verify=True), Fails()
        with pytest.raises(ZeroDivisionError):
            quantize(config, notes)
        assert "the trained model is kept" in notes.notes[-1]
        again = dataclasses.replace(config, verify=False)
        assert quantize(again, NothingTrained()).output.exists()

    def test_without_the_gate_the_output_is_marked(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make(shared_model_path, tmp_path / "out", verify=True)
        with monkeypatch.context() as patch, pytest.raises(ParityError):
            patch.setattr("qatc.quantize.writing.verify", failing_gate)
            quantize(config)
        monkeypatch.setattr("qatc.quantize.writing.verify", no_more)
        result = quantize(dataclasses.replace(config, verify=False), NothingTrained())
        assert weights(result.output) == weights(done.output)
        parity = json.loads((result.output / "qatc.json").read_text())["parity"]
        assert parity == {"passed": None, "reason": "--no-verify asked for it"}
        assert "Not verified: --no-verify" in (result.output / "report.md").read_text()
        assert why_unverified(result.output) == parity["reason"]

    def test_a_failing_gate_leaves_the_output_that_was_there(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(done.output, tmp_path / "out")
        before = contents(tmp_path / "out")
        config = make(
            shared_model_path, tmp_path / "out", overwrite=True, data=done.data, verify=True
        )
        monkeypatch.setattr("qatc.quantize.writing.verify", failing_gate)
        with pytest.raises(ParityError):
            quantize(config)
        assert contents(tmp_path / "out") == before

    def test_a_newer_version_may_write_what_an_older_one_trained(
        self, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make(shared_model_path, tmp_path / "out", verify=True)
        with monkeypatch.context() as patch, pytest.raises(ParityError):
            patch.setattr("qatc.quantize.writing.verify", failing_gate)
            patch.setattr(
                "qatc.quantize.provenance.package_version", lambda package: f"{package} of old"
            )
            quantize(config)
        output = quantize(dataclasses.replace(config, verify=False)).output
        metadata = json.loads((output / "qatc.json").read_text())
        assert metadata["versions"]["torch"] == "torch of old"
        assert metadata["written_with"]["torch"] == torch.__version__
