"""A corpus of text that is there already, in the format of one that a model writes.

LLM-QAT (arXiv 2305.17888, table 3) compares its generated corpus with real text. Documents are
tokenized and cut into sequences of the given length, each behind what the tokenizer puts before a
text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers

import qatc
from qatc.data.config import OnProgress, Recording
from qatc.data.corpus import (
    FORMAT_VERSION,
    MANIFEST,
    TEXT,
    Corpus,
    prefix_tokens,
    require_known,
    tokenizer_fingerprint,
)
from qatc.data.documents import documents, is_documents, read_text
from qatc.data.generate import begin_corpus, corpus_place
from qatc.data.shards import Tokens, write_shard
from qatc.data.teacher_logits import Recorded, record_teacher
from qatc.errors import ConfigError, DataError
from qatc.models.load import LoadedModel
from qatc.storage.directories import refuse_overlap
from qatc.storage.files import write_json


def corpus_from_text(
    file: Path,
    tokenizer: Any,
    output: Path,
    *,
    model: str,
    sequences: int = 4096,
    max_length: int = 256,
    shard_size: int = 1024,
) -> Corpus:
    """Make a corpus of a text; one that was begun with the same text and settings is completed.

    Args:
        file: UTF-8 text. One whose name ends in ``.jsonl`` has a document in each line, an object
            with the field ``text``; each ends with the end-of-sequence token, if there is one. Any
            other file is one document.
        tokenizer: of the model to be trained.
        output: directory of the corpus.
        model: the name of that model, for messages and the manifest.
        sequences: how many to take at most, from the beginning of the text.
        max_length: tokens per sequence at most, with what stands before the text.
        shard_size: sequences per file.

    Raises:
        ConfigError: the text cannot be read, a number is out of range, or ``output`` holds
            something else.
        DataError: there is no text.
    """
    for name, value in {"sequences": sequences, "shard_size": shard_size}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    if max_length < 4:
        raise ConfigError(f"max_length must be at least 4; got {max_length}")
    refuse_overlap({"the corpus": output}, {"the text": file})
    found = list(itertools.islice(_sequences(file, tokenizer, max_length), sequences))
    if not found:
        raise DataError(f"the text {file} is empty; give one to train on")
    description = {
        "format_version": FORMAT_VERSION,
        "strategy": TEXT,
        "model": model,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompt_tokens": len(prefix_tokens(tokenizer)) + 1,
        "text": str(file),
        "tokens_sha256": hashlib.sha256(b"".join(s.tobytes() for s in found)).hexdigest(),
        "sequences": len(found),
        "max_length": max_length,
        "shard_size": shard_size,
        "qatc_version": qatc.__version__,
        "transformers_version": transformers.__version__,
    }
    with corpus_place(output, model):
        manifest = begin_corpus(output, description)
        parts = [found[i : i + shard_size] for i in range(0, len(found), shard_size)]
        manifest["shards"] = [write_shard(output, n, part) for n, part in enumerate(parts)]
        write_json(output / MANIFEST, {**manifest, "complete": True})
        return Corpus.open(output)


def record_on_text(
    teacher: LoadedModel,
    tokenizer: Any,
    corpus: Corpus,
    recording: Recording,
    on_progress: OnProgress | None = None,
) -> Recorded:
    """Record what a teacher says of a corpus that no model wrote, or complete that.

    Args:
        teacher: the full-precision model.
        tokenizer: of the corpus.
        corpus: complete.
        recording: how much.
        on_progress: called with the number of rows recorded so far, and of all.

    Raises:
        DataError: the model has no embedding for a token of the text.
        ConfigError, CheckpointError: as of :func:`qatc.data.teacher_logits.record_teacher`.
    """
    tokens, what = np.concatenate(corpus.sequences()), f"the corpus {corpus.path}"
    require_known(tokens, tokenizer, teacher.model, what=what, name=teacher.name)
    with corpus_place(corpus.path, teacher.name):
        fingerprint = teacher.fingerprint
        return record_teacher(
            teacher, corpus, recording, fingerprint=fingerprint, on_progress=on_progress
        )


def _sequences(file: Path, tokenizer: Any, length: int) -> Iterator[Tokens]:
    """The documents of a file, cut into sequences."""
    prefix = prefix_tokens(tokenizer)
    lines = is_documents(file)
    end = [tokenizer.eos_token_id] if lines and tokenizer.eos_token_id is not None else []
    body = length - len(prefix)
    for document in documents(file) if lines else (read_text(file),):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            ids = [*ids, *end]
        for start in range(0, len(ids), body):
            yield np.array([*prefix, *ids[start : start + body]], np.int32)
