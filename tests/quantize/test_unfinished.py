"""When an unfinished run may be gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qatc.errors import CheckpointError, ConfigError
from qatc.quantize.settings import QuantizeConfig, check_places
from qatc.quantize.unfinished import (
    VERSION_OF,
    begin_run,
    check_run,
    end_run,
    recorded_inputs,
    trained_file,
)
from qatc.recipe.recipe import Recipe
from qatc.storage import markers
from qatc.storage.markers import Mark
from qatc.training.config import TrainingConfig
from tests.conftest import at_disk_call, contents, run_until_killed


def test_checking_writes_nothing(config: QuantizeConfig, tmp_path: Path) -> None:
    check_run(config)
    check_run(replace(config, output=tmp_path / "not" / "yet" / "there"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"overwrite": True},
        {"verify": False},
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


def test_a_run_from_before_a_setting_was_there_goes_on(config: QuantizeConfig) -> None:
    begin_run(config)
    file = config.partial / "run.json"
    begun = json.loads(file.read_text())
    del begun["training"]["optimizer"]
    file.write_text(json.dumps(begun))
    check_run(config)
    other = replace(config, training=replace(config.training, optimizer="adamw8bit"))
    with pytest.raises(ConfigError, match="optimizer was 'adamw' and is 'adamw8bit' now"):
        check_run(other)


def test_the_order_of_weight_bits_counts(config: QuantizeConfig) -> None:
    pairs = (("*.v_proj.weight", 6), ("*.layers.1.*", 3))
    first, other = (
        replace(config, recipe=replace(config.recipe, weight_bits=order))
        for order in (pairs, pairs[::-1])
    )
    begin_run(first)
    (config.partial / "work").write_text("done")
    begin_run(first)
    with pytest.raises(ConfigError, match="recipe.weight_bits was"):
        check_run(other)


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
        ({"data": Path("corpus")}, "data was None and is 'corpus' now"),
        ({"eval_text": Path("a.txt")}, "eval_text was None and is 'a.txt' now"),
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
    """Killed between making the directory and marking it."""
    config.partial.mkdir()
    check_run(config)
    begin_run(config)
    assert set(contents(config.partial)) == {"run.json", Mark.UNFINISHED.value}


INPUTS = {"the model some/model": "1" * 64, f"{VERSION_OF}torch": "2.13.0"}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("the model some/model", "2" * 64, r"\(fingerprint 11111111, now 22222222\)"),
        (f"{VERSION_OF}torch", "2.14.0", "the version of torch changed from 2.13.0 to 2.14.0"),
    ],
)
def test_inputs_that_changed_are_named(
    config: QuantizeConfig, name: str, value: str, says: str
) -> None:
    begin_run(config, INPUTS)
    (config.partial / "work").write_text("done")
    assert check_run(config, INPUTS) == []
    with pytest.raises(ConfigError, match=f"since it began {name} changed.*--overwrite") as raised:
        check_run(config, INPUTS | {name: value})
    assert re.search(says, str(raised.value))
    over = replace(config, overwrite=True)
    assert len(check_run(over, INPUTS | {name: value})) == 1
    assert (config.partial / "work").exists()
    begin_run(over, INPUTS | {name: value})
    assert not (config.partial / "work").exists()
    assert recorded_inputs(config) == INPUTS | {name: value}


def test_inputs_become_known_one_after_the_other(config: QuantizeConfig) -> None:
    begin_run(config, INPUTS)
    (config.partial / "work").write_text("done")
    begin_run(config, {"the corpus c": "3" * 64})
    assert recorded_inputs(config) == INPUTS | {"the corpus c": "3" * 64}
    assert (config.partial / "work").exists()
    with pytest.raises(ConfigError, match="the corpus c changed"):
        check_run(config, {"the corpus c": "4" * 64})


def test_more_inputs_become_known_beside_those_that_are(config: QuantizeConfig) -> None:
    begin_run(config, {"model": "1"})
    begin_run(config, {"model": "1", "corpus": "2"})
    assert recorded_inputs(config) == {"model": "1", "corpus": "2"}


def test_the_folders_above_are_made(config: QuantizeConfig, tmp_path: Path) -> None:
    deep = replace(config, output=tmp_path / "not" / "yet" / "there")
    begin_run(deep)
    assert deep.partial.is_dir()


def test_a_folder_in_which_nothing_can_be_made(
    config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one without the right to write, or without the right to go into it."""
    for right in (os.W_OK, os.X_OK):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="written to"):
            patch.setattr(os, "access", lambda path, asked, right=right: not asked & right)
            check_places(config)


def test_another_version_may_write_what_is_trained(config: QuantizeConfig) -> None:
    begin_run(config, INPUTS)
    trained_file(config).write_text("{}")
    check_run(config, INPUTS | {f"{VERSION_OF}torch": "2.14.0"})
    with pytest.raises(ConfigError, match="the model some/model changed"):
        check_run(config, INPUTS | {"the model some/model": "2" * 64})


@pytest.mark.parametrize("content", ["notes.txt", "run.json"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_that_is_no_unfinished_run(
    config: QuantizeConfig, content: str, overwrite: bool
) -> None:
    config.partial.mkdir()
    (config.partial / content).write_text("{}")
    with pytest.raises(ConfigError, match=r"out\.partial, but that is there already"):
        check_run(replace(config, overwrite=overwrite))
    assert set(contents(config.partial)) == {content}


def test_half_of_a_deleted_run_is_begun_anew(config: QuantizeConfig) -> None:
    begin_run(config, INPUTS)
    (config.partial / "work").write_text("done")
    markers.change(config.partial, Mark.REMOVING)
    check_run(replace(config, model="other/model"))
    begin_run(config, INPUTS)
    assert not (config.partial / "work").exists()


def test_a_kill_while_a_run_is_deleted(config: QuantizeConfig) -> None:
    """What is left of it is whole, or nothing that is gone on with."""
    work = [config.partial / name for name in ("a", "b/c", "d")]

    def make() -> None:
        begin_run(config, INPUTS)
        for path in work:
            path.parent.mkdir(exist_ok=True)
            path.write_text("done")

    make()
    with pytest.MonkeyPatch.context() as patch:
        calls = at_disk_call(patch)
        end_run(config)
    assert not config.partial.exists()
    left = set()
    for number in range(1, len(calls) + 1):
        make()

        def killed(number: int = number) -> None:
            at_disk_call(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            end_run(config)

        run_until_killed(killed)
        begin_run(config, INPUTS)
        left.add(tuple(path.exists() for path in work))
        end_run(config)
    assert left == {(True, True, True), (False, False, False)}
