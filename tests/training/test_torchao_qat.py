"""torchao's fake quantization, which is modules of its own, is trained like qatc's graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig

import qatc
from qatc.errors import PassError
from qatc.training.distill import Distiller
from tests.training.conftest import CONFIG, assert_equal, losses, make, make_rows, weights

INT4 = torch.int4  # type: ignore[attr-defined]

BASES = [
    Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=PerGroup(16)),
    IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(16)),
]

LONGER = replace(CONFIG, steps=60, learning_rate=3e-3)


def is_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def prepared(base: Any) -> Any:
    """The teacher itself, rounded."""
    student = make(0)
    quantize_(student, QATConfig(base, step="prepare"), filter_fn=is_layer)
    return student.train()


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
def test_it_learns_and_converts_to_what_was_trained(base: Any, tmp_path: Path) -> None:
    student = prepared(base)
    before = weights(student)
    history = Distiller(student, make(0), make_rows(), LONGER, tmp_path).run()
    start = sum(record.kl for record in history[:5])
    assert sum(record.kl for record in history[-5:]) < 0.7 * start
    assert not any(torch.equal(before[name], now) for name, now in weights(student).items())

    ids = torch.from_numpy(make_rows().tokens).long()
    with torch.no_grad():
        wanted = student.eval()(ids).logits
        quantize_(student, QATConfig(base, step="convert"), filter_fn=None)
        layer = student.model.layers[0].mlp.up_proj
        assert type(layer) is nn.Linear
        assert isinstance(layer.weight.data, IntxUnpackedToInt8Tensor)
        torch.testing.assert_close(student(ids).logits, wanted, rtol=0, atol=1e-5)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=8)
    whole = Distiller(prepared(BASES[0]), make(0), make_rows(), config, tmp_path / "whole")
    history = whole.run()

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 6:
            raise Stop

    first = Distiller(prepared(BASES[0]), make(0), make_rows(), config, tmp_path / "two")
    with pytest.raises(Stop):
        first.run(stop)
    second = Distiller(prepared(BASES[0]), make(0), make_rows(), config, tmp_path / "two")
    assert losses(second.run()) == losses(history)
    assert_equal(weights(second.student), weights(whole.student))


def test_prepare_does_not_quantize_twice() -> None:
    with pytest.raises(PassError, match="found nothing to work on"):
        qatc.prepare(prepared(BASES[0]), qatc.Recipe.from_bits("4-8-16"), compile=False)
