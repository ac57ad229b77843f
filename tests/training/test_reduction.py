"""Four processes train what one does, bit for bit, in every way; and others go on from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatc.data.config import Recording
from qatc.data.corpus import Rows
from qatc.graph import captures
from qatc.machine.world import World
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.reduction import InOrder
from qatc.training.sharding import sharded
from tests.conftest import make_llama
from tests.losses import test_recorded
from tests.ranks import fork_ranks
from tests.training.conftest import CONFIG, VOCABULARY, assert_equal, make_rows

TOGETHER = replace(CONFIG, steps=4, checkpoint_every=2, gradient_clip=1e9)
TIED: dict[str, Any] = {"tie_word_embeddings": True}

WAYS: dict[str, tuple[TrainingConfig, dict[str, Any]]] = {
    "adamw": (TOGETHER, {}),
    "tied": (TOGETHER, TIED),
    "checkpointed activations": (replace(TOGETHER, checkpoint_activations=True), TIED),
    "recorded teacher": (replace(TOGETHER, teacher="recorded"), {}),
    "adamw8bit": (replace(TOGETHER, optimizer="adamw8bit"), {"hidden_size": 64}),
    "bf16 masters": (
        replace(TOGETHER, optimizer="adamw8bit", master_dtype="bfloat16"),
        {"hidden_size": 64},
    ),
    "hidden states": (
        replace(TOGETHER, loss="logits+hidden+label", checkpoint_activations=True),
        {},
    ),
}
"""How to train, and what model, by a name."""

CLIPPED = {
    f"{name}, clipped": (replace(config, gradient_clip=0.05), model)
    for name, (config, model) in WAYS.items()
    if config.master_dtype == "float32"
}


def apart(config: TrainingConfig, size: int = 4) -> TrainingConfig:
    """One process with the rows that each of several sees of a batch."""
    return replace(config, batch_size=config.batch_size // size, accumulate=size)


def train(
    directory: Path, world: World, config: TrainingConfig, model: dict[str, Any], rows: Rows
) -> dict[str, Tensor]:
    """The parameters as they are after a training."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "tie_word_embeddings": False}
    student, teacher = (make_llama(VOCABULARY, seed, **(sizes | model)) for seed in (1, 0))
    if config.master_dtype == "bfloat16":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    again = config.checkpoint_activations
    prepare(student, Recipe.from_bits("4-8-4"), compile=False, checkpoint_activations=again)
    with sharded(world, student, teacher) as (own, other):
        given = None if config.teacher == "recorded" else other
        Distiller(own, given, rows, config, directory).run()
    return {name: p.detach().clone() for name, p in student.named_parameters()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """Those that are trained on, by the kind of the teacher."""
    place = tmp_path_factory.mktemp("recorded") / "corpus"
    return {"online": make_rows(), "recorded": test_recorded.make_rows(place, Recording(4, 4))}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Rows]) -> Path:
    """What four processes trained."""
    directory = tmp_path_factory.mktemp("four")

    def act(world: World) -> None:
        for name, (config, model) in (WAYS | CLIPPED).items():
            found = train(directory / name, world, config, model, rows[config.teacher])
            if world.first:
                save_file(found, directory / f"{name}.safetensors")

    with captures.shared():
        train(directory / "first", World(), *WAYS["adamw"], rows["online"])  # captured for all
        fork_ranks(act, 4)
    return directory


@pytest.mark.parametrize("name", WAYS)
def test_four_train_what_one_does_bit_for_bit(
    of_four: Path, tmp_path: Path, rows: dict[str, Rows], name: str
) -> None:
    config, model = WAYS[name]
    alone = train(tmp_path, World(), apart(config), model, rows[config.teacher])
    assert_equal(load_file(of_four / f"{name}.safetensors"), alone)


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_they_do_but_for_the_sum_of_a_norm(
    of_four: Path, tmp_path: Path, rows: dict[str, Rows], name: str
) -> None:
    config, model = CLIPPED[name]
    alone = train(tmp_path, World(), apart(config), model, rows[config.teacher])
    found = load_file(of_four / f"{name}.safetensors")
    assert_equal(found, alone, rtol=1e-5, atol=1e-5)


def begun(source: Path, place: Path) -> Path:
    """A run as it was at step 2 of 4."""
    shutil.copytree(source, place)
    shutil.rmtree(place / "checkpoints" / "step-000004")
    return place


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_number_goes_on_with_what_four_began(
    of_four: Path, tmp_path: Path, rows: dict[str, Rows], name: str, size: int
) -> None:
    """To the same parameters; five, of which some have no rows, only read and write them."""
    config, model = WAYS[name]


def test_in_order() -> None:
    """As ((a + b) + c) + d, where a sum from the other end differs."""
    parts = torch.tensor([[1e8, 1.0], [1.0, 1e8], [-1e8, 3.0], [0.5, -1e8]])

    def act(world: World) -> None:
        from torch import distributed

        every = InOrder()
        sent = torch.stack([parts[world.rank] + i for i in range(world.size)]).flatten()
        found = every.allocate((2,), dtype=torch.float32, device=torch.device("cpu"))
        every(found, sent, distributed.group.WORLD, distributed.ReduceOp.SUM)
        a, b, c, d = parts + world.rank
        assert torch.equal(found, ((a + b) + c) + d)
        assert not torch.equal(found, ((d + c) + b) + a)

    fork_ranks(act, 4)
