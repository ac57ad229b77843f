"""The processes that do one run together, as ``torchrun`` starts them; usually it is one alone.

A :class:`World` says which of them this one is, and lets them act together. Alone, each of its
methods does just what it is given to do, and nothing of ``torch.distributed`` is loaded.

Errors end all of them with one message: that of the process that fails first. The others notice at
their next common act, and end unheard.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from qatc.errors import ConfigError, QatcError, WorldError

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=2)
"""How long one waits for word of another: the first may evaluate for hours. Whoever dies is noticed
at once, as its connections close."""

_STEP = datetime.timedelta(hours=1)
"""How long one waits for others within a step, or while models are divided: all do that at once.
NCCL may not notice who dies beside it. ``torchrun`` ends the others then; another launcher may not.
"""

_LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What ``torchrun`` tells each process; schedulers set some of it for others."""


class EndedElsewhere(SystemExit):
    """Another process has ended the run, and tells why: this one ends unheard."""


@dataclass(frozen=True)
class World:
    """This process among those of its run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        words: the group, on CPUs, over which they tell one another what is no part of a step.
    """

    rank: int = 0
    size: int = 1
    words: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def on_first(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``act``, which the first process alone does, gives: to all, or its error to all.

        What it gives is small, and can be pickled.
        """
        if self.size == 1:
            return act(*args, **kwargs)
        from torch import distributed

        outcome: list[Any] = [None, None]
        own: BaseException | None = None
        if self.first:
            try:
                outcome[0] = act(*args, **kwargs)
            except BaseException as error:
                own, outcome[1] = error, _portable(error)
        distributed.broadcast_object_list(outcome, src=0, group=self.words)
        if own is not None:
            raise own
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def first_before_others(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``act`` gives, done by the first process and then, with what it left, by others."""
        found: list[T] = []
        self.on_first(lambda: found.append(act(*args, **kwargs)))
        return found[0] if found else act(*args, **kwargs)

    def on_each(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """What ``act`` gives in every process, in their order: to all, or an error to all."""
        if self.size == 1:
            return [act(*args, **kwargs)]
        from torch import distributed

        mine: tuple[Any, QatcError | None]
        try:
            mine = act(*args, **kwargs), None
        except QatcError as error:
            mine = None, error
        outcomes: list[Any] = [None] * self.size
        distributed.all_gather_object(outcomes, mine, group=self.words)
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [value for value, _ in outcomes]

    def group_beside(self) -> Any:
        """A new group of all processes, on CPUs, for a thread that runs beside them; None alone."""
        if self.size == 1:
            return None
        from torch import distributed

        return distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of some numbers, summed over all processes in fp64."""
        return self._reduced(values, "SUM")

    def greatest(self, value: int) -> int:
        """The greatest of a number over all processes."""
        return int(self._reduced([value], "MAX")[0])

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        numbers = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(numbers, getattr(distributed.ReduceOp, how), group=self.words)
        return [float(number) for number in numbers]


ALONE = World()
"""A process by itself."""

_current = ALONE


def current() -> World:
    """The world of this process: it alone, unless it is inside of :func:`joined`."""
    return _current


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Inside the block, be one of the processes that ``torchrun`` started, if it did.

    Args:
        device: what each computes on: the GPU of its local rank, or with ``cpu`` the CPU.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the device is a single GPU.
        WorldError: another process ended without a word.
        EndedElsewhere: another process tells why the run ends.
    """
    global _current
    if not _LAUNCHED <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield _current
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    on_gpus = device != "cpu" and torch.cuda.is_available()
    store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_STEP,
    )
    words = World(rank, size).group_beside()
    _current = World(rank, size, words)
    try:
        _current.on_each(_take_device, device, on_gpus)
        yield _current
        _current.on_each(lambda: None)  # whoever leaves early would look like one that died
        distributed.destroy_process_group()
        words = None
    except BaseException as error:
        if isinstance(error, EndedElsewhere) or not _is_first_to_fail(store):
            raise EndedElsewhere(1) from error
        if _is_lost(error):
            raise WorldError(
                f"another of the {size} processes ended without a word, as one does that is killed"
                " or out of memory; run the same command again: it goes on from what is kept"
            ) from error
        raise
    finally:
        if words is not None:
            distributed.destroy_process_group(words)  # or its threads break off the process's end
        _current = ALONE


@contextlib.contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Inside the block, torch has a process group, which this process alone is, if it had none."""
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _take_device(device: str, on_gpus: bool) -> None:
    """Let this process use a GPU of its own."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"each of {_current.size} processes takes the GPU of its own; got --device {device},"
            " leave it out, or name GPUs in CUDA_VISIBLE_DEVICES"
        )
    if on_gpus:
        local, count = int(os.environ.get("LOCAL_RANK", _current.rank)), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"there are more processes than the {count} GPUs here; start at most"
                f" {count} with --nproc-per-node, or pass --device cpu"
            )
        torch.cuda.set_device(local)


def _portable(error: BaseException) -> BaseException:
    return error if isinstance(error, QatcError) else EndedElsewhere(1)


def _is_first_to_fail(store: Any) -> bool:
    """Whether no other process has failed before; if the one with the store is gone, it has."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return int(store.add(f"qatc has failed, {attempt}", 1)) == 1
    except RuntimeError:
        return False


def _is_lost(error: BaseException) -> bool:
    """Whether it is what torch raises where another process is gone."""
    signs = ("onnection", "gloo", "NCCL", "ncclRemoteError", "socket")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
