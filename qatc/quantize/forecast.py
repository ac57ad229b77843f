"""What is ahead of a run: tokens, memory and time, as its first steps take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.config import RECORDING, Recording
from qatc.data.corpus import Corpus, Rows
from qatc.data.generate import Speed, measure_speed
from qatc.data.teacher_rows import Targets
from qatc.losses.chunks import chunk_size, find_chunks
from qatc.losses.objective import distillation_losses, parse_loss, recorded_losses
from qatc.machine.device import peak_memory, total_memory
from qatc.machine.world import current
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

_LESS_MEMORY = "--batch-size, --max-length, --no-train-embeddings"


def forecast(
    setting: Setting, pair: Pair, corpus: Corpus | None, texts: Mapping[str, Rows]
) -> int | None:
    """Measure the first steps and say what all of them will take.

    Returns:
        How many sequences are fast to write side by side; None where that was not measured: the
        corpus is there, or nothing is left to train, or the teacher is divided.
    """
    config, training = setting.config, setting.config.training
    if not parse_method(config.method).trains:
        return None
    checkpoints = Checkpoints(config.partial / "checkpoints", training.keep_checkpoints)
    done = setting.world.on_first(checkpoints.latest) or 0
    if done >= training.steps:
        return None
    setting.observer.stage("Measuring the first steps")
    teacher = pair.teacher.model
    length, vocabulary = config.generation.max_length, teacher.config.vocab_size
    # Each of several processes has a share of a batch, and writes a share of the corpus.
    share = training.batch_size // current().size
    batch = training.batch_size * length
    size = chunk_size(training.loss_chunk, share * length, vocabulary)
    beside = None if training.teacher == "recorded" else teacher
    floor = training_floor(pair.student, beside, size or share * length, vocabulary, training)
    _warn_of_memory(setting, floor)
    few = torch.zeros((2, 8), dtype=torch.long, device=pair.student.device)
    chunks = find_chunks(
        pair.student,
        beside,
        *(few, training.loss_chunk, share * length),
        autocast=pair.autocast,
    )
    terms = [term.name for term in parse_loss(training.loss)]

    def loss(ids: Tensor, real: Tensor) -> Tensor:
        how: Any = {"autocast": pair.autocast, "compile": setting.compile, "chunks": chunks}
        if training.teacher == "recorded":
            recording = Recording.parse(config.generation.record_logits or RECORDING)
            targets = Targets.arbitrary(ids.numel(), recording, vocabulary).to(ids.device)
            losses, _ = recorded_losses(pair.student, targets, ids, real, real, terms, **how)
        else:
            losses, _ = distillation_losses(pair.student, teacher, ids, real, real, terms, **how)
        return torch.stack(list(losses.values())).sum()

    # Several processes leave each a share of the gradients, which the whole ones are not.
    few_gradients = training.fused_step or current().size > setting.world.size
    with _dropped_gradients(pair.student) if few_gradients else nullcontext():
        cost = measure_step(loss, pair.student, share, length, vocabulary, setting.world)
    speed = None
    if corpus is None and not setting.divided:
        speed = measure_speed(
            pair.teacher, config.data_directory, config.generation, compile=setting.compile
        )
    steps = training.steps - done
    passes = steps * training.accumulate
    held_out = config.eval_sequences + sum(len(rows) for rows in texts.values())
    needed = max(floor, peak_memory(setting.device) + optimizer_bytes(pair.student, training))
    phases = [
        *([] if speed is None else [_writing(setting, speed)]),
        Phase(
            f"training {steps} steps of {training.batch_size * training.accumulate} x {length}",
            passes * batch, passes * cost.step, "--steps",
        ),
        Phase(
            "evaluating it three times", 3 * held_out * length,
            3 * rows_cost(cost, held_out, share), "--eval-samples",
        ),
    ]  # fmt: skip
    for phase in phases:
        setting.observer.note(str(phase))
    setting.observer.note(memory_text(needed, setting.device, _LESS_MEMORY))
    return None if speed is None else speed.slots


@contextmanager
def _dropped_gradients(model: nn.Module) -> Iterator[None]:
    """As a step within the backward pass leaves none behind."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _writing(setting: Setting, speed: Speed) -> Phase:
    """The corpus that is still to be written, at the speed of some of its steps."""
    tokens = speed.sequences * setting.config.generation.max_length
    title = f"writing at most {speed.sequences} sequences, {speed.slots} side by side"
    seconds = tokens / speed.tokens_per_second / current().size
    return Phase(title, tokens, seconds, "--samples, --max-length, --data")


def _warn_of_memory(setting: Setting, floor: int) -> None:
    """Before memory is taken that is not there: the system ends such a process unheard."""
    total = total_memory(setting.device)
    if total is not None and floor > total:
        setting.observer.note(memory_text(floor, setting.device, _LESS_MEMORY))
