"""What several commands share is declared once, and its defaults are those of the library."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest
from typer.models import ParameterInfo

from qatc.cli import options
from qatc.cli.main import app
from qatc.data import CorpusConfig
from qatc.quantize import QuantizeConfig
from qatc.training import TrainingConfig

COMMANDS: dict[str, Callable[..., Any]] = {
    str(command.name): command.callback for command in app.registered_commands if command.callback
}

OWN_DEFAULT = {("verify", "device")}
"""Defaults that differ on purpose: bit for bit, a model is compared on the CPU."""


def declared() -> Iterator[tuple[str, str, ParameterInfo, Any]]:
    """Command, parameter, declaration and default of every option and argument."""
    for name, command in COMMANDS.items():
        hints = get_type_hints(command, include_extras=True)
        for parameter in inspect.signature(command).parameters.values():
            for info in getattr(hints[parameter.name], "__metadata__", ()):
                if isinstance(info, ParameterInfo):
                    yield name, parameter.name, info, parameter.default


def test_no_option_is_declared_twice() -> None:
    places: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for command, parameter, info, _ in declared():
        assert info.help, f"{parameter} of {command} has no help"
        places[info.help].setdefault(id(info), []).append(f"{parameter} of {command}")
    twice = {text: list(own.values()) for text, own in places.items() if len(own) > 1}
    assert not twice, "move it to cli/options.py"


def test_shared_options_have_one_default() -> None:
    defaults: dict[int, dict[str, Any]] = defaultdict(dict)
    for command, parameter, info, default in declared():
        if (command, parameter) not in OWN_DEFAULT:
            defaults[id(info)][command] = default
    assert [own for own in defaults.values() if len({*map(repr, own.values())}) > 1] == []


NAMES = {  # of the settings whose options are called otherwise
    "sequences": "samples",
    "learning_rate": "lr",
    "warmup_steps": "warmup",
    "eval_sequences": "eval_samples",
}
ELSEWHERE = {"shard_size", "eval_tokens", "generation", "training", "recipe", "model", "output"}


@pytest.mark.parametrize("config", [CorpusConfig, TrainingConfig, QuantizeConfig])
def test_defaults_are_those_of_the_library(config: Any) -> None:
    given = inspect.signature(COMMANDS["quantize"]).parameters
    for field in dataclasses.fields(config):
        name = NAMES.get(field.name, field.name)
        if config is CorpusConfig and name == "batch_size":
            name = "generation_batch_size"
        if name in ELSEWHERE:
            continue
        default = given[name].default
        if name == "greedy_tokens":
            default = options.parse_range(default)
        assert default == field.default, name
