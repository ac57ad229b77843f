"""When decoding steps are not replayed: for good, for a while, and what is said about it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatc.recipe.recipe import Recipe
from qatc.runtime.cuda import arena, graphed
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.cuda.recorder import CudaRecorder
from tests.conftest import make_output
from tests.runtime.replaying import IDS, Again, graphed_and_plain, steps

pytestmark = pytest.mark.usefixtures("small_buckets")


def test_what_cannot_be_recorded_is_not_replayed(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))

    class Refuses(Again):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            step()
            raise RuntimeError("CUDA error: operation not permitted\nmore")

    forward._recorder = Refuses()
    assert torch.equal(steps(model, IDS, 5), steps(plain, IDS, 5))
    assert forward.reason == (
        "recording LlamaForCausalLM failed: RuntimeError: CUDA error: operation not permitted"
    )
    assert graphed.why_not_replayed(model) == forward.reason


def test_a_model_that_counts_its_positions_itself_is_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded step knows neither how many tokens are held nor that there will be more."""
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    inner = type(model.model).forward

    def asks(*args: Any, **kwargs: Any) -> Any:
        held, new = kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1]
        kwargs["position_ids"] = torch.arange(held, held + new)[None]
        return inner(model.model, *args, **kwargs)

    cache = plain(input_ids=IDS[:1, :5], use_cache=True).past_key_values
    monkeypatch.setattr(model.model, "forward", asks)
    wanted = steps(plain, IDS[:1, 5:20], 1, copy.deepcopy(cache))
    assert torch.equal(steps(model, IDS[:1, 5:20], 1, cache), wanted)
    assert forward.reason == "LlamaForCausalLM asks its cache where a token is"


def test_a_replay_that_gives_something_else_is_not_used(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))

    class Wrong(Again):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            replay = super().record(step)
            return lambda: replay().roll(1)

    forward._recorder = Wrong()
    with pytest.warns(RuntimeWarning, match="not replayed: what was recorded computes"):
        assert torch.equal(steps(model, IDS, 5), steps(plain, IDS, 5))
    assert forward.reason == "what was recorded computes something else" and forward.replayed == 0


def test_a_step_that_ran_beside_its_recording_is_not_used(tmp_path: Path) -> None:
    """As on another GPU than the one that records, whose graph is then empty."""
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))

    class Nothing(Again):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            result = step()
            return lambda: result

    class Half(Again):
        """Replays an output, in which what is stale is not seen but by other tokens."""

        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            result = step()
            kept = result.clone()
            return lambda: result.copy_(kept)

    for recorder in (Nothing(), Half()):
        forward._recorder, forward.reason = recorder, None
        assert torch.equal(steps(model, IDS, 5), steps(plain, IDS, 5))
        assert forward.reason == "what was recorded computes something else"
        assert forward.recorded == forward.replayed == 0


def test_what_records_knows_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(graphed, "CudaRecorder", asked.append)
    runtime: Any = SimpleNamespace(device="cuda")
    GraphedForward(nn.Linear(2, 2, device="meta"), runtime)  # in the place of cuda:1
    assert asked == [torch.device("meta")]


def test_threads_of_copies_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a model record into one memory."""
    event = SimpleNamespace(wait=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    recorder, entered = CudaRecorder(torch.device("cuda:0")), threading.Event()

    def enter() -> None:
        with recorder.turn():
            entered.set()

    other = threading.Thread(target=enter)
    with recorder.turn():
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    other.join()


def test_a_lack_of_memory_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    monkeypatch.setattr(graphed, "PAUSE", 8)

    class Full(Again):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("the recording was ended by another error")

    def no_room(layers: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    # Other rows in the second round, for which there is no memory yet.
    for ids, recorder, room in ((IDS, Full(), arena.Arena), (IDS[:2], Again(), no_room)):
        forward._recorder = recorder
        monkeypatch.setattr(graphed, "Arena", room)
        before = forward.replayed
        with pytest.warns(RuntimeWarning, match="not replayed: .* tried again after 8 calls"):
            assert torch.equal(steps(model, ids[:, :10], 5), steps(plain, ids[:, :10], 5))
        assert "8 calls" in str(forward.reason) and forward.replayed == before
        forward._recorder = Again()
        monkeypatch.setattr(graphed, "Arena", arena.Arena)
        assert torch.equal(steps(model, ids[:, :20], 5), steps(plain, ids[:, :20], 5))
        assert forward.reason is None and forward.replayed > before


def test_caches_that_were_too_many_are_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forward, _ = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    monkeypatch.setattr(graphed, "PAUSE", 5)
    monkeypatch.setattr(graphed, "FUTILE", 2)
    with torch.no_grad():
        caches = [model(input_ids=IDS[:1, :9], use_cache=True).past_key_values for _ in range(3)]
        with pytest.warns(RuntimeWarning, match="more often"):
            for cache in caches:
                model(input_ids=IDS[:1, :1], past_key_values=cache, use_cache=True)
    assert forward.reason is not None and forward.replayed == 0
    steps(model, IDS[:1], 5)
    assert forward.reason is None and forward.replayed > 20
