"""How much of a divided model a process holds: its rows, a weight for a moment, all, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qatc.errors import ConfigError
from qatc.machine.device import available_memory, release_memory
from qatc.machine.world import World
from qatc.models.regions import sharded_parts
from qatc.training.sharding import own_rows


def release(model: Any) -> None:
    """Let go of the memory of a model that is not run any more."""
    if not sharded_parts(model):
        model.to("meta")
        return
    for parameter in model.parameters():  # which FSDP holds by other names too
        own_rows(parameter.detach()).untyped_storage().resize_(0)


def is_released(model: Any) -> bool:
    """Whether a model's memory was let go of by :func:`release`."""
    parameter = own_rows(next(model.parameters()).detach())
    return parameter.is_meta or not parameter.untyped_storage().size()


def gathered(tensor: Any) -> Tensor:
    """All rows of a tensor, which all processes ask for together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


@contextmanager
def whole_in_each(world: World, model: Any, device: str) -> Iterator[None]:
    """Inside the block, each process has all rows of a divided model, and runs it by itself.

    A model that is whole anyway is left as it is.

    Raises:
        ConfigError: a device has no room for them.
    """
    if world.size == 1:
        yield
        return
    release_memory(device)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if torch.device(device).type == "cpu":  # whose memory processes share
        needed *= world.size
    free = available_memory(device)
    if world.greatest(free is not None and free < needed):
        raise ConfigError(
            f"the teacher writes its corpus whole, and takes {needed / 1e9:.1f} GB so, beside what"
            " is on each device already, which is more than is free; let qatc generate-data write"
            " the corpus before, where nothing else is on the device, and pass it with --data"
        )
    parts = sharded_parts(model)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
