"""What the teacher writes, and that an interrupted run ends with the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data import corpus as data
from qatc.data import generate
from qatc.data.corpus import Corpus
from qatc.data.decode import Decoder
from qatc.errors import CheckpointError
from qatc.models.load import LoadedModel
from qatc.models.preparation import can_compile
from tests.conftest import contents, kill_at_call, make_llama, make_tokenizer, run_until_killed
from tests.data.conftest import BOS, CONFIG, EOS


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
            patch.setattr("qatc.storage.files.os.fsync", full)
            with pytest.raises(CheckpointError, match="No space left on device; free some"):
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
