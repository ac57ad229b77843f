"""What each of two processes does for test_sharding."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qatc.errors import ConfigError
from qatc.graph import captures
from qatc.machine.world import World, joined
from qatc.models import find_regions
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.sharding import sharded
from tests.conftest import make_llama
from tests.training.conftest import CONFIG, VOCABULARY, make_rows

UNCLIPPED = replace(CONFIG, steps=6, checkpoint_every=3, gradient_clip=1e9)
TOGETHER = UNCLIPPED
APART = replace(UNCLIPPED, batch_size=2, accumulate=2)
"""One process with the rows that each of two processes sees of a batch."""


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
    student = make_llama(VOCABULARY, 1, hidden_size=16, intermediate_size=16)
    for what in order.split():
        if what == "prepare":
            prepare(student, Recipe.from_bits("4-8-4"), compile=False)
        elif what == "shard":
            for _, layer in find_regions(student):
                fully_shard(layer)
            fully_shard(student)
        elif what == "rounded":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for _, layer in find_regions(student):
                fully_shard(layer, mp_policy=policy)
    ids = torch.from_numpy(make_rows().tokens[:2]).long()
    student(input_ids=ids, use_cache=False).logits.square().mean().backward()
    whole = {}
    for name, parameter in student.named_parameters():
        gradient: Any = parameter.grad
        assert gradient is not None, f"{order}: {name} does not train"
        if "shard" in order:
            assert hasattr(parameter, "full_tensor"), f"{order}: {name} is not sharded"
            gradient = gradient.full_tensor()
        whole[name] = gradient
    return whole


def refuses_rounded_masters(order: str) -> None:
    try:
        user_step(order)
    except ConfigError as error:
        assert "MixedPrecisionPolicy(param_dtype=torch.bfloat16)" in str(error)
    else:
        raise AssertionError(f"{order}: codes would be those of rounded weights")


def main(directory: Path) -> None:
    with joined("cpu") as world:
        assert world.size == 2

        def keep(name: str, tensors: dict[str, Tensor]) -> None:
            if world.first:
                save_file(tensors, directory / f"{name}.safetensors")

        def finish(name: str, config: TrainingConfig = TOGETHER, **how: Any) -> None:
            student, _ = train(directory / name, config, world, **how)
            keep(name, {n: p.detach().clone() for n, p in student.named_parameters()})

        with captures.shared():
            finish("whole")
            world.on_first(lambda: forget_last(directory / "whole", directory / "again"))
            finish("again")
            finish("begun alone")
            finish("begun by four")
            try:
                train(directory / "ended", TOGETHER, world, lambda r: end(world, r))
            except KeyboardInterrupt:
                world.on_each(lambda: None)
            else:
                raise AssertionError("the training was to end")
            finish("ended")
            finish("tied", replace(TOGETHER, gradient_clip=0.05), tie_word_embeddings=True)
        for order in ("prepare shard", "shard prepare"):
            keep(order, user_step(order))
        refuses_rounded_masters("prepare rounded")
        refuses_rounded_masters("rounded prepare")


def forget_last(source: Path, place: Path) -> None:
    """A run as it was at its checkpoint before the last one."""
    shutil.copytree(source, place)
    last = max((place / "checkpoints").iterdir())
    assert last.name == "step-000006"
    shutil.rmtree(last)


def end(world: World, record: StepMetrics) -> None:
    """Ctrl-C reaches one of the processes alone."""
    if record.step == 2 and not world.first:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
