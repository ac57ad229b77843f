"""Training on several processes: each holds a part of every parameter, and sees a part of a batch.

Student and teacher are sharded by FSDP2, layer by layer and then what is left at the root: rows of
a parameter stand in the order of the processes. A layer is whole only while it runs. Gradients are
summed over the processes, and losses are divided by what the whole batch counts, so that they are
those of one process with that batch. Alone, a process does all that with models as they are, unless
parameters are to be offloaded: then it shards them for itself, and they lie in host memory. A layer
is copied to the device while it runs; gradients go back, and the optimizer's step is the CPU's.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.losses.objective import parse_loss
from qatc.machine.reduction import InOrder
from qatc.machine.world import World, group_of_one
from qatc.models import find_regions
from qatc.models.regions import sharded_parts
from qatc.training.config import TrainingConfig
from qatc.training.parts import parse_train


def check_batch(world: World, batch_size: int) -> None:
    """Raise ``ConfigError`` unless the processes get the same number of a batch's rows each."""
    if batch_size % world.size:
        raise ConfigError(
            f"a batch of {batch_size} rows cannot be divided among {world.size} processes; pass a"
            f" --batch-size that is a multiple of {world.size}, or start another number of them"
        )


def check_training(world: World, config: TrainingConfig, learned: bool) -> None:
    """Raise ``ConfigError`` if several processes cannot train so.

    Args:
        world: the processes.
        config: how they are to train.
        learned: whether there are learned scales.
    """
    check_batch(world, config.batch_size)
    shards = world.size > 1 or config.offload == "parameters"
    if shards and config.master_dtype == "bfloat16" and learned:
        raise ConfigError(
            "learned scales are trained in fp32, and several processes, or --offload parameters,"
            " train parameters of one dtype together; leave --master-dtype at float32, or choose"
            " --preset paper"
        )
    if world.size > 1 and parse_train(config.train).parts == "lora":
        raise ConfigError(
            f"--train {config.train} updates whole weights, of which each of {world.size} processes"
            " has a part; start one, or train the weights themselves (--train full)"
        )
    if shards and [term.name for term in parse_loss(config.loss)] == ["attention"]:
        # FSDP gathers a layer's parameters as soon as a gradient reaches its output.
        raise ConfigError(
            f"the loss {config.loss} asks nothing of what the last layer gives, and several"
            " processes, or --offload parameters, wait for that to train it; add a term, as in"
            " --loss attention+0.1*logits, or leave those out"
        )
    if world.size > 1 and parse_train(config.train).by_layer:
        raise ConfigError(
            f"--train {config.train} trains a layer at a time on one device, and there are"
            f" {world.size} processes; start one, or train end to end (--train full)"
        )


def own_share(world: World, batch: Rows) -> Rows:
    """The rows of a batch that this process sees."""
    share = len(batch) // world.size
    return batch[world.rank * share : (world.rank + 1) * share]


@contextmanager
def sharded(world: World, *models: Any, offload: bool = False) -> Iterator[tuple[Any, ...]]:
    """Inside the block, models whose parameters are divided among the processes.

    Those that are given are empty meanwhile. Where the block ends well, those of the first process
    have the parameters that the sharded ones had; those of the others stay empty. Models that are
    divided already, see :mod:`qatc.divided.load`, are what is given, and stay so.

    Args:
        world: the processes.
        models: of which each has all.
        offload: keep what each process has of them in host memory.
    """
    alone = world.size == 1 and not offload
    if alone or all(sharded_parts(model) for model in models):
        yield models
        return
    with group_of_one(next(models[0].parameters()).device.type):
        yield from _sharded(world, models, offload)


def _sharded(world: World, models: Any, offload: bool) -> Iterator[tuple[Any, ...]]:
    places = [{id(p): p.data_ptr() for p in model.parameters()} for model in models]
    divided = [_shard(model, offload) for model in models]
    yield tuple(divided)
    gathered: dict[int, Tensor] = {}
    for model, parts, place in zip(models, divided, places, strict=True):
        for parameter, part in zip(model.parameters(), parts.parameters(), strict=True):
            whole = part.detach().full_tensor().to(parameter.device)
            if not parameter.requires_grad:  # student and teacher may have shared its memory
                whole = gathered.setdefault(place[id(parameter)], whole)
            if world.first:
                parameter.data = whole


def _shard(model: Any, offload: bool) -> Any:
    """A sharded model of the tensors of ``model``, which is empty afterwards."""
    tensors = (*model.parameters(), *model.buffers())
    divided = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    device = next(model.parameters()).device
    pairs = zip(shard_parts(divided, device, offload), _parts(model), strict=True)
    for _, whole in pairs:
        for parameter in whole.parameters():
            parameter.data = parameter.data.new_empty(0)
    return divided


def shard_parts(model: Any, device: torch.device, offload: bool = False) -> Iterator[Any]:
    """Shard a model in place, part after part: each one, once it is sharded.

    Args:
        model: of which no part is sharded yet; its parameters may be without storage.
        device: where each process computes.
        offload: keep the rows of each in host memory, and not there.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # Before 2.13, hooks on gradients may run before these have come to pinned memory.
    pins = device.type != "cpu" and torch.__version__ >= "2.13"
    pinned = CPUOffloadPolicy(pin_memory=pins)
    policy = pinned if offload else OffloadPolicy()
    for part in _parts(model):
        # The root as well: else its parameters stay whole behind a pass that has no backward.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        # A sum, and not the mean: each loss is divided by what all of them count.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
        if device.type == "cpu":
            part.set_custom_reduce_scatter(InOrder())
        yield part
    for buffer in model.buffers():
        if buffer.is_contiguous():  # measured or computed, by machines that may differ
            distributed.broadcast(buffer, src=0)


def _parts(model: Any) -> list[Any]:
    """What is sharded by itself: the layers, and then the rest."""
    return [*(module for name, module in find_regions(model) if name), model]


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, of a sharded one wherever its parameters lie."""
    parameter: Any = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    kind = parameter.device if mesh is None else torch.device(mesh.device_type)
    on_gpu = kind.type == "cuda" and kind.index is None
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else kind


def require_sharded(world: World, trained: Mapping[str, nn.Parameter]) -> None:
    """Assert that no parameter would be trained by each process on its own."""
    whole = [name for name, p in trained.items() if not hasattr(p, "to_local")]
    assert world.size == 1 or not whole, f"not sharded: {', '.join(whole[:3])}"


def clip_gradients(parameters: Collection[nn.Parameter], limit: float) -> float:
    """Scale the gradients down to this norm of all of them; what it was before."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def own_rows(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: some of its rows, if it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_row(parameter: Any) -> int:
    """The number of the first row that this process has of a parameter."""
    if not hasattr(parameter, "to_local"):
        return 0
    mesh = parameter.device_mesh
    rows: int = -(-len(parameter) // mesh.size())
    return min(rows * int(mesh.get_local_rank()), len(parameter))


def like_shard(rows: Tensor, parameter: Any) -> Tensor:
    """The rows that this process has of a tensor as part of the whole, as ``parameter`` is.

    The tensor may have other columns than the parameter, and be in host memory.
    """
    if not hasattr(parameter, "to_local"):
        return rows
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    if rows.device.type != mesh.device_type:  # a DTensor would move them there
        mesh = init_device_mesh(rows.device.type, (mesh.size(),))
    shape = (len(parameter), *rows.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, mesh, parameter.placements, shape=torch.Size(shape), stride=stride
    )
