"""A teacher, and the corpora that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.data.config import CorpusConfig
from qatc.data.corpus import Corpus
from qatc.data.generate import generate_corpus
from qatc.models.load import LoadedModel
from tests.conftest import make_llama

BOS, EOS = 0, 1
CONFIG = CorpusConfig(sequences=40, max_length=24, batch_size=8, shard_size=16, seed=3)


@pytest.fixture(scope="session")
def teacher() -> LoadedModel:
    return LoadedModel(make_llama(), "tiny", torch.float32)


@pytest.fixture(scope="session")
def write(teacher: LoadedModel, tokenizer: Any) -> Callable[..., Corpus]:
    def write(output: Path, config: CorpusConfig = CONFIG, **changes: Any) -> Corpus:
        given = {"teacher": teacher, "tokenizer": tokenizer, "compile": False} | changes
        return generate_corpus(output=output, config=config, **given)

    return write


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Corpus]) -> Corpus:
    """The corpus of an uninterrupted run."""
    return write(tmp_path_factory.mktemp("generate") / "whole")
