"""Training checkpoints: atomic, never pickled, bit for bit.

They are written and read by ``torch.distributed.checkpoint``, as safetensors files. Each process
writes its rows of every tensor; any number of processes goes on from what another wrote. The
directory takes its place once all have written.

Aside, a checkpoint is a copy of the state, taken at once, that is written while training goes on:
by a thread, and among processes over a group of their own. The next one waits for it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult

from qatc.errors import CheckpointError
from qatc.machine.world import current
from qatc.storage import markers
from qatc.storage.directories import complete_directory, recover
from qatc.storage.files import sync, writing_to
from qatc.storage.markers import Mark
from qatc.training.state import shapes_of, to_restore, to_save

# It says that there is one process, which is what it is told.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Checkpoints:
    """The checkpoints of one run: directories ``step-000250`` of safetensors files.

    Args:
        directory: where they are.
        keep: how many of the last ones to keep.
        aside: write while training goes on. It takes host memory for a copy of the state; where
            that is all in host memory and the CPU computes, nothing is gained.
    """

    def __init__(self, directory: Path, keep: int, aside: bool = False) -> None:
        self.directory = directory
        self.keep = keep
        self.aside = aside
        self._group: Any = None
        self._on_its_way: _OnItsWay | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        whole = (path.name for path in self.directory.iterdir() if _is_checkpoint(path))
        found = (re.fullmatch(r"step-(\d+)", name) for name in whole)
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """Step of the last checkpoint, or None; waits for one that is on its way."""
        self.wait()
        steps = self.steps()
        return steps[-1] if steps else None

    def save(
        self,
        step: int,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write a checkpoint and drop the oldest ones; aside, only begin to.

        Raises:
            CheckpointError: this one or the one before cannot be written; earlier ones are kept.
        """
        self.wait()
        world, place, block = current(), self._path(step), ExitStack()

        def open_place() -> Path:
            return block.enter_context(
                complete_directory(place, overwrite=True, replaceable=_is_checkpoint)
            )

        inside = world.on_first(open_place)

        def finish() -> None:
            block.close()
            self._drop_oldest()

        if self._group is None:
            self._group = world.group_beside()
        state = to_save(trained, optimizer)
        how: dict[str, Any] = {
            "storage_writer": _Writer(inside / _file(world.rank, world.size), finish),
            "process_group": self._group,
            "no_dist": world.size == 1,
        }
        if self.aside:
            writing: Any = async_save(state, **how)
            self._on_its_way = _OnItsWay(place, block, writing)
        else:
            self._on_its_way = _OnItsWay(place, block, _at_once(save, state, **how))
            self.wait()

    def settle(self) -> None:
        """:meth:`wait` if nothing is left to wait for: all have written, or failed to."""
        writing = self._on_its_way
        if writing is not None and not current().greatest(not writing.future.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is on its way, if there is one.

        Raises:
            CheckpointError: it cannot be written; earlier ones are kept. All processes raise it.
        """
        writing = self._on_its_way
        if writing is None:
            return
        try:
            writing.future.result()  # a signal that breaks this off leaves it on its way
            self._on_its_way = None
        except CheckpointException as failed:
            self._on_its_way = None
            error = _told(failed, writing.place)
            writing.block.__exit__(type(error), error, None)  # removes what is there of it
            raise error from failed

    def close(self) -> None:
        """:meth:`wait`, and give up what only this run's checkpoints needed."""
        try:
            self.wait()
        finally:
            if self._group is not None and self._on_its_way is None:
                distributed.destroy_process_group(self._group)
                self._group = None

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
        self.wait()
        step = current().on_first(self._last_whole)
        if step is None:
            return 0
        with self._damage_told(step):
            reader = HuggingFaceStorageReader(str(self._path(step)))
            kept = reader.read_metadata().state_dict_metadata
            _require_all_files(self._path(step))
            if shapes_of(kept) != {f"model.{n}": p.shape for n, p in trained.items()}:
                raise CheckpointError(
                    f"the checkpoint {self._path(step)} belongs to another model or another choice"
                    " of trained parameters; remove it to start over"
                )
            state = to_restore(kept, trained, optimizer)
            with torch.no_grad():
                load(state, storage_reader=reader, no_dist=True)  # each reads what it needs
            torch.set_rng_state(state["random.cpu"])
            if "random.cuda" in state:
                torch.cuda.set_rng_state(state["random.cuda"])
        return step

    def _last_whole(self) -> int | None:
        """Delete what a killed run left of a checkpoint that it was writing or deleting."""
        for name in {path.name.partition(".")[0] for path in self.directory.glob("step-*")}:
            recover(self.directory / name)
            if markers.is_empty(self.directory / name):
                (self.directory / name).rmdir()
        return next(reversed(self.steps()), None)

    @contextmanager
    def _damage_told(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            reason = _first(error) if isinstance(error, CheckpointException) else error
            earlier = self.steps()[:-1]
            back = f"step {earlier[-1]}" if earlier else "the start"
            raise CheckpointError(
                f"the checkpoint {self._path(step)} is damaged ({reason}); remove the directory"
                f" {self._path(step)} and run the same command again to go on from {back}"
            ) from error

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"


@dataclass(frozen=True)
class _OnItsWay:
    """A checkpoint that is being written.

    Attributes:
        place: where it will be.
        block: the directory beside it, opened by the first process, which takes the place at last.
        future: ends once all processes have written and it is there.
    """

    place: Path
    block: ExitStack
    future: Future[Any]


class _Writer(HuggingFaceStorageWriter):
    """Writes what a process has to a file, and then has the first process do the rest.

    Args:
        file: where to.
        finish: is called by the first process once all have written theirs.
    """

    def __init__(self, file: Path, finish: Callable[[], None]) -> None:
        super().__init__(str(file.parent), save_distributed=True)
        self._file, self._finish = file, finish

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As the base class does, which copies all of it twice before it writes."""
        tensors = {item.index.fqn: planner.resolve_data(item).cpu() for item in plan.items}
        starts = {
            item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            for item in plan.items
        }
        told = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(starts)}
        save_file(tensors, self._file, metadata=told)
        sync(self._file)
        done: Any = torch.futures.Future()
        done.set_result(
            [WriteResult(i.index, tensors[i.index.fqn].nbytes, None) for i in plan.items]
        )
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Called by the first process alone."""
        self._finish()


def _at_once(act: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """The future of what has been done."""
    future: Future[Any] = Future()
    try:
        future.set_result(act(*args, **kwargs))
    except CheckpointException as error:
        future.set_exception(error)
    return future


def _told(failed: CheckpointException, place: Path) -> BaseException:
    """Why a checkpoint could not be written, as one error of all processes."""
    error = _first(failed)
    if isinstance(error, CheckpointError) or not isinstance(error, Exception):
        return error  # or a signal
    return CheckpointError(
        f"cannot write the checkpoint {place}: {error}; free some space and"
        " run the same command again"
    )


def _first(failed: CheckpointException) -> BaseException:
    """What went wrong in the first of the processes in which something did."""
    error, _ = failed.failures[min(failed.failures)]
    return error


def _file(rank: int, size: int) -> str:
    """What the file of a process is called."""
    part = f"-{rank:05d}-of-{size:05d}" if size > 1 else ""
    return f"state{part}.safetensors"


def _require_all_files(path: Path) -> None:
    """Raise ``OSError`` if a file is missing in the directory of a checkpoint."""
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if found != [_file(rank, len(found)) for rank in range(len(found))]:
        raise OSError(f"it has {', '.join(found)}, and not all files")


def _is_checkpoint(path: Path) -> bool:
    return any(path.glob("*.safetensors"))
