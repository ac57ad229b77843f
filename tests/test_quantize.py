"""The whole run on a tiny model: what comes out, and that it comes out complete or not at all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qatc import files, generate
from qatc.assess import AssessConfig, assess
from qatc.data import Corpus, pack_rows
from qatc.distill import TrainingConfig
from qatc.errors import CheckpointError, ConfigError, DataError, TrainingError
from qatc.evaluate import evaluate
from qatc.export.directory import load_codes, load_reference, read_recipe
from qatc.export.directory import write_model as write_model_directory
from qatc.generate import GenerationConfig
from qatc.models import load_model
from qatc.prepare import prepare
from qatc.progress import Observer
from qatc.quantize import GENERATED, QuantizeResult, quantize
from qatc.recipe import Recipe
from qatc.settings import QuantizeConfig
from tests.conftest import contents, kill_at_call, run_until_killed

FILES = {
    "config.json",
    "generation_config.json",
    "loss.png",
    "metrics.jsonl",
    "model.safetensors",
    "qatc.json",
    "report.md",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="session")
def settings(shared_model_path: Path) -> Callable[..., QuantizeConfig]:
    def settings(output: Path, **changes: Any) -> QuantizeConfig:
        given = {
            "generation": GenerationConfig(sequences=64, max_length=24, batch_size=32),
            "training": TrainingConfig(
                steps=12, batch_size=4, checkpoint_every=4, learning_rate=3e-3
            ),
            "eval_sequences": 16,
            "compile": False,
        } | changes
        return QuantizeConfig(str(shared_model_path), output, **given)

    return settings


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., QuantizeConfig]
) -> QuantizeResult:
    """An uninterrupted run."""
    return quantize(settings(tmp_path_factory.mktemp("quantize") / "out"))


def result_of(output: Path) -> dict[str, Any]:
    """All files of an output, without what the clock decides."""
    found: dict[str, Any] = contents(output)
    metadata = json.loads(found["qatc.json"])
    del metadata["training_seconds"], found["report.md"], found["qatc.json"]
    records = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    return found | {
        "qatc.json": metadata,
        "metrics.jsonl": [record | {"seconds": 0} for record in records],
    }


class TestOutput:
    def test_is_complete_and_nothing_else_is_left(self, whole: QuantizeResult) -> None:
        assert set(contents(whole.output)) == FILES
        assert {p.name for p in whole.output.parent.iterdir()} == {"out", "out.data"}
        assert Corpus.open(whole.data).manifest["sequences"] == 64

    def test_says_where_it_comes_from(self, whole: QuantizeResult, shared_model_path: Path) -> None:
        found = json.loads((whole.output / "qatc.json").read_text())
        assert found["model"] == str(shared_model_path)
        assert Recipe.from_dict(found["recipe"]) == Recipe()
        assert (found["recipe"]["kv_site"], found["recipe"]["kv"]["range"]) == (
            "cache",
            "restricted",
        )
        assert found["versions"].keys() >= {"qatc", "torch", "transformers"}
        assert "not installed" not in found["versions"].values()
        assert found["run"]["training"]["seed"] == found["run"]["generation"]["seed"] == 0
        assert found["data"]["fingerprint"] == Corpus.open(whole.data).fingerprint
        assert found["figures"][GENERATED]["QAT"] == whole.figures[GENERATED]["QAT"].to_dict()

    def test_report(self, whole: QuantizeResult) -> None:
        text = (whole.output / "report.md").read_text()
        full, rtn, qat = (whole.figures[GENERATED][n] for n in ("full precision", "RTN", "QAT"))
        lost, won = rtn.perplexity - full.perplexity, rtn.perplexity - qat.perplexity
        kl = (rtn.kl - qat.kl) / rtn.kl  # type: ignore[operator]
        assert f"| {100 * won / lost:.1f} % (KL {100 * kl:.1f} %) |" in text

    def test_training_helped(self, whole: QuantizeResult) -> None:
        figures = whole.figures[GENERATED]
        assert figures["full precision"].kl == 0
        assert figures["QAT"].kl < 0.9 * figures["RTN"].kl  # type: ignore[operator]

    def test_figures_are_those_of_what_is_stored(
        self, whole: QuantizeResult, shared_model_path: Path
    ) -> None:
        corpus = Corpus.open(whole.data)
        held_out = pack_rows(corpus.sequences()[-16:], 24, corpus.prompt_tokens)
        stored = prepare(load_reference(whole.output), read_recipe(whole.output), compile=False)
        teacher = load_model(str(shared_model_path)).model
        again = evaluate(stored, held_out, teacher=teacher, batch_size=4)
        assert again.to_dict() == pytest.approx(whole.figures[GENERATED]["QAT"].to_dict())

    def test_tokenizer(self, whole: QuantizeResult, tokenizer: Any) -> None:
        text = "The old fox"
        assert AutoTokenizer.from_pretrained(whole.output)(text) == tokenizer(text)

    def test_assess_agrees_on_the_whole_corpus(
        self, whole: QuantizeResult, shared_model_path: Path
    ) -> None:
        config = AssessConfig(
            str(whole.output), data=whole.data, teacher=str(shared_model_path), compile=False
        )
        found = assess(replace(config, length=24))
        assert found.kl == pytest.approx(whole.figures[GENERATED]["QAT"].kl, rel=0.3)


class TestVariants:
    def test_bf16_with_frozen_embeddings_and_a_text(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        whole: QuantizeResult,
        shared_model_path: Path,
        text_file: Path,
    ) -> None:
        recipe = Recipe.from_bits("3-8-8", group_size=16, kv_site="projection")
        config = settings(
            tmp_path / "out",
            recipe=recipe,
            dtype="bfloat16",
            train_embeddings=False,
            eval_text=text_file,
            data=whole.data,
        )
        result = quantize(config)
        assert list(result.figures) == [GENERATED, str(text_file)]
        assert not (tmp_path / "out.data").exists()
        name = "model.embed_tokens.weight"
        stored = load_file(tmp_path / "out" / "model.safetensors")
        source = load_file(shared_model_path / "model.safetensors")
        assert torch.equal(stored[name], source[name])
        assert not torch.equal(stored["model.norm.weight"], source["model.norm.weight"])
        codes = load_codes(tmp_path / "out")
        assert {(w.spec, int(w.codes.abs().max())) for w in codes.values()} == {(recipe.weights, 3)}

    def test_weights_in_full_precision(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        recipe = Recipe.from_bits("16-8-4")
        quantize(settings(tmp_path / "out", recipe=recipe, data=whole.data))
        assert load_codes(tmp_path / "out") == {}


class Killer(Observer):
    """Kills the process at a point of the run."""

    def __init__(self, point: str, number: int = 1) -> None:
        setattr(self, point, kill_at_call(getattr(self, point), number))


class TestResume:
    @pytest.mark.parametrize(
        ("point", "number"), [("generated", 1), ("evaluated", 3), ("trained", 7), ("trained", 12)]
    )
    def test_killed(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        whole: QuantizeResult,
        point: str,
        number: int,
    ) -> None:
        config = settings(tmp_path / "out")
        run_until_killed(lambda: quantize(config, Killer(point, number)))
        assert config.partial.exists() and not config.output.exists()
        assert quantize(config).figures == whole.figures
        assert result_of(config.output) == result_of(whole.output)
        assert {p.name for p in tmp_path.iterdir()} == {"out", "out.data"}

    @pytest.mark.parametrize("rename", [1, 2])
    def test_killed_while_the_old_output_is_replaced(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        whole: QuantizeResult,
        monkeypatch: pytest.MonkeyPatch,
        rename: int,
    ) -> None:
        config = settings(tmp_path / "out", data=whole.data, overwrite=True)
        config.output.mkdir()
        (config.output / "old").write_text("old")
        real, calls = Path.rename, kill_at_call(Path.rename, rename)
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "rename",
                lambda path, to: (calls if to.name.startswith("out") else real)(path, to),
            )
            run_until_killed(lambda: quantize(config))
        quantize(config)
        found, expected = result_of(config.output), result_of(whole.output)
        assert found["model.safetensors"] == expected["model.safetensors"]
        assert set(contents(config.output)) == FILES

    def test_ctrl_c(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        class Interrupting(Observer):
            def trained(self, metrics: Any, total: int) -> None:
                if metrics.step == 6:
                    os.kill(os.getpid(), signal.SIGINT)

        config = settings(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            quantize(config, Interrupting())
        assert (config.partial / "checkpoints" / "step-000006").exists()
        quantize(config)
        assert result_of(config.output) == result_of(whole.output)

    def test_a_given_corpus_that_is_unfinished_is_completed(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        config = settings(tmp_path / "out", data=tmp_path / "corpus")
        run_until_killed(lambda: quantize(config, Killer("generated")))
        quantize(config)
        assert contents(tmp_path / "corpus") == contents(whole.data)

    def test_a_truncated_checkpoint(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        config = settings(tmp_path / "out")
        run_until_killed(lambda: quantize(config, Killer("trained", 10)))
        file = config.partial / "checkpoints" / "step-000008" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="to go on from step 4"):
            quantize(config)
        file.unlink()
        file.parent.rmdir()
        quantize(config)
        assert result_of(config.output) == result_of(whole.output)


class TestFailure:
    """Nothing is half-written, and the same command goes on once the reason is gone."""

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"device": "nonsense"}, ConfigError, "try --device cpu"),
            ({"eval_sequences": 33}, ConfigError, "64 sequences are too few to hold out 33"),
            ({"eval_text": Path("absent")}, ConfigError, "cannot read the text absent"),
            ({"generation": GenerationConfig(max_length=129)}, ConfigError, "at most 128 tokens"),
            ({"recipe": Recipe(skip=("*absent*",))}, ConfigError, "matches no parameter"),
        ],
    )
    def test_before_anything_is_written(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        changes: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            quantize(settings(tmp_path / "out", **changes))
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_output(
        self, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        before = contents(whole.output)
        with pytest.raises(ConfigError, match="exists; choose another --output, or pass --over"):
            quantize(settings(whole.output))
        assert contents(whole.output) == before

    def test_a_corpus_of_another_tokenizer(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        whole: QuantizeResult,
        other_tokenizer_path: Path,
    ) -> None:
        config = settings(tmp_path / "out", data=whole.data)
        with pytest.raises(DataError, match="with another tokenizer than this model's"):
            quantize(replace(config, model=str(other_tokenizer_path)))
        assert list(tmp_path.iterdir()) == []

    def test_a_generated_corpus_with_other_settings(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig]
    ) -> None:
        config = settings(tmp_path / "out")
        with suppress(KeyboardInterrupt):
            quantize(config, _StopBeforeTraining())
        smaller = GenerationConfig(sequences=48, max_length=24, batch_size=32)
        with pytest.raises(ConfigError, match="was made with sequences 64, not 48"):
            quantize(replace(config, generation=smaller, overwrite=True))

    def test_divergence_keeps_the_last_good_checkpoint(
        self, tmp_path: Path, settings: Callable[..., QuantizeConfig], whole: QuantizeResult
    ) -> None:
        training = TrainingConfig(
            steps=12, batch_size=4, checkpoint_every=1, learning_rate=1e38, gradient_clip=1e30
        )
        config = settings(tmp_path / "out", training=training, data=whole.data)
        with pytest.raises(TrainingError, match="the loss is not a number at step .*a lower --lr"):
            quantize(config)
        assert not config.output.exists()

    @pytest.mark.parametrize("full_for", ["shard", "checkpoint", "model"])
    def test_full_disk(
        self,
        tmp_path: Path,
        settings: Callable[..., QuantizeConfig],
        whole: QuantizeResult,
        monkeypatch: pytest.MonkeyPatch,
        full_for: str,
    ) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        config = settings(tmp_path / "out")
        with monkeypatch.context() as patch:
            if full_for == "shard":
                patch.setattr(generate, "write_shard", lambda *_: _write_on_full_disk(tmp_path))
            if full_for == "checkpoint":
                patch.setattr(safetensors.torch, "save_file", full)
            if full_for == "model":
                patch.setattr("qatc.quantize.write_model", _fail_after(write_model_directory))
            with pytest.raises(CheckpointError, match="cannot write .*; free some space"):
                quantize(config)
        assert not [p.name for p in tmp_path.rglob("*.writing")]
        assert not config.output.exists()
        quantize(config)
        assert result_of(config.output) == result_of(whole.output)


class _StopBeforeTraining(Observer):
    def stage(self, title: str) -> None:
        if title.startswith("Evaluating full precision"):
            raise KeyboardInterrupt


def _write_on_full_disk(directory: Path) -> None:
    with files.writing_to(directory / "shard"):
        raise OSError(28, "No space left on device")


def _fail_after(function: Callable[..., None]) -> Callable[..., None]:
    def failing(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        raise OSError(28, "No space left on device")

    return failing
