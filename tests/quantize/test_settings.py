"""The settings of a run, and where it may write."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatc.data.config import CorpusConfig
from qatc.errors import CheckpointError, ConfigError
from qatc.quantize.pair import load_models
from qatc.quantize.settings import QuantizeConfig, check_places
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig


def test_places(config: QuantizeConfig) -> None:
    assert config.partial == config.output.with_name("out.partial")
    assert config.data_directory == config.output.with_name("out.data")
    assert replace(config, data=Path("corpus")).data_directory == Path("corpus")


def test_every_setting_decides_but_for_a_few(config: QuantizeConfig) -> None:
    """What is added later decides the result, unless somebody says that it does not."""
    names = {field.name for field in fields(QuantizeConfig)}
    assert names - config.to_dict().keys() == {"output", "overwrite", "verify", "trust_remote_code"}
    training = {field.name for field in fields(TrainingConfig)}
    left_out = training - config.to_dict()["training"].keys()
    # Gradients of checkpointed activations are the same, bit for bit.
    assert left_out == {"checkpoint_every", "keep_checkpoints", "checkpoint_activations"}
    generation = {field.name for field in fields(CorpusConfig)}
    assert config.to_dict()["generation"].keys() == generation


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"output": "m"}, "the output .* would replace the model"),
        ({"output": "m/deep/out"}, "the output .* lies in the model"),
        ({"output": "."}, "the output .* would replace the model"),
        ({"model": "{}/out.partial"}, "the place of the unfinished run .* would replace the model"),
        ({"data": "out/data"}, "the output .* would replace the corpus"),
        ({"data": "out"}, "the output .* would replace the corpus"),
        ({"data": "out.partial"}, "the place of the unfinished run .* would replace the corpus"),
        ({"output": "corpus/out", "data": "corpus"}, "the output .* lies in the corpus"),
        ({"data": "m/data"}, "the corpus .* lies in the model"),
        ({"data": "."}, "the output .* lies in the corpus"),
        ({"eval_text": "out/a.txt"}, "the output .* would replace the evaluation text"),
    ],
)
def test_overlapping_places(tmp_path: Path, change: dict[str, str], says: str) -> None:
    for name in ("m", "out.partial"):
        (tmp_path / name).mkdir()
    paths = {"output": "out", "model": "{}/m"} | change
    settings: dict[str, Any] = {k: tmp_path / v for k, v in paths.items() if k != "model"}
    config = QuantizeConfig(model=paths["model"].format(tmp_path), overwrite=True, **settings)
    with pytest.raises(ConfigError, match=says):
        check_places(config)


@pytest.mark.parametrize("place", ["output", "data"])
def test_a_place_under_a_file(config: QuantizeConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    change: dict[str, Any] = {place: tmp_path / "file" / "below"}
    with pytest.raises(CheckpointError, match=f"file is not a directory .* another --{place}"):
        check_places(replace(config, **change))


def test_masters_in_bfloat16_are_computed_on_in_it() -> None:
    training = TrainingConfig(master_dtype="bfloat16")
    setting: Any = SimpleNamespace(config=QuantizeConfig("m", Path("o"), training=training))
    with pytest.raises(ConfigError, match="this one computes in float32: pass --dtype bfloat16"):
        load_models(setting, torch.float32)


def test_values() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16"):
        QuantizeConfig("m", Path("o"), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quantizes nothing"):
        QuantizeConfig("m", Path("o"), recipe=Recipe.from_bits("16-16-16"))
    with pytest.raises(ConfigError, match="eval_sequences must be at least 1"):
        QuantizeConfig("m", Path("o"), eval_sequences=0)
    with pytest.raises(ConfigError, match="loss_on must be answers or all; got 'users'"):
        QuantizeConfig("m", Path("o"), loss_on="users")  # type: ignore[arg-type]
    training = TrainingConfig(loss="logits+0.5*hidden")
    assert QuantizeConfig("m", Path("o"), method="rotate+gptq", training=training)
    with pytest.raises(ConfigError, match="turns those of the student; leave out hidden or rotate"):
        QuantizeConfig("m", Path("o"), method="rotate+qat", training=training)
    masters = TrainingConfig(master_dtype="bfloat16")
    for method in ("gptq", "gptq+qat"):
        with pytest.raises(ConfigError, match="which masters in bfloat16 would round; leave out"):
            QuantizeConfig("m", Path("o"), method=method, training=masters)
    rotated = Recipe.from_bits("4-4-4", rotate_inputs=("*.down_proj.weight",))
    assert QuantizeConfig("m", Path("o"), method="rotate", recipe=rotated)
    with pytest.raises(ConfigError, match="gptq turns no weights for them; begin the method with"):
        QuantizeConfig("m", Path("o"), method="gptq", recipe=rotated)
