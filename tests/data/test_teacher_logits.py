"""What is recorded of a teacher beside its corpus, and which record is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatc.data import generate, teacher_logits
from qatc.data.config import Recording
from qatc.data.corpus import Corpus, Rows
from qatc.data.teacher_logits import Recorded, record_teacher
from qatc.data.text import corpus_from_text, record_on_text
from qatc.errors import ConfigError, DataError
from qatc.models.load import LoadedModel
from qatc.report.contents import corpus_contents
from qatc.report.tables import corpus_rows
from tests.conftest import contents, kill_at_call, run_until_killed
from tests.data.conftest import CONFIG
from tests.data.test_chat import CONFIG as CHAT_CONFIG
from tests.data.test_chat import chat_tokenizer, chatter
from tests.data.test_text import DOCUMENTS
from tests.data.test_text import write as documents

__all__ = ["chat_tokenizer", "chatter"]

WHOLE = replace(CONFIG, record_logits="112+1")
"""Of the tiny teacher with its 112 tokens, all of its distribution."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rows of 24 tokens each, so that there are several, and the last batch is smaller."""
    monkeypatch.setattr(teacher_logits, "FILE_TOKENS", 9 * 24)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Corpus]) -> Recorded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_logits, "FILE_TOKENS", 9 * 24)
        return Recorded.open(write(tmp_path_factory.mktemp("recorded") / "c", WHOLE))


@pytest.fixture
def copy(recorded: Recorded, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded.path, tmp_path / "c"))


def assert_are_the_teachers(rows: Rows, teacher: LoadedModel) -> None:
    """Targets of everything, against a forward pass over the same rows."""
    assert rows.recorded is not None
    found = rows.recorded.read(rows.counted)
    with torch.no_grad():
        ids = torch.from_numpy(rows.tokens).long()
        p = teacher.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).double().softmax(-1)
    counted = torch.from_numpy(rows.counted).flatten()
    target = torch.zeros_like(p).scatter_add_(-1, found.ids, found.weights.double())
    torch.testing.assert_close(target[counted], p[counted], rtol=0, atol=4e-4)
    assert not found.weights[~counted].any() and not found.entropy[~counted].any()
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)[counted]
    torch.testing.assert_close(found.entropy[counted].double(), entropy, rtol=2e-3, atol=2e-3)


class TestTargets:
    def test_are_the_teachers_in_the_row_that_is_trained_on(
        self, recorded: Recorded, teacher: LoadedModel
    ) -> None:
        corpus = Corpus.open(recorded.path)
        rows = recorded.attach(corpus.rows(24))
        assert_are_the_teachers(rows, teacher)
        some = rows[np.array([20, 3, 3, 11])]
        assert_are_the_teachers(some, teacher)
        assert_are_the_teachers(rows[5:7], teacher)

    def test_of_a_text(self, tmp_path: Path, tokenizer: Any, teacher: LoadedModel) -> None:
        """Several sequences in a row, of which each sees those before it; some are held out."""
        file = documents(tmp_path / "text.jsonl", *DOCUMENTS)
        corpus = corpus_from_text(file, tokenizer, tmp_path / "c", model="tiny", max_length=110)
        recorded = record_on_text(teacher, tokenizer, corpus, Recording(112, 1))
        rows = recorded.attach(corpus.rows(110))
        assert int(rows.sequence.max()) > 2 and not rows.real.all()
        assert_are_the_teachers(rows, teacher)
        short = 0
        for held in range(1, 8):
            kept = recorded.attach(corpus.rows(110, slice(None, -held)))
            short += int(kept.counted[-1].sum()) < int(rows.counted[len(kept) - 1].sum())
            assert_are_the_teachers(kept, teacher)
        assert short > 2, "or no row ends earlier"

    def test_of_conversations(
        self,
        tmp_path: Path,
        write: Callable[..., Corpus],
        chatter: LoadedModel,
        chat_tokenizer: Any,
    ) -> None:
        size = chatter.model.config.vocab_size
        config = replace(CHAT_CONFIG, record_logits=f"{size}+1")
        corpus = write(tmp_path / "c", config, teacher=chatter, tokenizer=chat_tokenizer)
        rows = Recorded.open(corpus).attach(corpus.rows(60, slice(None, -4)))
        assert rows.answers_only and int(rows.counted.sum()) < int(rows.real.sum())
        assert_are_the_teachers(rows, chatter)


class TestFiles:
    def test_a_corpus_that_is_there_gets_a_record(
        self,
        recorded: Recorded,
        whole: Corpus,
        tmp_path: Path,
        write: Callable[..., Corpus],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = Path(shutil.copytree(whole.path, tmp_path / "c"))
        monkeypatch.setattr(generate, "write_shard", lambda *_: pytest.fail("written again"))
        write(path, WHOLE)
        assert contents(path) == contents(recorded.path)
        assert {k: v for k, v in contents(path).items() if k in contents(whole.path)} == contents(
            whole.path
        )
        files = recorded.manifest["files"]
        size = sum((path / file["file"]).stat().st_size for file in files)
        tokens = sum(len(s) for s in whole.sequences())
        assert len(files) > 2 and recorded.bytes_per_token == pytest.approx(size / tokens)

    @pytest.mark.parametrize("number", [1, 2, 3, 5])
    def test_an_interrupted_one_ends_with_the_same_bytes(
        self,
        recorded: Recorded,
        whole: Corpus,
        tmp_path: Path,
        write: Callable[..., Corpus],
        monkeypatch: pytest.MonkeyPatch,
        number: int,
    ) -> None:
        path = Path(shutil.copytree(whole.path, tmp_path / "c"))
        with monkeypatch.context() as patch:  # after the three times that the corpus' is written
            patch.setattr(Path, "replace", kill_at_call(Path.replace, 3 + number))
            run_until_killed(lambda: write(path, WHOLE))
        if (path / "recorded.json").exists():
            with pytest.raises(DataError, match=r"unfinished; run its .* --record-logits 112\+1"):
                Recorded.open(Corpus.open(path))
        write(path, WHOLE)
        assert contents(path) == contents(recorded.path)

    def test_a_damaged_file_is_written_anew(
        self, copy: Path, recorded: Recorded, write: Callable[..., Corpus]
    ) -> None:
        file = copy / "teacher-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(DataError, match="teacher-00001.* is missing or damaged"):
            Recorded.open(Corpus.open(copy))
        write(copy, WHOLE)
        assert contents(copy) == contents(recorded.path)

    def test_the_draws_are_those_of_the_row(
        self, whole: Corpus, tmp_path: Path, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many rows are in a file."""
        found = []
        for size in (9, 16):
            monkeypatch.setattr(teacher_logits, "FILE_TOKENS", size * 24)
            path = Path(shutil.copytree(whole.path, tmp_path / str(size)))
            corpus = Corpus.open(path)
            recorded = record_teacher(teacher, corpus, Recording(4, 6), fingerprint="it")
            rows = recorded.attach(corpus.rows(24))
            assert rows.recorded is not None
            found.append(rows.recorded.read(rows.counted))
        assert torch.equal(found[0].ids, found[1].ids)
        torch.testing.assert_close(found[0].weights, found[1].weights, rtol=1e-3, atol=1e-5)


class TestRefusals:
    def test_no_record(self, whole: Corpus) -> None:
        with pytest.raises(DataError, match=r"no recorded teacher; .*--record-logits 32\+32"):
            Recorded.open(whole)

    def test_other_rows(self, recorded: Recorded) -> None:
        rows = Corpus.open(recorded.path).rows(20)
        with pytest.raises(DataError, match="of rows of 24 tokens.* have 20; give --max-length 24"):
            recorded.attach(rows)

    def test_another_teacher(self, recorded: Recorded) -> None:
        recorded.require_teacher(recorded.manifest["model_fingerprint"], torch.bfloat16, "x")
        with pytest.raises(DataError, match=r"other weights than x has here \(.* in float32; this"):
            recorded.require_teacher("another", torch.bfloat16, "x")

    def test_another_record(self, copy: Path, write: Callable[..., Corpus]) -> None:
        before = contents(copy)
        with pytest.raises(ConfigError, match=r"already, with record_logits '112\+1', not '4\+4'"):
            write(copy, replace(CONFIG, record_logits="4+4"))
        assert contents(copy) == before

    def test_other_sequences(self, copy: Path, write: Callable[..., Corpus]) -> None:
        kept = {p.name: p.read_bytes() for p in copy.iterdir() if "shard" not in p.name}
        shutil.rmtree(copy)
        other = write(copy, replace(CONFIG, seed=4))
        for name in kept.keys() - {"manifest.json"}:
            (copy / name).write_bytes(kept[name])
        with pytest.raises(DataError, match="of other sequences than the corpus has now; remove"):
            Recorded.open(other)


def test_a_corpus_says_what_is_recorded_beside_it(copy: Path) -> None:
    def told() -> str:
        return dict(corpus_rows(corpus_contents(copy)))["teacher recorded"]

    assert told().startswith("112+1 of ") and told().endswith(", complete")
    (copy / "teacher-00001.safetensors").write_bytes(b"")
    assert "missing or damaged: teacher-00001.safetensors; qatc generate-data --rec" in told()
    (copy / teacher_logits.MANIFEST).unlink()
    assert "teacher recorded" not in dict(corpus_rows(corpus_contents(copy)))
