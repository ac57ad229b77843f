"""What records a step of fixed shapes and addresses, to be replayed."""

from __future__ import annotations

from collections.abc import Callable
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


class CudaRecorder:
    """Records steps as CUDA graphs, which share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

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
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
