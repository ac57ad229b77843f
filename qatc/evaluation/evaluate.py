"""Evaluate a model on disk: a quantized output with the numerics it was trained for, or another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qatc.data.corpus import (
    Corpus,
    Rows,
    pack_rows,
    read_text,
    require_known,
    text_rows,
    tokenizer_fingerprint,
)
from qatc.errors import ConfigError
from qatc.evaluation.metrics import Metrics, evaluate
from qatc.evaluation.reference import prepare_reference
from qatc.machine.device import pick_device
from qatc.models import load_model, load_tokenizer
from qatc.models.load import check_length
from qatc.models.preparation import prepare
from qatc.output import load_reference, open_output
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from qatc.storage.directories import recover


@dataclass(frozen=True)
class AssessConfig:
    """What to evaluate, and on what.

    Args:
        model: directory of a qatc output, or hub name or directory of a full-precision model.
        text: text file, or
        data: corpus; one of the two is needed.
        teacher: full-precision model, for KL and agreement.
        recipe: round a full-precision model by this recipe.
        length: tokens per row.
        max_tokens: tokens to evaluate on, at most.
        batch_size: rows per forward pass.
        device: torch device, or ``auto``.
        compile: compile the graphs; ``None``: if this machine can.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    text: Path | None = None
    data: Path | None = None
    teacher: str | None = None
    recipe: Recipe | None = None
    length: int = 256
    max_tokens: int = 65_536
    batch_size: int = 8
    device: str = "auto"
    compile: bool | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        recover(Path(self.model))
        if (self.text is None) == (self.data is None):
            raise ConfigError("say what to evaluate on: either --text FILE or --data CORPUS")
        if self.is_output and self.recipe is not None:
            raise ConfigError(f"{self.model} is quantized already; leave out --bits")
        if self.length < 4 or self.batch_size < 1:
            raise ConfigError(
                "length must be at least 4 and batch_size at least 1;"
                f" got {self.length} and {self.batch_size}"
            )

    @property
    def is_output(self) -> bool:
        """Whether the model is an output of qatc."""
        return (Path(self.model) / "qatc.json").exists()


def assess(config: AssessConfig, observer: Observer | None = None) -> Metrics:
    """Evaluate a model in fp32, with fake-quantized activations and KV if it is quantized.

    Raises:
        QatcError: something cannot be read; with the way out.
    """
    observer = observer or Observer()
    device, trust = pick_device(config.device), config.trust_remote_code
    observer.stage(f"Loading {config.model}")
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
    rows = _rows(config, tokenizer)
    if config.teacher is not None:
        _require_one_vocabulary(config, tokenizer)

    def load(name: str) -> Any:
        return load_model(name, dtype=torch.float32, device=device, trust_remote_code=trust).model

    model: Any
    if config.is_output:
        directory = Path(config.model)
        output = open_output(directory, trust_remote_code=trust)
        model = load_reference(output).to(device)  # type: ignore[arg-type]
        check_length(config.model, model.config, config.length)
        prepare_reference(model, output, compile=config.compile)
    else:
        model = load(config.model)
        check_length(config.model, model.config, config.length)
        if config.recipe is not None:
            prepare(model, config.recipe, compile=config.compile)
    teacher = None if config.teacher is None else load(config.teacher)
    for name, judged in ((config.model, model), (config.teacher, teacher)):
        if name is not None and judged is not None:
            what = f"the text {config.text or config.data}"
            require_known(rows.tokens, tokenizer, judged, what=what, name=name)
    observer.stage(f"Evaluating on {rows.tokens.size:,} tokens")
    return evaluate(
        model,
        rows,
        teacher=teacher,
        batch_size=config.batch_size,
        on_progress=observer.evaluated,
    )


def _require_one_vocabulary(config: AssessConfig, tokenizer: Any) -> None:
    """KL compares two distributions over the same tokens."""
    assert config.teacher is not None
    other = load_tokenizer(config.teacher, trust_remote_code=config.trust_remote_code)
    if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"the teacher {config.teacher} has another tokenizer than {config.model}; give the"
            " full-precision model that it was made from"
        )


def _rows(config: AssessConfig, tokenizer: Any) -> Rows:
    if config.data is not None:
        corpus = Corpus.open(config.data)
        corpus.require_tokenizer(tokenizer)
        rows = pack_rows(corpus.sequences(), config.length, corpus.prompt_tokens)
        return rows[: max(1, config.max_tokens // config.length)]
    assert config.text is not None
    return text_rows(read_text(config.text), tokenizer, config.length, config.max_tokens)
