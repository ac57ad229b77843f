"""A run that learns from a recorded teacher: what it writes, holds in memory and refuses."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from qatc.data.config import CorpusConfig, Recording
from qatc.data.corpus import Corpus
from qatc.data.teacher_logits import record_teacher
from qatc.errors import ConfigError, DataError
from qatc.models import load_model
from qatc.models.load import model_fingerprint
from qatc.quantize import stages
from qatc.quantize.pair import drop_teacher
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from tests.conftest import contents, make_llama, save
from tests.quantize.conftest import NothingTrained, interrupted, make, weights

TRAINING = TrainingConfig(steps=6, batch_size=4, checkpoint_every=2, teacher="recorded")


def recorded(model: Path, output: Path, **changes: Any) -> QuantizeConfig:
    return make(model, output, **{"training": TRAINING, **changes})


@pytest.fixture(scope="module")
def finished(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that has its teacher write and record, and then go."""
    output = tmp_path_factory.mktemp("recorded") / "out"
    left: list[str] = []

    def dropped(pair: Any) -> None:
        layers = pair.teacher.model.model.layers
        weights = [(n, weakref.ref(p)) for n, p in layers.named_parameters()]
        gc.disable()  # the collector may be run by the next line of anybody, or much later
        drop_teacher(pair)
        gc.enable()
        left.extend(name for name, weight in weights if weight() is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "drop_teacher", dropped)
        result = quantize(recorded(shared_model_path, output, train_embeddings=False))
    assert not left
    return result


def test_one_command_writes_records_and_trains(
    finished: Any, done: Any, shared_model_path: Path
) -> None:
    found = contents(finished.data)
    assert {"recorded.json", "teacher-00000.safetensors"} < found.keys()
    corpus = contents(done.data)
    assert {name: found[name] for name in corpus} == corpus, "of the same corpus"
    figures = finished.figures["generated"]
    assert figures["full precision"].kl == pytest.approx(0, abs=1e-6)
    assert 0 < figures["QAT"].kl < figures["RTN"].kl


def test_while_it_trains_no_teacher_is_there(
    finished: Any, shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is another corpus written, or another record; and the run is the same after a stop."""
    before, seen, pairs = contents(finished.data), [], []

    def dropped(pair: Any) -> None:
        drop_teacher(pair)
        pairs.append(pair)

    class Looking(Distiller):
        def step(self, step: int) -> Any:
            assert self.teacher is None
            seen.append(all(p.is_meta for p in pairs[-1].teacher.model.parameters()))
            return super().step(step)

    monkeypatch.setattr(stages, "drop_teacher", dropped)
    monkeypatch.setattr(stages, "Distiller", Looking)
    config = recorded(
        shared_model_path, tmp_path / "out", data=finished.data, train_embeddings=False
    )
    interrupted(config)
    result = quantize(config)
    assert seen == [True] * len(seen) and len(seen) == 5 + 2
    assert weights(result.output) == weights(finished.output)
    assert contents(finished.data) == before


def refuse(config: QuantizeConfig, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        quantize(config, NothingTrained())
    assert not config.output.exists()


class TestRefusals:
    def test_a_corpus_without_a_record(
        self, done: Any, shared_model_path: Path, tmp_path: Path
    ) -> None:
        config = recorded(shared_model_path, tmp_path / "out", data=done.data)
        refuse(config, DataError, r"run its qatc generate-data command again with --record-logits")

    def test_other_rows(self, finished: Any, shared_model_path: Path, tmp_path: Path) -> None:
        shorter = CorpusConfig(sequences=24, max_length=12)
        data = finished.data
        config = recorded(shared_model_path, tmp_path / "out", data=data, generation=shorter)
        refuse(config, DataError, "of rows of 16 tokens, .* have 12; give --max-length 16")

    def test_another_teacher(self, finished: Any, tmp_path: Path, tokenizer: Any) -> None:
        model = save(tmp_path / "model", make_llama(seed=1), tokenizer)
        config = recorded(model, tmp_path / "out", data=finished.data)
        refuse(config, DataError, "with other weights than .*model has here; give the same model")

    def test_another_record(self, finished: Any, shared_model_path: Path, tmp_path: Path) -> None:
        asked = CorpusConfig(sequences=24, max_length=16, record_logits="8+8")
        data = finished.data
        config = recorded(shared_model_path, tmp_path / "out", data=data, generation=asked)
        refuse(config, ConfigError, r"has 32\+32 of its teacher recorded, not 8\+8; leave out")

    def test_a_record_changed_since_the_run_began(
        self, finished: Any, shared_model_path: Path, tmp_path: Path
    ) -> None:
        data = Path(shutil.copytree(finished.data, tmp_path / "data"))
        config = recorded(shared_model_path, tmp_path / "out", data=data)
        interrupted(config)
        (data / "recorded.json").unlink()
        (data / "teacher-00000.safetensors").unlink()
        teacher = load_model(str(shared_model_path))
        fingerprint = model_fingerprint(teacher.model)
        record_teacher(teacher, Corpus.open(data), Recording(8, 8), fingerprint=fingerprint)
        refuse(config, ConfigError, "the recorded teacher in .* changed")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"method": "rtn"}, "the method rtn does not train"),
            (
                {
                    "training": TrainingConfig(),
                    "generation": CorpusConfig(record_logits="8+8"),
                },
                r"nothing reads what --record-logits 8\+8 records while",
            ),
        ],
    )
    def test_settings(self, tmp_path: Path, changes: Any, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            recorded(tmp_path / "model", tmp_path / "out", **changes)
