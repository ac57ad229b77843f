"""What each of two processes does together with the other, in one go: to start them takes longest.

:func:`begin` lays out what they find, and what one process does by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from qatc.cli.errors import readable_errors
from qatc.data.config import CorpusConfig
from qatc.errors import ConfigError
from qatc.graph import captures
from qatc.machine.world import World, joined
from qatc.models import find_regions
from qatc.models.preparation import prepare
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.sharding import sharded
from tests.conftest import make_llama
from tests.divided.in_parts import lay_out_checkpoints, load_together, never_whole
from tests.training.conftest import CONFIG, VOCABULARY, make_rows

UNCLIPPED = replace(CONFIG, steps=6, checkpoint_every=3, gradient_clip=1e9)
TOGETHER = UNCLIPPED
APART = replace(UNCLIPPED, batch_size=2, accumulate=2)
"""One process with the rows that each of two processes sees of a batch."""

SMALL: dict[str, Any] = {"loss_chunk": 8, "optimizer": "adamw8bit"}
"""What takes less memory, and gives the same sums."""

FUSED: dict[str, Any] = {"fused_step": True, "loss_chunk": 8}


def make_pair(**changes: Any) -> tuple[Any, Any]:
    """A prepared student and its teacher, of two layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "tie_word_embeddings": False}
    student, teacher = (make_llama(VOCABULARY, seed, **(sizes | changes)) for seed in (1, 0))
    return prepare(student, Recipe.from_bits("4-8-4"), compile=False), teacher


def train(
    directory: Path, config: TrainingConfig, world: World, on_step: Any = None, **changes: Any
) -> tuple[Any, list[StepMetrics]]:
    """A student as it is after its training, and its history."""
    student, teacher = make_pair(**changes)
    with sharded(world, student, teacher) as (own, other):
        history = Distiller(own, other, make_rows(), config, directory).run(on_step)
    return student, history


def user_step(order: str) -> dict[str, Tensor]:
    """The gradients of a training loop of a user's own, with the model sharded in this order."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    student = make_llama(VOCABULARY, 1, hidden_size=16, intermediate_size=16)
    for what in order.split():
        if what == "prepare":
            prepare(student, Recipe.from_bits("4-8-4"), compile=False)
        elif what == "shard":
            for _, layer in find_regions(student):
                fully_shard(layer)
            fully_shard(student)
            if order == "shard prepare":
                refuses_to_add(student)
        elif what == "rounded":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for _, layer in find_regions(student):
                fully_shard(layer, mp_policy=policy)
        elif what == "rounded-root":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            fully_shard(student, mp_policy=policy)
    if "shard" in order:
        whole = [n for n, p in student.named_parameters() if not hasattr(p, "full_tensor")]
        assert not whole, f"{order}: an optimizer would train {whole} in each process alone"
    ids = torch.from_numpy(make_rows().tokens[:2]).long()
    student(input_ids=ids, use_cache=False).logits.square().mean().backward()
    gradients: dict[str, Any] = {n: p.grad for n, p in student.named_parameters()}
    return {n: g.full_tensor() if "shard" in order else g for n, g in gradients.items()}


def refuses_to_add(student: Any) -> None:
    """Learned scales would be in no shard."""
    try:
        prepare(student, Recipe.from_bits("4-8-4", preset="best"), compile=False)
    except ConfigError as error:
        assert "call qatc.prepare before fully_shard" in str(error)
    else:
        raise AssertionError("learned scales were added to a sharded model")


def refuses_rounded_masters(order: str) -> None:
    try:
        user_step(order)
    except ConfigError as error:
        assert "MixedPrecisionPolicy(param_dtype=torch.bfloat16)" in str(error)
    else:
        raise AssertionError(f"{order}: codes would be those of rounded weights")


def run_of(
    model: Path, output: Path, method: str = "qat", train_embeddings: bool = True, **training: Any
) -> QuantizeConfig:
    """A run of few steps, whose gradients are never clipped."""
    settings: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "gradient_clip": 1e9}
    return QuantizeConfig(
        str(model),
        output,
        generation=CorpusConfig(sequences=24, max_length=16, batch_size=8, shard_size=5),
        training=TrainingConfig(**(settings | training)),
        method=method,
        eval_sequences=7,
        train_embeddings=train_embeddings,
        compile=False,
        verify=False,
    )


def begin(directory: Path, model: Path) -> None:
    """What one process does with the rows of both, and runs that others began."""
    with captures.shared():
        student, _ = train(directory / "alone", APART, World())
        save_file(parameters_of(student), directory / "alone.safetensors")
        forget_last(directory / "alone", directory / "begun alone")
        for name, changes in RUNS.items():
            run = run_of(model, directory / f"{name} alone", batch_size=2, accumulate=2, **changes)
            quantize(run)
    lay_out_checkpoints(directory, model)


RUNS: dict[str, dict[str, Any]] = {
    "quantized": {"method": "gptq+qat"},
    "divided": {},
    "recorded": {"teacher": "recorded", "train_embeddings": False},
}
"""Runs by the names of their outputs: one that needs whole models, and two that do not."""


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def act_together(world: World, directory: Path) -> None:
    """What the first does reaches the others, and so does an error of any."""
    done: list[int] = []

    def act(value: int) -> int:
        done.append(value)
        return value + 1

    assert world.on_first(act, 4) == 5 and done == [4] * world.first
    assert world.first_before_others(act, 6) == 7 and done[-1] == 6
    assert world.on_each(lambda: world.rank) == [0, 1]
    assert world.sum([1.5, world.rank]) == [3.0, 1.0]
    assert world.greatest(world.rank) == 1
    for together, failing in ((world.on_first, 0), (world.on_each, 1)):
        try:
            together(fail, world, failing)
        except ConfigError as error:
            assert str(error) == f"process {failing} cannot"
        else:
            raise AssertionError("an error is one of all")


def fail(world: World, rank: int) -> None:
    if world.rank == rank:
        raise ConfigError(f"process {rank} cannot")


def main(directory: Path, model: Path) -> None:
    with joined("cpu") as world:
        assert world.size == 2
        act_together(world, directory)

        def finish(name: str, config: TrainingConfig = TOGETHER, **how: Any) -> None:
            student, _ = train(directory / name, config, world, **how)
            if world.first:
                save_file(parameters_of(student), directory / f"{name}.safetensors")

        with captures.shared():
            finish("whole")
            world.on_first(forget_last, directory / "whole", directory / "again")
            for name in ("again", "begun alone"):
                finish(name)
            try:
                train(directory / "ended", TOGETHER, world, lambda r: end(world, r))
            except KeyboardInterrupt:
                world.on_each(lambda: None)
            else:
                raise AssertionError("the training was to end")
            finish("ended")
            finish("tied", replace(TOGETHER, gradient_clip=0.05), tie_word_embeddings=True)
            finish("small", replace(TOGETHER, **SMALL))
            world.on_first(forget_last, directory / "small", directory / "small again")
            finish("small again", replace(TOGETHER, **SMALL))
            finish("fused", replace(TOGETHER, **FUSED))
            quantize(run_of(model, directory / "quantized", batch_size=4, **RUNS["quantized"]))
            for name in ("divided", "recorded"):
                with never_whole():
                    quantize(run_of(model, directory / name, batch_size=4, **RUNS[name]))
            load_together(world, directory, model)
        for order in ("prepare shard", "shard prepare"):
            gradients = user_step(order)
            if world.first:
                save_file(gradients, directory / f"{order}.safetensors")
        for order in ("prepare rounded", "rounded prepare"):
            refuses_rounded_masters(order)
            refuses_rounded_masters(order.replace("rounded", "rounded-root"))
        if not world.first:
            raise ConfigError("all is done, and the second process ends")
        world.on_each(lambda: None)


def forget_last(source: Path, place: Path) -> None:
    """A run as it was at its checkpoint before the last one."""
    shutil.copytree(source, place)
    last = max((place / "checkpoints").iterdir())
    assert last.name == "step-000006"
    shutil.rmtree(last)


def end(world: World, record: StepMetrics) -> None:
    """A signal reaches one of the processes alone; Ctrl-C, in the background, none."""
    if record.step == 2 and not world.first:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        with readable_errors():
            main(*map(Path, sys.argv[1:]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
