"""What the teacher says at every token of a corpus, recorded once, so that training need not ask.

Of each token that counts, a record has the teacher's ``K`` most likely next tokens with their
log-probabilities, and ``R`` draws of all other tokens, the tail. Each draw stands for an R-th part
of the tail's mass. Cross-entropy and its gradient are linear in the target, so that both are those
of the whole distribution in expectation over the draws; the ``K`` most likely tokens alone would be
another distribution. One draw is made in each of R equal parts of the tail's cumulative
distribution, which leaves every expectation as it is and has less variance than R free ones.

The target of a token is the teacher's distribution in the row that it is trained in
(:class:`qatc.data.corpus.Rows`), where it sees the sequences before its own. So records are made of
the rows of the whole corpus. Rows are filled in the order of the sequences, and those of the first
sequences alone, without the ones held out, are the same; the last one may end earlier, and causal
attention sees no end.

Beside the corpus' shards lie ``teacher-00000.safetensors`` ... and ``recorded.json``, which says
how they were made and holds their hashes. A file has the tensors ``rows``, uint8, rows as
:mod:`qatc.data.teacher_rows` packs them one behind the other, and ``ends``, int64, where each ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import qatc
from qatc.data.config import RECORDING, Recording
from qatc.data.corpus import Corpus, Rows, derived_seed
from qatc.data.sampling import sequence_random
from qatc.data.shards import Marks, shard_is_whole
from qatc.data.teacher_rows import Targets, merged_weights, pack_row, unpack_row
from qatc.errors import ConfigError, DataError
from qatc.models.load import LoadedModel
from qatc.storage.files import read_json, sha256, write_atomically, write_json

FORMAT_VERSION = 1
MANIFEST = "recorded.json"

FILE_TOKENS = 2**18
"""Tokens of the rows in a file, the unit of resuming."""

_ROWS = 8
"""Rows of a forward pass. Their number may decide last bits, so it is the same everywhere."""

_OF_DRAWS = -1
"""What derives the seed of draws from that of the corpus; no sequence has this number."""

_HOW_COMPUTED = ("dtype", "qatc_version", "torch_version", "transformers_version")
"""They decide last bits, and so are to be the same in all files of one recording."""


_Mapped = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Recorded:
    """The recorded teacher of a corpus, complete and checked against its manifest.

    Attributes:
        path: directory of the corpus.
        manifest: settings, counts and hashes.
    """

    path: Path
    manifest: dict[str, Any]
    _mapped: dict[int, _Mapped] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, corpus: Corpus) -> Recorded:
        """Open the record that lies beside a corpus.

        Raises:
            DataError: there is none, it is unfinished, of other sequences, or damaged.
        """
        path = corpus.path
        again = "run its qatc generate-data command again with --record-logits"
        if not (path / MANIFEST).exists():
            raise DataError(
                f"the corpus {path} has no recorded teacher; {again} {RECORDING}, which adds one,"
                " or leave out --teacher recorded"
            )
        manifest = _read_manifest(path)
        again = f"{again} {manifest['record_logits']}"
        if manifest["corpus_fingerprint"] != corpus.fingerprint:
            raise DataError(
                f"the recorded teacher in {path} is of other sequences than the corpus has now;"
                f" remove {path / MANIFEST} and {again}"
            )
        if not manifest["complete"]:
            raise DataError(f"the recorded teacher in {path} is unfinished; {again}")
        for file in manifest["files"]:
            if not shard_is_whole(path, file):
                raise DataError(
                    f"the file {path / file['file']} of the recorded teacher is missing or damaged;"
                    f" {again}: it writes just that file anew"
                )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """A hash of the record's content."""
        hashes = "".join(file["sha256"] for file in self.manifest["files"])
        return hashlib.sha256(hashes.encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Bytes on the disk for each token that counts."""
        files = self.manifest["files"]
        return float(sum(f["bytes"] for f in files) / max(1, sum(f["tokens"] for f in files)))

    def require_teacher(self, fingerprint: str, dtype: torch.dtype, name: str) -> None:
        """Raise ``DataError`` unless this teacher was recorded; its dtype is for the message."""
        if self.manifest["model_fingerprint"] == fingerprint:
            return
        own, found = str(dtype).removeprefix("torch."), self.manifest["dtype"]
        also = f" (it was computed in {found}; this run computes in {own})" if own != found else ""
        raise DataError(
            f"the recorded teacher in {self.path} is {self.manifest['model']}, with other weights"
            f" than {name} has here{also}; give the same model and --dtype, or leave out --teacher"
            " recorded"
        )

    def require_rows(self, length: int) -> None:
        """Raise ``DataError`` unless rows of this length were recorded."""
        own = self.manifest["max_length"]
        if length != own:
            raise DataError(
                f"the recorded teacher in {self.path} is of rows of {own} tokens, and this run's"
                f" have {length}; give --max-length {own}, or leave out --teacher recorded"
            )

    def packed_row(self, number: int) -> bytes:
        """A row of the whole corpus, as it is stored."""
        file, row = divmod(number, self.manifest["rows_per_file"])
        if file not in self._mapped:
            self._mapped[file] = _map(self.path / self.manifest["files"][file]["file"])
        rows, ends = self._mapped[file]
        return bytes(rows[int(ends[row - 1]) if row else 0 : int(ends[row])])

    def attach(self, rows: Rows) -> Rows:
        """Rows of the corpus, from its first sequence on, with what is recorded of them.

        Of conversations, rows of answers alone.
        """
        self.require_rows(rows.tokens.shape[1])
        assert rows.answers_only == self.manifest["answers_only"]
        recorded = RecordedRows(self, np.arange(len(rows)))
        return Rows(rows.tokens, rows.sequence, rows.labelled, rows.answers_only, recorded)


@dataclass(frozen=True)
class RecordedRows:
    """What is recorded of some rows, read when it is wanted.

    Attributes:
        source: the record.
        numbers: int64 ``[R]``: which rows of the whole corpus they are.
    """

    source: Recorded
    numbers: npt.NDArray[np.int64]

    def __getitem__(self, rows: Any) -> RecordedRows:
        return RecordedRows(self.source, self.numbers[rows])

    def read(self, counted: Marks) -> Targets:
        """The targets of all tokens of the rows.

        Args:
            counted: bool ``[R, L]``: which tokens count; of the others nothing is recorded.

        Returns:
            Targets of the ``R * L`` tokens, row by row.
        """
        manifest = self.source.manifest
        recording, vocabulary = Recording.parse(manifest["record_logits"]), manifest["vocabulary"]
        top = min(recording.top, vocabulary)
        ids = np.zeros((*counted.shape, top + recording.draws), np.int64)
        weights = np.zeros(ids.shape, np.float32)
        entropy = np.zeros(counted.shape, np.float32)
        for row, number in enumerate(self.numbers.tolist()):
            here = counted[row].nonzero()[0]
            sampled, own = unpack_row(self.source.packed_row(number), recording, vocabulary)
            count = slice(len(here))  # a row that ends earlier than the whole corpus' has fewer
            ids[row, here] = torch.cat([sampled.head, sampled.draws], -1).numpy()[count]
            weights[row, here] = merged_weights(sampled).numpy()[count]
            entropy[row, here] = own[count]
        flat = ids.reshape(-1, ids.shape[-1])
        found = (flat, weights.reshape(flat.shape), entropy.reshape(-1))
        return Targets(*map(torch.from_numpy, found))


@torch.no_grad()
def record_teacher(
    teacher: LoadedModel,
    corpus: Corpus,
    recording: Recording,
    *,
    fingerprint: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recorded:
    """Record what the teacher says of the rows of a corpus, or complete a record that was begun.

    The same command ends with the same bytes, interrupted or not. Nobody else may write to the
    corpus meanwhile.

    Args:
        teacher: the full-precision model, in the dtype that it is to be recorded in.
        corpus: complete.
        recording: how much.
        fingerprint: of the teacher, see :func:`qatc.models.load.model_fingerprint`.
        on_progress: called with the number of rows recorded so far, and of all.

    Raises:
        ConfigError: a record of something else is there.
        CheckpointError: the disk cannot be written.
        DataError: the corpus has nothing to train on.
    """
    length = int(corpus.manifest["max_length"])
    rows = corpus.rows(length)
    seed = int(corpus.manifest.get("seed", 0))
    path, per_file = corpus.path, max(1, FILE_TOKENS // length)
    description = {
        "format_version": FORMAT_VERSION,
        "model": teacher.name,
        "model_fingerprint": fingerprint,
        "corpus_fingerprint": corpus.fingerprint,
        "record_logits": str(recording),
        "seed": seed,
        "max_length": length,
        "answers_only": rows.answers_only,
        "vocabulary": int(teacher.model.get_output_embeddings().weight.shape[0]),
        "rows_per_file": per_file,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "qatc_version": qatc.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }
    manifest = _begin(path, description)
    kept = {file["file"]: file for file in manifest["files"] if shard_is_whole(path, file)}
    files = []
    for number, first in enumerate(range(0, len(rows), per_file)):
        name = f"teacher-{number:05d}.safetensors"
        if name not in kept:
            part = rows[first : first + per_file]
            packed = []
            for row in _record_rows(teacher.model, part, recording, seed, first):
                packed.append(row)
                if on_progress is not None:
                    on_progress(first + len(packed), len(rows))
            kept[name] = _write(path / name, packed, int(part.counted.sum()))
        files.append(kept[name])
        manifest["files"] = files
        manifest["complete"] = first + per_file >= len(rows)
        write_json(path / MANIFEST, manifest)
    return Recorded.open(corpus)


def recorded_as(path: Path) -> str | None:
    """What is recorded beside the corpus at ``path``, such as ``32+32``; None if nothing is."""
    return _read_manifest(path)["record_logits"] if (path / MANIFEST).exists() else None


def _begin(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on with."""
    if not (path / MANIFEST).exists():
        return {**description, "files": [], "complete": False}
    found = _read_manifest(path)
    for key, value in description.items():
        if (
            key == "model"
            or found.get(key) == value
            or (key in _HOW_COMPUTED and found["complete"])
        ):
            continue
        raise ConfigError(
            f"the corpus {path} has a recorded teacher already, with {key} {found.get(key)!r}, not"
            f" {value!r}; remove {path / MANIFEST} to record it anew"
        )
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"the recorded teacher in {path} has format {version!r}, but this qatc reads"
            f" {FORMAT_VERSION}; remove {path / MANIFEST} and record it anew"
        )
    assert isinstance(manifest, dict)
    return manifest


def _record_rows(
    model: Any, rows: Rows, recording: Recording, seed: int, first: int
) -> Iterator[bytes]:
    """Rows as they are stored; ``first`` is the number of the first one in the corpus."""
    own_seed, device = derived_seed(seed, _OF_DRAWS), model.device
    for start in range(0, len(rows), _ROWS):
        batch = rows[start : start + _ROWS]
        ids = torch.from_numpy(batch.tokens).to(device, torch.long)
        logits = model(input_ids=ids, use_cache=False).logits
        for row in range(len(batch)):
            random = sequence_random(own_seed, first + start + row)
            uniform = random.random((ids.shape[1], recording.draws))
            counted = batch.counted[row].nonzero()[0]
            yield pack_row(logits[row, counted], recording, torch.from_numpy(uniform[counted]))


def _write(file: Path, rows: list[bytes], tokens: int) -> dict[str, Any]:
    """Write one file, atomically, and return its manifest entry."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[Any]] = {
        "rows": np.frombuffer(b"".join(rows), np.uint8),
        "ends": np.cumsum([len(row) for row in rows], dtype=np.int64),
    }
    content = save(tensors)
    write_atomically(file, content)
    return {
        "file": file.name,
        "rows": len(rows),
        "tokens": tokens,
        "bytes": len(content),
        "sha256": sha256(file),
    }


def _map(file: Path) -> _Mapped:
    """Rows and their ends in a file, which is mapped into memory and read as it is looked at."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    values = np.memmap(file, np.uint8, "r", 8 + size)
    rows, ends = (values[slice(*header[name]["data_offsets"])] for name in ("rows", "ends"))
    return rows, np.frombuffer(ends.tobytes(), "<i8")
