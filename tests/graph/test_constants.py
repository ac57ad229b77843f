"""What is equal, what is not, and what is noticed: the constants of modules."""

from __future__ import annotations

import enum
import functools
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatc.graph.constants import Constants, comparable


@dataclass
class Settings:
    factor: float
    table: dict[str, Any]


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


def scaled(factor: float) -> Any:
    return lambda x: x * factor


SHARED = torch.ones(2)
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (1, 1, True),
        (1, 1, 1.0),
        (0.0, 0.0, -0.0),
        (float("nan"), float("nan"), 1.0),
        ("a", "a", b"a"),
        ((1, 2), (1, 2), [1, 2]),
        ((1, (2, "x")), (1, (2, "x")), (1, (2, "y"))),
        ([1, [2]], [1, [2]], [1, [3]]),
        (deque([1]), deque([1]), deque([2])),
        (bytearray(b"a"), bytearray(b"a"), bytearray(b"b")),
        ({"a": 1}, {"a": 1}, {"a": 2}),
        ({1, 2}, {2, 1}, {1, 3}),
        (slice(1, 2), slice(1, 2), slice(1, 3)),
        (np.float32(2), np.float32(2), np.float32(3)),
        (np.float32(2), np.float32(2), np.float64(2)),
        (np.arange(3), np.arange(3), np.arange(3) + 1),
        (Settings(2.0, {"a": [1]}), Settings(2.0, {"a": [1]}), Settings(2.0, {"a": [2]})),
        (SimpleNamespace(a=1), SimpleNamespace(a=1), SimpleNamespace(a=2)),
        (Slotted(1.0), Slotted(1.0), Slotted(2.0)),
        (Kind.ONE, Kind.ONE, Kind.TWO),
        (scaled(2.0), scaled(2.0), scaled(3.0)),
        (functools.partial(max, 1), functools.partial(max, 1), functools.partial(max, 2)),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.Size((1, 2)), torch.Size((1, 2)), torch.Size((1, 3))),
        (SHARED, SHARED, SHARED.clone()),
        (CYCLE, CYCLE, [1]),
    ],
)
def test_values_are_compared_by_value(one: Any, same: Any, other: Any) -> None:
    assert comparable(one) == comparable(same)
    assert hash(comparable(one)) == hash(comparable(same))
    assert comparable(one) != comparable(other)


def test_what_cannot_be_looked_into_is_compared_by_identity() -> None:
    first, second = torch.Generator(), torch.Generator()
    assert comparable(first) == comparable(first) != comparable(second)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.pair, self.names = 1, (1, 2), {"a": [1]}
        self.settings, self.slotted = Settings(1.0, {}), Slotted(1.0)
        self.array, self.plain = np.zeros(2), torch.zeros(2)
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


CHANGES: dict[str, Any] = {
    "a number": lambda m: setattr(m, "number", 2),
    "a bool for a number": lambda m: setattr(m, "number", True),
    "a tuple": lambda m: setattr(m, "pair", (1, 3)),
    "inside a dict": lambda m: m.names["a"].append(2),
    "a key of a dict": lambda m: m.names.update(b=1),
    "a field": lambda m: setattr(m.settings, "factor", 2.0),
    "a slot": lambda m: setattr(m.slotted, "factor", 2.0),
    "an array in place": lambda m: m.array.fill(1),
    "a tensor in place": lambda m: m.plain.add_(1),
    "another attribute": lambda m: setattr(m, "more", 1),
    "a submodule": lambda m: setattr(m, "linear", nn.Linear(2, 2, bias=False)),
    "training": lambda m: m.linear.eval(),
    "the class": lambda m: setattr(m, "__class__", type("Other", (Inner,), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    module: Any = nn.Sequential(Inner())
    module[0].array = np.zeros(2) if "array" in change else None
    module[0].slotted = Slotted(1.0) if "slot" in change else None
    constants = Constants(module)
    assert constants.refresh()
    before = constants.value
    assert "array" in change or "slot" in change or not constants.refresh(), (
        "read again for nothing"
    )
    constants.refresh()
    assert constants.value == before
    CHANGES[change](module[0])
    assert constants.refresh()
    if change != "a submodule":
        assert constants.value != before


def test_numbers_of_layers_and_checkpointing_do_not_count() -> None:
    one: Any = Inner()
    other: Any = Inner()
    one.plain = other.plain = SHARED
    one.layer_idx, other.layer_idx = 1, 2
    other.gradient_checkpointing = True
    found = []
    for module in (one, other):
        constants = Constants(module)
        constants.refresh()
        found.append(constants.value)
    assert found[0] == found[1]
