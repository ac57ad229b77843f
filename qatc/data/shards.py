"""The files of a corpus: some sequences each, as parquet.

The column ``input_ids`` holds token ids, not text. Conversations have a second one, ``answer``: for
each token whether it is part of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qatc.errors import DataError
from qatc.storage.files import sha256, write_atomically

Tokens = npt.NDArray[np.int32]
Marks = npt.NDArray[np.bool_]
"""Something that is so or not of each token of a sequence."""


def shard_is_whole(path: Path, shard: dict[str, Any]) -> bool:
    """Whether the shard of this manifest entry is there and has the recorded hash."""
    file = path / shard["file"]
    return file.is_file() and sha256(file) == str(shard["sha256"])


def read_shard(path: Path, shard: dict[str, Any]) -> Iterator[Tokens]:
    """The sequences of one shard."""
    return _read(path / shard["file"], "input_ids")


def read_answers(path: Path, shard: dict[str, Any]) -> Iterator[Marks]:
    """For each sequence of a shard of conversations, which tokens are part of an answer."""
    return _read(path / shard["file"], "answer")


def _read(path: Path, column: str) -> Iterator[npt.NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # pyarrow takes no path that is not UTF-8
            found = pq.read_table(file, columns=[column]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for chunk in found.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            yield values[start:end]


def write_shard(
    path: Path, number: int, sequences: list[Tokens], answers: list[Marks] | None = None
) -> dict[str, Any]:
    """Write a shard, atomically, and return its manifest entry.

    Args:
        path: directory of the corpus.
        number: of the shard.
        sequences: its sequences.
        answers: of conversations, which tokens of each are part of an answer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"input_ids": pa.array([s.tolist() for s in sequences], pa.list_(pa.int32()))}
    counted = {}
    if answers is not None:
        columns["answer"] = pa.array([marks.tolist() for marks in answers], pa.list_(pa.bool_()))
        counted["answer_tokens"] = int(sum(marks.sum() for marks in answers))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    file = f"shard-{number:05d}.parquet"
    write_atomically(path / file, sink.getvalue().to_pybytes())
    return {
        "file": file,
        "sequences": len(sequences),
        "tokens": int(sum(len(s) for s in sequences)),
        **counted,
        "sha256": sha256(path / file),
    }
