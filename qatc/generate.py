"""The teacher writes its corpus: batched, resumable, byte-identical for one seed.

A fixed number of *slots* decode side by side, each at its own position. A sequence that ends makes
room for the next one in the same step, so that one long sequence does not hold up the others.

Every shard is generated from a random state of its own, derived from the seed and the shard's
number. An interrupted run therefore continues with the first missing shard and ends with the same
bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from torch import Tensor

import qatc
from qatc.data import (
    FORMAT_VERSION,
    MANIFEST,
    Corpus,
    Tokens,
    derived_seed,
    prefix_tokens,
    read_manifest,
    shard_is_whole,
    tokenizer_fingerprint,
    write_shard,
)
from qatc.decode import Decoder, decoding
from qatc.directories import refuse_overlap
from qatc.errors import ConfigError, DataError
from qatc.files import write_json, writing_to
from qatc.locks import locked
from qatc.models.load import LoadedModel, check_length

Strategy = Literal["hybrid", "sample", "greedy"]

OnProgress = Callable[[int, int], None]
"""Called with the number of sequences and of tokens written or generated so far."""


@dataclass(frozen=True)
class GenerationConfig:
    """How a corpus is generated.

    Args:
        sequences: how many sequences.
        max_length: tokens per sequence at most, the beginning-of-sequence token included.
        strategy: ``hybrid`` (greedy start, then sampling), ``sample`` or ``greedy``.
        greedy_tokens: least and greatest number of greedy tokens of ``hybrid``, drawn for each
            sequence.
        seed: of everything that is drawn, any number from 0.
        batch_size: sequences decoded side by side.
        shard_size: sequences per shard, the unit of resuming.

    Raises:
        ConfigError: a value is out of range.
    """

    sequences: int = 4096
    max_length: int = 256
    strategy: Strategy = "hybrid"
    greedy_tokens: tuple[int, int] = (3, 5)
    seed: int = 0
    batch_size: int = 256
    shard_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("sequences", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}")
        if self.max_length < 4:
            raise ConfigError(f"max_length must be at least 4; got {self.max_length}")
        if self.strategy not in get_args(Strategy):
            raise ConfigError(
                f"strategy must be one of {', '.join(get_args(Strategy))}; got {self.strategy!r}"
            )
        low, high = self.greedy_tokens
        if not 0 <= low <= high:
            raise ConfigError(f"greedy_tokens must be a range such as 3 to 5; got {low} to {high}")

    @property
    def shards(self) -> int:
        """How many shards the corpus has."""
        return -(-self.sequences // self.shard_size)

    def shard_sequences(self, shard: int) -> int:
        """How many sequences this shard has."""
        return min(self.shard_size, self.sequences - shard * self.shard_size)


@torch.inference_mode()
def generate_corpus(
    teacher: LoadedModel,
    tokenizer: Any,
    output: Path,
    config: GenerationConfig,
    *,
    compile: bool = True,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Let the teacher write a corpus, or complete one that was interrupted.

    Args:
        teacher: the full-precision model.
        tokenizer: its tokenizer.
        output: directory of the corpus; one begun with the same settings is completed.
        config: how to generate.
        compile: whether to compile the decode step.
        on_progress: called now and then.

    Raises:
        ConfigError: ``output`` holds something else or is being written by another run, or the
            model cannot take ``max_length``.
        CheckpointError: the disk cannot be written.
    """
    check_length(teacher.name, teacher.model.config, config.max_length)
    description = describe(teacher, tokenizer, config, compile)
    with corpus_place(output, teacher.name):
        return _generate(
            teacher, tokenizer, output, config, _begin(output, description), compile, on_progress
        )


def _generate(
    teacher: LoadedModel,
    tokenizer: Any,
    output: Path,
    config: GenerationConfig,
    manifest: dict[str, Any],
    compile: bool,
    on_progress: OnProgress | None,
) -> Corpus:
    kept = {s["file"]: s for s in manifest["shards"] if shard_is_whole(output, s)}
    shards: list[dict[str, Any]] = []
    vocabulary = _Vocabulary.of(tokenizer, teacher.model)
    slots = min(config.batch_size, config.shard_size, config.sequences)
    with decoding(teacher.model, slots, config.max_length, compile=compile) as decoder:
        for number in range(config.shards):
            entry = kept.get(f"shard-{number:05d}.parquet")
            if entry is None:
                done = sum(s["sequences"] for s in shards), sum(s["tokens"] for s in shards)
                generator = _ShardGenerator(decoder, vocabulary, config, number, slots)
                entry = write_shard(output, number, generator.run(on_progress, *done))
                entry["slot_utilization"] = round(generator.utilization, 4)
            shards.append(entry)
            manifest["shards"] = shards
            manifest["complete"] = number + 1 == config.shards
            write_json(output / MANIFEST, manifest)
            if on_progress is not None:
                on_progress(sum(s["sequences"] for s in shards), sum(s["tokens"] for s in shards))
    return Corpus.open(output)


def describe(
    teacher: LoadedModel, tokenizer: Any, config: GenerationConfig, compile: bool
) -> dict[str, Any]:
    """What decides a corpus, as its manifest says it; :func:`check_corpus` compares it."""
    settings = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they come back
    return {
        "format_version": FORMAT_VERSION,
        "model": teacher.name,
        "model_fingerprint": model_fingerprint(teacher.model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompt_tokens": len(prefix_tokens(tokenizer)) + 1,
        **settings,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "compile": compile,
        "qatc_version": qatc.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


_INFORMATIVE = ("model",)
_HOW_COMPUTED = ("dtype", "compile", "qatc_version", "torch_version", "transformers_version")
"""They decide the last bits, and so the bytes of an unfinished corpus; of a whole one no more."""


@contextmanager
def corpus_place(output: Path, model: str) -> Iterator[None]:
    """Hold ``output`` for a corpus of ``model``, a name or directory; it may be held already.

    Raises:
        ConfigError: ``output`` overlaps the model, holds something else than a corpus, or is being
            written by another run.
        CheckpointError: it cannot be written.
    """
    refuse_overlap({"the corpus": output}, {"the model": model})
    with locked(output):
        _found(output)
        yield


def _begin(output: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on with: a new one, or that of the same run."""
    found = check_corpus(output, description)
    if found is None:
        with writing_to(output):
            output.mkdir(parents=True, exist_ok=True)
        found = {**description, "shards": [], "complete": False}
        write_json(output / MANIFEST, found)
    return found


def _found(output: Path) -> dict[str, Any] | None:
    """The manifest that is there, if any."""
    if not output.exists() or (output.is_dir() and _is_empty(output)):
        return None
    try:
        return read_manifest(output)
    except DataError as error:
        raise ConfigError(
            f"the output {output} exists and is not a corpus to go on with; choose another place"
        ) from error


def check_corpus(output: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest at ``output``, or None if there is nothing yet.

    Raises:
        ConfigError: it does not fit ``description``, see :func:`describe`.
    """
    found = _found(output)
    if found is None:
        return None
    for key, value in description.items():
        if key in _INFORMATIVE or found.get(key) == value:
            continue
        if key in _HOW_COMPUTED and found["complete"]:
            continue
        difference = f"with {key} {found.get(key)!r}, not {value!r}"
        if key.endswith("_fingerprint"):
            difference = f"by another {key.removesuffix('_fingerprint')}, that of {found['model']}"
        raise ConfigError(
            f"the corpus {output} was made {difference}; choose another place, or remove that one"
            " first"
        )
    return found


def _is_empty(directory: Path) -> bool:
    """Whether there is nothing in it but what a killed run may have left of a first manifest."""
    return all(path.name == f"{MANIFEST}.writing" for path in directory.iterdir())


def model_fingerprint(model: Any) -> str:
    """A hash of a model's configuration and of every value of its parameters and buffers.

    The values are read as fp32, so that a bf16 checkpoint has one fingerprint in whatever dtype it
    was loaded. Every byte counts: a sample would miss a change in place. That takes a second per
    4 GB on each core (with SHA instructions), beside which loading the model takes longer.
    """
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    stored = model.state_dict()
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in stored
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
        for name, found in zip(tensors, pool.map(_tensor_digest, tensors.values()), strict=True):
            digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + found)
    return digest.hexdigest()


_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Entries of a config that say how it was loaded, and not what the model computes."""


def _tensor_digest(tensor: Tensor) -> bytes:
    """Hash of a tensor's values, some at a time, so that no second copy of it is made."""
    digest = hashlib.sha256()
    for part in tensor.detach().reshape(-1).split(1 << 22):
        digest.update((part.float() if part.is_floating_point() else part).cpu().numpy())
    return digest.digest()


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens that generation needs to know."""

    prefix: list[int]
    ends: Tensor
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Any, model: Any) -> _Vocabulary:
        ends: set[int] = set()
        for source in (tokenizer, model.config, model.generation_config):
            found = getattr(source, "eos_token_id", None)
            ends.update([found] if isinstance(found, int) else found or [])
        special = ends | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        size = min(len(tokenizer), model.get_output_embeddings().weight.shape[0])
        ordinary = [i for i in range(size) if i not in special]
        device = model.device
        return cls(
            prefix_tokens(tokenizer),
            torch.tensor(sorted(ends), dtype=torch.long, device=device),
            torch.tensor(ordinary, dtype=torch.long, device=device),
        )


class _ShardGenerator:
    """Generates one shard; its state is that of the slots."""

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: _Vocabulary,
        config: GenerationConfig,
        shard: int,
        slots: int,
    ) -> None:
        self.decoder, self.config, self.ends = decoder, config, vocabulary.ends
        self.count = config.shard_sequences(shard)
        device = vocabulary.ordinary.device
        seed = derived_seed(config.seed, shard)
        self.random = torch.Generator(device).manual_seed(seed)
        draw = torch.Generator().manual_seed(seed + 1)
        first = torch.randint(len(vocabulary.ordinary), (self.count,), generator=draw)
        low, high = config.greedy_tokens if config.strategy == "hybrid" else (0, 0)
        greedy = torch.randint(low, high + 1, (self.count,), generator=draw)
        if config.strategy == "greedy":
            greedy.fill_(config.max_length)
        prefix = len(vocabulary.prefix)
        self.prompts = torch.empty((self.count, prefix + 1), dtype=torch.long, device=device)
        self.prompts[:, :prefix] = torch.tensor(vocabulary.prefix, device=device)
        self.prompts[:, prefix] = vocabulary.ordinary[first.to(device)]
        self.sample_from = prefix + 1 + greedy.to(device)
        self.slots, self.device = slots, device
        self.tokens = torch.zeros((slots, config.max_length), dtype=torch.long, device=device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.owner = torch.full((slots,), -1, dtype=torch.long, device=device)
        self.next_sequence = 0
        self.steps = 0
        self.finished: dict[int, Tokens] = {}

    @property
    def utilization(self) -> float:
        """The share of slot-steps whose token was kept."""
        kept = sum(len(s) - 1 for s in self.finished.values())
        return kept / max(1, self.steps * self.slots)

    def run(self, on_progress: OnProgress | None, sequences: int, tokens: int) -> list[Tokens]:
        """Generate all sequences of the shard; the counts before it are for ``on_progress``."""
        self._refill(torch.arange(self.slots, device=self.device))
        while len(self.finished) < self.count:
            self._step()
            if on_progress is not None and self.steps % 16 == 0:
                live = int(self.positions[self.owner >= 0].sum())
                ended = sum(len(s) for s in self.finished.values())
                on_progress(sequences + len(self.finished), tokens + ended + live)
        return [self.finished[i] for i in range(self.count)]

    def _step(self) -> None:
        """Decode one token in every slot, and hand over the slots whose sequence ended."""
        rows = torch.arange(self.slots, device=self.device)
        current = self.tokens[rows, self.positions]
        logits = self.decoder.step(current, self.positions, int(self.positions.max()))
        following = self.positions + 1
        last = following == self.config.max_length - 1
        chosen = self._choose(logits.float(), following)
        self.tokens[rows, following] = chosen
        given = following < self.prompts.shape[1]
        ended = (torch.isin(chosen, self.ends) & ~given) | last
        self.positions = following
        self.steps += 1
        done = ended & (self.owner >= 0)
        if bool(done.any()):
            self._collect(done.nonzero().flatten())
        if bool(ended.any()):
            self._refill(ended.nonzero().flatten())

    def _choose(self, logits: Tensor, following: Tensor) -> Tensor:
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=self.random).squeeze(1)
        owner = self.owner.clamp(min=0)
        chosen = torch.where(following < self.sample_from[owner], logits.argmax(-1), sampled)
        prompt = self.prompts[owner, following.clamp(max=self.prompts.shape[1] - 1)]
        return torch.where(following < self.prompts.shape[1], prompt, chosen)

    def _collect(self, slots: Tensor) -> None:
        for slot in slots.tolist():
            length = int(self.positions[slot]) + 1
            sequence = self.tokens[slot, :length].to("cpu", torch.int32).numpy()
            self.finished[int(self.owner[slot])] = np.array(sequence)

    def _refill(self, slots: Tensor) -> None:
        """Start the next sequences in these slots; slots without one idle at position 0."""
        for slot in slots.tolist():
            self.positions[slot] = 0
            if self.next_sequence < self.count:
                self.owner[slot] = self.next_sequence
                self.tokens[slot, : self.prompts.shape[1]] = self.prompts[self.next_sequence]
                self.next_sequence += 1
            else:
                self.owner[slot] = -1
