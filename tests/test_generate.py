"""What the teacher writes, and that an interrupted run ends with the same bytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc import data, files, generate
from qatc.data import Corpus
from qatc.errors import ConfigError
from qatc.generate import GenerationConfig, generate_corpus
from qatc.models.load import LoadedModel
from qatc.preparation import can_compile
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

    @pytest.mark.parametrize("number", [1, 2, 5, 7])
    def test_killed_before_a_file_is_in_place(
        self,
        tmp_path: Path,
        write: Callable[..., Corpus],
        whole: Corpus,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
    ) -> None:
        """Seven files: the first manifest, then three times a shard and the manifest."""
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
        ],
    )
    def test_config(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
            GenerationConfig(**change)
