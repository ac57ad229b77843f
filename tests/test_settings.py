"""The settings of a run, and when an unfinished one may be gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qatc.distill import TrainingConfig
from qatc.errors import CheckpointError, ConfigError
from qatc.recipe import Recipe
from qatc.settings import QuantizeConfig, begin_run, check_run
from tests.conftest import contents


@pytest.fixture
def config(tmp_path: Path) -> QuantizeConfig:
    return QuantizeConfig("some/model", tmp_path / "out")


def test_places(config: QuantizeConfig) -> None:
    assert config.partial == config.output.with_name("out.partial")
    assert config.data_directory == config.output.with_name("out.data")
    assert replace(config, data=Path("corpus")).data_directory == Path("corpus")


def test_checking_writes_nothing(config: QuantizeConfig, tmp_path: Path) -> None:
    check_run(config)
    check_run(replace(config, output=tmp_path / "not" / "yet" / "there"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"overwrite": True},
        {"trust_remote_code": True},
        {"training": TrainingConfig(checkpoint_every=7, keep_checkpoints=9)},
    ],
)
def test_the_same_run_goes_on(config: QuantizeConfig, change: dict[str, Any]) -> None:
    begin_run(config)
    (config.partial / "work").write_text("done")
    again = replace(config, **change)
    check_run(again)
    begin_run(again)
    assert (config.partial / "work").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"training": TrainingConfig(steps=7)}, "training.steps was 1500 and is 7 now"),
        ({"recipe": Recipe.from_bits("4-8-8")}, "recipe.kv.bits was 4 and is 8 now"),
        (
            {"recipe": Recipe.from_bits("4-8-4", head_bits=8)},
            "recipe.head.bits was 16 and is 8 now",
        ),
        ({"model": "other/model"}, "model was 'some/model' and is 'other/model' now"),
    ],
)
def test_other_settings_are_named(
    config: QuantizeConfig, change: dict[str, Any], difference: str
) -> None:
    begin_run(config)
    (config.partial / "work").write_text("done")
    other = replace(config, **change)
    with pytest.raises(ConfigError, match=rf"{difference}\); repeat its command"):
        check_run(other)
    assert (config.partial / "work").exists()
    check_run(replace(other, overwrite=True))
    assert (config.partial / "work").exists(), "kept until the new run has something to keep"
    begin_run(replace(other, overwrite=True))
    assert not (config.partial / "work").exists()
    check_run(other)


def test_a_directory_without_settings_is_begun_anew(config: QuantizeConfig) -> None:
    """Killed between making the directory and writing the settings."""
    config.partial.mkdir()
    check_run(config)
    begin_run(config)
    assert list(contents(config.partial)) == ["run.json"]


@pytest.mark.parametrize("place", ["output", "data"])
def test_a_place_under_a_file(config: QuantizeConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is not a directory that can be written to"):
        check_run(replace(config, **{place: tmp_path / "file" / "below"}))


def test_values() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16"):
        QuantizeConfig("m", Path("o"), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quantizes nothing"):
        QuantizeConfig("m", Path("o"), recipe=Recipe.from_bits("16-16-16"))
    with pytest.raises(ConfigError, match="eval_sequences must be at least 1"):
        QuantizeConfig("m", Path("o"), eval_sequences=0)
