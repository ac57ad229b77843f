"""What a checkpoint holds: tensors by name, of which each process has some rows.

model.NAME              a trained parameter
optimizer.KEY.NAME      what the optimizer keeps of it
random.cpu, random.cuda states of the generators of the first process
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatc.machine.world import current
from qatc.training.sharding import like_shard, own_rows


def to_save(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All that a run goes on with, as it lies.

    What has rows is a DTensor where they are divided. What has none is the same everywhere, and in
    the first process alone.
    """
    state = {f"model.{name}": p.detach().contiguous() for name, p in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensor = torch.as_tensor(value)
            if tensor.dim():
                tensor = _as_part(tensor.contiguous(), parameter)
            if tensor.dim() or current().first:
                state[f"optimizer.{key}.{name}"] = tensor
    if current().first:
        state["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def to_restore(
    kept: Mapping[str, Any],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """The tensors that a checkpoint is to be read into.

    The state of the optimizer is read into what is there, of its own dtypes, where
    ``load_state_dict`` would make the dtype of a parameter of all; what is not there is made.

    Args:
        kept: of the checkpoint, ``TensorStorageMetadata`` by name.
        trained, optimizer: of this run.
    """
    state: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in trained.items()}
    for name, found in kept.items():
        kind, _, rest = name.partition(".")
        if kind == "random" and (rest == "cpu" or torch.cuda.is_available()):
            state[name] = torch.empty(found.size, dtype=found.properties.dtype)
        key, _, of = rest.partition(".")
        if kind == "optimizer" and of in trained:
            slots = optimizer.state[trained[of]]
            if key not in slots:
                slots[key] = _made(trained[of], found)
            state[name] = _as_part(slots[key], trained[of]) if found.size else slots[key]
    return state


def shapes_of(kept: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the parameters in a checkpoint."""
    return {name: found.size for name, found in kept.items() if name.startswith("model.")}


def _made(parameter: nn.Parameter, found: Any) -> Tensor:
    """Room for what an optimizer keeps of a parameter."""
    own = own_rows(parameter)
    shape = (len(own), *found.size[1:]) if found.size else ()
    made = torch.empty(shape, dtype=found.properties.dtype, device=own.device)
    return like_shard(made, parameter) if found.size == parameter.shape else made


def _as_part(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Some rows as part of all of them, where a parameter is divided."""
    return tensor if hasattr(tensor, "to_local") else like_shard(tensor, parameter)
