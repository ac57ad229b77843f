"""Optimizers that take less memory, and steps that are taken within the backward pass.

``adamw`` over fp32 masters is torch's own, fused. All else is :class:`RoundingAdamW`, on the
functions of :mod:`qatc.training.adamw`. torchao's 8-bit AdamW is not used: its blocks run across
rows, so that sharding a parameter by rows changes its moments, and it has none of bf16 shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qatc.training.adamw import BETAS, Scalars, block_of, update_coded, update_float
from qatc.training.config import TrainingConfig
from qatc.training.sharding import first_row, own_rows

BLOCK = 2**20
"""Elements that are updated at a time, which bounds what an update takes besides its states."""


def make_optimizer(
    trained: Mapping[str, nn.Parameter],
    config: TrainingConfig,
    rate: float,
    compile: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        trained: the parameters by name.
        config: which one.
        rate: the learning rate that it starts at.
        compile: compile what is not torch's own with Inductor.
    """
    away = config.offload == "optimizer" and any(p.is_cuda for p in trained.values())
    if config.plain_optimizer and not away:
        return torch.optim.AdamW(
            trained.values(), lr=rate, betas=BETAS, weight_decay=0.0, fused=True
        )
    return RoundingAdamW(
        trained,
        rate,
        coded=config.optimizer == "adamw8bit",
        offload=away,
        seed=config.seed,
        compile=compile,
    )


def moment_bytes(shape: torch.Size, config: TrainingConfig) -> int:
    """Bytes of what the optimizer keeps of a parameter of this shape."""
    block = block_of(shape) if config.optimizer == "adamw8bit" else None
    return 8 * shape.numel() if block is None else 2 * shape.numel() + 8 * (shape.numel() // block)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW without weight decay whose states may take 8 bits and lie in host memory.

    Parameters in bf16 are rounded stochastically, see :mod:`qatc.training.adamw`. States are made
    at once, and updated in place, parameter by parameter and in blocks of rows.

    Args:
        trained: the parameters by name. The name, not the order, decides how one is rounded.
        rate: learning rate.
        coded: keep moments in 8 bits.
        offload: keep states of parameters on a GPU in pinned host memory.
        seed: of the rounding.
        compile: compile updates with Inductor.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        rate: float,
        *,
        coded: bool = False,
        offload: bool = False,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(trained.values(), {"lr": rate})
        self.names = {parameter: name for name, parameter in trained.items()}
        self.seed, self.compile = seed, compile
        on_gpu = any(p.is_cuda for p in trained.values())
        self._lanes = [torch.cuda.Stream() for _ in range(2)] if offload and on_gpu else []
        for parameter in trained.values():
            self.state[parameter] = _states(parameter, coded, bool(self._lanes))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for parameter in self.names:
            if parameter.grad is not None:
                self.update(parameter)
        self.finish()

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, factor: Tensor | None = None) -> None:
        """Update one parameter by its gradient times a factor; :meth:`finish` ends it.

        Args:
            parameter: one of them, or a shard of its rows (a DTensor sharded on dimension 0).
            factor: fp32 scalar; None for 1.
        """
        state = self.state[parameter]
        state["step"] += 1
        rate, step = float(self.param_groups[0]["lr"]), int(state["step"])
        scalars = Scalars.of(rate, step, self.names[parameter], self.seed)
        numbers = scalars.rate, scalars.first, scalars.second, scalars.low, scalars.high
        assert parameter.grad is not None
        own, gradient = own_rows(parameter.detach()), own_rows(parameter.grad)
        factor = torch.ones((), device=own.device) if factor is None else factor
        coded = "exp_avg_scale" in state
        block = (block_of(parameter.shape) or 1) if coded else 1
        shape = (-1, block) if coded else (-1,)
        run = _compiled(coded) if self.compile else (update_coded if coded else update_float)
        before = first_row(parameter)  # a scalar has no rows
        first = before * (parameter.shape.numel() // parameter.shape[0]) if before else 0
        if not own.numel():
            return
        flat = own.view(shape), gradient.reshape(shape)
        moments = [own_rows(state[key]).view(shape) for key in _KEYS[:2]]
        if coded:
            moments += [own_rows(state[key]).view(-1, 1) for key in _KEYS[2:]]
        size = max(1, BLOCK // block)
        lanes = self._lane(gradient, factor)
        for lane, start in zip(lanes, range(0, len(flat[0]), size), strict=False):
            with nullcontext() if lane is None else torch.cuda.stream(lane):
                part = slice(start, start + size)
                kept = [moment[part] for moment in moments]
                near = [moment.to(own.device, non_blocking=True) for moment in kept]
                at = torch.tensor(first + start * block)
                run(*(t[part] for t in flat), *near, factor, at, *numbers)
                for into, value in zip(kept, near, strict=True):
                    if into.device != value.device:
                        into.copy_(value, non_blocking=True)

    def _lane(self, *read: Tensor) -> Iterator[Any]:
        """The streams that blocks take in turn, so that one is copied while another is computed."""
        for lane in self._lanes:
            lane.wait_stream(torch.cuda.current_stream())
            for tensor in read:
                tensor.record_stream(lane)  # it may be dropped before it is read
        while True:
            yield from self._lanes or (None,)

    def finish(self) -> None:
        """Wait for what runs beside the backward pass."""
        for lane in self._lanes:
            torch.cuda.current_stream().wait_stream(lane)
            lane.synchronize()  # states in host memory are whole


_KEYS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


def _states(parameter: Tensor, coded: bool, pinned: bool) -> dict[str, Tensor]:
    """What is kept of a parameter, before the first step.

    Moments have its shape, and scales a row of their own for each of its rows.
    """
    block = block_of(parameter.shape) if coded else None
    local = own_rows(parameter.detach())
    how: dict[str, Any] = {"device": local.device}
    if pinned:
        how = {"device": "cpu", "pin_memory": True}
    found = {"step": torch.tensor(0.0)}
    if block is None:
        for key in _KEYS[:2]:
            found[key] = torch.zeros(local.shape, dtype=torch.float32, **how)
        return found
    found["exp_avg"] = torch.full(local.shape, 128, dtype=torch.uint8, **how)
    found["exp_avg_sq"] = torch.zeros(local.shape, dtype=torch.uint8, **how)
    blocks = parameter.shape.numel() // parameter.shape[0] // block
    for key in _KEYS[2:]:
        found[key] = torch.zeros((local.shape[0], blocks), dtype=torch.float32, **how)
    return found


@functools.cache
def _compiled(coded: bool) -> Callable[..., None]:
    graph = torch.compile(update_coded if coded else update_float)
    tensors = 6 if coded else 4

    def call(*arguments: Tensor) -> None:
        for tensor in arguments[:tensors]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        graph(*arguments)

    return call


class StepInBackward:
    """Updates each parameter as soon as its gradient is there, and drops that.

    The norm of all gradients is not known then, so that each tensor's own is clipped.

    Args:
        optimizer: updates a single parameter.
        trained: the parameters.
        clip: greatest norm of a tensor's gradient.
    """

    def __init__(
        self, optimizer: RoundingAdamW, trained: Mapping[str, nn.Parameter], clip: float
    ) -> None:
        self.optimizer, self.clip = optimizer, clip
        self._squares: list[Tensor] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in trained.values()]

    def remove(self) -> None:
        """Let backward passes be without steps again; else parameters keep all of the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        norm: Any = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._squares.append(norm.square())
        self.optimizer.update(parameter, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        parameter.grad = None

    def finish(self) -> float:
        """End the step; returns the norm of all gradients, unclipped."""
        self.optimizer.finish()
        norm = float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0
        self._squares.clear()
        return norm
