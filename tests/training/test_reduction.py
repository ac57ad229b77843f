"""Four processes train what one does, bit for bit, in every way; and others go on from them."""

from __future__ import annotations

import shutil
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
from qatc.machine.reduction import InOrder
from qatc.machine.world import World
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.checkpoint import Checkpoints
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.optimizers import make_optimizer
from qatc.training.sharding import sharded
from tests.conftest import make_llama
from tests.losses import test_recorded
from tests.ranks import fork_ranks, in_a_new_process
from tests.training.conftest import CONFIG, VOCABULARY, assert_equal, make_rows

TOGETHER = replace(CONFIG, steps=2, gradient_clip=1e9)
LONGER = replace(TOGETHER, steps=4, checkpoint_every=2)
TIED: dict[str, Any] = {"tie_word_embeddings": True}
WIDE: dict[str, Any] = {"hidden_size": 64}
"""Wide enough for moments in 8 bits."""

SAME: dict[str, tuple[TrainingConfig, dict[str, Any]]] = {
    "adamw": (LONGER, {}),
    "adamw8bit": (replace(LONGER, optimizer="adamw8bit"), WIDE),
    "tied, checkpointed": (replace(TOGETHER, checkpoint_activations=True), TIED),
    "recorded": (replace(TOGETHER, teacher="recorded"), TIED),
    "bf16 masters": (
        replace(TOGETHER, optimizer="adamw8bit", master_dtype="bfloat16"),
        WIDE,
    ),
    "attention, checkpointed": (
        replace(TOGETHER, loss="logits+attention", checkpoint_activations=True),
        {},
    ),
}
"""How to train, and what model, where a sum is added in one order: bit for bit."""

CLOSE: dict[str, tuple[TrainingConfig, dict[str, Any]]] = {
    # A norm is summed in another order.
    "clipped": (replace(TOGETHER, gradient_clip=0.05, checkpoint_activations=True), TIED),
    "clipped, recorded": (replace(TOGETHER, gradient_clip=0.05, teacher="recorded"), {}),
    # And so are the gradients of a layer's output, of which one more reads it.
    "hidden": (replace(TOGETHER, loss="logits+hidden"), {}),
}


def apart(config: TrainingConfig, size: int) -> TrainingConfig:
    """One process with the rows that each of several sees of a batch."""
    return replace(config, batch_size=config.batch_size // size, accumulate=size)


def make_pair(config: TrainingConfig, model: dict[str, Any]) -> tuple[Any, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "tie_word_embeddings": False}
    student, teacher = (make_llama(VOCABULARY, seed, **(sizes | model)) for seed in (1, 0))
    if config.master_dtype == "bfloat16":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    again = config.checkpoint_activations
    prepare(student, Recipe.from_bits("4-8-4"), compile=False, checkpoint_activations=again)
    return student, teacher


def train(
    directory: Path, world: World, config: TrainingConfig, model: dict[str, Any], rows: Rows
) -> dict[str, Tensor]:
    """The parameters as they are after a training, or the rest of one."""
    student, teacher = make_pair(config, model)
    with sharded(world, student, teacher) as (own, other):
        given = None if config.teacher == "recorded" else other
        Distiller(own, given, rows, config, directory).run()
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def begun(source: Path, place: Path) -> Path:
    """A run as it was at step 2 of 4."""
    shutil.copytree(source, place)
    shutil.rmtree(place / "checkpoints" / "step-000004")
    return place


def write_again(directory: Path, world: World, config: TrainingConfig, model: Any) -> None:
    """Read the checkpoint of a run, and put one by these processes in its place."""
    (student,) = make_pair(config, model)[:1]
    with sharded(world, student) as (own,):
        trained = dict(own.named_parameters())
        optimizer = make_optimizer(trained, config, 1.0)
        checkpoints = Checkpoints(directory / "checkpoints", 2, aside=True)
        assert checkpoints.restore(own, trained, optimizer) == 2
        checkpoints.save(2, own, trained, optimizer)
        checkpoints.close()


PARTS = torch.tensor([[1e8, 1.0], [1.0, 1e8], [-1e8, 3.0], [0.5, -1e8]])


def write_worlds(base: Path) -> None:
    """Write what worlds trained, and one process, by what and how many did."""
    torch.set_num_threads(1)
    recorded = test_recorded.make_rows(base / "corpus", Recording(4, 4))
    rows = {"online": make_rows(), "recorded": recorded}
    resumed = ("adamw", "adamw8bit")

    def run(by: str, name: str, world: World, parts: int = 1) -> None:
        config, model = (SAME | CLOSE)[name]
        given = apart(config, parts), model, rows[config.teacher]
        parameters = train(base / by / name, world, *given)
        if world.first:
            save_file(parameters, base / by / f"{name}.safetensors")

    def by_four(world: World) -> None:
        for name in SAME | CLOSE:
            run("four", name, world)

    def by_five(world: World) -> None:
        for name in resumed:
            write_again(base / "five, then two" / name, world, *SAME[name])
            files = (base / "five, then two" / name).rglob("*.safetensors")
            assert {file.name for file in files} == {
                f"state-0000{rank}-of-00005.safetensors" for rank in range(5)
            }

    def by_two(world: World) -> None:
        for name in resumed:
            for by in ("four, then two", "five, then two"):
                run(by, name, world)

    def add(world: World) -> None:
        from torch import distributed

        every = InOrder()
        sent = torch.stack([PARTS[world.rank] + i for i in range(world.size)]).flatten()
        found = every.allocate((2,), dtype=torch.float32, device=torch.device("cpu"))
        every(found, sent, distributed.group.WORLD, distributed.ReduceOp.SUM)
        save_file({"sum": found}, base / "sums" / f"{world.rank}.safetensors")

    (base / "sums").mkdir()
    fork_ranks(add, 4)
    with captures.shared():
        for name in SAME | CLOSE:
            run("one", name, World(), parts=4)
        fork_ranks(by_four, 4)
        for name in resumed:
            for by in ("four, then two", "four, then one"):
                begun(base / "four" / name, base / by / name)
            for by in ("five, then two", "one, then one"):
                begun(base / "one" / name, base / by / name)
            for by in ("four, then one", "one, then one"):
                run(by, name, World(), parts=2)
        fork_ranks(by_five, 5)
        fork_ranks(by_two, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What :func:`write_worlds` wrote."""
    base = tmp_path_factory.mktemp("worlds")
    in_a_new_process(__name__, "write_worlds", base)
    files = base.glob("*/*.safetensors")
    return {f"{file.stem}: {file.parent.name}": load_file(file) for file in files}


@pytest.mark.parametrize("name", SAME)
def test_four_train_what_one_does_bit_for_bit(found: Any, name: str) -> None:
    assert_equal(found[f"{name}: four"], found[f"{name}: one"])


@pytest.mark.parametrize("name", CLOSE)
def test_where_a_sum_has_another_order_they_do_almost(found: Any, name: str) -> None:
    assert_equal(found[f"{name}: four"], found[f"{name}: one"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("by", ["four, then one", "four, then two", "five, then two"])
def test_any_number_goes_on_with_what_another_wrote(found: Any, name: str, by: str) -> None:
    """The five, of which some have no rows, read what one wrote, and write it again."""
    assert_equal(found[f"{name}: {by}"], found[f"{name}: one, then one"])
    assert any(
        not torch.equal(value, found[f"{name}: one"][key])
        for key, value in found[f"{name}: {by}"].items()
    ), "the split of a batch shows in the last bits, so that this does compare what it should"


def test_in_order(found: Any) -> None:
    """As ((a + b) + c) + d, where a sum from the other end differs."""
    for rank in range(4):
        a, b, c, d = PARTS + rank
        assert torch.equal(found[f"{rank}: sums"]["sum"], ((a + b) + c) + d)
        assert not torch.equal(found[f"{rank}: sums"]["sum"], ((d + c) + b) + a)
