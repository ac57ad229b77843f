"""A run of ``qatc quantize`` with the cheapest options with which it fits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from qatc.data.config import RECORDING
from qatc.data.corpus import is_complete
from qatc.data.teacher_logits import recorded_as
from qatc.errors import ConfigError
from qatc.estimate.fit import Choice, require_fit, training_changes
from qatc.estimate.setup import CHOICES, Setup
from qatc.estimate.shapes import Shape, read_shape
from qatc.losses.objective import RECORDED_TERMS, parse_loss
from qatc.machine.device import pick_device, pick_dtype
from qatc.machine.world import current
from qatc.models.pipelines import why_no_integer_forward
from qatc.ptq.method import parse_method
from qatc.quantize import QuantizeConfig
from qatc.quantize.given import why_whole


def fitted(config: QuantizeConfig, memory: float) -> tuple[QuantizeConfig, Choice]:
    """The run with the cheapest options with which it fits into ``memory`` bytes of each GPU.

    The same command gives the same choice on the same machine, so that an interrupted run goes on
    with it. With another number of processes, give the options that it chose.

    Raises:
        ConfigError: there is no such model, nothing fits, or what fits needs a recorded teacher
            that is not there.
    """
    if config.training.train not in CHOICES["train"]:
        raise ConfigError(
            f"--fit reckons with a training of everything or of low-rank updates, end to end, and"
            f" --train is {config.training.train}; leave out one of them"
        )
    shape = read_shape(config.model, trust_remote_code=config.trust_remote_code)
    choice = require_fit(shape, setup_of(config, shape), memory)
    training = replace(config.training, **training_changes(choice))
    if training.teacher == "recorded" and recorded_as(config.data_directory) is None:
        raise ConfigError(
            f"to fit, {shape.name} needs a recorded teacher, which has the device to itself while"
            f" it writes: run {_generate_data(config, f' --record-logits {RECORDING}')} first"
        )
    if choice.setup.written_before and not is_complete(config.data_directory):
        raise ConfigError(
            f"to fit, {shape.name} needs a corpus that is there, as its teacher wants the device to"
            f" itself while it writes: run {_generate_data(config)} first"
        )
    return replace(config, training=training, verify=choice.setup.verify), choice


def _generate_data(config: QuantizeConfig, options: str = "") -> str:
    """The command that makes the corpus of a run before it."""
    generation = config.generation
    return (
        f"qatc generate-data --model {config.model} --output {config.data_directory}{options}"
        f" --samples {generation.sequences} --max-length {generation.max_length}"
    )


def _closed(config: QuantizeConfig) -> tuple[str, ...]:
    """What cannot be chosen, as the run is told otherwise or would refuse it."""
    method, terms = parse_method(config.method), [t.name for t in parse_loss(config.training.loss)]
    found = {"loss_chunk"} if config.training.loss_chunk is not None else set()
    if method.steps or not method.trains:
        found |= {"master_dtype"}
    if not method.trains or not set(terms) <= set(RECORDED_TERMS):
        found |= {"teacher"}
    if config.training.train == "lora":
        found |= {"offload"}
    if config.recipe.weights.learned or config.recipe.kv.learned:
        found |= {"--offload parameters"}  # which wants masters of one dtype
    return tuple(sorted(found))


def setup_of(config: QuantizeConfig, shape: Shape) -> Setup:
    """What memory depends on of a run on this machine."""
    device, generation, training = pick_device(config.device), config.generation, config.training
    width = SimpleNamespace(hidden_size=shape.hidden)
    on_integers = why_no_integer_forward(config.recipe, torch.device(device)) is None
    asked = config.integer_forward
    return Setup(
        compute=str(pick_dtype(config.dtype, device, width)).removeprefix("torch."),
        weight_bits=config.recipe.weights.bits,
        integer_forward=on_integers if asked is None else asked,
        compile=config.compile is not False,
        on_gpu=torch.device(device).type != "cpu",
        gpus=current().size,
        divided=why_whole(config) is None,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        max_length=generation.max_length,
        steps=training.steps,
        samples=generation.sequences,
        eval_samples=config.eval_sequences,
        slots=None if generation.batch_size == "auto" else generation.batch_size,
        train_embeddings=config.train_embeddings,
        keep_checkpoints=training.keep_checkpoints,
        verify=config.verify,
        teacher=training.teacher,
        optimizer=training.optimizer,
        master_dtype=training.master_dtype,
        loss_chunk=training.loss_chunk,
        checkpoint_activations=training.checkpoint_activations,
        fused_step=training.fused_step,
        offload=training.offload,
        train=training.train,
        lora_rank=training.lora_rank,
        closed=_closed(config),
    )
