"""What is ahead of a run: tokens, memory and time, as its first steps take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qatc.data.corpus import Corpus, Rows
from qatc.data.generate import Speed, measure_speed
from qatc.machine.device import peak_memory, total_memory
from qatc.ptq.method import parse_method
from qatc.quantize.given import Setting
from qatc.quantize.pair import Pair
from qatc.report.first_steps import (
    Phase,
    measure_step,
    memory_text,
    optimizer_bytes,
    rows_cost,
    training_floor,
)
from qatc.training.checkpoint import Checkpoints
from qatc.training.objective import distillation_losses, parse_loss

_LESS_MEMORY = "--batch-size, --max-length, --no-train-embeddings"


def forecast(
    setting: Setting, pair: Pair, corpus: Corpus | None, texts: Mapping[str, Rows]
) -> int | None:
    """Measure the first steps and say what all of them will take.

    Returns:
        How many sequences are fast to write side by side; None where that was not measured: the
        corpus is there, or nothing is left to train.
    """
    config, training = setting.config, setting.config.training
    if not parse_method(config.method).trains:
        return None
    done = Checkpoints(config.partial / "checkpoints", training.keep_checkpoints).latest() or 0
    if done >= training.steps:
        return None
    setting.observer.stage("Measuring the first steps")
    teacher = pair.teacher.model
    length, vocabulary = config.generation.max_length, teacher.config.vocab_size
    batch = training.batch_size * length
    floor = training_floor(pair.student, teacher, batch, vocabulary)
    _warn_of_memory(setting, floor)
    terms = [term.name for term in parse_loss(training.loss)]

    def loss(ids: Tensor, real: Tensor) -> Tensor:
        losses, _ = distillation_losses(
            *(pair.student, teacher, ids, real, real, terms),
            autocast=pair.autocast,
            compile=setting.compile,
        )
        return torch.stack(list(losses.values())).sum()

    cost = measure_step(
        loss,
        pair.student,
        *(training.batch_size, length, vocabulary),
    )
    speed = None
    if corpus is None:
        speed = measure_speed(
            pair.teacher, config.data_directory, config.generation, compile=setting.compile
        )
    steps = training.steps - done
    passes = steps * training.accumulate
    held_out = config.eval_sequences + sum(len(rows) for rows in texts.values())
    needed = max(floor, peak_memory(setting.device) + optimizer_bytes(pair.student))
    phases = [
        *([] if speed is None else [_writing(setting, speed)]),
        Phase(
            f"training {steps} steps of {training.batch_size * training.accumulate} x {length}",
            passes * batch, passes * cost.step, "--steps",
        ),
        Phase(
            "evaluating it three times", 3 * held_out * length,
            3 * rows_cost(cost, held_out, training.batch_size), "--eval-samples",
        ),
    ]  # fmt: skip
    for phase in phases:
        setting.observer.note(str(phase))
    setting.observer.note(memory_text(needed, setting.device, _LESS_MEMORY))
    return None if speed is None else speed.slots


def _writing(setting: Setting, speed: Speed) -> Phase:
    """The corpus that is still to be written, at the speed of some of its steps."""
    tokens = speed.sequences * setting.config.generation.max_length
    title = f"writing at most {speed.sequences} sequences, {speed.slots} side by side"
    seconds = tokens / speed.tokens_per_second
    return Phase(title, tokens, seconds, "--samples, --max-length, --data")


def _warn_of_memory(setting: Setting, floor: int) -> None:
    """Before memory is taken that is not there: the system ends such a process unheard."""
    total = total_memory(setting.device)
    if total is not None and floor > total:
        setting.observer.note(memory_text(floor, setting.device, _LESS_MEMORY))
