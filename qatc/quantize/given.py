"""The first stage of a run: what the user gave, read before anything expensive begins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qatc.data.chat import ChatFormat
from qatc.data.config import CHAT, Recording
from qatc.data.corpus import Corpus, Rows, is_complete, require_known, text_rows
from qatc.data.documents import read_text
from qatc.data.teacher_logits import Recorded
from qatc.errors import ConfigError
from qatc.machine.device import device_name, pick_device, pick_dtype
from qatc.machine.world import ALONE, World, current
from qatc.models import LoadedModel, load_config, load_tokenizer
from qatc.models.load import check_length
from qatc.models.preparation import can_compile
from qatc.progress import Observer
from qatc.ptq.method import parse_method
from qatc.quantize.settings import QuantizeConfig
from qatc.quantize.unfinished import recorded_inputs
from qatc.recipe.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """What every stage of a run is told.

    Attributes:
        config: the run.
        observer: is told what happens.
        device: torch device.
        compile: whether graphs are compiled.
        divided: whether models are divided among several processes from loading to packing, so that
            all of them take part wherever one is run.
    """

    config: QuantizeConfig
    observer: Observer
    device: str
    compile: bool
    divided: bool = False

    @classmethod
    def of(cls, config: QuantizeConfig, observer: Observer) -> Setting:
        """The run on this machine."""
        device = pick_device(config.device)
        compile = can_compile(device) if config.compile is None else config.compile
        reason = why_whole(config) if current().size > 1 else None
        if reason is not None:
            observer.note(f"each process holds whole models but while they train, as {reason}")
        divided = current().size > 1 and reason is None
        return cls(config, observer, device, compile, divided)

    @property
    def world(self) -> World:
        """The processes that run a model together: all, or this one, which has it as a whole."""
        return current() if self.divided else ALONE


def why_whole(config: QuantizeConfig) -> str | None:
    """Why several processes cannot do a run without whole models, or None if they can."""
    if parse_method(config.method).steps:
        return f"--method {config.method} changes whole weights"
    if config.budget is not None:
        return "--budget rounds one whole weight after the other"
    if config.training.offload == "parameters":
        return "--offload parameters moves whole models into the host's memory"
    if config.training.train != "full":
        return f"--train {config.training.train} trains a part of the model"
    return why_recipe_wants_whole(config.recipe)


def why_recipe_wants_whole(recipe: Recipe) -> str | None:
    """What of a recipe several processes cannot do without whole models, or None."""
    if recipe.rotate_inputs:
        return "inputs are rotated, for which whole weights are turned"
    if recipe.weights.learned or recipe.kv.learned or recipe.center_keys:
        return "learned scales and centers of keys are measured on whole weights"
    if recipe.weights.scale_dtype == "float16":
        return f"scales for the target {recipe.target} are held against whole weights"
    return None


@dataclass(frozen=True)
class Given:
    """What the user gave, besides the model's weights.

    Attributes:
        tokenizer: of the model.
        compute: dtype that the run computes in.
        texts: rows of the evaluation text, if there is one, by its name.
        corpus: a complete corpus of the user's; None if the teacher is to write or complete one.
        recorded: what is recorded of the teacher beside that corpus, if it is to be learned from.
        inputs: fingerprints of all these by what they are called in a message.
    """

    tokenizer: Any
    compute: torch.dtype
    texts: Mapping[str, Rows]
    corpus: Corpus | None
    recorded: Recorded | None
    inputs: Mapping[str, str]


def read_given(setting: Setting) -> Given:
    """Read tokenizer, evaluation text and corpus, and find early what is wrong with one.

    Raises:
        QatcError: something cannot be read, or does not fit.
    """
    config = setting.config
    trust, length = config.trust_remote_code, config.generation.max_length
    model_config = load_config(config.model, trust_remote_code=trust)
    check_length(config.model, model_config, length)
    compute = pick_dtype(config.dtype, setting.device, model_config)
    if config.dtype == "auto" and compute is torch.float32 and setting.device != "cpu":
        setting.observer.note(
            f"computing in float32, as {device_name(setting.device)} has no bfloat16 of its own:"
            " --dtype bfloat16 is emulated there, and slower"
        )
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
    inputs: dict[str, str] = {}
    texts: dict[str, Rows] = {}
    if config.eval_text is not None:
        text = read_text(config.eval_text)
        rows = text_rows(text, tokenizer, length, config.eval_tokens)
        digest = hashlib.sha256(text.encode() + rows.tokens.tobytes())  # of the tokenizer as well
        inputs[f"the evaluation text {config.eval_text}"] = digest.hexdigest()
        texts[str(config.eval_text)] = rows
    corpus, recorded, sequences = None, None, config.generation.sequences
    if config.data is not None and is_complete(config.data) and not _is_recording(config):
        corpus = Corpus.open(config.data)
        corpus.require_tokenizer(tokenizer)
        inputs[f"the corpus {config.data}"] = corpus.fingerprint
        recorded = open_recorded(config, corpus)
        inputs |= recorded_teacher(recorded)
        sequences = int(corpus.manifest["sequences"])
        setting.observer.note(f"training on the corpus {config.data}, {sequences:,} sequences")
    chat = config.generation.strategy == CHAT if corpus is None else corpus.is_chat
    if corpus is None and chat:
        ChatFormat.of(tokenizer, config.model)
    if config.loss_on == "answers" and not chat:
        raise ConfigError(
            "the corpus holds no conversations, so that the loss cannot count their answers alone;"
            " leave out --loss-on answers, or let them be written: --strategy chat"
        )
    if config.loss_on == "all" and chat and config.training.teacher == "recorded":
        raise ConfigError(
            "of conversations, the teacher is recorded where answers are; leave out --loss-on all,"
            " or --teacher recorded"
        )
    if sequences < 2 * config.eval_sequences:
        raise ConfigError(
            f"{sequences} sequences are too few to hold out {config.eval_sequences} for"
            " evaluation; generate more (--samples), or lower --eval-samples"
        )
    return Given(tokenizer, compute, texts, corpus, recorded, inputs)


def _is_recording(config: QuantizeConfig) -> bool:
    """Whether an unfinished run has written this corpus itself and still records the teacher."""
    if config.training.teacher != "recorded":
        return False
    begun = recorded_inputs(config)
    return bool(begun) and f"the corpus {config.data}" not in begun


def open_recorded(config: QuantizeConfig, corpus: Corpus) -> Recorded | None:
    """What is recorded of the teacher beside a corpus, if the student is to learn from that.

    Raises:
        DataError: there is none, or it is of other rows than those of the run.
        ConfigError: it is not the one that was asked for.
    """
    if config.training.teacher != "recorded":
        return None
    recorded = Recorded.open(corpus)
    recorded.require_rows(config.generation.max_length)
    asked, found = config.generation.record_logits, recorded.manifest["record_logits"]
    if asked is not None and Recording.parse(asked) != Recording.parse(found):
        raise ConfigError(
            f"the corpus {corpus.path} has {found} of its teacher recorded, not {asked}; leave out"
            " --record-logits"
        )
    return recorded


def recorded_teacher(recorded: Recorded | None) -> dict[str, str]:
    """The fingerprint of a recorded teacher by what it is called in a message."""
    if recorded is None:
        return {}
    return {f"the recorded teacher in {recorded.path}": recorded.fingerprint}


def require_recorded(recorded: Recorded, teacher: LoadedModel) -> None:
    """Raise ``DataError`` unless it is this teacher that was recorded."""
    recorded.require_teacher(teacher.fingerprint, teacher.model.dtype, teacher.name)


def require_known_tokens(given: Given, model: Any, name: str) -> None:
    """Find tokens that the model has no embedding for before one is looked up.

    Raises:
        DataError: there is one in the text or the corpus.
    """
    found = {f"the text {title}": rows.tokens for title, rows in given.texts.items()}
    if given.corpus is not None:
        found[f"the corpus {given.corpus.path}"] = np.concatenate(given.corpus.sequences())
    for what, tokens in found.items():
        require_known(tokens, given.tokenizer, model, what=what, name=name)
