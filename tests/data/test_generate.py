"""What the teacher writes, and that an interrupted run ends with the same bytes."""

from __future__ import annotations

import copy
import functools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data import corpus as data
from qatc.data import generate, slots
from qatc.data.config import GenerationConfig
from qatc.data.corpus import Corpus
from qatc.data.decode import Decoder
from qatc.data.generate import generate_corpus, model_fingerprint
from qatc.data.slots import Plan, Slots, Vocabulary
from qatc.errors import ConfigError, DataError
from qatc.models.load import LoadedModel
from qatc.models.preparation import can_compile
from qatc.storage import files
from tests.conftest import contents, kill_at_call, make_llama, make_tokenizer, run_until_killed

BOS, EOS = 0, 1
CONFIG = GenerationConfig(sequences=40, max_length=24, batch_size=8, shard_size=16, seed=3)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return LoadedModel(make_llama(), "tiny", torch.float32)


@pytest.fixture(scope="module")
def write(teacher: LoadedModel, tokenizer: Any) -> Callable[..., Corpus]:
    def write(output: Path, config: GenerationConfig = CONFIG, **changes: Any) -> Corpus:
        given = {"teacher": teacher, "tokenizer": tokenizer, "compile": False} | changes
        return generate_corpus(output=output, config=config, **given)

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Corpus]) -> Corpus:
    """The corpus of an uninterrupted run."""
    return write(tmp_path_factory.mktemp("generate") / "whole")


def logits_of(teacher: LoadedModel, sequence: Any) -> Tensor:
    """What the model says about every next token, by one plain forward pass."""
    ids = torch.tensor(np.asarray(sequence), dtype=torch.long)[None]
    with torch.no_grad():
        result: Tensor = teacher.model(ids).logits[0]
    return result


def greedy_start(teacher: LoadedModel, sequence: Any) -> int:
    """How many tokens after the first two are the most likely ones, without a gap."""
    best = logits_of(teacher, sequence).argmax(-1)[1:-1].tolist()
    hits = [a == b for a, b in zip(best, sequence[2:], strict=True)]
    return hits.index(False) if False in hits else len(hits)


class TestSequences:
    def test_as_many_and_as_long_as_asked(self, whole: Corpus) -> None:
        assert [s["sequences"] for s in whole.manifest["shards"]] == [16, 16, 8]
        sequences = whole.sequences()
        assert len(sequences) == 40
        assert all(len(s) == 24 or s[-1] == EOS for s in sequences)
        assert all(EOS not in s[2:-1] for s in sequences), "nothing follows the end"
        assert any(len(s) < 24 for s in sequences), "or this test shows nothing"

    def test_begins_with_bos_and_an_ordinary_token(self, whole: Corpus) -> None:
        sequences = whole.sequences()
        assert whole.prompt_tokens == 2
        assert {int(s[0]) for s in sequences} == {BOS}
        first = {int(s[1]) for s in sequences}
        assert not first & {BOS, EOS} and len(first) > 20

    def test_hybrid_is_greedy_for_three_to_five_tokens(
        self, whole: Corpus, teacher: LoadedModel
    ) -> None:
        greedy = [greedy_start(teacher, s) for s in whole.sequences() if len(s) == 24]
        assert min(greedy) == 3, "sampled too early, or always four and more"
        # A sampled token is the most likely one now and then, so some go on by chance.
        assert {3, 4, 5} <= set(greedy) and np.mean(np.asarray(greedy) > 5) < 0.3

    def test_the_rest_follows_the_teachers_distribution(
        self, tmp_path: Path, write: Callable[..., Corpus], teacher: LoadedModel
    ) -> None:
        config = replace(CONFIG, sequences=128, strategy="sample", batch_size=64, shard_size=128)
        surprise, entropy = [], []
        for sequence in write(tmp_path / "corpus", config).sequences():
            log_p = logits_of(teacher, sequence).double().log_softmax(-1)[1:-1]
            chosen = torch.tensor(sequence[2:], dtype=torch.long)
            surprise += log_p.gather(1, chosen[:, None]).neg().flatten().tolist()
            entropy += (-(log_p.exp() * log_p).sum(-1)).tolist()
        deviation = np.std(surprise) / len(surprise) ** 0.5
        assert len(surprise) > 2000
        assert abs(np.mean(surprise) - np.mean(entropy)) < 3 * deviation

    def test_greedy(
        self, tmp_path: Path, write: Callable[..., Corpus], teacher: LoadedModel
    ) -> None:
        config = replace(CONFIG, sequences=8, strategy="greedy")
        for sequence in write(tmp_path / "corpus", config).sequences():
            assert greedy_start(teacher, sequence) == len(sequence) - 2

    def test_greedy_is_what_transformers_generates(
        self, tmp_path: Path, write: Callable[..., Corpus], teacher: LoadedModel
    ) -> None:
        config = replace(CONFIG, sequences=8, strategy="greedy")
        for sequence in write(tmp_path / "corpus", config).sequences():
            ids = torch.tensor(sequence[:2], dtype=torch.long)[None]
            wanted = teacher.model.generate(ids, max_new_tokens=22, do_sample=False, pad_token_id=2)
            assert sequence.tolist() == wanted[0].tolist()

    @pytest.mark.parametrize("greedy", [(2, 2), (0, 1), (1, 4)])
    def test_both_ends_of_the_greedy_tokens_occur(
        self, write: Callable[..., Corpus], tmp_path: Path, greedy: tuple[int, int]
    ) -> None:
        """A model that is almost even: a sampled token is the most likely one in 1 of 100 cases."""
        even = LoadedModel(make_llama(initializer_range=0.02), "even", torch.float32)
        config = replace(CONFIG, sequences=48, greedy_tokens=greedy)
        corpus = write(tmp_path / "corpus", config, teacher=even)
        starts = [greedy_start(even, s) for s in corpus.sequences() if len(s) > 10]
        counts = np.bincount(starts, minlength=greedy[1] + 1)
        expected = range(greedy[0], greedy[1] + 1)
        assert all(counts[i] >= 3 for i in expected)
        assert sum(counts[i] for i in expected) >= 0.9 * len(starts)

    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_the_slots_do_not_matter_in_exact_arithmetic(
        self, tmp_path: Path, write: Callable[..., Corpus], batch_size: int
    ) -> None:
        """In fp64 the products of other batches round alike as far as any token notices."""
        exact = LoadedModel(make_llama().double(), "exact", torch.float64)
        one = write(tmp_path / "one", replace(CONFIG, sequences=20), teacher=exact)
        changes = replace(CONFIG, sequences=20, batch_size=batch_size, shard_size=7)
        other = write(tmp_path / "other", changes, teacher=exact)
        pairs = zip(one.sequences(), other.sequences(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)

    def test_a_longer_corpus_begins_with_a_shorter_one(
        self, tmp_path: Path, write: Callable[..., Corpus], whole: Corpus
    ) -> None:
        longer = write(tmp_path / "corpus", replace(CONFIG, sequences=48))
        assert longer.manifest["shards"][:2] == whole.manifest["shards"][:2]

    def test_the_last_sequences_are_not_computed_in_idle_slots(
        self, tmp_path: Path, write: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows: list[int] = []
        step = Decoder.step

        def counted(decoder: Decoder, tokens: Tensor, *rest: Any) -> Tensor:
            rows.append(len(tokens))
            return step(decoder, tokens, *rest)

        monkeypatch.setattr(Decoder, "step", counted)
        config = replace(CONFIG, sequences=20, max_length=100, shard_size=20)
        corpus = write(tmp_path / "corpus", config)
        assert max(rows) == 8 and min(rows) < 4
        decoded = sum(len(s) - 1 for s in corpus.sequences())
        # A single sequence has a second row beside it.
        assert sum(rows) - rows.count(2) <= decoded <= sum(rows)

    def test_without_a_token_at_the_beginning(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        plain = make_tokenizer(bos=False)
        corpus = write(tmp_path / "corpus", replace(CONFIG, sequences=8), tokenizer=plain)
        assert corpus.prompt_tokens == 1
        assert not {int(s[0]) for s in corpus.sequences()} & {BOS, EOS}

    def test_the_seed_decides(
        self, tmp_path: Path, write: Callable[..., Corpus], whole: Corpus
    ) -> None:
        other = write(tmp_path / "other", replace(CONFIG, seed=4))
        assert other.fingerprint != whole.fingerprint

    def test_slots_are_refilled(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        config = replace(CONFIG, sequences=24, max_length=100, batch_size=4, shard_size=24)
        (shard,) = write(tmp_path / "corpus", config).manifest["shards"]
        decoded = [len(s) - 1 for s in Corpus.open(tmp_path / "corpus").sequences()]
        one_by_one = sum(max(decoded[i : i + 4]) for i in range(0, 24, 4))
        assert shard["steps"] <= sum(decoded) / 4 + max(decoded) < one_by_one


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
        slots = Slots(Never(), Vocabulary([BOS], frozenset({5}), [5], []), 1, 4, "cpu")
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


class TestSlotsByMeasurement:
    @pytest.fixture
    def rates(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Twice the slots are worth it up to 64; the numbers tried are recorded."""
        tried: list[int] = []

        def measure(decoder: Any, rows: int, length: int, device: Any) -> tuple[float, int]:
            tried.append(rows)
            return max(rows / 64, 1), 1000

        monkeypatch.setattr(slots, "_measure", measure)
        monkeypatch.setattr(slots, "available_memory", lambda _: None)
        return tried

    def test_doubled_while_that_is_worth_it(self, rates: list[int]) -> None:
        assert slots.choose_slots(Never(), 1000, 8, "cpu") == 64
        assert rates == [16, 32, 64, 128]

    @pytest.mark.parametrize(("most", "wanted"), [(1, 1), (5, 5), (20, 20), (48, 48)])
    def test_no_more_than_there_are_sequences(
        self, rates: list[int], most: int, wanted: int
    ) -> None:
        assert slots.choose_slots(Never(), most, 8, "cpu") == wanted

    @pytest.mark.parametrize(("free", "wanted"), [(100_000, 50), (10_000, 16)])
    def test_half_of_the_free_memory(
        self, rates: list[int], monkeypatch: pytest.MonkeyPatch, free: int, wanted: int
    ) -> None:
        monkeypatch.setattr(slots, "available_memory", lambda _: free)
        assert slots.choose_slots(Never(), 1000, 8, "cpu") == wanted

    def test_measured_once_and_kept(
        self, tmp_path: Path, write: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A resumed run takes the number of the manifest, whatever would be measured by then."""
        config = replace(CONFIG, batch_size="auto")
        monkeypatch.setattr(generate, "choose_slots", lambda *_: 5)
        once = write(tmp_path / "once", config)
        assert once.manifest["slots"] == 5 and once.manifest["batch_size"] == "auto"
        kill = kill_at_call(lambda *_: None, 4)
        run_until_killed(lambda: write(tmp_path / "corpus", config, on_progress=kill))
        monkeypatch.setattr(generate, "choose_slots", lambda *_: pytest.fail("measured again"))
        write(tmp_path / "corpus", config)
        assert contents(tmp_path / "corpus") == contents(once.path)

    def test_by_itself(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        corpus = write(tmp_path / "corpus", replace(CONFIG, batch_size="auto"))
        assert corpus.manifest["slots"] == 16  # all of a shard
        assert len(corpus.sequences()) == 40


class TestResume:
    """Each shard is written from a random state of its own."""

    def finish(self, output: Path, write: Callable[..., Corpus], whole: Corpus) -> None:
        write(output)
        assert contents(output) == contents(whole.path)

    @pytest.mark.parametrize("calls", [1, 4])
    def test_killed_inside_a_shard(
        self, tmp_path: Path, write: Callable[..., Corpus], whole: Corpus, calls: int
    ) -> None:
        kill = kill_at_call(lambda *_: None, calls)
        run_until_killed(lambda: write(tmp_path / "corpus", on_progress=kill))
        assert not data.is_complete(tmp_path / "corpus")
        self.finish(tmp_path / "corpus", write, whole)

    @pytest.mark.parametrize("number", [1, 2, 3, 6, 8])
    def test_killed_before_a_file_is_in_place(
        self,
        tmp_path: Path,
        write: Callable[..., Corpus],
        whole: Corpus,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
    ) -> None:
        """Eight files: the manifest, again with the slots, then thrice a shard and the manifest."""
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", kill_at_call(Path.replace, number))
            run_until_killed(lambda: write(tmp_path / "corpus"))
        assert list((tmp_path / "corpus").glob("*.writing"))
        self.finish(tmp_path / "corpus", write, whole)

    @pytest.mark.parametrize("shard", [0, 2])
    def test_truncated_shard(
        self, tmp_path: Path, write: Callable[..., Corpus], whole: Corpus, shard: int
    ) -> None:
        write(tmp_path / "corpus")
        file = tmp_path / "corpus" / f"shard-{shard:05d}.parquet"
        file.write_bytes(file.read_bytes()[:-20])
        self.finish(tmp_path / "corpus", write, whole)

    def test_a_whole_corpus_is_left_alone(
        self, write: Callable[..., Corpus], whole: Corpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generate, "write_shard", lambda *_: pytest.fail("written again"))
        assert write(whole.path).fingerprint == whole.fingerprint

    def test_full_disk(
        self,
        tmp_path: Path,
        write: Callable[..., Corpus],
        whole: Corpus,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            with pytest.raises(files.CheckpointError, match="No space left on device; free some"):
                write(tmp_path / "corpus")
        assert contents(tmp_path / "corpus") == {}
        self.finish(tmp_path / "corpus", write, whole)

    @pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
    def test_compiled(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        compiled = functools.partial(write, config=replace(CONFIG, sequences=20), compile=True)
        compiled(tmp_path / "once")
        (tmp_path / "once" / "shard-00001.parquet").rename(tmp_path / "shard")
        compiled(tmp_path / "once")
        again = (tmp_path / "once" / "shard-00001.parquet").read_bytes()
        assert again == (tmp_path / "shard").read_bytes()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"sequences": 41}, "sequences 40, not 41"),
            ({"max_length": 25}, "max_length 24, not 25"),
            ({"strategy": "sample"}, "strategy 'hybrid', not 'sample'"),
            ({"greedy_tokens": (3, 4)}, r"greedy_tokens \[3, 5\], not \[3, 4\]"),
            ({"seed": 4}, "seed 3, not 4"),
            ({"batch_size": 4}, "batch_size 8, not 4"),
            ({"shard_size": 8}, "shard_size 16, not 8"),
        ],
    )
    def test_a_corpus_with_other_settings(
        self, write: Callable[..., Corpus], whole: Corpus, change: Any, difference: str
    ) -> None:
        before = contents(whole.path)
        with pytest.raises(ConfigError, match=f"was made with {difference}; choose another"):
            write(whole.path, replace(CONFIG, **change))
        assert contents(whole.path) == before

    def test_a_corpus_of_another_model_or_tokenizer(
        self, write: Callable[..., Corpus], whole: Corpus
    ) -> None:
        other = LoadedModel(make_llama(seed=1), "other", torch.float32)
        with pytest.raises(ConfigError, match="was made by another model, that of tiny"):
            write(whole.path, teacher=other)
        with pytest.raises(ConfigError, match="was made by another tokenizer, that of tiny"):
            write(whole.path, tokenizer=make_tokenizer(90))

    @pytest.mark.parametrize("name", ["config", "weight", "buffer"])
    def test_a_model_that_changed_in_any_value_is_another(
        self, tmp_path: Path, write: Callable[..., Corpus], name: str
    ) -> None:
        model = make_llama()
        model.register_buffer("bias", torch.zeros(5))
        teacher = LoadedModel(model, "tiny", torch.float32)
        before = write(tmp_path / "corpus", replace(CONFIG, sequences=8), teacher=teacher)
        if name == "config":
            model.config.rope_parameters["rope_theta"] *= 2
        else:
            values = model.bias if name == "buffer" else model.model.embed_tokens.weight
            with torch.no_grad():
                values.flatten()[3] += 1e-4
        with pytest.raises(ConfigError, match="was made by another model"):
            write(before.path, replace(CONFIG, sequences=8), teacher=teacher)

    def test_a_model_is_the_same_in_another_dtype(self) -> None:
        stored = make_llama().to(torch.bfloat16)
        again = copy.deepcopy(stored).float()
        again.config.dtype, again.config._name_or_path = torch.float32, "elsewhere"
        assert model_fingerprint(again) == model_fingerprint(stored)

    @pytest.mark.parametrize("package", ["qatc", "torch", "transformers"])
    def test_shards_of_two_versions_are_no_corpus(
        self, tmp_path: Path, write: Callable[..., Corpus], package: str
    ) -> None:
        config = replace(CONFIG, sequences=8)
        manifest = write(tmp_path / "corpus", config).path / data.MANIFEST
        plain = json.loads(manifest.read_text()) | {f"{package}_version": "0.0"}
        files.write_json(manifest, plain)
        write(tmp_path / "corpus", config)
        files.write_json(manifest, plain | {"complete": False})
        with pytest.raises(ConfigError, match=f"was made with {package}_version '0.0', not"):
            write(tmp_path / "corpus", config)

    @pytest.mark.parametrize("output", ["model", "model/corpus", "."])
    def test_a_corpus_over_or_in_its_model(
        self, tmp_path: Path, write: Callable[..., Corpus], output: str
    ) -> None:
        (tmp_path / "model").mkdir()
        teacher = LoadedModel(make_llama(), str(tmp_path / "model"), torch.float32)
        with pytest.raises(ConfigError, match=r"the corpus .* the model"):
            write(tmp_path / output, teacher=teacher)
        assert [path.name for path in tmp_path.rglob("*")] == ["model"]

    def test_a_corpus_that_is_being_written(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        refused: list[str] = []

        def second() -> None:
            try:
                write(tmp_path / "corpus")
            except ConfigError as error:
                refused.append(str(error))

        def start_another(*_: int) -> None:
            if not refused:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        write(tmp_path / "corpus", on_progress=start_another)
        assert f"is being written by process {os.getpid()}" in refused[0]

    @pytest.mark.parametrize("seed", [2**43, 2**64, 10**30])
    def test_a_seed_of_any_size(
        self, tmp_path: Path, write: Callable[..., Corpus], seed: int
    ) -> None:
        config = replace(CONFIG, sequences=4, seed=seed)
        assert write(tmp_path / "corpus", config).manifest["seed"] == seed
        assert write(tmp_path / "corpus", config).manifest["complete"]

    def test_how_it_is_computed_matters_until_it_is_complete(
        self, tmp_path: Path, write: Callable[..., Corpus]
    ) -> None:
        config = replace(CONFIG, sequences=8)
        manifest = write(tmp_path / "corpus", config).path / data.MANIFEST
        plain = json.loads(manifest.read_text()) | {"compile": True}
        files.write_json(manifest, plain)
        write(tmp_path / "corpus", config)
        files.write_json(manifest, plain | {"complete": False})
        with pytest.raises(ConfigError, match="was made with compile True, not False"):
            write(tmp_path / "corpus", config)

    @pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
    def test_a_place_that_holds_something_else(
        self, tmp_path: Path, write: Callable[..., Corpus], name: str
    ) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match="is not a corpus to go on with"):
            write(tmp_path)
        assert contents(tmp_path) == {name: b"mine"}

    def test_more_than_the_model_takes(self, tmp_path: Path, write: Callable[..., Corpus]) -> None:
        with pytest.raises(ConfigError, match="tiny takes at most 128 tokens; got 129"):
            write(tmp_path / "corpus", replace(CONFIG, max_length=129))
        assert not (tmp_path / "corpus").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"sequences": 0},
            {"batch_size": 0},
            {"shard_size": 0},
            {"max_length": 3},
            {"strategy": "beam"},
            {"greedy_tokens": (5, 3)},
            {"seed": -1},
        ],
    )
    def test_config(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
            GenerationConfig(**change)
