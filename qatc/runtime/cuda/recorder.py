"""What records a step of fixed shapes and addresses, to be replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """Records steps."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does again all that ``step`` does, and gives its result, until it is called anew.

        Args:
            step: reads and writes the same memory in every call, and may be called several times
                while it is recorded.
        """

    def turn(self) -> AbstractContextManager[None]:
        """One block at a time; the device does what it is given there behind earlier blocks' work.

        Blocks may be those of threads with streams of their own.
        """


class CudaRecorder:
    """Records steps as CUDA graphs, which share their memory.

    Args:
        device: the GPU, with its number: each thread has a current one of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._last: torch.cuda.Event | None = None
        self._lock = threading.RLock()  # of all who record into one memory

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            if self._last is None:
                self._last = torch.cuda.Event()
            self._last.wait()
            try:
                yield
            finally:
                self._last.record()

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                step()  # compiles, tunes and allocates what may not be recorded
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what a recording of all threads would not allow.
            where: Any = {"pool": self._pool, "stream": side}
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
                result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
