"""Which corpus is no corpus to go on with, and which settings make no sense."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.data import corpus as data
from qatc.data.config import CorpusConfig
from qatc.data.corpus import Corpus
from qatc.errors import ConfigError
from qatc.models.load import LoadedModel, model_fingerprint
from qatc.storage import files
from tests.conftest import contents, make_llama, make_tokenizer
from tests.data.conftest import CONFIG


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
            CorpusConfig(**change)
