"""The loop that launches a step before the last token is read: transformers' texts, on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatc.recipe.recipe import Recipe
from qatc.runtime.cuda.loop import Arrival, decoding_loop
from qatc.runtime.generate_text import Writer
from tests.conftest import make_output

SAMPLED = {"temperature": 1.3, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_output(tmp_path_factory.mktemp("o") / "o", Recipe(), tokenizer=tokenizer)


def writer(output: Path, **options: Any) -> Writer:
    found = Writer(output, device="cpu", compile=False, max_new_tokens=20, **options)
    found.ends = set(range(5, 112, 9))
    return found


def with_own_loop(found: Writer) -> Writer:
    found._loop = lambda stream, ends: {  # type: ignore[method-assign]
        "custom_generate": decoding_loop(20, ends, stream.take)
    }
    return found


@pytest.mark.parametrize("options", [{"temperature": 0.0}, SAMPLED | {"stop": ["e"]}])
def test_it_writes_what_transformers_loop_writes(output: Path, options: dict[str, Any]) -> None:
    one = writer(output, **options)
    one.settings["repetition_penalty"] = 1.2
    texts: list[list[Any]] = [[], []]
    counts: list[int] = []
    for found in texts:
        for prompt in ("The old fox", "The blue lantern waits", "The"):
            shown: list[str] = []
            written = one.write(prompt, shown.append)
            found.append((written.text, shown))
            counts.append(written.new_tokens)
        with_own_loop(one)
    assert texts[0] == texts[1]
    theirs, ours = counts[:3], counts[3:]
    # transformers asks whether a stop string has come before it hands over the token.
    assert set(ours) != {20} and all(
        t - o in ((0, 1) if "stop" in options else (0,)) for t, o in zip(theirs, ours, strict=True)
    )


def test_nothing_is_computed_behind_the_last_token(output: Path) -> None:
    one = with_own_loop(writer(output, temperature=0.0))
    one.ends = set()
    calls: list[int] = []
    one.model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    assert one.write("The old fox").new_tokens == 20 and calls[1:] == [1] * 19


def test_the_copy_is_waited_for_on_the_tokens_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    waited: list[str] = []

    class Event:
        def __init__(self, device: str = "the current one") -> None:
            self.device = device

        def record(self) -> None:
            """On the current stream of the current device."""

        def synchronize(self) -> None:
            waited.append(self.device)

    class Token:
        is_cuda, device = True, torch.device("cuda:1")

        def __getitem__(self, row: int) -> torch.Tensor:
            return torch.tensor([7])

    def current_stream(device: Any = None) -> Any:
        return SimpleNamespace(record_event=lambda: Event(str(device)))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    token: Any = Token()
    assert Arrival(token, torch.zeros(1, dtype=torch.long)).wait() == 7
    assert waited == ["cuda:1"]
