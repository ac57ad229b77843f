"""Which tokens a slot may draw, and how many slots there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data import slots
from qatc.data.corpus import Corpus
from qatc.data.slots import Plan, Slots, Vocabulary
from qatc.errors import DataError
from qatc.models.load import LoadedModel
from tests.conftest import contents, kill_at_call, make_llama, make_tokenizer, run_until_killed
from tests.data.conftest import BOS, CONFIG, EOS


def with_added(*tokens: str) -> Any:
    """The tokenizer with tokens of its own, beyond the 112 that the model has."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


class TestTokens:
    """Which tokens may be drawn: none that stands for something else, none that is not there."""

    CONFIG = replace(CONFIG, sequences=400, max_length=6, batch_size=100, shard_size=400)

    def first(self, corpus: Corpus) -> set[int]:
        return {int(s[1]) for s in corpus.sequences()}

    def ending(self, *ends: int, **changes: Any) -> LoadedModel:
        model = make_llama(**changes)
        model.generation_config.eos_token_id = [EOS, *ends]
        return LoadedModel(model, "ending", torch.float32)

    def test_every_ordinary_token_may_come_first(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        config = replace(self.CONFIG, sequences=2000, max_length=4, shard_size=2000)
        assert self.first(write(tmp_path / "corpus", config)) == set(range(2, 112))

    def test_the_end_of_the_generation_config_ends(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        ends = set(range(20, 60))
        corpus = write(tmp_path / "corpus", self.CONFIG, teacher=self.ending(*ends))
        sequences = corpus.sequences()
        assert not self.first(corpus) & ends
        assert all(not ends & {*s[2:-1].tolist()} for s in sequences)
        assert sum(s[-1] in ends for s in sequences) > 100

    @pytest.mark.parametrize("place", ["config", "tokenizer"])
    def test_the_end_of_the_config_or_tokenizer_alone_ends(
        self, tmp_path: Path, write: Callable[..., Corpus], place: str
    ) -> None:
        teacher, tokenizer = self.ending(), make_tokenizer()
        teacher.model.generation_config.eos_token_id = None
        teacher.model.config.eos_token_id = None
        if place == "config":
            tokenizer.eos_token = None
            teacher.model.config.eos_token_id = [7, 8]
        ends = {7, 8} if place == "config" else {EOS}
        changes = {"teacher": teacher, "tokenizer": tokenizer}
        corpus = write(tmp_path / "corpus", replace(self.CONFIG, max_length=40), **changes)
        assert any(s[-1] in ends for s in corpus.sequences())
        assert all(not ends & {*s[1:-1].tolist()} for s in corpus.sequences())

    def test_a_given_token_that_is_an_end_ends_nothing(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        """Tokenizers that end and begin a text with one token, and two given ones."""
        tokenizer = make_tokenizer()
        tokenizer.eos_token = "<s>"
        model = make_llama()
        model.config.eos_token_id = model.generation_config.eos_token_id = BOS
        teacher = LoadedModel(model, "tiny", torch.float32)
        corpus = write(tmp_path / "corpus", self.CONFIG, teacher=teacher, tokenizer=tokenizer)
        assert min(len(s) for s in corpus.sequences()) >= 3
        never: Any = Never()
        slots = Slots(never, Vocabulary([BOS], frozenset({5}), [5], []), 1, 4, "cpu")
        found: list[Any] = []
        slots.run([Plan([BOS, 5], 2, np.zeros(4))], lambda _, tokens: found.append(tokens))
        assert found[0].tolist() == [BOS, 5, 0, 0]

    def test_added_tokens_do_not_come_first(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        """A chat token is an added one, whether it is called special or not."""
        tokenizer = with_added("<|chat|>", "<|tool|>")
        teacher = LoadedModel(make_llama(114), "tiny", torch.float32)
        corpus = write(tmp_path / "corpus", self.CONFIG, teacher=teacher, tokenizer=tokenizer)
        assert not self.first(corpus) & {112, 113}
        drawn = {int(token) for s in corpus.sequences() for token in s[2:]}
        assert drawn & {112, 113}, "the model itself may say them"

    def test_a_token_without_an_embedding_is_never_drawn(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        tokenizer = make_tokenizer(140)  # ordinary tokens, some of which the model does not have
        assert len(tokenizer) > 112
        corpus = write(tmp_path / "corpus", self.CONFIG, tokenizer=tokenizer)
        assert max(int(s.max()) for s in corpus.sequences()) < 112
        padded = with_added("[PAD]")
        assert len(write(tmp_path / "pad", self.CONFIG, tokenizer=padded).sequences()) == 400

    def test_a_logit_without_a_token_is_never_drawn(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        """Embeddings are rounded up to 64 or 128; what they hold beyond the tokenizer is noise."""
        teacher = LoadedModel(make_llama(160), "wide", torch.float32)
        for strategy in ("hybrid", "greedy"):
            config = replace(self.CONFIG, strategy=strategy)
            corpus = write(tmp_path / strategy, config, teacher=teacher)
            assert max(int(s.max()) for s in corpus.sequences()) < 112

    def test_a_model_that_answers_nan(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        model = make_llama()
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        with pytest.raises(DataError, match="NaN or infinite logits"):
            write(tmp_path / "corpus", teacher=LoadedModel(model, "nan", torch.float32))

    def test_a_tokenizer_of_another_model(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        teacher = LoadedModel(make_llama(2), "small", torch.float32)
        with pytest.raises(DataError, match="do not belong together: the model has 2 tokens"):
            write(tmp_path / "corpus", teacher=teacher)


class Never:
    """A decoder whose most likely token is always 0, and that has room for all."""

    def resize(self, rows: int) -> None:
        pass

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        return torch.tensor([[9.0, 0, 0, 0, 0, 0]]).repeat(len(tokens), 1)


class Timed(Never):
    """Twice the slots take no longer up to 64; the clock goes on in steps alone.

    A row takes 1000 bytes with its six logits, each of 4 bytes and twice.
    """

    row_bytes = 1000 - 6 * 8

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.tried = 0.0, list[int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(slots, "available_memory", lambda _: None)

    def resize(self, rows: int) -> None:
        self.tried.append(rows)

    def step(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        self.now += max(len(tokens) / 64, 1)
        return super().step(tokens, positions, longest)


class TestSlotsByMeasurement:
    @pytest.fixture
    def timed(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        return Timed(monkeypatch)

    def test_doubled_while_that_is_worth_it(self, timed: Any) -> None:
        assert slots.choose_slots(timed, 1000, 8, "cpu") == 64
        assert timed.tried == [16, 32, 64, 128]

    @pytest.mark.parametrize(("most", "wanted"), [(1, 1), (5, 5), (20, 20), (48, 48)])
    def test_no_more_than_there_are_sequences(self, timed: Any, most: int, wanted: int) -> None:
        assert slots.choose_slots(timed, most, 8, "cpu") == wanted

    @pytest.mark.parametrize(("free", "wanted"), [(100_000, 50), (10_000, 16)])
    def test_half_of_the_free_memory(
        self, timed: Any, monkeypatch: pytest.MonkeyPatch, free: int, wanted: int
    ) -> None:
        monkeypatch.setattr(slots, "available_memory", lambda _: free)
        assert slots.choose_slots(timed, 1000, 8, "cpu") == wanted

    def test_measured_once_and_kept(
        self, tmp_path: Path, write: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A resumed run takes the number of the manifest, whatever would be measured by then."""
        config = replace(CONFIG, batch_size="auto")
        monkeypatch.setattr(slots, "choose_slots", lambda *_: 5)
        once = write(tmp_path / "once", config)
        assert once.manifest["slots"] == 5 and once.manifest["batch_size"] == "auto"
        kill = kill_at_call(lambda *_: None, 4)
        run_until_killed(lambda: write(tmp_path / "corpus", config, on_progress=kill))
        monkeypatch.setattr(slots, "choose_slots", lambda *_: pytest.fail("measured again"))
        write(tmp_path / "corpus", config)
        assert contents(tmp_path / "corpus") == contents(once.path)

    def test_by_itself(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        corpus = write(tmp_path / "corpus", replace(CONFIG, batch_size="auto"))
        assert corpus.manifest["slots"] == 16  # all of a shard
        assert len(corpus.sequences()) == 40
