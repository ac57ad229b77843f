"""Checkpoints: complete or absent, never pickled, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qatc.errors import CheckpointError
from qatc.storage import markers
from qatc.storage.markers import Mark
from qatc.training.checkpoint import Checkpoints
from tests.conftest import at_disk_call, contents, run_until_killed


class Run:
    """A small model under AdamW."""

    def __init__(self, directory: Path, width: int = 3, keep: int = 2) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 1))
        self.trained = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.1, fused=True)
        self.checkpoints = Checkpoints(directory, keep)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.rand(5, 3)
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.model, self.trained, self.optimizer)

    def restore(self) -> int:
        return self.checkpoints.restore(self.model, self.trained, self.optimizer)

    def state(self) -> list[Tensor]:
        slots = [self.optimizer.state[p] for p in self.trained.values()]
        moments = [torch.as_tensor(slot[key]) for slot in slots for key in sorted(slot)]
        return [*(p.detach().clone() for p in self.trained.values()), *moments]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def test_goes_on_as_if_nothing_had_happened(run: Run) -> None:
    run.train(3)
    run.save(3)
    run.train(4)
    expected = run.state()
    other = Run(run.checkpoints.directory)
    assert other.restore() == 3
    other.train(4)
    assert all(torch.equal(a, b) for a, b in zip(other.state(), expected, strict=True))


def test_nothing_to_restore(run: Run) -> None:
    assert run.restore() == 0
    assert run.checkpoints.latest() is None


def test_the_same_step_again_takes_the_place_of_the_first(run: Run) -> None:
    """A run may be stopped at the step that it has just saved."""
    run.train(3)
    run.save(3)
    run.train(1)
    run.save(3)
    state = [tensor.clone() for tensor in run.state()]
    run.train(1)
    assert run.restore() == 3
    assert all(torch.equal(a, b) for a, b in zip(run.state(), state, strict=True))


def test_keeps_the_last_ones(run: Run) -> None:
    for step in (5, 10, 15, 100):
        run.train(1)
        run.save(step)
    assert run.checkpoints.steps() == [15, 100]
    names = {"step-000015/state.safetensors", "step-000100/state.safetensors"}
    assert set(contents(run.checkpoints.directory)) == names


def test_what_a_killed_run_left_is_no_checkpoint(run: Run) -> None:
    run.train(1)
    run.save(5)
    (run.checkpoints.directory / "step-000010.writing").mkdir()
    assert run.checkpoints.latest() == 5
    markers.put(run.checkpoints.directory / "step-000010.writing", Mark.WRITING)
    (run.checkpoints.directory / "step-000007").mkdir()  # killed while it was deleted
    assert run.checkpoints.steps() == [5] and Run(run.checkpoints.directory).restore() == 5
    run.save(10)
    assert sorted(p.name for p in run.checkpoints.directory.iterdir()) == [
        "step-000005",
        "step-000010",
    ]


def test_a_kill_while_one_is_written_or_deleted_costs_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one that is listed is whole, whatever call the kill came before."""
    run.train(1)
    for step in (5, 10):
        run.save(step)
    backup = run.checkpoints.directory.with_name("backup")
    shutil.copytree(run.checkpoints.directory, backup)
    with monkeypatch.context() as patch:
        calls = at_disk_call(patch)
        run.save(15)
    latest = set()
    for number in range(1, len(calls) + 1):
        shutil.rmtree(run.checkpoints.directory)
        shutil.copytree(backup, run.checkpoints.directory)

        def killed(number: int = number) -> None:
            at_disk_call(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run.save(15)

        run_until_killed(killed)
        latest.add(Run(run.checkpoints.directory).restore())
        names = {path.name for path in run.checkpoints.directory.iterdir()}
        assert names <= {"step-000005", "step-000010", "step-000015"}, number
        whole = {path.parent.name for path in run.checkpoints.directory.glob("*/*.safetensors")}
        assert whole == names, "what is half deleted is gone"
    assert latest == {10, 15}


@pytest.mark.parametrize("error", [SafetensorError("disk full"), OSError(28, "No space left")])
def test_a_full_disk_keeps_the_earlier_ones(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run.train(1)
    run.save(5)
    before = contents(run.checkpoints.directory)

    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot write .*step-000010: .*free some space"):
        run.save(10)
    assert contents(run.checkpoints.directory) == before


@pytest.mark.parametrize(("steps", "back"), [((5,), "the start"), ((5, 10), "step 5")])
def test_a_truncated_one_says_how_to_go_on(run: Run, steps: tuple[int, ...], back: str) -> None:
    run.train(1)
    for step in steps:
        run.save(step)
    file = run.checkpoints.directory / f"step-{steps[-1]:06d}" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=f"is damaged .* to go on from {back}$") as raised:
        run.restore()
    assert f"remove the directory {file.parent} " in str(raised.value)


def test_of_another_model(run: Run) -> None:
    run.train(1)
    run.save(5)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        Run(run.checkpoints.directory, width=8).restore()
