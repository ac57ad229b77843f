"""Whether a model is still what was recorded: whatever is put in the place of something is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qatc.graph.watch import Watch


class Model(nn.Module):
    """Of a linear, a norm, and a buffer of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2, bias=False), nn.RMSNorm(2)
        self.register_buffer("gain", torch.ones(1))


def new(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


CHANGES: dict[str, Callable[[Model], object]] = {
    "data": lambda m: setattr(m.norm.weight, "data", torch.ones(2)),
    "a parameter": lambda m: setattr(m.norm, "weight", new(2)),
    "one of another shape": lambda m: setattr(m.norm, "weight", new(3)),
    "one that was None": lambda m: setattr(m.linear, "bias", new(2)),
    "an equal buffer of one element": lambda m: setattr(m, "gain", torch.ones(1)),
    "an assigned state": lambda m: m.load_state_dict(Model().state_dict(), assign=True),
    "a module": lambda m: setattr(m, "norm", nn.RMSNorm(2)),
    "a removed module": lambda m: delattr(m, "norm"),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.linear),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_replaced_is_seen(what: str) -> None:
    model = Model()
    watch = Watch(model)
    assert watch.unchanged() and not watch.overheard()
    CHANGES[what](model)
    assert not watch.unchanged()
    assert not hasattr(model, "norm") or Watch(model).unchanged()


def test_values_may_change_in_place() -> None:
    model = Model()
    watch = Watch(model)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert watch.unchanged()


def test_hooks_are_seen() -> None:
    model = Model()
    watch = Watch(model)
    for register in (
        model.norm.register_forward_hook,
        model.linear.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        assert watch.overheard()
        handle.remove()
        assert not watch.overheard()
