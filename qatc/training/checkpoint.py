"""Training checkpoints: atomic, never pickled, bit for bit.

A process alone writes one file. Of several each writes its rows of every tensor into a file of its
own, side by side, and the first one puts the directory in its place once all have. The rows of all
files, in their order, are the tensor: so any number of processes goes on from what another wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc.errors import CheckpointError
from qatc.machine.world import current
from qatc.storage import markers
from qatc.storage.directories import complete_directory, recover
from qatc.storage.files import writing_to
from qatc.storage.markers import Mark
from qatc.training.sharding import first_row, like_shard, own_rows


class Checkpoints:
    """The checkpoints of one run: directories ``step-000250`` of safetensors files.

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
        world = current()
        tensors = {f"model.{n}": own_rows(p.detach()) for n, p in trained.items()}
        for name, parameter in trained.items():
            for key, value in optimizer.state[parameter].items():
                rows = own_rows(torch.as_tensor(value))
                if world.first or rows.dim():  # what has no rows is the same everywhere
                    tensors[f"optimizer.{key}.{name}"] = rows
        if world.first:
            tensors["random.cpu"] = torch.get_rng_state()
            if torch.cuda.is_available():
                tensors["random.cuda"] = torch.cuda.get_rng_state()
        place = self._path(step)
        with ExitStack() as block:

            def open_place() -> Path:
                return block.enter_context(
                    complete_directory(place, overwrite=True, replaceable=_is_checkpoint)
                )

            file = world.on_first(open_place) / _file(world.rank, world.size)
            world.on_each(_write, file, tensors, step, place)
            world.on_first(block.close)
        world.on_first(self._drop_oldest)

    def _drop_oldest(self) -> None:
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
        world = current()
        step = world.on_first(self._last_whole)
        if step is None:
            return 0
        with self._opened(step) as kept:
            expected = {f"model.{name}": tuple(p.shape) for name, p in trained.items()}
            if expected != {n: s for n, s in kept.shapes.items() if n.startswith("model.")}:
                raise CheckpointError(
                    f"the checkpoint {self._path(step)} belongs to another model or another choice"
                    " of trained parameters; remove it to start over"
                )
            with torch.no_grad():
                for name, parameter in trained.items():
                    rows = own_rows(parameter)
                    rows.copy_(kept.rows(f"model.{name}", first_row(parameter), len(rows)))
                    _load(optimizer.state[parameter], name, parameter, kept)
            torch.set_rng_state(kept.whole("random.cpu"))
            if torch.cuda.is_available() and "random.cuda" in kept.shapes:
                torch.cuda.set_rng_state(kept.whole("random.cuda"))
        return step

    def _last_whole(self) -> int | None:
        self._clear()
        return self.latest()

    @contextmanager
    def _opened(self, step: int) -> Iterator[_Files]:
        from safetensors import SafetensorError

        path = self._path(step) / _file(0, 1)
        try:
            yield _Files(self._path(step))
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


class _Files:
    """The files of a checkpoint, and tensors as rows of all of them.

    Attributes:
        shapes: of every tensor, as a whole.

    Raises:
        OSError: one is missing.
        SafetensorError: one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        alone = directory / _file(0, 1)
        paths = [alone] if alone.exists() else sorted(directory.glob("state-*-of-*.safetensors"))
        names = [_file(number, len(paths)) for number in range(len(paths))]
        if [path.name for path in paths] != names or not paths:
            raise OSError(f"it has {', '.join(p.name for p in paths) or 'no file'}, and not all")
        files: list[Any] = [safe_open(path, "pt") for path in paths]
        self._parts = [{name: file.get_slice(name) for name in file.keys()} for file in files]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for parts in self._parts:
            for name, part in parts.items():
                rows, *others = part.get_shape() or [None]
                before = self.shapes.get(name)
                rows = rows + before[0] if before else rows
                self.shapes[name] = () if rows is None else (rows, *others)

    def whole(self, name: str) -> Tensor:
        """A tensor that one file has."""
        tensor: Tensor = next(parts for parts in self._parts if name in parts)[name][...]
        return tensor

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of a tensor."""
        found, start = [], 0
        for parts in self._parts:
            part = parts[name]
            rows = part.get_shape()[0]
            low, high = max(first - start, 0), min(first + count - start, rows)
            if low < high:
                found.append(part[low:high])
            start += rows
        return torch.cat(found) if found else self._parts[0][name][:0]


def _load(state: dict[str, Tensor], name: str, parameter: nn.Parameter, kept: _Files) -> None:
    """What an optimizer has of a parameter, of whose rows this process has some.

    Into the state as it lies, of its own dtypes, where ``load_state_dict`` would make the dtype of
    a parameter of all; what is not there is made.
    """
    own = own_rows(parameter)
    for full, shape in kept.shapes.items():
        kind, _, rest = full.partition(".")
        key, _, of = rest.partition(".")
        if kind != "optimizer" or of != name:
            continue
        first = first_row(parameter)
        value = kept.rows(full, first, len(own)) if shape else kept.whole(full)
        if key in state:
            own_rows(state[key]).copy_(value)
        else:
            value = value.to(own.device)
            state[key] = like_shard(value, parameter) if value.shape == own.shape else value


def _write(file: Path, tensors: Mapping[str, Tensor], step: int, place: Path) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, file, metadata={"step": str(step)})
    except Exception as error:  # safetensors raises its own error for a full disk
        raise CheckpointError(
            f"cannot write the checkpoint {place}: {error}; free some space and"
            " run the same command again"
        ) from error


def _file(rank: int, size: int) -> str:
    """What the file of a process is called."""
    part = f"-{rank:05d}-of-{size:05d}" if size > 1 else ""
    return f"state{part}.safetensors"


def _is_checkpoint(path: Path) -> bool:
    return any(path.glob("state*.safetensors"))
