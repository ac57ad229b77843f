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
from qatc.losses.distances import relative_error
from qatc.losses.objective import distillation_losses, parse_loss, recorded_losses
from qatc.machine.device import peak_memory, total_memory
from qatc.machine.world import current
from qatc.models import find_regions
from qatc.ptq.method import parse_method
from qatc.quantize.given import Setting
from qatc.quantize.pair import Pair
from qatc.report.first_steps import (
    Phase,
    StepCost,
    measure_step,
    memory_text,
    optimizer_bytes,
    rows_cost,
    training_floor,
)
from qatc.training.blockwise import layer_checkpoints
from qatc.training.checkpoint import Checkpoints
from qatc.training.distill import compiled_layers
from qatc.training.parts import parse_train, trained_at_once
from qatc.training.streams import Stream

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
    stages, layers = parse_train(training.train), len(find_regions(pair.student))
    checkpoints = Checkpoints(config.partial / "checkpoints", training.keep_checkpoints)
    done = setting.world.on_first(checkpoints.latest) or 0
    steps = 0 if stages.parts is None else training.steps - done
    layer_steps = _layer_steps_left(setting, layers) if stages.by_layer and not done else 0
    if steps + layer_steps <= 0:
        return None
    setting.observer.stage("Measuring the first steps")
    length, batch = config.generation.max_length, training.batch_size
    of = f"{batch * training.accumulate} x {length}"
    phases, needed = [], 0
    if layer_steps:
        with trained_at_once(pair.student, "blockwise"):
            cost = _measure_layer(setting, pair)
            needed = peak_memory(setting.device) + optimizer_bytes(pair.student, training)
        passes = layer_steps * training.accumulate
        read = rows_cost(cost, min(training.blockwise_rows, config.generation.sequences), batch)
        phases.append(Phase(
            f"training {layers} layers for {training.layer_steps} steps of {of} each",
            passes * batch * length // layers, passes * cost.step + 2 * layers * read,
            "--blockwise-steps",
        ))  # fmt: skip
    with trained_at_once(pair.student, stages.parts or "blockwise", training.lora_rank):
        cost, floor = _measure_end_to_end(setting, pair, stages.parts is not None)
        own = optimizer_bytes(pair.student, training)
        needed = max(needed, floor, peak_memory(setting.device) + own)
    speed = None
    if corpus is None and not setting.divided:
        speed = measure_speed(
            pair.teacher, config.data_directory, config.generation, compile=setting.compile
        )
        phases.insert(0, _writing(setting, speed))
    if steps:
        passes = steps * training.accumulate
        phases.append(Phase(
            f"training {steps} steps of {of}", passes * batch * length, passes * cost.step,
            "--steps",
        ))  # fmt: skip
    held_out = config.eval_sequences + sum(len(rows) for rows in texts.values())
    share = batch // current().size * setting.world.size  # of a batch, all that run it at a time
    phases.append(Phase(
        "evaluating it three times", 3 * held_out * length, 3 * rows_cost(cost, held_out, share),
        "--eval-samples",
    ))  # fmt: skip
    for phase in phases:
        setting.observer.note(str(phase))
    setting.observer.note(memory_text(needed, setting.device, _LESS_MEMORY))
    return None if speed is None else speed.slots


def _layer_steps_left(setting: Setting, layers: int) -> int:
    """Of all layers that are trained one after the other together."""
    config = setting.config
    done = (layer_checkpoints(config.partial, number).latest() or 0 for number in range(layers))
    return layers * config.training.layer_steps - sum(done)


def _measure_layer(setting: Setting, pair: Pair) -> StepCost:
    """A step of the last layer alone, which learns to give what it reads."""
    config, vocabulary = setting.config, pair.teacher.model.config.vocab_size
    batch, length = config.training.batch_size, config.generation.max_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=generator, dtype=torch.int32)
    text = Rows(ids.numpy(), torch.ones_like(ids).numpy(), (ids >= 0).numpy())
    stream = Stream(pair.student, text, batch, pair.compute, pair.autocast)
    hidden, last = stream.hidden.to(pair.student.device), len(find_regions(pair.student)) - 1

    def loss(ids: Tensor, real: Tensor) -> Tensor:
        return relative_error(stream.run(last, hidden), hidden, real) / real.sum()

    return measure_step(loss, pair.student, batch, length, vocabulary)


def _measure_end_to_end(setting: Setting, pair: Pair, trains: bool) -> tuple[StepCost, int]:
    """A step of all of the model, and the memory that training takes at least.

    Args:
        setting: the run.
        pair: both models; the parameters that it trains require a gradient.
        trains: whether the model is trained end to end; else it is run that way alone.
    """
    config, training = setting.config, setting.config.training
    teacher = pair.teacher.model
    length, vocabulary = config.generation.max_length, teacher.config.vocab_size
    # Each of several processes has a share of a batch, and writes a share of the corpus.
    share = training.batch_size // current().size
    size = chunk_size(training.loss_chunk, share * length, vocabulary)
    beside = None if training.teacher == "recorded" else teacher
    floor = training_floor(pair.student, beside, size or share * length, vocabulary, training)
    _warn_of_memory(setting, floor)
    few = torch.zeros((2, 8), dtype=torch.long, device=pair.student.device)
    chunks = find_chunks(
        *(pair.student, beside, few, training.loss_chunk, share * length), autocast=pair.autocast
    )
    terms = [term.name for term in parse_loss(training.loss)] if trains else ["logits"]

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
    streams = training.offload == "parameters"
    few_gradients = training.fused_step or current().size > setting.world.size or streams
    with (
        _dropped_gradients(pair.student) if few_gradients else nullcontext(),
        compiled_layers(beside if trains else None, setting.compile),
    ):
        of_step = (share, length, vocabulary, setting.world)
        cost = measure_step(loss, pair.student, *of_step, backward=trains)
    if streams and trains:
        setting.observer.note(
            "--offload parameters makes a step longer than it is measured: weights and gradients"
            " pass between host and device in each, and the CPU takes the optimizer's step"
        )
    return cost, floor


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
