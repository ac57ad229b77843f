"""The settings of a quantization run, and the directory where an unfinished run is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatc.device import DType, check_dtype
from qatc.distill import TrainingConfig
from qatc.errors import CheckpointError, ConfigError
from qatc.files import read_json, write_json, writing_to
from qatc.generate import GenerationConfig
from qatc.recipe import Recipe


@dataclass(frozen=True)
class QuantizeConfig:
    """One run of :func:`qatc.quantize.quantize`.

    Args:
        model: hub name or directory of the full-precision model.
        output: directory to write.
        recipe: what is quantized and how.
        generation: how the corpus is generated, unless ``data`` has one already.
        training: how the student is trained.
        data: directory of the corpus; ``None`` for ``OUTPUT.data``.
        eval_text: a text file for a second evaluation.
        eval_sequences: generated sequences held out of training.
        eval_tokens: tokens of ``eval_text`` to evaluate on, at most.
        dtype: compute dtype, see :func:`qatc.device.pick_dtype`. Masters are always fp32.
        device: torch device; ``auto`` for a GPU if there is one.
        train_embeddings: train embeddings and output head as well, instead of sharing the
            teacher's.
        compile: compile the graphs; ``None``: if this machine can.
        integer_forward: compute quantized linears on int8 codes in training and evaluation;
            ``None``: where the recipe allows it and this machine is fast at it.
        overwrite: replace an existing ``output`` (only when the new one is complete).
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: a value is not valid.
    """

    model: str
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: Path | None = None
    eval_text: Path | None = None
    eval_sequences: int = 256
    eval_tokens: int = 65_536
    dtype: DType = "auto"
    device: str = "auto"
    train_embeddings: bool = True
    compile: bool | None = None
    integer_forward: bool | None = None
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not self.recipe.quantizes:
            raise ConfigError("the recipe quantizes nothing (16-16-16); choose e.g. --bits 4-8-4")
        if self.eval_sequences < 1:
            raise ConfigError(f"eval_sequences must be at least 1; got {self.eval_sequences}")

    @property
    def partial(self) -> Path:
        """Directory of the unfinished run."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def data_directory(self) -> Path:
        """Directory of the corpus."""
        return self.data or self.output.with_name(self.output.name + ".data")

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, as plain data."""
        plain = dataclasses.asdict(self)
        for name in ("output", "overwrite", "trust_remote_code", "recipe"):
            del plain[name]
        for name in ("checkpoint_every", "keep_checkpoints"):
            del plain["training"][name]
        plain["recipe"] = self.recipe.to_dict()
        result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return result


def check_run(config: QuantizeConfig) -> None:
    """Raise if ``config`` cannot be begun or gone on with; nothing is written.

    Raises:
        ConfigError: there is an unfinished run with other settings, and no ``overwrite``.
        CheckpointError: the place of the output cannot be written.
    """
    for place in (config.partial, config.data_directory):
        _check_place(place)
    changes = _changes(config)
    if changes and not config.overwrite:
        raise ConfigError(
            f"{config.partial} holds an unfinished run with other settings ({', '.join(changes)});"
            " repeat its command to finish it, or pass --overwrite to start over"
        )


def begin_run(config: QuantizeConfig) -> None:
    """Create the directory of the unfinished run, unless the one there is of the same run."""
    if config.partial.exists():
        if _run_file(config).exists() and not _changes(config):
            return
        shutil.rmtree(config.partial)
    with writing_to(config.partial):
        config.partial.mkdir(parents=True)
    write_json(_run_file(config), config.to_dict())


def _run_file(config: QuantizeConfig) -> Path:
    return config.partial / "run.json"


def _changes(config: QuantizeConfig) -> list[str]:
    """What differs from the unfinished run, if there is one."""
    if not _run_file(config).exists():
        return []
    found = dict(_flat(read_json(_run_file(config))))
    wanted = dict(_flat(config.to_dict()))
    return [
        f"{key} was {found.get(key)!r} and is {wanted.get(key)!r} now"
        for key in {**wanted, **found}
        if found.get(key) != wanted.get(key)
    ]


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_place(path: Path) -> None:
    """Raise unless a directory can be made at ``path``."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"cannot write {path}: {parent} is not a directory that can be written to; choose"
            " another --output"
        )
