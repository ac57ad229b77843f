"""What an output of qatc and a corpus hold, read off their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qatc.data.corpus import Corpus, read_manifest
from qatc.data.shards import shard_is_whole
from qatc.data.teacher_logits import MANIFEST as RECORD
from qatc.errors import CheckpointError
from qatc.evaluation.metrics import Metrics
from qatc.output import loads_elsewhere
from qatc.output.reading import read_metadata, recipe_of
from qatc.output.stored import Stored, measure
from qatc.storage.files import read_json


@dataclass(frozen=True)
class OutputContents:
    """What is in an output.

    Attributes:
        path: its directory.
        model: what it was made from; None if it does not say.
        bits: weights-activations-KV.
        recipe: as plain data.
        verified: whether it was found to compute what was trained; None if it was not compared.
        unverified: why it was not compared, if it says so.
        loads_elsewhere: whether transformers reads it as it is.
        stored: what its weight files hold.
        figures: by text and model, as they were measured when it was made.
        data: the corpus that it was trained on, as plain data.
        versions: of what made it.
    """

    path: str
    model: str | None
    bits: str
    recipe: dict[str, Any]
    verified: bool | None
    unverified: str | None
    loads_elsewhere: bool
    stored: Stored
    figures: dict[str, dict[str, Metrics]]
    data: dict[str, Any] | None
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def output_contents(directory: Path) -> OutputContents:
    """Describe an output; only the headers of its weight files are read.

    Raises:
        CheckpointError: it is no output, or a file is missing or damaged.
    """
    metadata = read_metadata(directory)
    recipe = recipe_of(directory, metadata)
    parity = metadata.get("parity") or {}
    return OutputContents(
        path=str(directory),
        model=metadata.get("model"),
        bits=recipe.bits,
        recipe=recipe.to_dict(),
        verified=parity.get("passed"),
        unverified=parity.get("reason"),
        loads_elsewhere=loads_elsewhere(directory),
        stored=_stored(directory, len(metadata["quantized"])),
        figures={
            text: {name: _metrics(found) for name, found in models.items()}
            for text, models in metadata.get("figures", {}).items()
        },
        data=metadata.get("data"),
        versions=dict(metadata.get("versions", {})),
    )


def _stored(directory: Path, quantized: int) -> Stored:
    try:
        stored = measure(directory)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"a weight file of {directory} is damaged or cut off ({error});"
            " copy or write the model again"
        ) from error
    if stored.weights < quantized:
        raise CheckpointError(
            f"{directory} holds {stored.weights} of its {quantized} quantized weights; a file is"
            " missing: copy or write the model again"
        )
    return stored


def _metrics(plain: Mapping[str, Any]) -> Metrics:
    """Figures as they were written: what was no finite number is None there."""
    finite = plain["perplexity"] is not None
    return Metrics(**{**plain, "perplexity": plain["perplexity"] if finite else float("nan")})


@dataclass(frozen=True)
class CorpusContents:
    """What is in a corpus, complete or not.

    Attributes:
        path: its directory.
        manifest: how it was made.
        sequences: how many there are by now.
        tokens: in them.
        damaged: files that are missing, or are not what was written.
        fingerprint: of its content; None while it is unfinished.
        record: what its teacher's recorded distribution was made by; None if there is none.
        damaged_record: files of that which are missing, or are not what was written.
    """

    path: str
    manifest: dict[str, Any]
    sequences: int
    tokens: int
    damaged: tuple[str, ...]
    fingerprint: str | None
    record: dict[str, Any] | None = None
    damaged_record: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def corpus_contents(directory: Path) -> CorpusContents:
    """Describe a corpus; its files are read to see that they are whole.

    Raises:
        DataError: it is no corpus.
    """
    manifest = read_manifest(directory)
    shards = manifest["shards"]
    file = directory / RECORD
    record = read_json(file) if file.exists() else None
    recorded = record["files"] if record else []
    return CorpusContents(
        path=str(directory),
        manifest=manifest,
        sequences=sum(shard["sequences"] for shard in shards),
        tokens=sum(shard["tokens"] for shard in shards),
        damaged=tuple(s["file"] for s in shards if not shard_is_whole(directory, s)),
        fingerprint=Corpus(directory, manifest).fingerprint if manifest["complete"] else None,
        record=record,
        damaged_record=tuple(f["file"] for f in recorded if not shard_is_whole(directory, f)),
    )
