"""The main job on a tiny model: complete or absent, and what it says it is."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qatc.data.generate import generate_corpus
from qatc.errors import ConfigError, DataError, TrainingError
from qatc.evaluation.metrics import Metrics, recovery
from qatc.evaluation.parity import verify
from qatc.models import load_model
from qatc.numerics.minmax import quantize as to_codes
from qatc.output import load_codes, open_output
from qatc.progress import Observer
from qatc.quantize import stages
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.storage import markers
from qatc.storage.locks import locked
from qatc.storage.markers import Mark
from qatc.training.checkpoint import Checkpoints
from qatc.training.config import TrainingConfig
from tests.conftest import contents, make_tokenizer, save
from tests.quantize.conftest import AfterStep, NothingBegun, make, weights


def test_output(done: Any) -> None:
    names = {path.name for path in done.output.iterdir()}
    assert {"config.json", "model.safetensors", "qatc.json", "report.md", "loss.png"} <= names
    assert {"tokenizer.json", "metrics.jsonl", "README.md"} <= names
    assert not done.output.with_name("out.partial").exists()
    assert len((done.output / "metrics.jsonl").read_text().splitlines()) == 6
    metadata = json.loads((done.output / "qatc.json").read_text())
    assert metadata["recipe"] == Recipe.from_bits("4-8-4").to_dict()
    assert {"torch", "qatc", "transformers"} <= set(metadata["versions"])
    assert metadata["data"]["seed"] == 0 and len(metadata["data"]["fingerprint"]) == 64
    assert open_output(done.output).recipe == Recipe.from_bits("4-8-4")
    by_layer = metadata["divergence_by_layer"]
    assert len(by_layer) == 2 and all(0 < kl < 1 for kl in by_layer)
    report = (done.output / "report.md").read_text()
    assert "| RTN |" in report and "loss.png" in report and "## By layer" in report
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


class KeepsCheckpoints(Observer):
    """Copies a run's checkpoints, which are gone once it has ended."""

    def __init__(self, config: QuantizeConfig, copy: Path) -> None:
        self.checkpoints, self.copy = config.partial / "checkpoints", copy

    def evaluated(self, done: int, total: int) -> None:
        if self.checkpoints.exists():
            shutil.copytree(self.checkpoints, self.copy, dirs_exist_ok=True)


def test_codes_are_those_of_the_masters(shared_model_path: Path, tmp_path: Path) -> None:
    """Under bf16 compute the fp32 masters are what training rounds, so their codes are written."""
    config = make(shared_model_path, tmp_path / "out", dtype="bfloat16")
    result = quantize(config, KeepsCheckpoints(config, tmp_path / "copy"))
    model = load_model(config.model, dtype=torch.float32).model
    masters = dict(model.named_parameters())
    kept = Checkpoints(tmp_path / "copy", 1)
    assert kept.restore(model, masters, torch.optim.AdamW(masters.values())) == 6
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
    result = quantize(make(source, tmp_path / "out", recipe=recipe, verify=True))
    head = load_codes(result.output)["lm_head.weight"]
    table = open_output(result.output).state["model.embed_tokens.weight"]
    assert table.dtype is torch.bfloat16
    assert not torch.equal(table, stored.model.embed_tokens.weight)  # it was trained
    codes, scale = to_codes(table.float(), recipe.head, snap=True)
    assert torch.equal(head.codes, codes) and torch.equal(head.scale, scale)


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
    monkeypatch.setattr("qatc.quantize.writing.verify", counted)
    quantize(make(shared_model_path, tmp_path / "out", verify=True))
    assert alive == [0]


class TestPlaces:
    @pytest.mark.parametrize("output", ["tiny", "tiny/out", ".", "tiny/../tiny", "link"])
    def test_the_model_is_never_touched(
        self, model_path: Path, tmp_path: Path, output: str
    ) -> None:
        (tmp_path / "link").symlink_to(model_path)
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match="the model"):
            quantize(make(model_path, tmp_path / output, overwrite=True), NothingBegun())
        assert contents(tmp_path) == before

    def test_an_output_is_not_written_twice_at_once(
        self, done: Any, shared_model_path: Path, tmp_path: Path
    ) -> None:
        """Refused before anything is loaded, and the first one ends as if nothing had happened."""
        config = make(shared_model_path, tmp_path / "out")
        refused: list[str] = []

        def second() -> None:
            try:
                quantize(config)
            except ConfigError as error:
                refused.append(str(error))

        def starts_another() -> None:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

        result = quantize(config, AfterStep(3, starts_another))
        assert len(refused) == 1
        assert f"{config.output} is being written by process {os.getpid()} " in refused[0]
        assert weights(result.output) == weights(done.output)

    def test_a_corpus_is_not_written_twice_at_once(
        self, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make(shared_model_path, tmp_path / "one", data=tmp_path / "data")
        other = dataclasses.replace(config, output=tmp_path / "two")
        started, refused = generate_corpus, []

        def starts_another(*args: Any, **kwargs: Any) -> Any:
            def second() -> None:
                try:
                    quantize(other)
                except ConfigError as error:
                    refused.append(str(error))

            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            return started(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("qatc.quantize.stages.generate_corpus", starts_another)
            quantize(config)
        assert f"{config.data} is being written by process {os.getpid()} " in refused[0]

    def test_a_finished_corpus_serves_two_runs_at_once(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make(shared_model_path, tmp_path / "out", data=done.data)
        with locked(done.data):
            assert weights(quantize(config).output) == weights(done.output)

    def test_an_interrupted_replacement_is_settled_by_whoever_reads(
        self, done: Any, tmp_path: Path
    ) -> None:
        shutil.copytree(done.output, tmp_path / "out.replaced")
        markers.put(tmp_path / "out.replaced", Mark.REPLACED)
        assert open_output(tmp_path / "out").recipe == Recipe.from_bits("4-8-4")
        assert contents(tmp_path) == {f"out/{k}": v for k, v in contents(done.output).items()}


def test_corpus_of_another_tokenizer(done: Any, other_tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        quantize(make(other_tokenizer_path, tmp_path / "out", data=done.data))
    assert not (tmp_path / "out").exists()


def test_a_text_with_a_token_that_the_model_lacks(model_path: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model_path)
    (tmp_path / "text").write_text("The old [PAD] fox sleeps. " * 30)
    with pytest.raises(DataError, match=r"text holds the token '\[PAD\]', number 112"):
        quantize(make(model_path, tmp_path / "out", eval_text=tmp_path / "text"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "tiny"]


def test_nan_stops_with_advice(shared_model_path: Path, tmp_path: Path) -> None:
    """A rate that throws the weights beyond what a product of them can hold."""
    config = make(shared_model_path, tmp_path / "out")
    training = dataclasses.replace(config.training, learning_rate=1e30)
    with pytest.raises(TrainingError, match="not a number at step 2.*--lr"):
        quantize(dataclasses.replace(config, training=training))
    assert not (tmp_path / "out").exists()


def test_the_teacher_is_compiled_while_it_is_learned_from(
    done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[tuple[Any, bool]] = []

    @contextmanager
    def spy(teacher: Any, compile: bool) -> Iterator[None]:
        during.append((teacher.config.model_type, compile))
        yield
        during.append(("over", compile))

    class Steps(Observer):
        def trained(self, metrics: Any, steps: int) -> None:
            during.append((metrics.step, False))

    monkeypatch.setattr(stages, "compiled_layers", spy)
    training = TrainingConfig(steps=1, batch_size=4)
    config = make(shared_model_path, tmp_path / "out", training=training, data=done.data)
    quantize(config, Steps())
    assert during == [("llama", False), (1, False), ("over", False)]
