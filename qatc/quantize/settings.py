"""The settings of a quantization run."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qatc.data.config import CorpusConfig
from qatc.data.corpus import is_complete
from qatc.errors import CheckpointError, ConfigError
from qatc.losses.objective import parse_loss
from qatc.machine.device import DType, check_dtype
from qatc.ptq.method import parse_method
from qatc.recipe.recipe import Recipe
from qatc.sensitivity.budget import check_budget
from qatc.storage.directories import refuse_overlap
from qatc.training.config import TrainingConfig
from qatc.training.parts import check_parts

LossOn = Literal["answers", "all"]


@dataclass(frozen=True)
class QuantizeConfig:
    """One run of :func:`qatc.quantize.run.quantize`.

    Args:
        model: hub name or directory of the full-precision model.
        output: directory to write.
        recipe: what is quantized and how.
        generation: how the corpus is generated, unless ``data`` has one already.
        training: how the student is trained.
        method: how the model gets to its codes, see :func:`qatc.ptq.method.parse_method`.
        budget: bits of a quantized weight on average, at most: those of each are chosen so that
            little is lost, see :mod:`qatc.sensitivity.budget`; ``None`` for those of the recipe.
        calibration_rows: rows of the corpus that post-training methods look at, at most.
        loss_on: which tokens of the corpus the loss counts: ``all``, or those of ``answers``, which
            a corpus of conversations knows; ``None``: of conversations the answers, else all.
        data: directory of the corpus; ``None`` for ``OUTPUT.data``.
        eval_text: a text file for a second evaluation.
        eval_sequences: generated sequences held out of training.
        eval_tokens: tokens of ``eval_text`` to evaluate on, at most.
        dtype: compute dtype, see :func:`qatc.machine.device.pick_dtype`.
        device: torch device; ``auto`` for a GPU if there is one.
        train_embeddings: train embeddings and output head as well, instead of sharing the
            teacher's.
        compile: compile the graphs; ``None``: if this machine can.
        integer_forward: compute quantized linears on int8 codes in training and evaluation;
            ``None``: where the recipe allows it and this machine is fast at it.
        overwrite: replace an existing ``output`` (only when the new one is complete).
        verify: compare the integer model with the trained one before it is called complete;
            without, the output is marked as not verified.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: a value is not valid.
    """

    model: str
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    generation: CorpusConfig = field(default_factory=CorpusConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    method: str = "qat"
    budget: float | None = None
    calibration_rows: int = 128
    loss_on: LossOn | None = None
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
    verify: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not self.recipe.quantizes:
            raise ConfigError("the recipe quantizes nothing (16-16-16); choose e.g. --bits 4-8-4")
        if self.eval_sequences < 1:
            raise ConfigError(f"eval_sequences must be at least 1; got {self.eval_sequences}")
        if self.calibration_rows < 1:
            raise ConfigError(f"calibration_rows must be at least 1; got {self.calibration_rows}")
        if self.loss_on not in (None, *get_args(LossOn)):
            raise ConfigError(f"loss_on must be answers or all; got {self.loss_on!r}")
        if self.budget is not None:
            check_budget(self.budget, self.recipe)
        method = parse_method(self.method)
        rotates = "rotate" in method.steps
        check_parts(self.training.train, self.method, method.trains, rotates, self.recipe)
        terms = [term.name for term in parse_loss(self.training.loss)]
        if rotates and method.trains and "hidden" in terms:
            raise ConfigError(
                f"the loss {self.training.loss} compares hidden states with the teacher's, and"
                f" {self.method} turns those of the student; leave out hidden or rotate"
            )
        if method.steps and self.training.master_dtype != "float32":
            raise ConfigError(
                f"the method {self.method} changes weights, which masters in"
                f" {self.training.master_dtype} would round; leave out --master-dtype, or all of"
                " the method but qat"
            )
        if self.recipe.rotate_inputs and "rotate" not in method.steps:
            raise ConfigError(
                f"the recipe rotates inputs ({', '.join(self.recipe.rotate_inputs)}), and the"
                f" method {self.method} turns no weights for them; begin the method with rotate,"
                " or leave rotate_inputs out of the recipe"
            )
        recorded = self.training.teacher == "recorded"
        if recorded and not method.trains:
            raise ConfigError(
                f"the method {self.method} does not train, so that nothing learns from a recorded"
                " teacher; leave out --teacher recorded, or end the method with qat"
            )
        if self.generation.record_logits is not None and not recorded:
            raise ConfigError(
                f"nothing reads what --record-logits {self.generation.record_logits} records while"
                " the teacher runs; add --teacher recorded, or leave it out"
            )
        if "gptq" in method.steps and not self.recipe.weights.quantizes:
            raise ConfigError(
                f"the method {self.method} rounds weights, and {self.recipe.bits} leaves them at 16"
                " bits; choose fewer, such as --bits 4-8-4"
            )

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
        for name in ("output", "overwrite", "verify", "trust_remote_code", "recipe"):
            del plain[name]
        for name in ("checkpoint_every", "keep_checkpoints", "checkpoint_activations"):
            del plain["training"][name]
        plain["recipe"] = self.recipe.to_dict()
        result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return result


def as_options(config: QuantizeConfig) -> dict[str, Any] | None:
    """The options of ``qatc quantize`` that ask for this run again, but for its output.

    Returns:
        Plain data, in the order of the command's help; None where no options can say it, as with
        two seeds.
    """
    generation, training = config.generation, config.training
    usual = (CorpusConfig.shard_size, QuantizeConfig.eval_tokens)
    if generation.seed != training.seed or (generation.shard_size, config.eval_tokens) != usual:
        return None
    low, high = generation.greedy_tokens
    found = {
        "model": config.model,
        "recipe": config.recipe.to_dict(),
        "method": config.method,
        "budget": config.budget,
        "calibration-rows": config.calibration_rows,
        "data": config.data,
        "samples": generation.sequences,
        "max-length": generation.max_length,
        "strategy": generation.strategy,
        "turns": generation.turns,
        "greedy-tokens": f"{low}-{high}",
        "generation-batch-size": str(generation.batch_size),
        "record-logits": generation.record_logits,
        "steps": training.steps,
        "batch-size": training.batch_size,
        "accumulate": training.accumulate,
        "lr": training.learning_rate,
        "warmup": training.warmup_steps,
        "gradient-clip": training.gradient_clip,
        "loss": training.loss,
        "teacher": training.teacher,
        "loss-chunk": training.loss_chunk,
        "checkpoint-activations": training.checkpoint_activations,
        "optimizer": training.optimizer,
        "master-dtype": training.master_dtype,
        "fused-step": training.fused_step,
        "offload": training.offload,
        "loss-on": config.loss_on,
        "train": training.train,
        "blockwise-steps": training.blockwise_steps,
        "blockwise-rows": training.blockwise_rows,
        "lora-rank": training.lora_rank,
        "train-embeddings": config.train_embeddings,
        "seed": training.seed,
        "checkpoint-every": training.checkpoint_every,
        "keep-checkpoints": training.keep_checkpoints,
        "eval-text": config.eval_text,
        "eval-samples": config.eval_sequences,
        "dtype": config.dtype,
        "device": config.device,
        "compile": config.compile,
        "integer-forward": config.integer_forward,
        "verify": config.verify,
        "trust-remote-code": config.trust_remote_code,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {name: value for name, value in plain.items() if value is not None}


def check_places(config: QuantizeConfig) -> None:
    """Raise if the run would write where something else is, or cannot; nothing is written.

    Raises:
        ConfigError: a place to be written is, holds or lies in something that is to be read.
        CheckpointError: the place of the output cannot be written.
    """
    places = {"the output": config.output, "the place of the unfinished run": config.partial}
    sources = {"the model": config.model, "the evaluation text": config.eval_text}
    refuse_overlap(places, {**sources, "the corpus": config.data_directory})
    if not is_complete(config.data_directory):
        refuse_overlap({"the corpus": config.data_directory}, sources)
    _check_place(config.partial, "--output")
    _check_place(config.data_directory, "--output" if config.data is None else "--data")


def _check_place(path: Path, option: str) -> None:
    """Raise unless a directory can be made at ``path``; the option says where."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"cannot write {path}: {parent} is not a directory that can be written to; choose"
            f" another {option}"
        )
