"""Two processes train what one does, and go on from what any number of processes wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qatc.errors import ConfigError
from qatc.machine.world import World
from qatc.training.config import TrainingConfig
from qatc.training.sharding import check_batch, check_training, own_share
from tests.in_a_world import (
    APART,
    FUSED,
    SMALL,
    TOGETHER,
    forget_last,
    parameters_of,
    train,
    user_step,
)
from tests.training.conftest import assert_equal, make_rows

ALONE = World()


def weights(directory: Path, name: str) -> dict[str, Tensor]:
    return load_file(directory / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["whole", "again", "begun alone", "ended"])
def test_trains_what_one_process_does_bit_for_bit(in_a_world: Path, name: str) -> None:
    """From the start, and from step 3 of 6 that two or one wrote, and from where it ended."""
    assert_equal(weights(in_a_world, name), weights(in_a_world, "alone"))


def test_one_process_goes_on_with_what_two_began(in_a_world: Path, tmp_path: Path) -> None:
    forget_last(in_a_world / "whole", tmp_path / "run")
    files = {p.name for p in (tmp_path / "run" / "checkpoints" / "step-000003").iterdir()}
    assert files == {f"state-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    student, _ = train(tmp_path / "run", APART, ALONE)
    assert_equal(parameters_of(student), weights(in_a_world, "alone"))


def test_tied_and_clipped(in_a_world: Path, tmp_path: Path) -> None:
    config = replace(APART, gradient_clip=0.05)
    student, history = train(tmp_path, config, ALONE, tie_word_embeddings=True)
    assert max(record.gradient_norm for record in history) > 0.05
    trained = parameters_of(student)
    assert "lm_head.weight" not in trained
    assert_equal(trained, weights(in_a_world, "tied"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "small again"])
def test_with_chunks_and_moments_in_8_bits(in_a_world: Path, tmp_path: Path, name: str) -> None:
    student, _ = train(tmp_path, replace(APART, **SMALL), ALONE)
    assert_equal(weights(in_a_world, name), parameters_of(student))


def test_steps_within_the_backward_pass(in_a_world: Path, tmp_path: Path) -> None:
    student, _ = train(tmp_path, replace(TOGETHER, **FUSED), ALONE)
    assert_equal(weights(in_a_world, "fused"), parameters_of(student), rtol=1e-4, atol=1e-5)


def test_the_record_is_of_the_whole_batch(in_a_world: Path) -> None:
    def read(name: str) -> list[dict[str, Any]]:
        lines = (in_a_world / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    alone, together = read("alone"), read("whole")
    assert [r["step"] for r in together] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "kl", "gradient_norm", "learning_rate", "tokens"):
        assert [r[key] for r in together] == pytest.approx([r[key] for r in alone], rel=1e-6), key


@pytest.mark.parametrize("order", ["prepare shard", "shard prepare"])
def test_a_user_shards_before_or_after_prepare(in_a_world: Path, order: str) -> None:
    assert_equal(weights(in_a_world, order), user_step("prepare"), rtol=1e-5, atol=1e-6)


def test_several_need_a_loss_of_what_the_last_layer_gives() -> None:
    config = TrainingConfig(batch_size=4, loss="0.5*attention")
    check_training(ALONE, config, learned=False)
    with pytest.raises(ConfigError, match="several processes, .*--loss attention.0.1.logits"):
        check_training(World(0, 2), config, learned=False)
    check_training(World(0, 2), replace(config, loss="attention+label"), learned=False)


def test_a_batch_is_divided_evenly() -> None:
    with pytest.raises(ConfigError, match="8 rows .* 3 processes; .* multiple of 3"):
        check_batch(World(0, 3), 8)
    rows = make_rows(6)
    shares = [own_share(World(rank, 3), rows).tokens for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert torch.equal(
        torch.cat([torch.from_numpy(share) for share in shares]), torch.from_numpy(rows.tokens)
    )
