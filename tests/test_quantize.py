"""The main job on a tiny model: complete or absent, resumable, and what it says it is."""

from __future__ import annotations

import dataclasses
import gc
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qatc.distill import Distiller, TrainingConfig
from qatc.errors import ConfigError, DataError, TrainingError
from qatc.evaluate import Metrics, recovery
from qatc.export import load_codes, load_float_state, read_recipe
from qatc.generate import GenerationConfig
from qatc.ops import quantize as to_codes
from qatc.parity import verify
from qatc.quantize import _Run, quantize
from qatc.recipe import Recipe
from qatc.settings import QuantizeConfig
from tests.conftest import save


def make(model: Path, output: Path, **changes: Any) -> QuantizeConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "recipe": Recipe.from_bits("4-8-4"),
        "generation": GenerationConfig(sequences=24, max_length=16, batch_size=8, shard_size=8),
        "training": TrainingConfig(steps=6, batch_size=4, checkpoint_every=2),
        "eval_sequences": 8,
        "compile": False,
    }
    return QuantizeConfig(**(settings | changes))


@pytest.fixture(scope="module")
def done(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run."""
    return quantize(make(shared_model_path, tmp_path_factory.mktemp("quantize") / "out"))


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_output(done: Any) -> None:
    names = {path.name for path in done.output.iterdir()}
    assert {"config.json", "model.safetensors", "qatc.json", "report.md", "loss.png"} <= names
    assert {"tokenizer.json", "metrics.jsonl"} <= names
    assert not done.output.with_name("out.partial").exists()
    assert len((done.output / "metrics.jsonl").read_text().splitlines()) == 6
    metadata = json.loads((done.output / "qatc.json").read_text())
    assert metadata["recipe"] == Recipe.from_bits("4-8-4").to_dict()
    assert {"torch", "qatc", "transformers"} <= set(metadata["versions"])
    assert metadata["data"]["seed"] == 0 and len(metadata["data"]["fingerprint"]) == 64
    assert read_recipe(done.output) == Recipe.from_bits("4-8-4")
    report = (done.output / "report.md").read_text()
    assert "| RTN |" in report and "loss.png" in report
    codes = load_codes(done.output)
    assert len(codes) == 14
    for weight in codes.values():
        again, scale = to_codes(weight.dequantize(), weight.spec, snap=True)
        assert int(weight.codes.abs().max()) <= 7
        assert torch.equal(scale, weight.scale) and torch.equal(again, weight.codes)


def test_figures(done: Any) -> None:
    figures: dict[str, Metrics] = done.figures["generated"]
    assert figures["full precision"].kl == pytest.approx(0, abs=1e-6)
    assert figures["full precision"].top1_agreement == 1
    assert figures["RTN"].kl is not None and figures["RTN"].kl > 0
    assert recovery(2.0, 10.0, 4.0) == pytest.approx(75.0)


def test_existing_output_is_refused(done: Any, shared_model_path: Path) -> None:
    before = weights(done.output)
    with pytest.raises(ConfigError, match="--overwrite"):
        quantize(make(shared_model_path, done.output))
    assert weights(done.output) == before


def test_codes_are_those_of_the_masters(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under bf16 compute the fp32 masters are what training rounds, so their codes are written."""
    masters: dict[str, Tensor] = {}
    write = _Run._write

    def remembers(self: _Run, *arguments: Any) -> None:
        masters.update(self.student.state_dict())
        write(self, *arguments)

    monkeypatch.setattr(_Run, "_write", remembers)
    result = quantize(make(shared_model_path, tmp_path / "out", dtype="bfloat16"))
    differ = 0
    for name, weight in load_codes(result.output).items():
        assert masters[name].dtype is torch.float32
        codes, scale = to_codes(masters[name], weight.spec, snap=True)
        assert torch.equal(weight.codes, codes) and torch.equal(weight.scale, scale)
        rounded, _ = to_codes(masters[name].bfloat16(), weight.spec, snap=True)
        differ += int((rounded != codes).sum())
    assert differ  # codes of bf16 copies are others


def test_a_tied_weight_of_which_only_the_head_is_quantized(
    shared_model_path: Path, tmp_path: Path
) -> None:
    """The table is stored in bf16, and the codes are those of what is stored."""
    stored = AutoModelForCausalLM.from_pretrained(shared_model_path, dtype=torch.bfloat16)
    source = save(tmp_path / "bf16", stored, AutoTokenizer.from_pretrained(shared_model_path))
    recipe = Recipe.from_bits("4-8-4", head_bits=8)
    result = quantize(make(source, tmp_path / "out", recipe=recipe))
    head = load_codes(result.output)["lm_head.weight"]
    table = load_float_state(result.output)["model.embed_tokens.weight"]
    assert table.dtype is torch.bfloat16
    assert not torch.equal(table, stored.model.embed_tokens.weight)  # it was trained
    codes, scale = to_codes(table.float(), recipe.head, snap=True)
    assert torch.equal(head.codes, codes) and torch.equal(head.scale, scale)


class Stopped(BaseException):
    """Stands for a kill."""


def test_interrupted_run_ends_the_same(
    done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(shared_model_path, tmp_path / "out")
    step = Distiller._step

    def stops(self: Distiller, number: int) -> Any:
        if number == 5:
            raise Stopped
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Distiller, "_step", stops)
        quantize(config)
    assert not config.output.exists()
    with pytest.raises(ConfigError, match="other settings"):
        quantize(dataclasses.replace(config, recipe=Recipe.from_bits("4-8-8")))
    result = quantize(config)
    assert weights(result.output) == weights(done.output)


def test_teacher_and_student_are_gone_when_the_output_is_verified(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def models() -> set[int]:
        return {id(o) for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)}

    def counted(*args: Any, **kwargs: Any) -> Any:
        alive.append(len(models() - before))
        return verify(*args, **kwargs)

    alive: list[int] = []
    before = models()
    monkeypatch.setattr("qatc.quantize.verify", counted)
    quantize(make(shared_model_path, tmp_path / "out"))
    assert alive == [0]


def test_ctrl_c_leaves_a_checkpoint(
    done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(shared_model_path, tmp_path / "out")
    step = Distiller._step

    def interrupts(self: Distiller, number: int) -> Any:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "_step", interrupts)
        quantize(config)
    assert (tmp_path / "out.partial" / "checkpoints" / "step-000003").is_dir()
    assert weights(quantize(config).output) == weights(done.output)


def test_corpus_of_another_tokenizer(done: Any, other_tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        quantize(make(other_tokenizer_path, tmp_path / "out", data=done.data))
    assert not (tmp_path / "out").exists()


def test_nan_stops_with_advice(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Distiller._losses

    def poisoned(self: Distiller, batch: Any) -> Any:
        loss, kl = step(self, batch)
        return loss * float("nan"), kl

    monkeypatch.setattr(Distiller, "_losses", poisoned)
    with pytest.raises(TrainingError, match="--lr"):
        quantize(make(shared_model_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
