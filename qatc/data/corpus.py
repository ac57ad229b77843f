"""The corpus that the teacher writes for itself, or that is made of text, and how it is read.

Data-free generation (LLM-QAT, arXiv 2305.17888, section 3.1): the first token of a sequence is
drawn from the vocabulary, the next three to five are the teacher's most likely ones, and the rest
is sampled from its distribution, until the end-of-sequence token or the maximum length. The greedy
start keeps a random first token from leading into nonsense; sampling keeps the corpus from
collapsing onto the few sentences that a greedy teacher repeats.

Conversations (:mod:`qatc.data.chat`) are written with themselves by chat models.

A corpus is a directory: ``shard-00000.parquet`` ... with token ids (:mod:`qatc.data.shards`), and
``manifest.json``, which says how it was made and holds the shards' hashes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qatc.data.config import CHAT
from qatc.data.shards import Marks, Tokens, read_answers, read_shard, shard_is_whole
from qatc.errors import DataError
from qatc.storage.files import read_json

if TYPE_CHECKING:  # which imports this module
    from qatc.data.teacher_logits import RecordedRows

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

TEXT = "text"
"""The strategy, in its manifest, of a corpus that no model wrote."""


@dataclass(frozen=True)
class Corpus:
    """A complete corpus on disk, checked against its manifest.

    Attributes:
        path: its directory.
        manifest: settings, counts and hashes.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a corpus and check that it is whole.

        Raises:
            DataError: there is none, it is unfinished, or a shard is missing or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if not manifest["complete"]:
            raise DataError(
                f"the corpus {path} is unfinished ({len(manifest['shards'])} shards so far);"
                " run the same qatc generate-data command again to complete it"
            )
        for shard in manifest["shards"]:
            if not shard_is_whole(path, shard):
                raise DataError(
                    f"the shard {path / shard['file']} is missing or damaged; run the same"
                    " qatc generate-data command again: it writes just that shard anew"
                )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """A hash of the corpus' content."""
        hashes = "".join(shard["sha256"] for shard in self.manifest["shards"])
        return hashlib.sha256(hashes.encode()).hexdigest()

    @property
    def held_out_name(self) -> str:
        """What its sequences are called in figures, where they are held out of training."""
        return "held out" if self.manifest["strategy"] == TEXT else "generated"

    @property
    def prompt_tokens(self) -> int:
        """How many tokens at the start of a sequence the teacher did not choose."""
        return int(self.manifest["prompt_tokens"])

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise ``DataError`` unless the corpus was made with this tokenizer."""
        if self.manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
            raise DataError(
                f"the corpus {self.path} was made by {self.manifest['model']}, with another"
                " tokenizer than this model's; generate one with qatc generate-data --model ..."
            )

    def sequences(self) -> list[Tokens]:
        """All sequences, in order."""
        return [s for shard in self.manifest["shards"] for s in read_shard(self.path, shard)]

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations, and knows which of their tokens are part of answers."""
        return self.manifest.get("strategy") == CHAT

    def rows(self, length: int, part: slice = slice(None), *, answers_only: bool = True) -> Rows:
        """Some of its sequences, in order, packed by :func:`pack_rows`.

        Args:
            length: tokens per row.
            part: which sequences.
            answers_only: of conversations, whether the answers alone count.

        Raises:
            DataError: answers alone count, and there is none.
        """
        answers = None
        if answers_only and self.is_chat:
            shards = self.manifest["shards"]
            answers = [a for shard in shards for a in read_answers(self.path, shard)][part]
        rows = pack_rows(self.sequences()[part], length, self.prompt_tokens, answers)
        if answers is not None and not len(rows):
            raise DataError(
                f"none of {len(answers)} conversations of the corpus {self.path} comes to an answer"
                f" in {self.manifest['max_length']} tokens; write longer ones (--max-length), or"
                " more"
            )
        return rows


@dataclass(frozen=True)
class Rows:
    """Sequences packed whole into rows of one length, for causal models without a mask.

    Whole sequences are put one behind the other while they fit; the rest of a row is padding at
    its end, which no real token can attend to. The target of a token is the teacher's distribution
    in the very same row; every real token is trained on, but for conversations.

    Attributes:
        tokens: int32 ``[R, L]``; padding is 0.
        sequence: int32 ``[R, L]``: number of the sequence within its row, from 1; 0 for padding.
        labelled: bool ``[R, L]``: whether the next token belongs to the same sequence and was
            chosen by the model that wrote the text, so that predicting it can be scored; of
            conversations, whether it is part of an answer.
        answers_only: whether nothing counts but what is labelled.
        recorded: what the teacher said of these very rows, where that is on the disk.
    """

    tokens: Tokens
    sequence: Tokens
    labelled: Marks
    answers_only: bool = False
    recorded: RecordedRows | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Rows:
        parts = (self.tokens[rows], self.sequence[rows], self.labelled[rows])
        recorded = None if self.recorded is None else self.recorded[rows]
        return Rows(*parts, self.answers_only, recorded)

    @property
    def real(self) -> Marks:
        """Which tokens are not padding."""
        real: Marks = self.sequence > 0
        return real

    @property
    def counted(self) -> Marks:
        """At which tokens student and teacher are compared."""
        return self.labelled if self.answers_only else self.real

    @property
    def utilization(self) -> float:
        """The share of tokens that are not padding."""
        return float(self.real.mean()) if len(self) else 0.0


def pack_rows(
    sequences: list[Tokens],
    length: int,
    prompt_tokens: int = 1,
    answers: list[Marks] | None = None,
) -> Rows:
    """Pack whole sequences into rows; those longer than a row are split.

    Args:
        sequences: token ids.
        length: tokens per row.
        prompt_tokens: leading tokens of a sequence that are not scored as labels.
        answers: which tokens of each sequence are part of an answer. They alone count then, and
            what no answer follows is left out.
    """
    filled: list[list[tuple[Tokens, Marks]]] = []
    room = 0
    for number, whole in enumerate(sequences):
        for i in range(0, len(whole), length):
            piece = whole[i : i + length]
            chosen = np.arange(len(piece)) >= prompt_tokens
            if answers is not None:
                chosen = answers[number][i : i + length]
                end = int(chosen.nonzero()[0].max(initial=-1)) + 1
                if end < 2:  # there is nothing to predict
                    continue
                piece, chosen = piece[:end], chosen[:end]
            if len(piece) > room:
                filled.append([])
                room = length
            filled[-1].append((piece, chosen))
            room -= len(piece)
    tokens = np.zeros((len(filled), length), np.int32)
    sequence = np.zeros_like(tokens)
    labelled = np.zeros(tokens.shape, np.bool_)
    for row, members in enumerate(filled):
        start = 0
        for number, (piece, chosen) in enumerate(members, 1):
            end = start + len(piece)
            tokens[row, start:end] = piece
            sequence[row, start:end] = number
            labelled[row, start : end - 1] = chosen[1:]
            start = end
    return Rows(tokens, sequence, labelled, answers is not None)


def text_rows(text: str, tokenizer: Any, length: int, max_tokens: int) -> Rows:
    """Tokenize a text and cut it into rows, each behind the beginning-of-sequence token.

    Args:
        text: any text.
        tokenizer: the model's tokenizer.
        length: tokens per row, the beginning-of-sequence token included.
        max_tokens: how much of the text to take.

    The first token of a row is not scored: the text before it is not in the row.

    Raises:
        DataError: the text is too short for one row.
    """
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    prefix = np.asarray(prefix_tokens(tokenizer), np.int32)
    body = length - len(prefix)
    count = min(len(ids), max_tokens) // body
    if count == 0:
        raise DataError(
            f"there are {min(len(ids), max_tokens)} tokens of text to evaluate on, less than one"
            f" row of {body}; give a longer text, or shorter rows"
        )
    rows = [np.concatenate([prefix, ids[i * body : (i + 1) * body]]) for i in range(count)]
    return pack_rows(rows, length, prompt_tokens=len(prefix) + 1)


def prefix_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: the beginning-of-sequence token or none."""
    bos = tokenizer.bos_token_id
    encoded = tokenizer("x")["input_ids"]
    return [bos] if bos is not None and encoded[:1] == [bos] else []


def require_known(
    tokens: npt.NDArray[Any], tokenizer: Any, model: Any, *, what: str, name: str
) -> None:
    """Check that a model has an embedding for every token, before one is looked up.

    Tokenizers know more tokens than the model where some were added, such as a ``[PAD]``, and its
    embeddings were not resized. They may know them; they may not use them.

    Args:
        tokens: token ids, a NumPy array of any shape.
        tokenizer: what made them.
        model: a causal LM.
        what, name: what to call the text and the model.

    Raises:
        DataError: the model has no embedding for one of them.
    """
    embedding = model.get_input_embeddings()
    # Packed, an embedding has no weight to count the rows of.
    known = int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
    largest = int(tokens.max()) if tokens.size else 0
    if largest >= known:
        raise DataError(
            f"{what} holds the token {tokenizer.convert_ids_to_tokens(largest)!r}, number"
            f" {largest}, but {name} has embeddings for {known} tokens only (0 to {known - 1});"
            " leave it out, or give the model an embedding for it (resize_token_embeddings)"
        )


def derived_seed(seed: int, number: int) -> int:
    """A seed for part ``number`` of what ``seed``, an integer of any size, decides."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:7])  # a torch generator takes 64 bits


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a corpus, complete or not.

    Raises:
        DataError: there is none, or it is of another format.
    """
    if not (path / MANIFEST).exists():
        raise DataError(
            f"{path} is not a corpus: it has no {MANIFEST}; make one with qatc generate-data"
        )
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"the corpus {path} has format {version!r}, but this qatc reads {FORMAT_VERSION};"
            " generate it anew with qatc generate-data"
        )
    assert isinstance(manifest, dict)
    return manifest


def is_complete(path: Path) -> bool:
    """Whether there is a corpus that was generated to its end; raises as :func:`read_manifest`."""
    return (path / MANIFEST).exists() and bool(read_manifest(path)["complete"])
