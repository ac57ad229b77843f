"""Training checkpoints: atomic, never pickled, bit for bit."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from qatc.errors import CheckpointError
from qatc.files import complete_directory

_FILE = "state.safetensors"


class Checkpoints:
    """The checkpoints of one run: directories ``step-000250`` with one safetensors file each.

    Args:
        directory: where they are.
        keep: how many of the last ones to keep.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", p.name) for p in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """Step of the last checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(
        self,
        step: int,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write a checkpoint and drop the oldest ones.

        Raises:
            CheckpointError: the disk cannot be written; earlier checkpoints are kept.
        """
        from safetensors.torch import save_file

        tensors = {f"model.{n}": p.detach().contiguous() for n, p in trained.items()}
        for name, parameter in trained.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        with complete_directory(self._path(step), overwrite=True) as staging:
            try:
                save_file(tensors, staging / _FILE, metadata={"step": str(step)})
            except Exception as error:  # safetensors raises its own error for a full disk
                raise CheckpointError(
                    f"cannot write the checkpoint {self._path(step)}: {error}; free some space and"
                    " run the same command again"
                ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def restore(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> int:
        """Load the last checkpoint into ``trained`` and ``optimizer``.

        Returns:
            Its step, or 0 if there is none.

        Raises:
            CheckpointError: it is damaged or belongs to another model.
        """
        step = self.latest()
        if step is None:
            return 0
        tensors = self._read(step)
        expected = {f"model.{name}": p.shape for name, p in trained.items()}
        found = {n: t.shape for n, t in tensors.items() if n.startswith("model.")}
        if expected != found:
            raise CheckpointError(
                f"the checkpoint {self._path(step)} belongs to another model or another choice of"
                " trained parameters; remove it to start over"
            )
        state: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                slot, _, name = rest.partition(".")
                state[name][slot] = value
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"model.{name}"])
        numbers = {id(p): i for i, p in enumerate(optimizer.param_groups[0]["params"])}
        whole = optimizer.state_dict()
        whole["state"] = {numbers[id(p)]: state[name] for name, p in trained.items()}
        optimizer.load_state_dict(whole)
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return step

    def _read(self, step: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(step) / _FILE
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            earlier = self.steps()[:-1]
            back = f"step {earlier[-1]}" if earlier else "the start"
            raise CheckpointError(
                f"the checkpoint {path} is damaged ({error}); remove the directory"
                f" {path.parent} and run the same command again to go on from {back}"
            ) from error

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"


class StopRequest:
    """Inside the block, the first Ctrl-C only sets :attr:`requested`; a second one interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
