"""The teacher writes its corpus: batched, resumable, byte-identical for a seed and slots.

Sequences decode side by side in *slots*, see :mod:`qatc.data.slots`. Every sequence is drawn from
random numbers of its own, derived from the seed and its number, and every shard begins with empty
slots. An interrupted run therefore continues with the first missing shard and ends with the same
bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import qatc
from qatc.data.chat import ChatFormat, Conversation
from qatc.data.config import CHAT, CorpusConfig, OnProgress, Recording
from qatc.data.corpus import (
    FORMAT_VERSION,
    MANIFEST,
    Corpus,
    prefix_tokens,
    read_manifest,
    require_known,
    tokenizer_fingerprint,
)
from qatc.data.decode import decoding
from qatc.data.shards import Marks, Tokens, shard_is_whole, write_shard
from qatc.data.slots import (
    Plan,
    Slots,
    Vocabulary,
    count_slots,
    measure_rate,
    plan_chat,
    plan_text,
)
from qatc.data.teacher_logits import record_teacher
from qatc.errors import ConfigError, DataError
from qatc.machine.world import current
from qatc.models.load import LoadedModel, check_length
from qatc.storage.directories import refuse_overlap
from qatc.storage.files import write_json, writing_to
from qatc.storage.locks import locked


@torch.inference_mode()
def generate_corpus(
    teacher: LoadedModel,
    tokenizer: Any,
    output: Path,
    config: CorpusConfig,
    *,
    compile: bool = True,
    slots: int | None = None,
    on_progress: OnProgress | None = None,
    on_recorded: OnProgress | None = None,
) -> Corpus:
    """Let the teacher write a corpus, or complete one that was interrupted.

    Args:
        teacher: the full-precision model.
        tokenizer: its tokenizer.
        output: directory of the corpus; one begun with the same settings is completed.
        config: how to generate.
        compile: whether to compile the decode step.
        slots: sequences side by side of a new corpus whose config leaves that to be measured, if
            it has been measured already, see :func:`measure_speed`.
        on_progress: called now and then.
        on_recorded: called with the number of rows whose teacher is recorded, if that is asked for,
            and of all.

    Raises:
        ConfigError: ``output`` holds something else or is being written by another run, or the
            model cannot take ``max_length``, or its tokenizer has no chat template to write
            conversations by.
        DataError: the model has no embedding for a token of the chat template.
        CheckpointError: the disk cannot be written.
    """
    check_length(teacher.name, teacher.model.config, config.max_length)
    with ExitStack() as held:
        described: dict[str, Any] = {}

        def begin() -> dict[str, Any]:
            described.update(describe(teacher, tokenizer, config, compile))
            held.enter_context(corpus_place(output, teacher.name))
            return begin_corpus(output, described)

        def record(recording: Recording) -> None:
            fingerprint = described["model_fingerprint"]
            record_teacher(
                *(teacher, corpus, recording), fingerprint=fingerprint, on_progress=on_recorded
            )

        manifest = current().on_first(begin)
        corpus = _generate(
            *(teacher, tokenizer, output, config, manifest, compile, slots, on_progress)
        )
        if config.record_logits is not None:
            current().on_first(record, Recording.parse(config.record_logits))
        return corpus


def _generate(
    teacher: LoadedModel,
    tokenizer: Any,
    output: Path,
    config: CorpusConfig,
    manifest: dict[str, Any],
    compile: bool,
    measured: int | None,
    on_progress: OnProgress | None,
) -> Corpus:
    world = current()
    kept = world.on_first(
        lambda: {s["file"]: s for s in manifest["shards"] if shard_is_whole(output, s)}
    )
    shards: list[dict[str, Any]] = []
    vocabulary, format = Vocabulary.of(tokenizer, teacher.model), None
    if config.strategy == CHAT:
        # As it was when the corpus was begun: a template may give the date.
        format = ChatFormat.from_dict(manifest["chat_format"])
        tokens = np.array(format.tokens)
        what = "the chat template"
        require_known(tokens, tokenizer, teacher.model, what=what, name=teacher.name)
        vocabulary = replace(vocabulary, ends=vocabulary.ends | format.ends)
    slots: Slots | None = None
    with decoding(teacher.model, 1, config.max_length, compile=compile) as decoder:

        def write(number: int) -> dict[str, Any]:
            nonlocal slots
            if slots is None:
                count, length = manifest["slots"], config.max_length
                slots = Slots(decoder, vocabulary, count, length, teacher.model.device)
            done = sum(s["sequences"] for s in shards), sum(s["tokens"] for s in shards)
            shard, before = _Shard(config, vocabulary, format, number), slots.steps
            entry = write_shard(output, number, *shard.run(slots, on_progress, *done))
            return {**entry, "steps": slots.steps - before}

        def own() -> list[dict[str, Any]]:
            mine = numbers[world.rank : world.rank + 1]  # none, at the end
            return [kept.get(f"shard-{n:05d}.parquet") or write(n) for n in mine]

        def keep() -> None:
            write_json(output / MANIFEST, manifest)

        if "slots" not in manifest and len(kept) < config.shards:
            device = teacher.model.device
            manifest["slots"] = world.on_first(
                lambda: measured or count_slots(decoder, config, device)
            )
            world.on_first(keep)
        for start in range(0, config.shards, world.size):
            numbers = range(start, min(start + world.size, config.shards))
            shards += [entry for found in world.on_each(own) for entry in found]
            manifest["shards"], manifest["complete"] = shards, len(shards) == config.shards
            world.on_first(keep)
            if on_progress is not None:
                on_progress(sum(s["sequences"] for s in shards), sum(s["tokens"] for s in shards))
    return Corpus.open(output)


@dataclass(frozen=True)
class Speed:
    """How fast a corpus is going to be written.

    Attributes:
        slots: sequences side by side.
        tokens_per_second: of all of them.
        sequences: that are still to be written.
    """

    slots: int
    tokens_per_second: float
    sequences: int


def measure_speed(
    teacher: LoadedModel, output: Path, config: CorpusConfig, *, compile: bool = True
) -> Speed:
    """Measure some steps of what :func:`generate_corpus` is about to do with the same arguments."""
    manifest = read_manifest(output) if (output / MANIFEST).exists() else {"shards": []}
    length, device = config.max_length, teacher.model.device
    with decoding(teacher.model, 1, length, compile=compile) as decoder:
        slots = manifest.get("slots") or count_slots(decoder, config, device)
        rate = measure_rate(decoder, slots, length, device)
    written = sum(s["sequences"] for s in manifest["shards"] if shard_is_whole(output, s))
    return Speed(slots, rate, config.sequences - written)


def describe(
    teacher: LoadedModel, tokenizer: Any, config: CorpusConfig, compile: bool
) -> dict[str, Any]:
    """What decides a corpus, as its manifest says it; :func:`check_corpus` compares it.

    Raises:
        ConfigError: conversations cannot be written by this tokenizer, or not in ``max_length``.
    """
    settings = json.loads(json.dumps(asdict(config)))  # tuples as lists, as they come back
    del settings["record_logits"]  # which leaves the corpus as it is
    prompt, of_chat = len(prefix_tokens(tokenizer)) + 1, {}
    if config.strategy == CHAT:
        format = ChatFormat.of(tokenizer, teacher.name)
        format.require_length(config.max_length, teacher.name)
        template = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
        of_chat = {"chat_template_fingerprint": template, "chat_format": asdict(format)}
        prompt = len(format.opening)
    return {
        "format_version": FORMAT_VERSION,
        "strategy": config.strategy,
        "model": teacher.name,
        "model_fingerprint": teacher.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        **of_chat,
        "prompt_tokens": prompt,
        **settings,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "compile": compile,
        "qatc_version": qatc.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


_INFORMATIVE = ("model", "chat_format")
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


def begin_corpus(output: Path, description: dict[str, Any]) -> dict[str, Any]:
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
    told = (*_INFORMATIVE, *(["prompt_tokens"] if "chat_format" in description else []))
    for key, value in description.items():
        if key in told or found.get(key) == value:
            continue
        if key in _HOW_COMPUTED and found["complete"]:
            continue
        difference = f"with {key} {found.get(key)!r}, not {value!r}"
        if key.endswith("_fingerprint"):
            what = key.removesuffix("_fingerprint").replace("_", " ")
            difference = f"by another {what}, that of {found['model']}"
        raise ConfigError(
            f"the corpus {output} was made {difference}; choose another place, or remove that one"
            " first"
        )
    return found


def _is_empty(directory: Path) -> bool:
    """Whether there is nothing in it but what a killed run may have left of a first manifest."""
    return all(path.name == f"{MANIFEST}.writing" for path in directory.iterdir())


class _Shard:
    """One shard: what is drawn for its sequences, and those that have ended.

    Every sequence is drawn from random numbers of its own, so that it is the same in whatever shard
    and beside whatever others it stands, as far as the model's logits are.
    """

    def __init__(
        self, config: CorpusConfig, vocabulary: Vocabulary, format: ChatFormat | None, number: int
    ) -> None:
        self.config, self.vocabulary, self.format = config, vocabulary, format
        self.first, self.count = number * config.shard_size, config.shard_sequences(number)
        self.finished: dict[int, Tokens] = {}
        self.conversations: list[Conversation] = []

    def run(
        self, slots: Slots, on_progress: OnProgress | None, *done: int
    ) -> tuple[list[Tokens], list[Marks] | None]:
        """All sequences of the shard, and of conversations which tokens are part of an answer.

        ``done``, what is before it, is for ``on_progress``.
        """

        def report() -> None:
            if on_progress is not None and slots.steps % 16 == 0:
                ended = sum(len(s) for s in self.finished.values())
                on_progress(done[0] + len(self.finished), done[1] + ended + slots.tokens)

        plans = (self._plan(self.first + i) for i in range(self.count))
        slots.run(plans, self.finished.__setitem__, report)
        sequences = [self.finished[i] for i in range(self.count)]
        pairs = zip(self.conversations, sequences, strict=False)
        return sequences, [talk.answers(len(s)) for talk, s in pairs] or None

    def _plan(self, number: int) -> Plan:
        if self.format is None:
            return plan_text(self.config, self.vocabulary, number)
        plan = plan_chat(self.config, self.format, number)
        assert plan.conversation is not None
        self.conversations.append(plan.conversation)
        return plan
