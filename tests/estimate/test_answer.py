"""The whole estimate: time, disk, and what is printed of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qatc.errors import ConfigError
from qatc.estimate import Setup, Speed, estimate, measure_speed, parse_memory
from qatc.estimate.tables import disk_rows, headline, memory_rows, option_rows, time_rows
from qatc.estimate.work import disk, forward_operations, seconds, step_seconds
from tests.estimate.shapes import llama_7b

SHAPE = llama_7b()
SPEED = Speed(100, 1000, 16)


def test_a_token_takes_two_operations_for_a_weight() -> None:
    weights = SHAPE.linear + 32000 * 4096
    assert forward_operations(SHAPE, 2) == pytest.approx(2 * weights, rel=1e-3)
    # Causal attention at 2048: every query meets 1024 keys, twice, in 32 layers.
    attention = 4 * 4096 * 1024 * 32
    assert forward_operations(SHAPE, 2048) == pytest.approx(2 * weights + attention)


def test_a_step_is_four_forwards_of_time_and_what_is_moved() -> None:
    forward = 2048 * forward_operations(SHAPE, 256) / 1e14
    assert step_seconds(SHAPE, Setup(), SPEED) == pytest.approx(4 * forward)
    recorded = Setup(teacher="recorded")
    assert step_seconds(SHAPE, recorded, SPEED) == pytest.approx(3 * forward)
    assert step_seconds(SHAPE, replace(recorded, gpus=8), SPEED) == pytest.approx(3 * forward / 8)
    moved = 2 * 8 * SHAPE.parameters / 16e9  # both moments, from the host and back
    away = replace(recorded, offload="optimizer")
    assert step_seconds(SHAPE, away, SPEED) == pytest.approx(3 * forward + moved)
    small = step_seconds(SHAPE, replace(away, optimizer="adamw8bit"), SPEED)
    assert small == pytest.approx(3 * forward + moved / 4, rel=0.05)


def test_writing_is_bound_by_the_weights_or_by_the_products() -> None:
    few = seconds(SHAPE, Setup(slots=2, samples=2), SPEED)["writing the corpus"]
    weights = 2 * (SHAPE.linear + 32000 * 4096) / 1e12
    assert few == pytest.approx(256 * weights, rel=0.02)  # and the cache
    slow = seconds(SHAPE, Setup(slots=128, samples=128), Speed(1, 1000))["writing the corpus"]
    assert slow == pytest.approx(256 * 128 * forward_operations(SHAPE, 256) / 1e12)


def test_the_disk_holds_one_checkpoint_more_than_are_kept() -> None:
    found = disk(SHAPE, Setup())
    assert found["checkpoints"] == 3 * 12 * SHAPE.parameters
    assert found["output"] == pytest.approx(SHAPE.linear / 2 + 2 * SHAPE.ends, rel=1e-3)
    assert disk(SHAPE, Setup(teacher="recorded"))["recorded teacher"] == 4096 * 256 * 170
    assert disk(SHAPE, Setup(weight_bits=8))["output"] > found["output"] + 3e9
    assert disk(SHAPE, Setup(weight_bits=16))["output"] == 2 * SHAPE.parameters
    updates = disk(SHAPE, Setup(train="lora", master_dtype="bfloat16"))["checkpoints"]
    assert updates == 3 * 12 * 16 * SHAPE.edges


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GB", 24e9), ("24", 24e9), ("22.5 GiB", 22.5 * 2**30), ("900mb", 9e8)],
)
def test_memory_is_read_as_it_is_written(text: str, wanted: float) -> None:
    assert parse_memory(text) == wanted


@pytest.mark.parametrize("text", ["", "0GB", "much", "-3GB", "24 parsecs"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory is an amount"):
        parse_memory(text)


def test_every_question_has_an_answer() -> None:
    found = estimate(SHAPE, Setup(), 48e9, SPEED)
    rows = memory_rows(found.phases, found.memory)
    (training,) = (row for row in rows if row[0] == "training")
    assert training[2] == "largest, too much" and "optimizer 53.9" in training[3]
    assert sum("largest" in row[2] for row in rows) == 1
    assert "does not fit into 1 x 48 GB" in headline(found)
    assert any(row[0] == "--optimizer adamw8bit" for row in option_rows(found))
    assert option_rows(found)[-1][0] == "all"
    assert found.chosen_seconds is not None
    assert time_rows(found.chosen_seconds, 1500)[-1][0] == "all"
    assert disk_rows(found.disk)[-1][0] == "all"
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["fits"] is False and plain["options"]["fits"] is True
    assert plain["options"]["added_share_of_a_step"] > 0
    assert plain["largest_phase"] == "training"


def test_what_fits_says_so_and_what_never_does_too() -> None:
    roomy = estimate(SHAPE, Setup(), 140e9)
    assert roomy.fits and roomy.seconds is None and "fits into" in headline(roomy)
    narrow = estimate(SHAPE, Setup(), 8e9)
    assert narrow.choice is None and "with all that helps" in headline(narrow)


def test_this_machine_is_measured() -> None:
    small = replace(SHAPE, hidden=64, inner=64)
    found = measure_speed(small, "float32", "cpu")
    assert 0 < found.tflops < 1000 and 0 < found.bandwidth < 100_000
