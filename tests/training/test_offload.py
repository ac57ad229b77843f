"""Parameters in host memory, by FSDP on a process alone: on a CPU the very same numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from qatc.errors import ConfigError
from qatc.machine.world import World
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.config import StepMetrics, TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.sharding import check_training, device_of, sharded
from tests.conftest import make_llama
from tests.training.conftest import CONFIG, VOCABULARY, assert_equal, losses, make_rows, weights

SHORT = replace(CONFIG, steps=4, checkpoint_every=2)


def make(seed: int, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16} | sizes
    return make_llama(VOCABULARY, seed, **sizes).to(dtype)


def trained(
    directory: Path, config: TrainingConfig, preset: str = "paper", frozen: bool = False
) -> tuple[dict[str, Tensor], list[StepMetrics]]:
    """Weights and steps of a run."""
    dtype = getattr(torch, config.master_dtype)
    student, teacher = make(1, dtype), make(0).requires_grad_(False)
    if frozen:
        table = student.model.embed_tokens.weight.requires_grad_(False)
        table.data = teacher.model.embed_tokens.weight.data
    prepare(
        student,
        Recipe.from_bits("4-8-4", preset=preset),
        compile=False,
        checkpoint_activations=config.checkpoint_activations,
        compute_dtype=None if dtype is torch.float32 else dtype,
    )
    offload = config.offload == "parameters"
    with sharded(World(), student, teacher, offload=offload) as (own, its):
        assert all(hasattr(p, "to_local") is offload for p in own.parameters())
        how: Any = {"autocast": lambda: torch.autocast("cpu", dtype, dtype is torch.bfloat16)}
        history = Distiller(own, its, make_rows(), config, directory, **how).run()
    assert not distributed.is_initialized()
    if frozen:
        shared = student.model.embed_tokens.weight, teacher.model.embed_tokens.weight
        assert shared[0].data_ptr() == shared[1].data_ptr()
    return weights(student), history


@pytest.mark.parametrize(
    ("change", "how"),
    [
        ({"gradient_clip": 0.05, "accumulate": 2, "loss_chunk": 8}, {"preset": "best"}),
        ({"optimizer": "adamw8bit", "checkpoint_activations": True}, {"frozen": True}),
        ({"master_dtype": "bfloat16", "fused_step": True}, {}),
    ],
)
def test_trains_the_same(tmp_path: Path, change: dict[str, Any], how: dict[str, Any]) -> None:
    here = trained(tmp_path / "here", replace(SHORT, **change), **how)
    away = trained(tmp_path / "away", replace(SHORT, offload="parameters", **change), **how)
    assert_equal(away[0], here[0])
    for mine, its in zip(losses(away[1]), losses(here[1]), strict=True):
        norm = its.gradient_norm  # with a fused step, of sums in another order
        assert mine == replace(its, gradient_norm=mine.gradient_norm)
        assert mine.gradient_norm == pytest.approx(norm, rel=1e-6)


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = trained(tmp_path, replace(SHORT, offload="parameters"))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    again = trained(tmp_path, replace(SHORT, offload="parameters"))
    assert_equal(again[0], whole[0])
    assert losses(again[1]) == losses(whole[1])


def test_where_a_model_computes() -> None:
    model = make(0)
    assert device_of(model) == torch.device("cpu")
    with sharded(World(), model, offload=True) as (own,):
        assert device_of(own) == torch.device("cpu")
    with sharded(World(), model) as (own,):
        assert own is model and not distributed.is_initialized()


def test_a_training_that_fails_leaves_no_group() -> None:
    with pytest.raises(ZeroDivisionError), sharded(World(), make(0), offload=True):
        raise ZeroDivisionError
    assert not distributed.is_initialized()


def test_refused() -> None:
    for train in ("lora", "blockwise"):
        with pytest.raises(ConfigError, match=f"--train is {train}; leave it out, or choose"):
            TrainingConfig(train=train, offload="parameters")
    both = TrainingConfig(offload="parameters", master_dtype="bfloat16")
    with pytest.raises(ConfigError, match="or --offload parameters, train parameters of one"):
        check_training(World(), both, learned=True)
    check_training(World(), both, learned=False)
