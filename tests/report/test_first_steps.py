"""What a run says before it starts: honest counts, and nothing changed by measuring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.losses.objective import distillation_losses
from qatc.machine.device import peak_memory, total_memory
from qatc.progress import Observer
from qatc.quantize.run import quantize
from qatc.report.first_steps import (
    Phase,
    duration,
    measure_step,
    memory_text,
    optimizer_bytes,
    rows_cost,
    training_floor,
)
from tests.conftest import make_llama
from tests.quantize.conftest import make


def test_measuring_a_step_leaves_nothing_behind() -> None:
    student, teacher = make_llama(seed=1), make_llama()
    before = {n: p.clone() for n, p in student.named_parameters()}
    state = torch.get_rng_state()
    seen: list[tuple[int, ...]] = []

    def loss(ids: Any, real: Any) -> Any:
        seen.append(tuple(ids.shape))
        assert int(ids.max()) < 112 and bool(real.all())
        return distillation_losses(student, teacher, ids, real, real)[0]["logits"]

    cost = measure_step(loss, student, 3, 8, 112)
    assert set(seen) == {(3, 8)} and 2 <= len(seen) <= 5
    assert 0 < cost.forward < cost.step
    assert rows_cost(cost, 7, 3) == pytest.approx(3 * cost.forward)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_memory_is_that_of_parameters_gradients_and_optimizer() -> None:
    student, teacher = make_llama(), make_llama().bfloat16()
    count = sum(p.numel() for p in student.parameters())
    logits = 3 * 2 * 64 * 112
    assert training_floor(student, teacher, 64, 112) == (4 + 2 + 4 + 8) * count + logits
    assert optimizer_bytes(student) == 8 * count
    frozen = student.get_input_embeddings().weight
    frozen.requires_grad_(False)
    assert optimizer_bytes(student) == 8 * (count - frozen.numel())
    shared = make_llama()
    assert training_floor(shared, shared, 0, 112) == (4 + 12) * count


def test_memory_of_the_process_is_below_that_of_the_machine() -> None:
    total = total_memory("cpu")
    assert total is not None and 0 < peak_memory("cpu") < total
    assert "too little" in memory_text(2 * total, "cpu", "--batch-size")
    assert "too little" not in memory_text(total // 2, "cpu", "--batch-size")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 1 s"), (44.6, "about 45 s"), (90, "about 2 min"), (3600, "about 60 min"),
        (5400, "about 1 h 30 min"), (13 * 3600, "about 13 h"),
    ],
)  # fmt: skip
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_phase_names_what_shortens_it() -> None:
    text = str(Phase("training 300 steps of 8 x 256", 614_400, 1500.0, "--steps"))
    assert text == (
        "training 300 steps of 8 x 256: 614,400 tokens, about 25 min; shorter with --steps"
    )


class Notes(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, title: str) -> None:
        self.lines.append(title)

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_says_what_is_ahead_before_it_does_it(model_path: Path, tmp_path: Path) -> None:
    notes = Notes()
    settings = make(model_path, tmp_path / "out")
    quantize(settings, notes)
    training = next(i for i, line in enumerate(notes.lines) if line.startswith("training 6 steps"))
    writing = notes.lines[training - 1]
    assert writing.startswith("writing at most 24 sequences, 8 side by side: 384 tokens, about")
    assert "--samples" in writing and "--data" in writing
    assert "6 steps of 4 x 16: 384 tokens, about" in notes.lines[training]
    assert notes.lines[training + 1].startswith("evaluating it three times: 384 tokens, about")
    assert notes.lines[training + 2].startswith("memory: about ")
    assert all("--" in line for line in notes.lines[training : training + 3])
    begun = next(i for i, line in enumerate(notes.lines) if line.startswith("The teacher writes"))
    assert training < begun
    again = Notes()
    given = replace(settings, output=tmp_path / "again", data=tmp_path / "out.data")
    quantize(given, again)
    assert not any(line.startswith("writing at most") for line in again.lines), "it is there"
