"""Bytes of every phase, against figures written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qatc.errors import ConfigError
from qatc.estimate import PhaseMemory, Setup, phases
from qatc.estimate.memory import LIBRARIES, largest, slot_bytes, slots_of
from qatc.estimate.training import saved_activations
from tests.estimate.shapes import llama_7b

P = 6_738_415_616
SHAPE = llama_7b()


def phase(title: str, setup: Setup) -> PhaseMemory:
    (found,) = (p for p in phases(SHAPE, setup) if p.title.startswith(title))
    return found


def test_training_in_full_is_sixteen_bytes_a_parameter_and_the_teacher() -> None:
    training = phase("training", Setup())
    own = {n: training.parts[n] for n in ("masters", "gradients", "optimizer", "teacher")}
    assert own == {"masters": 4 * P, "gradients": 4 * P, "optimizer": 8 * P, "teacher": 2 * P}
    assert largest(phases(SHAPE, Setup())) == training
    assert training.total == pytest.approx(sum(training.parts.values()))


def test_every_option_takes_what_it_says() -> None:
    plain = phase("training", Setup()).parts
    few = Setup(batch_size=1, max_length=16, master_dtype="bfloat16", fused_step=True)
    small = replace(few, optimizer="adamw8bit")
    parts = phase("training", small).parts
    assert parts["masters"] == 2 * P
    assert 2.03 * P <= parts["optimizer"] <= 2.58 * P
    assert parts["gradients"] == 2 * SHAPE.linear / 32
    assert phase("training", Setup(teacher="recorded")).parts.keys() == plain.keys() - {"teacher"}
    away = phase("training", Setup(offload="optimizer"))
    assert "optimizer" not in away.parts and away.host["optimizer"] == 8 * P
    assert away.host["checkpoint on its way"] == 12 * P
    here = phase("training", Setup(offload="optimizer", on_gpu=False))
    assert here.parts["optimizer"] == 8 * P and not here.host
    frozen = phase("training", Setup(train_embeddings=False)).parts
    assert frozen["optimizer"] == 8 * (P - 2 * 32000 * 4096)


def test_updates_take_what_they_have_and_a_layer_of_gradients() -> None:
    updates = 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    setup = Setup(train="lora", batch_size=1, max_length=16)
    parts = phase("training", setup).parts
    assert parts["optimizer"] == 8 * updates and parts["masters"] == 4 * P
    assert parts["gradients"] == 4 * updates + 4 * SHAPE.linear / 32
    assert updates / P == pytest.approx(0.006, rel=0.03)
    twice = phase("training", replace(setup, lora_rank=32, master_dtype="bfloat16")).parts
    assert twice["optimizer"] == 16 * updates
    assert twice["gradients"] == 8 * updates + 2 * SHAPE.linear / 32


def test_streamed_parameters_are_in_the_host_but_for_two_layers() -> None:
    streamed = phase("training", Setup(offload="parameters"))
    assert not {"masters", "teacher", "optimizer"} & streamed.parts.keys()
    host = {name: streamed.host[name] for name in ("masters", "teacher", "gradients", "optimizer")}
    assert host == {"masters": 4 * P, "teacher": 2 * P, "gradients": 4 * P, "optimizer": 8 * P}
    layer, ends = SHAPE.linear / 32, 2 * 32000 * 4096
    assert streamed.parts["gathered layers"] == pytest.approx((2 * layer + ends) * (4 + 2))
    few = phase("training", Setup(offload="parameters", batch_size=1, max_length=16)).parts
    assert few["gradients"] == 4 * ends, "of the largest part"
    assert phase("training", Setup(offload="parameters", on_gpu=False)).parts["masters"] == 4 * P
    assert phase("evaluating", Setup(offload="parameters")).parts["masters"] == 4 * P


def test_activations_are_those_of_all_layers_or_their_inputs() -> None:
    big = Setup(
        batch_size=32, max_length=2048, fused_step=True, loss_chunk=0
    )  # the loss is what counts most
    tokens, hidden = 32 * 2048, 4096
    parts = phase("training", big).parts
    each = parts["activations"] / tokens / hidden / 32
    assert each == pytest.approx(27.6, rel=0.08)  # as measured on a prototype
    again = phase("training", replace(big, checkpoint_activations=True)).parts
    assert again["activations"] / tokens / hidden / 32 == pytest.approx(2, rel=0.01)
    assert parts["logits and loss"] == 3 * 2 * tokens * 32000
    chunked = phase("training", replace(big, loss_chunk=256)).parts
    assert chunked["logits and loss"] == 3 * 2 * 256 * 32000 + tokens * hidden * 8
    assert chunked["gradients"] == 4 * 32000 * hidden
    by_itself = phase("training", replace(big, loss_chunk=None)).parts
    assert by_itself["logits and loss"] == 3 * 2 * 512 * 32000 + tokens * hidden * 8


def test_a_layer_saves_what_was_counted_of_a_compiled_one() -> None:
    """Bytes a token of two layers, in fp32 and bf16, without what all layers share."""
    small = replace(SHAPE, hidden=256, inner=688, heads=4, kv_heads=4, head_size=64)
    grouped = replace(small, inner=512, heads=8, kv_heads=2, head_size=32)
    for shape, compute, counted in (
        (small, "float32", 2113536 + 1572864 + 786432 + 264192 + 5 * 6144),
        (small, "bfloat16", 1056768 + 786432 + 393216 + 264192 + 5 * 6144),
        (grouped, "float32", 1572864 + 2 * 786432 + 2 * 196608 + 6 * 6144),
        (grouped, "bfloat16", 786432 + 2 * 393216 + 98304 + 196608 + 6 * 6144),
    ):
        setup = Setup(compute=compute)
        assert saved_activations(shape, setup) == pytest.approx(counted / 384, rel=0.02)


def test_a_tied_table_has_its_gradient_twice_for_a_moment() -> None:
    table = 32000 * 4096
    tied = replace(SHAPE, head=0)
    (apart,) = (p for p in phases(SHAPE, Setup()) if p.title == "training")
    (shared,) = (p for p in phases(tied, Setup()) if p.title == "training")
    assert apart.parts["gradients"] - shared.parts["gradients"] == 4 * table
    largest_of_layer = 4096 * 11008 * (2 + 4)
    more = shared.parts["workspace"] - apart.parts["workspace"]
    assert more == pytest.approx(4 * table - largest_of_layer)


def test_gpus_share_all_but_what_is_gathered() -> None:
    parts = phase("training", Setup(gpus=8)).parts
    assert parts["masters"] == 4 * P / 8 and parts["optimizer"] == P
    layer, ends = SHAPE.linear / 32, 2 * 32000 * 4096
    assert parts["gathered layers"] == pytest.approx((2 * layer + ends) * (4 + 2))
    loading = phase("loading", Setup(gpus=8))
    assert loading.parts["masters"] == 4 * P / 8 and loading.host_total < 4 * P
    evaluating = phase("evaluating", Setup(gpus=8)).parts
    assert evaluating["teacher"] == 2 * P / 8
    assert evaluating["gathered layers"] == parts["gathered layers"]
    packing = phase("packing", Setup(gpus=8))
    assert packing.parts["masters"] == 4 * P / 8
    assert packing.parts["workspace"] == 4096 * 11008 * 12  # a whole weight, turned into codes
    assert packing.host["whole masters"] == 4 * SHAPE.linear
    assert "masters" not in phase("packing", Setup(gpus=8, verify=False)).host
    assert not any("by layer" in p.title for p in phases(SHAPE, Setup(gpus=8)))


def test_a_teacher_that_writes_is_whole() -> None:
    online, before = Setup(gpus=8), Setup(gpus=8, written_before=True)
    parts = phase("writing the corpus", online).parts
    assert parts["whole teacher"] == 2 * P and parts["masters"] + parts["teacher"] == 6 * P / 8
    alone = phase("writing the corpus", before).parts
    assert alone["teacher"] == 2 * P and not {"masters", "whole teacher"} & alone.keys()
    assert phase("training", before) == phase("training", online)
    recorded = Setup(gpus=8, teacher="recorded")
    assert phase("recording", recorded).parts["teacher"] == 2 * P
    assert phase("evaluating", recorded).parts["teacher"] == 2 * P / 8
    assert "teacher" not in phase("evaluating", recorded).host


def test_runs_that_want_whole_models_share_them_out_in_training_alone() -> None:
    whole = Setup(gpus=8, divided=False)
    assert phase("training", whole) == phase("training", Setup(gpus=8))
    loading = phase("loading", whole)
    assert loading.parts["masters"] == 4 * P and loading.host_total > 8 * 4 * P
    assert phase("evaluating", whole).parts == phase("evaluating", Setup(batch_size=1)).parts
    assert any("by layer" in p.title for p in phases(SHAPE, whole))


def test_slots_are_limited_by_half_of_what_is_left() -> None:
    apart = Setup(teacher="recorded")
    assert slot_bytes(SHAPE, apart) == 2 * 4096 * 32 * 257 * 2 + 32000 * 2
    free = 24e9 - LIBRARIES - 2 * P
    assert slots_of(SHAPE, apart, 24e9) == int(free / 2 // slot_bytes(SHAPE, apart))
    assert slots_of(SHAPE, replace(apart, slots=7), 24e9) == 7
    assert slots_of(SHAPE, apart, None) == 256
    assert slots_of(SHAPE, replace(apart, samples=20), None) == 20
    assert slots_of(SHAPE, Setup(), 24e9) == 2  # nothing is left: it does not fit


def test_a_recorded_teacher_lies_in_the_host_beside_a_gpu() -> None:
    recorded = Setup(teacher="recorded")
    for title in ("loading", "evaluating", "measuring KL by layer"):
        assert "teacher" not in phase(title, recorded).parts, title
        assert phase(title, recorded).host["teacher"] == 2 * P, title
        assert phase(title, replace(recorded, on_gpu=False)).parts["teacher"] == 2 * P, title
        assert phase(title, Setup()).parts["teacher"] == 2 * P, title


def test_codes_are_packed_in_the_host_when_no_teacher_is_there() -> None:
    packing = phase("packing", Setup())
    assert packing.parts.keys() == {"masters", "workspace", "libraries"}
    assert packing.host["codes"] > SHAPE.linear
    assert "codes" in phase("packing", Setup(on_gpu=False)).parts


def test_a_recorded_teacher_is_not_beside_a_student_that_is_trained() -> None:
    for title in ("writing the corpus", "recording", "training"):
        held = phase(title, Setup(teacher="recorded")).parts.keys()
        assert len({"masters", "teacher"} & held) == 1, title
    assert not any(p.title.startswith("recording") for p in phases(SHAPE, Setup()))
    assert not any(p.title == "verifying" for p in phases(SHAPE, Setup(verify=False)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": 3}, "a batch of 8 rows cannot be shared by 3 GPUs"),
        ({"fused_step": True, "accumulate": 2}, "leave out --fused-step"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit"),
        ({"train": "lora", "gpus": 2}, "there are 2 GPUs; ask for one, or leave out --train lora"),
        ({"train": "lora", "offload": "parameters"}, "leave it out, or --train lora"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"loss_chunk": -1}, "loss_chunk must not be negative"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Setup(**changes)  # type: ignore[arg-type]
