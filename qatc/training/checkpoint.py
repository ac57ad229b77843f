"""Training checkpoints: atomic, never pickled, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qatc.errors import CheckpointError
from qatc.storage import markers
from qatc.storage.directories import complete_directory, recover
from qatc.storage.files import writing_to
from qatc.storage.markers import Mark

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
        whole = (path.name for path in self.directory.iterdir() if _is_checkpoint(path))
        found = (re.fullmatch(r"step-(\d+)", name) for name in whole)
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
        place = self._path(step)
        with complete_directory(place, overwrite=True, replaceable=_is_checkpoint) as staging:
            try:
                save_file(tensors, staging / _FILE, metadata={"step": str(step)})
            except Exception as error:  # safetensors raises its own error for a full disk
                raise CheckpointError(
                    f"cannot write the checkpoint {place}: {error}; free some space and"
                    " run the same command again"
                ) from error
        for old in self.steps()[: -self.keep]:
            with writing_to(self._path(old)):
                markers.put(self._path(old), Mark.REMOVING)  # a kill may leave half of it
                markers.remove(self._path(old))

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
        self._clear()
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
        for name, parameter in trained.items():
            _load(optimizer.state[parameter], state[name], parameter)
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

    def _clear(self) -> None:
        """Delete what a killed run left of a checkpoint that it was writing or deleting."""
        for name in {path.name.partition(".")[0] for path in self.directory.glob("step-*")}:
            recover(self.directory / name)
            if markers.is_empty(self.directory / name):
                (self.directory / name).rmdir()

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"


@torch.no_grad()
def _load(state: dict[str, Tensor], saved: Mapping[str, Tensor], parameter: nn.Parameter) -> None:
    """Into the state of a parameter as it lies, of its own dtypes; what is not there is made.

    ``load_state_dict`` would make the dtype of a parameter of all.
    """
    for key, value in saved.items():
        if key in state:
            state[key].copy_(value)
        else:
            state[key] = value.to(parameter.device)


def _is_checkpoint(path: Path) -> bool:
    return (path / _FILE).exists()
