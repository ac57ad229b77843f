"""What is trained: which parameters, what else is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.errors import ConfigError
from qatc.models.preparation import prepare
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.parts import choose_parts, parse_train, trained_at_once
from tests.conftest import make_llama
from tests.training.conftest import CONFIG, make, make_rows, weights

LEARNED = Recipe.from_bits("4-8-4", preset="best")
NORMS = {
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
}


def changed(student: Any, directory: Path) -> set[str]:
    """Names of what a short training changes."""
    before = weights(student)
    Distiller(student, make(0), make_rows(), replace(CONFIG, steps=2), directory).run()
    return {
        name for name, value in weights(student).items() if not torch.equal(value, before[name])
    }


def test_norms_alone(tmp_path: Path) -> None:
    student = prepare(make(1), Recipe.from_bits("4-8-4"), compile=False)
    choose_parts(student, "norms")
    assert changed(student, tmp_path) == NORMS


def test_scales_alone(tmp_path: Path) -> None:
    student = prepare(make(1), LEARNED, compile=False)
    choose_parts(student, "scales")
    found = changed(student, tmp_path)
    assert len([n for n in found if n.endswith("weight_scale_gain")]) == 7
    assert len(found) == 9, "and those of keys and values"


def test_what_is_frozen_stays_so(tmp_path: Path) -> None:
    student = prepare(make(1), Recipe.from_bits("4-8-4"), compile=False)
    student.get_parameter("model.norm.weight").requires_grad_(False)
    choose_parts(student, "norms")
    assert changed(student, tmp_path) == NORMS - {"model.norm.weight"}


@pytest.mark.parametrize(
    ("train", "begin"),
    [("blockwise", {"model"}), ("norms", {"model"}), ("blockwise+full", {"model", "lm_head"})],
)
def test_what_a_step_trains_at_once(train: str, begin: set[str]) -> None:
    model = make_llama(num_hidden_layers=3, tie_word_embeddings=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    with trained_at_once(model, train):
        found = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n in found} == begin
    if train == "blockwise":
        assert {n.split(".")[2] for n in found} == {"2"} and len(found) == 9
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="has no scales that could be trained"):
        choose_parts(prepare(make(1), Recipe.from_bits("4-8-4"), compile=False), "scales")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": "head"}, "train must be one of full, scales, norms, .*; got 'head'"),
        ({"train": "blockwise", "loss": "label"}, "leave out --loss, or let it be lowered end"),
        ({"train": "norms", "blockwise_steps": 5}, "train is norms; choose --train blockwise"),
        ({"train": "blockwise", "blockwise_steps": 0}, "blockwise_steps must be at least 1; got 0"),
        ({"train": "blockwise", "blockwise_rows": 0}, "blockwise_rows must be at least 1; got 0"),
    ],
)
def test_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainingConfig(**change)


@pytest.mark.parametrize(
    ("train", "change", "says"),
    [
        ("scales", {}, "no learned scales that --train scales could train; choose --preset best"),
        ("norms", {"method": "gptq"}, "the method gptq trains nothing, .*; add qat to the method"),
        ("blockwise", {"method": "rotate+qat"}, "turns those of the student; leave out rotate"),
    ],
)
def test_what_a_run_lacks(train: str, change: dict[str, Any], says: str) -> None:
    training = TrainingConfig(train=train)
    with pytest.raises(ConfigError, match=says):
        QuantizeConfig("m", Path("o"), training=training, **change)
    recipe = LEARNED if train == "scales" else Recipe()
    assert QuantizeConfig("m", Path("o"), training=training, recipe=recipe)


def test_steps_of_a_layer() -> None:
    assert TrainingConfig(steps=100, train="blockwise").layer_steps == 100
    assert TrainingConfig(steps=100, train="blockwise+full").layer_steps == 25
    assert TrainingConfig(train="blockwise+full", blockwise_steps=7).layer_steps == 7
    assert parse_train("blockwise").parts is None
