"""A corpus of text: what is in it, and which text is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatc.data.corpus import Corpus
from qatc.data.generate import generate_corpus
from qatc.data.text import corpus_from_text
from qatc.errors import ConfigError, DataError
from tests.conftest import TEXT, contents, make_tokenizer
from tests.data.conftest import BOS, CONFIG, EOS

DOCUMENTS = [f"{part}." for part in TEXT.split(". ")[:20]]


def write(file: Path, *documents: str) -> Path:
    """Lines of JSON, with other fields and empty lines between them."""
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(documents)]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return file


def make(file: Path, output: Path, tokenizer: Any, **changes: Any) -> Corpus:
    settings: dict[str, Any] = {"model": "tiny", "max_length": 200, "shard_size": 8}
    return corpus_from_text(file, tokenizer, output, **settings | changes)


def test_documents_are_there_whole(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "text.jsonl", *DOCUMENTS)
    corpus = make(file, tmp_path / "c", tokenizer)
    sequences = Corpus.open(tmp_path / "c").sequences()
    assert all(s[0] == BOS and s[-1] == EOS and s.dtype == np.int32 for s in sequences)
    assert [tokenizer.decode(s[1:-1]) for s in sequences] == DOCUMENTS
    corpus.require_tokenizer(tokenizer)
    manifest = corpus.manifest
    assert (manifest["strategy"], manifest["text"]) == ("text", str(file))
    assert (manifest["sequences"], len(manifest["shards"])) == (20, 3)
    assert corpus.prompt_tokens == 2 and corpus.held_out_name == "held out"


@pytest.mark.parametrize("bos", [True, False])
def test_long_documents_are_cut_without_loss(tmp_path: Path, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    file = write(tmp_path / "text.JSONL", *DOCUMENTS)
    sequences = make(file, tmp_path / "c", tokenizer, max_length=7).sequences()
    assert max(map(len, sequences)) == 7 and {s[0] == BOS for s in sequences} == {bos}
    ids = np.concatenate([s[bos:] for s in sequences]).tolist()
    assert "".join(DOCUMENTS) == tokenizer.decode([i for i in ids if i != EOS])
    assert ids.count(EOS) == 20


def test_any_other_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    sequences = make(file, tmp_path / "c", tokenizer, max_length=50).sequences()
    ids = np.concatenate([s[1:] for s in sequences])
    assert ids.tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert all(len(s) == 50 for s in sequences[:-1])


def test_takes_the_first_ones(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "text.jsonl", *DOCUMENTS)
    file.write_text(file.read_text() + "no document")  # is not reached
    corpus = make(file, tmp_path / "c", tokenizer, sequences=5)
    assert [tokenizer.decode(s[1:-1]) for s in corpus.sequences()] == DOCUMENTS[:5]


def test_an_interrupted_one_is_completed_and_another_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    file, target = write(tmp_path / "text.jsonl", *DOCUMENTS), tmp_path / "c"
    make(file, target, tokenizer)
    whole = contents(target)
    (target / "shard-00001.parquet").unlink()
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, "shards": [], "complete": False}))
    with pytest.raises(DataError, match="is unfinished"):
        Corpus.open(target)
    make(file, target, tokenizer)
    assert contents(target) == whole
    write(file, *DOCUMENTS[::-1])
    with pytest.raises(ConfigError, match=r"was made with tokens_sha256 .*another place"):
        make(file, target, tokenizer)
    assert contents(target) == whole


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.txt", b"", DataError, "a.txt is empty"),
        ("a.jsonl", b"\n\n", DataError, "a.jsonl is empty"),
        ("a.jsonl", b'{"text": ""}\n', DataError, "a.jsonl is empty"),
        ("a.txt", b"\xff\xfe", ConfigError, "a.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', ConfigError, "a.jsonl is not UTF-8"),
        ("a.jsonl", b'\n{"text": "x"', ConfigError, "line 2 of the text .*a.jsonl is no document"),
        ("a.jsonl", b'{"txt": "x"}', ConfigError, "line 1 .* is no document"),
        ("a.jsonl", b'{"text": 3}', ConfigError, "line 1 .* is no document"),
        ("a.jsonl", b'["text"]', ConfigError, "line 1 .* is no document"),
        ("a.jsonl", b'"text"', ConfigError, "line 1 .* is no document"),
        ("a.jsonl", rb'{"text": "\ud800"}', ConfigError, "line 1 .* is no document"),
    ],
)
def test_text_that_is_none(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, error: type[Exception], says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says):
        make(tmp_path / name, tmp_path / "c", tokenizer)
    assert not (tmp_path / "c").exists()


def test_wrong_settings(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "text.jsonl", *DOCUMENTS)
    for change in {"sequences": 0}, {"max_length": 3}, {"shard_size": 0}:
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must be at least"):
            make(file, tmp_path / "c", tokenizer, **change)
    with pytest.raises(ConfigError, match="cannot read the text .*none.txt: No such file"):
        make(tmp_path / "none.txt", tmp_path / "c", tokenizer)
    with pytest.raises(ConfigError, match="would replace the text|holds|is"):
        make(file, file, tokenizer)


def test_a_model_does_not_go_on_with_a_text(tmp_path: Path, tokenizer: Any, teacher: Any) -> None:
    make(write(tmp_path / "text.jsonl", *DOCUMENTS), tmp_path / "c", tokenizer)
    with pytest.raises(ConfigError, match="was made with strategy 'text', not 'hybrid'"):
        generate_corpus(teacher, tokenizer, tmp_path / "c", CONFIG, compile=False)
