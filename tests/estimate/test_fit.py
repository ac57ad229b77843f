"""The cheapest options with which a run fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from qatc.errors import ConfigError
from qatc.estimate import Setup, Speed, fit, phases
from qatc.estimate.fit import (
    ASSUMED,
    OPTIONS,
    require_fit,
    smallest,
    training_changes,
)
from qatc.estimate.memory import largest
from tests.estimate.shapes import llama_7b

SHAPE = llama_7b()


def test_what_fits_is_left_as_it_is() -> None:
    choice = fit(SHAPE, Setup(), 140e9)
    assert choice is not None and not choice.options and choice.setup == Setup()
    assert choice.added == 0 and choice.typed == []


def test_seven_billion_fit_into_24_gb_with_the_optimizer_in_the_host() -> None:
    choice = fit(SHAPE, Setup(), 24e9)
    assert choice is not None
    assert {"--master-dtype bfloat16", "--teacher recorded", "--offload optimizer"} <= {
        option.name for option in choice.options
    }
    found = phases(SHAPE, choice.setup, 24e9)
    assert largest(found).total <= 24e9
    assert any(phase.title.startswith("writing the corpus") for phase in found)


@pytest.mark.parametrize("memory", [36e9, 48e9, 80e9, 110e9])
def test_nothing_cheaper_fits(memory: float) -> None:
    """Against a search of its own, over all options at one batch."""
    choice = fit(SHAPE, Setup(), memory)
    assert choice is not None and choice.phase.total <= memory
    cheaper = []
    for taken in itertools.product([False, True], repeat=len(OPTIONS)):
        options = [option for option, own in zip(OPTIONS, taken, strict=True) if own]
        setup = Setup(**{k: v for option in options for k, v in option.changes.items()})
        added = sum(option.added(SHAPE, setup, ASSUMED) for option in options)
        if added < choice.added - 1e-3 and largest(phases(SHAPE, setup, memory)).total <= memory:
            cheaper.append([option.name for option in options])
    assert not cheaper


def test_what_is_asked_for_already_is_kept() -> None:
    asked = Setup(optimizer="adamw8bit", verify=False, loss_chunk=64)
    choice = fit(SHAPE, asked, 80e9)
    assert choice is not None
    assert choice.setup.optimizer == "adamw8bit" and choice.setup.loss_chunk == 64
    assert not [o for o in choice.options if "optimizer" in o.changes or "loss_chunk" in o.changes]


def test_rows_are_halved_and_passes_doubled() -> None:
    wide = Setup(batch_size=64, max_length=2048)
    choice = fit(SHAPE, wide, 140e9)
    assert choice is not None and choice.setup.batch_size * choice.setup.accumulate == 64
    alone = Setup(batch_size=64, max_length=2048, accumulate=2, checkpoint_activations=True)
    chosen = fit(SHAPE, replace(alone, loss_chunk=256), 160e9)
    assert chosen is not None and not any("fused_step" in o.changes for o in chosen.options)


def test_thirty_billion_fit_eight_gpus_of_80_gb_with_a_corpus_that_is_there() -> None:
    layer = 4 * 6656**2 + 3 * 6656 * 17920
    large = replace(
        SHAPE, layers=60, hidden=6656, inner=17920, heads=52, kv_heads=52, linear=60 * layer,
        active=60 * layer, small=121 * 6656, embedding=32000 * 6656, head=32000 * 6656,
        largest=6656 * 17920,
    )  # fmt: skip
    choice = fit(large, Setup(gpus=8), 80e9)
    assert choice is not None and choice.setup.written_before
    assert choice.setup.teacher == "online" and choice.setup.master_dtype == "float32"
    assert fit(large, Setup(gpus=8, divided=False), 80e9) != choice
    assert fit(SHAPE, Setup(gpus=8), 80e9) == fit(SHAPE, Setup(gpus=8, written_before=False), 80e9)


def test_a_slow_link_makes_the_host_dear() -> None:
    (offload,) = (option for option in OPTIONS if option.name == "--offload optimizer")
    fast, slow = Speed(100, 1000, 64), Speed(100, 1000, 4)
    assert offload.added(SHAPE, Setup(), slow) == pytest.approx(
        16 * offload.added(SHAPE, Setup(), fast)
    )


def test_parameters_of_the_host_are_for_what_the_optimizer_there_is_not_enough_for() -> None:
    """In full precision of masters, with the teacher beside them."""
    asked = Setup(closed=("master_dtype", "optimizer", "fused_step", "teacher"))
    choice = fit(SHAPE, asked, 44e9)
    assert choice is not None
    assert [o.name for o in choice.options if "offload" in o.changes] == ["--offload parameters"]
    assert fit(SHAPE, replace(asked, closed=(*asked.closed, "--offload parameters")), 44e9) is None
    (streamed,) = (o for o in choice.options if "offload" in o.changes)
    beside = next(o for o in OPTIONS if o.name == "--offload optimizer")
    assert streamed.added(SHAPE, Setup(), ASSUMED) > beside.added(SHAPE, Setup(), ASSUMED) > 0


def test_computing_again_is_a_forward_pass_of_four_or_five() -> None:
    (again,) = (option for option in OPTIONS if "checkpoint_activations" in option.changes)
    online = again.added(SHAPE, Setup(), ASSUMED)
    assert online == pytest.approx(1 / 4, rel=0.03)
    recorded = again.added(SHAPE, Setup(teacher="recorded"), ASSUMED)
    assert recorded == pytest.approx(1 / 3, rel=0.03)


def test_what_cannot_fit_is_refused_with_what_comes_nearest() -> None:
    assert fit(SHAPE, Setup(), 12e9) is None
    nearest = smallest(SHAPE, Setup(), 12e9)
    with pytest.raises(ConfigError, match=r"7B does not fit into 12\.0 GB: with .*GB while"):
        require_fit(SHAPE, Setup(), 12e9)
    assert nearest.phase.total > 12e9
    assert require_fit(SHAPE, Setup(), 24e9) == fit(SHAPE, Setup(), 24e9)


def test_on_a_cpu_nothing_is_moved_elsewhere() -> None:
    choice = fit(SHAPE, Setup(on_gpu=False), 80e9)
    assert choice is not None and choice.setup.offload == "none"


def test_a_choice_is_fields_of_the_training_config() -> None:
    choice = fit(SHAPE, Setup(), 24e9)
    assert choice is not None
    changes = training_changes(choice)
    assert changes["offload"] == "optimizer" and changes["teacher"] == "recorded"
    assert "verify" not in changes and "batch_size" not in changes
