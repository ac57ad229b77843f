"""A corpus on disk, and how it is packed into rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc.data import corpus as data
from qatc.data.corpus import Corpus, pack_rows, text_rows
from qatc.data.documents import read_text
from qatc.data.shards import Tokens, write_shard
from qatc.errors import ConfigError, DataError
from qatc.storage.files import write_json
from tests.conftest import make_llama, make_tokenizer

sequences_of_any_length = st.lists(
    st.lists(st.integers(0, 99), max_size=20).map(lambda s: np.asarray(s, np.int32)), max_size=12
)


def sequences(*texts: str) -> list[Tokens]:
    return [np.asarray([int(c) for c in text], np.int32) for text in texts]


def write_corpus(path: Path, tokenizer: Any, shards: int = 2) -> Path:
    path.mkdir()
    entries = [write_shard(path, i, sequences("012", "0345")) for i in range(shards)]
    manifest = {
        "format_version": data.FORMAT_VERSION,
        "model": "somebody",
        "tokenizer_fingerprint": data.tokenizer_fingerprint(tokenizer),
        "prompt_tokens": 2,
        "sequences": 2 * shards,
        "shards": entries,
        "complete": True,
    }
    write_json(path / data.MANIFEST, manifest)
    return path


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Any) -> Path:
    return write_corpus(tmp_path / "corpus", tokenizer)


def change_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / data.MANIFEST).read_text())
    write_json(path / data.MANIFEST, manifest | changes)


class TestPackRows:
    def test_whole_sequences_one_behind_the_other(self) -> None:
        rows = pack_rows(sequences("123", "45", "6789"), 6, prompt_tokens=1)
        assert rows.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
        assert rows.sequence.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
        assert rows.labelled.astype(int).tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
        assert rows.utilization == 9 / 12

    def test_tokens_of_the_prompt_are_no_labels(self) -> None:
        rows = pack_rows(sequences("12345", "67"), 7, prompt_tokens=2)
        assert rows.labelled.astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 0]]

    def test_a_sequence_longer_than_a_row_is_split(self) -> None:
        rows = pack_rows(sequences("1234567"), 3)
        assert rows.tokens.tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]

    def test_of_conversations_answers_alone_count(self) -> None:
        """A token counts whose next one is part of an answer; behind the last one, nothing is."""
        answers = [np.array([int(c) for c in text], bool) for text in ("0011010", "000", "01")]
        rows = pack_rows(sequences("1234567", "123", "89"), 9, 3, answers)
        assert rows.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9, 0]]
        assert rows.counted.astype(int).tolist() == [[0, 1, 1, 0, 1, 0, 1, 0, 0]]
        assert rows.real.astype(int).tolist() == [[1] * 8 + [0]]
        assert rows[np.array([0])].answers_only
        pieces = pack_rows(sequences("1234567"), 3, 1, answers[:1])
        assert pieces.tokens.tolist() == [[1, 2, 3], [4, 5, 6]], "a label in another row is none"
        assert pieces.counted.astype(int).tolist() == [[0, 1, 0], [0, 1, 0]]

    @given(sequences_of_any_length, st.integers(2, 25), st.randoms(use_true_random=False))
    def test_every_answer_counts_once(self, given: list[Tokens], length: int, random: Any) -> None:
        answers = [np.array([random.random() < 0.4 for _ in s], bool) for s in given]
        rows = pack_rows(given, length, 2, answers)
        wanted = [
            int(s[i])
            for s, marks in zip(given, answers, strict=True)
            for i in range(len(s))
            if marks[i] and i % length
        ]
        following = np.roll(rows.tokens, -1, axis=1)
        assert following[rows.counted].tolist() == wanted
        assert rows.counted.any(axis=1).all(), "no row without anything to learn"

    def test_rows_can_be_taken_out(self) -> None:
        rows = pack_rows(sequences("12", "34", "56"), 2)[np.array([2, 0])]
        assert rows.tokens.tolist() == [[5, 6], [1, 2]]
        assert len(rows) == 2

    @given(sequences_of_any_length, st.integers(1, 25), st.integers(1, 3))
    def test_every_token_is_there_once(self, given: list[Tokens], length: int, prompt: int) -> None:
        rows = pack_rows(given, length, prompt)
        assert rows.tokens.shape[1:] == (length,)
        assert rows.tokens[rows.real].tolist() == [t for s in given for t in s]
        # A label is a later token of the same sequence, so never padding.
        following = np.roll(rows.sequence, -1, axis=1)
        assert np.all(rows.sequence[rows.labelled] == following[rows.labelled])
        assert not rows.labelled[:, -1].any()
        pieces = [len(s[i : i + length]) for s in given for i in range(0, len(s), length)]
        assert rows.labelled.sum() == sum(max(0, n - prompt) for n in pieces)


class TestTextRows:
    def test_every_row_begins_with_bos_and_the_text_goes_on(self, tokenizer: Any) -> None:
        text = "The old fox waits by the river, and nobody asked why."
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = text_rows(text, tokenizer, 5, 10_000)
        assert rows.tokens[:, 0].tolist() == [0] * len(rows)
        assert rows.tokens[:, 1:].flatten().tolist() == ids[: len(ids) // 4 * 4]
        assert rows.labelled.astype(int).tolist() == [[0, 1, 1, 1, 0]] * len(rows)

    def test_takes_as_much_as_is_asked_for(self, tokenizer: Any) -> None:
        assert len(text_rows("fox " * 500, tokenizer, 5, 16)) == 4

    @pytest.mark.parametrize("text", ["", "fox"])
    def test_too_short_a_text_is_refused(self, tokenizer: Any, text: str) -> None:
        with pytest.raises(DataError, match="less than one row of 63; give a longer text"):
            text_rows(text, tokenizer, 64, 10_000)

    def test_a_text_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for name, reason in (
            ("binary", "not UTF-8"),
            ("absent", "No such file"),
            (".", "Is a directory"),
        ):
            with pytest.raises(ConfigError, match=reason):
                read_text(tmp_path / name)

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_bytes("caf\u00e9 \ufeff".encode())
        (tmp_path / "marked").write_bytes("caf\u00e9 \ufeff".encode("utf-8-sig"))
        assert read_text(tmp_path / "marked") == read_text(tmp_path / "plain")
        assert read_text(tmp_path / "plain") == "caf\u00e9 \ufeff"

    def test_documents_are_one_text_with_empty_lines_between(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n\n{"text": "two", "url": "x"}\n')
        assert read_text(tmp_path / "a.jsonl") == "one\n\n\ntwo"
        (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
        with pytest.raises(ConfigError, match="line 2 of the text .*b.jsonl is no document"):
            read_text(tmp_path / "b.jsonl")

    def test_tokens_that_the_model_has_no_embedding_for(self) -> None:
        tokenizer, model = make_tokenizer(), make_llama(112)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

        def check(*tokens: int) -> None:
            ids = np.asarray([tokens], np.int32)
            data.require_known(ids, tokenizer, model, what="the text a.txt", name="tiny")

        check(0, 111)
        check()
        with pytest.raises(
            DataError, match=r"a\.txt holds the token '\[PAD\]', number 112, but tiny"
        ):
            check(5, 112)


class TestCorpus:
    def test_reads_what_was_written(self, corpus: Path) -> None:
        found = Corpus.open(corpus)
        expected = [[0, 1, 2], [0, 3, 4, 5]] * 2
        assert [s.tolist() for s in found.sequences()] == expected
        assert found.manifest["shards"][0] | {"sha256": ""} == {
            "file": "shard-00000.parquet",
            "sequences": 2,
            "tokens": 7,
            "sha256": "",
        }

    def test_in_a_directory_whose_name_is_no_text(self, corpus: Path) -> None:
        odd = corpus.rename(corpus.with_name("corpus\udcff"))
        assert len(Corpus.open(odd).sequences()) == 4

    def test_fingerprint_follows_the_content(self, corpus: Path, tokenizer: Any) -> None:
        same = write_corpus(corpus.with_name("same"), tokenizer)
        longer = write_corpus(corpus.with_name("longer"), tokenizer, shards=3)
        assert Corpus.open(same).fingerprint == Corpus.open(corpus).fingerprint
        assert Corpus.open(longer).fingerprint != Corpus.open(corpus).fingerprint

    @pytest.mark.parametrize("damage", ["truncated", "missing", "one bit"])
    def test_a_damaged_shard_is_named_with_the_way_out(self, corpus: Path, damage: str) -> None:
        shard = corpus / "shard-00001.parquet"
        content = bytearray(shard.read_bytes())
        shard.unlink()
        if damage != "missing":
            content[30] ^= damage == "one bit"
            shard.write_bytes(content[: len(content) // 2 if damage == "truncated" else None])
        with pytest.raises(DataError, match="run the same qatc generate-data command again") as e:
            Corpus.open(corpus)
        assert str(shard) in str(e.value)

    def test_no_corpus(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="make one with qatc generate-data"):
            Corpus.open(tmp_path)

    def test_unfinished(self, corpus: Path) -> None:
        assert data.is_complete(corpus)
        change_manifest(corpus, complete=False)
        assert not data.is_complete(corpus)
        with pytest.raises(DataError, match="unfinished .2 shards so far"):
            Corpus.open(corpus)

    @pytest.mark.parametrize("version", [0, 2, None])
    def test_another_format(self, corpus: Path, version: int | None) -> None:
        change_manifest(corpus, format_version=version)
        with pytest.raises(DataError, match=f"has format {version!r}, but this qatc reads 1"):
            Corpus.open(corpus)

    def test_truncated_manifest(self, corpus: Path) -> None:
        manifest = corpus / data.MANIFEST
        manifest.write_bytes(manifest.read_bytes()[:100])
        with pytest.raises(DataError, match="not valid JSON"):
            Corpus.open(corpus)

    def test_of_another_tokenizer(self, corpus: Path, tokenizer: Any) -> None:
        Corpus.open(corpus).require_tokenizer(tokenizer)
        with pytest.raises(DataError, match="made by somebody, with another tokenizer"):
            Corpus.open(corpus).require_tokenizer(make_tokenizer(90))
