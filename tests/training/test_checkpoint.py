"""Checkpoints: complete or absent, never pickled, bit for bit."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qatc.errors import CheckpointError
from qatc.machine.world import World
from qatc.storage import markers
from qatc.storage.markers import Mark
from qatc.training import checkpoint
from qatc.training.checkpoint import Checkpoints
from tests.conftest import at_disk_call, contents, run_until_killed
from tests.ranks import fork_ranks, in_a_new_process


class Run:
    """A small model under AdamW."""

    def __init__(self, directory: Path, width: int = 3, keep: int = 2, aside: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 1))
        self.trained = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.1, fused=True)
        self.checkpoints = Checkpoints(directory, keep, aside)

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
        return [tensor.clone() for tensor in self.named_state().values()]

    def named_state(self) -> dict[str, Tensor]:
        moments = {
            f"optimizer.{key}.{name}": torch.as_tensor(self.optimizer.state[p][key])
            for name, p in self.trained.items()
            for key in sorted(self.optimizer.state[p])
        }
        return {f"model.{name}": p.detach() for name, p in self.trained.items()} | moments


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


@pytest.fixture
def aside(tmp_path: Path) -> Run:
    """One whose checkpoints are written while it trains."""
    return Run(tmp_path / "checkpoints", aside=True)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Checkpoints are written as soon as what this gives is called, or at the end."""
    free, write = threading.Event(), checkpoint._Writer.write_data

    def wait(*args: Any) -> Any:
        assert free.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint._Writer, "write_data", wait)
    try:
        yield free.set
    finally:
        free.set()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


@pytest.mark.parametrize("kind", ["run", "aside"])
def test_a_kill_while_one_is_written_or_deleted_costs_none(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one that is listed is whole, whatever call the kill came before."""
    run: Run = request.getfixturevalue(kind)
    run.train(1)
    for step in (5, 10):
        run.save(step)
    run.checkpoints.wait()
    backup = run.checkpoints.directory.with_name("backup")
    shutil.copytree(run.checkpoints.directory, backup)
    with monkeypatch.context() as patch:
        calls = at_disk_call(patch)
        run.save(15)
        run.checkpoints.wait()
    latest = set()
    for number in range(1, len(calls) + 1):
        shutil.rmtree(run.checkpoints.directory)
        shutil.copytree(backup, run.checkpoints.directory)

        def killed(number: int = number) -> None:
            at_disk_call(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run.save(15)
            run.checkpoints.wait()

        run_until_killed(killed)
        latest.add(Run(run.checkpoints.directory).restore())
        names = {path.name for path in run.checkpoints.directory.iterdir()}
        assert names <= {"step-000005", "step-000010", "step-000015"}, number
        whole = {path.parent.name for path in run.checkpoints.directory.glob("*/*.safetensors")}
        assert whole == names, "what is half deleted is gone"
    assert latest == {10, 15}


@pytest.mark.parametrize("kind", ["run", "aside"])
def test_a_full_disk_keeps_the_earlier_ones(kind: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(kind)
    run.train(1)
    run.save(5)
    run.checkpoints.wait()
    before = contents(run.checkpoints.directory)
    told = "cannot write the checkpoint .*step-000010: .*File too large.*; free some space"
    with full_disk(), pytest.raises(CheckpointError, match=told):
        run.save(10)
        run.checkpoints.wait()
    assert contents(run.checkpoints.directory) == before
    run.save(10)
    assert run.checkpoints.latest() == 10


class TestAside:
    def test_it_is_of_the_step_that_it_was_begun_at(
        self, aside: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aside.train(3)
        state = aside.state()
        with held(monkeypatch) as release:
            aside.save(3)
            aside.train(2)
            assert aside.checkpoints.steps() == [], "none before it is whole"
            aside.checkpoints.settle()  # does not wait
            release()
            assert aside.checkpoints.latest() == 3
        assert not any(torch.equal(a, b) for a, b in zip(aside.state(), state, strict=True))
        assert aside.restore() == 3
        assert all(torch.equal(a, b) for a, b in zip(aside.state(), state, strict=True))

    def test_the_next_one_waits_for_it(self, aside: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        aside.train(1)
        with held(monkeypatch) as release:
            aside.save(3)
            threading.Timer(0.1, release).start()
            aside.save(6)
            assert 3 in aside.checkpoints.steps()
        assert aside.restore() == 6, "and whoever reads waits as well"

    def test_a_failure_is_told_as_soon_as_it_is_known(self, aside: Run) -> None:
        aside.train(1)
        with full_disk():
            aside.save(5)
            with pytest.raises(CheckpointError, match="step-000005: .*free some space"):
                for _ in range(600):
                    aside.checkpoints.settle()
                    threading.Event().wait(0.1)
        aside.checkpoints.wait()  # it is told once


def save_where_one_cannot(directory: Path) -> None:
    """Let two processes save, of which the second has a full disk."""

    def act(world: World) -> None:
        run = Run(directory / "checkpoints", aside=True)
        run.train(1)
        run.save(5)
        run.checkpoints.wait()
        with full_disk() if world.rank == 1 else nullcontext():
            run.save(10)
            with pytest.raises(CheckpointError, match="step-000010: .*free some space"):
                run.checkpoints.wait()
        assert run.checkpoints.steps() == [5]
        assert world.on_each(run.restore) == [5, 5]
        run.checkpoints.close()

    fork_ranks(act, 2)


def test_where_one_of_two_processes_cannot_write_both_tell(tmp_path: Path) -> None:
    in_a_new_process(__name__, "save_where_one_cannot", tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    (tmp_path / "checkpoints" / "step-000005" / "state-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is damaged .it has .*, and not all files"):
        Run(tmp_path / "checkpoints").restore()


def test_the_one_file_of_an_earlier_release(run: Run) -> None:
    run.train(2)
    place = run.checkpoints.directory / "step-000002"
    place.mkdir(parents=True)
    state = run.named_state() | {"random.cpu": torch.get_rng_state()}
    save_file(state, place / "state.safetensors", metadata={"step": "2"})
    expected = run.state()
    other = Run(run.checkpoints.directory)
    assert other.restore() == 2
    assert all(torch.equal(a, b) for a, b in zip(other.state(), expected, strict=True))


@pytest.mark.parametrize(("steps", "back"), [((5,), "the start"), ((5, 10), "step 5")])
def test_a_truncated_one_says_how_to_go_on(run: Run, steps: tuple[int, ...], back: str) -> None:
    run.train(1)
    for step in steps:
        run.save(step)
    (file,) = (run.checkpoints.directory / f"step-{steps[-1]:06d}").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=f"is damaged .* to go on from {back}$") as raised:
        run.restore()
    assert f"remove the directory {file.parent} " in str(raised.value)


def test_of_another_model(run: Run) -> None:
    run.train(1)
    run.save(5)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        Run(run.checkpoints.directory, width=8).restore()
