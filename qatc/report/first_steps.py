"""What a run will take, before it starts: tokens, memory, and time as its own first steps take it.

Nothing is looked up in a table of machines: a step of training is done a few times on random
tokens, until it has been compiled and takes its time, and thrown away. What was compiled is used by
the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatc.machine.device import total_memory
from qatc.machine.world import ALONE, World
from qatc.training.config import TrainingConfig
from qatc.training.optimizers import moment_bytes
from qatc.training.sharding import own_rows

_USUAL = TrainingConfig()

SETTLED = 0.8
"""Steps are repeated while one takes less than this share of the one before it."""


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        title: what is done.
        tokens: how many tokens go through the model, at most.
        seconds: how long that takes.
        options: what makes it shorter.
    """

    title: str
    tokens: int
    seconds: float
    options: str

    def __str__(self) -> str:
        return (
            f"{self.title}: {self.tokens:,} tokens, {duration(self.seconds)};"
            f" shorter with {self.options}"
        )


@dataclass(frozen=True)
class StepCost:
    """What one forward and backward pass took.

    Attributes:
        forward: seconds of both models' forward passes and the loss.
        step: seconds of all of it.
    """

    forward: float
    step: float


def measure_step(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: nn.Module,
    rows: int,
    length: int,
    vocabulary: int,
    world: World = ALONE,
    backward: bool = True,
) -> StepCost:
    """Time one step of training on random tokens; no parameter and no random state changes.

    Args:
        loss: maps ids int64 ``[B, T]`` and a mask bool ``[B, T]`` to a scalar.
        student: what is trained; its gradients are dropped.
        rows: B.
        length: T.
        vocabulary: ids are drawn below it.
        world: the processes that a sharded student is trained by, which take as many steps each.
        backward: whether gradients are computed; without, it is a forward pass alone.
    """
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    real = torch.ones_like(ids, dtype=torch.bool)
    costs: list[StepCost] = []

    def unsettled() -> bool:
        # The first one compiles, the second may still find caches cold.
        return len(costs) < 2 or (costs[-1].step < SETTLED * costs[-2].step and len(costs) < 5)

    with torch.random.fork_rng(), torch.set_grad_enabled(backward):
        while world.greatest(unsettled()):
            started = _now(device)
            value = loss(ids, real)
            forward = _now(device)
            if backward:
                value.backward()
            costs.append(StepCost(forward - started, _now(device) - started))
            student.zero_grad(set_to_none=True)
    return costs[-1]


def training_floor(
    student: nn.Module,
    teacher: nn.Module | None,
    tokens: int,
    vocabulary: int,
    config: TrainingConfig = _USUAL,
) -> int:
    """Bytes that training takes at least: parameters, gradients, AdamW's state, teacher, logits.

    Args:
        student, teacher: the models; what they share counts once. None for a teacher that is not
            there meanwhile.
        tokens: of one forward pass, or of a chunk of its logits.
        vocabulary: width of the logits.
        config: which optimizer there is, and whether it leaves gradients.
    """
    models = [student] if teacher is None else [student, teacher]
    tensors = {id(p): p for m in models for p in m.parameters()}
    held = sum(own_rows(p.detach()).nbytes for p in tensors.values())
    gradients = sum(own_rows(p.detach()).nbytes for p in student.parameters() if p.requires_grad)
    left = _near(student, config, "none", "optimizer") and not config.fused_step
    held += optimizer_bytes(student, config) + (gradients if left else 0)
    width = next(models[-1].parameters()).element_size()
    return held + 3 * width * tokens * vocabulary


def optimizer_bytes(student: nn.Module, config: TrainingConfig = _USUAL) -> int:
    """Bytes of the optimizer's state, which is made after the first steps are measured.

    That of a model on a GPU may lie elsewhere.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    near = _near(student, config, "none")
    return sum(moment_bytes(own_rows(p.detach()).shape, config) for p in trained) if near else 0


def _near(student: nn.Module, config: TrainingConfig, *kept: str) -> bool:
    """Whether what these ways to offload keep on a GPU is there, or all is in one memory."""
    return config.offload in kept or not any(p.is_cuda for p in student.parameters())


def memory_text(needed: int, device: str, options: str) -> str:
    """A line on memory, with a warning where the machine has less."""
    total = total_memory(device)
    has = "" if total is None else f" of {total / 1e9:.1f} GB"
    text = f"memory: about {needed / 1e9:.1f} GB{has}"
    if total is not None and needed > total:
        text += ", which is too little: it may end for lack of memory"
    return f"{text}; less with {options}"


def duration(seconds: float) -> str:
    """A rough time for a person: ``about 40 s``, ``about 25 min``, ``about 3 h 10 min``."""
    if seconds < 90:
        return f"about {max(1, round(seconds)):d} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h" + (f" {minutes} min" if hours < 10 else "")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rows_cost(cost: StepCost, rows: int, batch_size: int) -> float:
    """Seconds of forward passes over this many rows, as one of ``batch_size`` took."""
    return cost.forward * -(-rows // batch_size)
