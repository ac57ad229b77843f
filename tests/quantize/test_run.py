"""The main job on a tiny model: complete or absent, resumable, and what it says it is."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qatc.data.config import GenerationConfig
from qatc.data.generate import generate_corpus
from qatc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ParityError,
    QatcError,
    TrainingError,
)
from qatc.evaluation.metrics import Metrics, recovery
from qatc.evaluation.parity import Check, ParityReport, verify
from qatc.models import load_model, load_tokenizer
from qatc.numerics.minmax import quantize as to_codes
from qatc.output import load_codes, open_output
from qatc.output.reading import why_unverified
from qatc.progress import Observer
from qatc.quantize.provenance import package_version
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.quantize.writing import write
from qatc.recipe.recipe import Recipe
from qatc.storage import markers
from qatc.storage.locks import locked
from qatc.storage.markers import Mark
from qatc.training.distill import Distiller, TrainingConfig
from tests.conftest import contents, make_tokenizer, save


def make(model: Path, output: Path, **changes: Any) -> QuantizeConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "recipe": Recipe.from_bits("4-8-4"),
        "generation": GenerationConfig(sequences=24, max_length=16, batch_size=8, shard_size=8),
        "training": TrainingConfig(steps=6, batch_size=4, checkpoint_every=2),
        "eval_sequences": 8,
        "compile": False,
        "verify": False,  # seconds a run; tests of the gate ask for it
    }
    return QuantizeConfig(**(settings | changes))


@pytest.fixture(scope="module")
def done(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run."""
    output = tmp_path_factory.mktemp("quantize") / "out"
    return quantize(make(shared_model_path, output, verify=True))


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


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

    def remembers(setting: Any, trained: Any) -> None:
        masters.update(trained.masters)
        write(setting, trained)

    monkeypatch.setattr("qatc.quantize.run.write", remembers)
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
    result = quantize(make(source, tmp_path / "out", recipe=recipe, verify=True))
    head = load_codes(result.output)["lm_head.weight"]
    table = open_output(result.output).state["model.embed_tokens.weight"]
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
    monkeypatch.setattr("qatc.quantize.writing.verify", counted)
    quantize(make(shared_model_path, tmp_path / "out", verify=True))
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


def interrupted(config: QuantizeConfig, step: int = 5) -> None:
    """Run until before this step."""
    take = Distiller._step

    def stops(self: Distiller, number: int) -> Any:
        if number == step:
            raise Stopped
        return take(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Distiller, "_step", stops)
        quantize(config)


def no_more(*args: Any, **kwargs: Any) -> None:
    pytest.fail("computed again")


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


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
        monkeypatch.setattr(Distiller, "_step", no_more)
        monkeypatch.setattr("qatc.quantize.pair.evaluate", no_more)
        monkeypatch.setattr("qatc.data.generate.write_shard", no_more)
        result = quantize(config)
        assert weights(result.output) == weights(done.output)
        assert result.figures == done.figures
        assert {p.name for p in tmp_path.iterdir()} == {"out.data", "out"}
        metadata = json.loads((result.output / "qatc.json").read_text())
        assert metadata["parity"]["passed"] is (True if gate else None)
        assert (why_unverified(result.output) is None) == gate

    def test_a_failing_evaluation_keeps_the_training_too(
        self, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, notes = make(shared_model_path, tmp_path / "out", verify=True), Notes()
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("qatc.quantize.run.measure_trained", bug)
            quantize(config, notes)
        assert "the trained model is kept" in notes.notes[-1]
        monkeypatch.setattr(Distiller, "_step", no_more)
        assert quantize(dataclasses.replace(config, verify=False)).output.exists()

    def test_without_the_gate_the_output_is_marked(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make(shared_model_path, tmp_path / "out", verify=True)
        with monkeypatch.context() as patch, pytest.raises(ParityError):
            patch.setattr("qatc.quantize.writing.verify", failing_gate)
            quantize(config)
        monkeypatch.setattr(Distiller, "_step", no_more)
        monkeypatch.setattr("qatc.quantize.writing.verify", no_more)
        result = quantize(dataclasses.replace(config, verify=False))
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


class TestInputs:
    """A run is one run of one model, on one corpus, by one version."""

    def change(self, name: str, config: QuantizeConfig) -> None:
        """Change an input in place, keeping its size and its times."""
        path = {
            "model": Path(config.model) / "model.safetensors",
            "config": Path(config.model) / "config.json",
            "corpus": config.data_directory / "manifest.json",
            "text": config.eval_text,
        }[name]
        assert path is not None
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        if name == "model":
            state = load_file(path)
            state["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
            save_file(state, path, metadata={"format": "pt"})
        elif name == "config":
            plain = json.loads(path.read_text())
            path.write_text(json.dumps(plain | {"rms_norm_eps": 1e-3}))
        elif name == "text":
            path.write_text(path.read_text().replace("The old", "The odd", 1))
        else:
            shutil.rmtree(config.data_directory)
            generation = dataclasses.replace(config.generation, seed=1)
            teacher = load_model(config.model, dtype=torch.float32)
            tokenizer = load_tokenizer(config.model)
            generate_corpus(teacher, tokenizer, path.parent, generation, compile=False)
        os.utime(path, ns=times)

    @pytest.mark.parametrize("name", ["model", "config", "corpus", "text"])
    def test_changed_in_place(
        self, model_path: Path, text_file: Path, tmp_path: Path, name: str
    ) -> None:
        text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
        data = tmp_path / "data"
        config = make(model_path, tmp_path / "out", eval_text=text, data=data)
        interrupted(config)
        before = contents(config.partial)
        self.change(name, config)
        called = {"text": "the evaluation text", "config": "the model"}.get(name, f"the {name}")
        with pytest.raises(ConfigError, match=f"since it began {called} .* changed .*--overwrite"):
            quantize(config)
        assert contents(config.partial) == before
        notes = Notes()
        result = quantize(dataclasses.replace(config, overwrite=True), notes)
        assert any(note.startswith(f"starting over: {called}") for note in notes.notes)
        inputs = json.loads((result.output / "qatc.json").read_text())["inputs"]
        assert len(inputs) == 3 and any(key.startswith(called) for key in inputs)
        steps = (result.output / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in steps] == list(range(1, 7))

    @pytest.mark.parametrize("package", ["qatc", "torch", "transformers"])
    def test_another_version(
        self,
        shared_model_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        package: str,
    ) -> None:
        config = make(shared_model_path, tmp_path / "out")
        interrupted(config)
        real = package_version
        monkeypatch.setattr(
            "qatc.quantize.provenance.package_version",
            lambda name: "9.9" if name == package else real(name),
        )
        monkeypatch.setattr("qatc.quantize.run.read_given", no_more)
        with pytest.raises(ConfigError, match=f"the version of {package} changed from .* to 9.9"):
            quantize(config)

    def test_a_corpus_that_does_not_fit_is_found_before_the_old_run_is_deleted(
        self, shared_model_path: Path, tmp_path: Path
    ) -> None:
        config = make(shared_model_path, tmp_path / "out")
        interrupted(config)
        before = contents(config.partial)
        generation = dataclasses.replace(config.generation, seed=1)
        other = dataclasses.replace(config, generation=generation, overwrite=True)
        with pytest.raises(ConfigError, match="was made with seed 0, not 1"):
            quantize(other)
        assert contents(config.partial) == before


class TestPlaces:
    @pytest.mark.parametrize("output", ["tiny", "tiny/out", ".", "tiny/../tiny", "link"])
    def test_the_model_is_never_touched(
        self, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
    ) -> None:
        (tmp_path / "link").symlink_to(model_path)
        before = contents(tmp_path)
        monkeypatch.setattr("qatc.quantize.run.read_given", no_more)
        with pytest.raises(ConfigError, match="the model"):
            quantize(make(model_path, tmp_path / output, overwrite=True))
        assert contents(tmp_path) == before

    def test_an_output_is_not_written_twice_at_once(
        self, done: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Refused before anything is loaded, and the first one ends as if nothing had happened."""
        config = make(shared_model_path, tmp_path / "out")
        take = Distiller._step
        refused: list[str] = []

        def second() -> None:
            try:
                quantize(config)
            except ConfigError as error:
                refused.append(str(error))

        def starts_another(self: Distiller, number: int) -> Any:
            if number == 3 and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            return take(self, number)

        monkeypatch.setattr(Distiller, "_step", starts_another)
        result = quantize(config)
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
