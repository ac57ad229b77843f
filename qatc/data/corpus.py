"""The corpus that the teacher writes for itself, or that is made of text, and how it is read.

Data-free generation (LLM-QAT, arXiv 2305.17888, section 3.1): the first token of a sequence is
drawn from the vocabulary, the next three to five are the teacher's most likely ones, and the rest
is sampled from its distribution, until the end-of-sequence token or the maximum length. The greedy
start keeps a random first token from leading into nonsense; sampling keeps the corpus from
collapsing onto the few sentences that a greedy teacher repeats.

A corpus is a directory: ``shard-00000.parquet`` ... with one column ``input_ids`` (token ids, not
text), and ``manifest.json``, which says how it was made and holds the shards' hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qatc.errors import ConfigError, DataError
from qatc.storage.files import read_json, sha256, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

TEXT = "text"
"""The strategy, in its manifest, of a corpus that no model wrote."""

Tokens = npt.NDArray[np.int32]


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


@dataclass(frozen=True)
class Rows:
    """Sequences packed whole into rows of one length, for causal models without a mask.

    Whole sequences are put one behind the other while they fit; the rest of a row is padding at
    its end, which no real token can attend to. Every real token is trained on: its target is the
    teacher's distribution in the very same row.

    Attributes:
        tokens: int32 ``[R, L]``; padding is 0.
        sequence: int32 ``[R, L]``: number of the sequence within its row, from 1; 0 for padding.
        labelled: bool ``[R, L]``: whether the next token belongs to the same sequence and was
            chosen by the model that wrote the text, so that predicting it can be scored.
    """

    tokens: Tokens
    sequence: Tokens
    labelled: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.tokens[rows], self.sequence[rows], self.labelled[rows])

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """Which tokens are not padding."""
        real: npt.NDArray[np.bool_] = self.sequence > 0
        return real

    @property
    def utilization(self) -> float:
        """The share of tokens that are not padding."""
        return float(self.real.mean()) if len(self) else 0.0


def pack_rows(sequences: list[Tokens], length: int, prompt_tokens: int = 1) -> Rows:
    """Pack whole sequences into rows; those longer than a row are split.

    Args:
        sequences: token ids.
        length: tokens per row.
        prompt_tokens: leading tokens of a sequence that are not scored as labels.
    """
    pieces = [s[i : i + length] for s in sequences for i in range(0, len(s), length) if len(s)]
    filled: list[list[Tokens]] = []
    room = 0
    for piece in pieces:
        if len(piece) > room:
            filled.append([])
            room = length
        filled[-1].append(piece)
        room -= len(piece)
    tokens = np.zeros((len(filled), length), np.int32)
    sequence = np.zeros_like(tokens)
    labelled = np.zeros(tokens.shape, np.bool_)
    for row, members in enumerate(filled):
        start = 0
        for number, piece in enumerate(members, 1):
            end = start + len(piece)
            tokens[row, start:end] = piece
            sequence[row, start:end] = number
            labelled[row, start + prompt_tokens - 1 : max(end - 1, start)] = True
            start = end
    return Rows(tokens, sequence, labelled)


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


def read_text(path: Path) -> str:
    """A text file without its byte-order mark; one that cannot be read raises ``ConfigError``."""
    with readable_text(path):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def readable_text(path: Path) -> Iterator[None]:
    """What keeps a text from being read in the block raises ``ConfigError``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text {path} is not UTF-8: {error.reason}") from error


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


def shard_is_whole(path: Path, shard: dict[str, Any]) -> bool:
    """Whether the shard of this manifest entry is there and has the recorded hash."""
    file = path / shard["file"]
    return file.is_file() and sha256(file) == str(shard["sha256"])


def read_shard(path: Path, shard: dict[str, Any]) -> Iterator[Tokens]:
    """The sequences of one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with (path / shard["file"]).open("rb") as file:  # pyarrow takes no path that is not UTF-8
            column = pq.read_table(file, columns=["input_ids"]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path / shard['file']}: {error}") from error
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            yield values[start:end]


def write_shard(path: Path, number: int, sequences: list[Tokens]) -> dict[str, Any]:
    """Write a shard, atomically, and return its manifest entry."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([s.tolist() for s in sequences], type=pa.list_(pa.int32()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"input_ids": column}), sink, compression="zstd")
    file = f"shard-{number:05d}.parquet"
    write_atomically(path / file, sink.getvalue().to_pybytes())
    return {
        "file": file,
        "sequences": len(sequences),
        "tokens": int(sum(len(s) for s in sequences)),
        "sha256": sha256(path / file),
    }
