"""The report beside a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatc.evaluation.metrics import Metrics
from qatc.recipe.recipe import Recipe
from qatc.report.markdown import write_report
from qatc.report.tables import figure_rows, recovery_text
from qatc.training.blockwise import LayerMetrics
from qatc.training.config import StepMetrics

FIGURES = {
    "generated": {
        "full precision": Metrics(10.0, 0.0, 1.0, 500),
        "RTN": Metrics(30.0, 0.8, 0.5, 500),
        "QAT": Metrics(15.0, 0.2, 0.75, 500),
    }
}
METADATA: dict[str, Any] = {
    "model": "somebody/some-model",
    "run": {
        "recipe": Recipe.from_bits("4-16-8", group_size=32, head_bits=8).to_dict(),
        "training": {"loss": "logits+hidden"},
    },
    "data": {
        "fingerprint": "0123456789abcdef0123",
        "model": "somebody/some-model",
        "strategy": "hybrid",
        "seed": 7,
        "sequences": 1234,
        "max_length": 99,
    },
    "versions": {"qatc": "0.1.0", "torch": "9.9"},
    "compute_dtype": "bfloat16",
    "integer_forward": True,
    "device": "CPU, 1 thread",
    "learning_rate": 1.234e-4,
    "training_seconds": 2.0,
    "row_utilization": 0.875,
    "divergence_by_layer": [0.001234, 0.5],
}
HISTORY = [StepMetrics(i, 3.0 / i, 1.0 / i, 1e-4, 0.5, 1000, 0.5) for i in range(1, 5)]


def test_recovery_is_that_of_perplexity_and_of_kl() -> None:
    assert recovery_text(FIGURES["generated"]) == "75.0 % (KL 75.0 %)"
    lossless = dict.fromkeys(("full precision", "RTN", "QAT"), Metrics(10.0, 0.0, 1.0, 500))
    assert recovery_text(lossless) == ""


def test_a_row_for_every_text_and_model() -> None:
    assert figure_rows(FIGURES)[1:] == [
        ["generated", "full precision", "10", "0.0000", "100.0%", ""],
        ["generated", "RTN", "30", "0.8000", "50.0%", ""],
        ["generated", "QAT", "15", "0.2000", "75.0%", "75.0 % (KL 75.0 %)"],
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report(path, METADATA, FIGURES, HISTORY)
    return path


@pytest.mark.parametrize(
    "line",
    [
        "# somebody/some-model at 4-16-8",
        "| text | model | perplexity | KL to teacher | top-1 agreement | recovery |",
        "| generated | QAT | 15 | 0.2000 | 75.0% | 75.0 % (KL 75.0 %) |",
        "| weights | 4 bits, one scale per 32 values, restricted range |",
        "| activations | not quantized |",
        "| KV cache | 8 bits, one scale per token and head, restricted range |",
        "| KV site | cache |",
        "| output head | 8 bits, one scale per token of the vocabulary, restricted range |",
        "| token embedding | not quantized |",
        "| torch | 9.9 |",
    ],
)
def test_holds_figures_recipe_and_versions(report: Path, line: str) -> None:
    assert line in (report / "report.md").read_text().splitlines()


def test_tells_how_it_was_trained(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "4 steps, 4,000 tokens in 2 s (2,000 tokens/s) on CPU, 1 thread" in text
    assert "bfloat16, quantized linears on int8 codes; loss `" in text
    assert "`, peak learning rate 0.000123; 87.5% of" in text
    assert "1234 sequences of at most 99 tokens written by somebody/some-model" in text
    assert "(strategy hybrid, seed 7)" in text
    assert "what is behind them is full precision: 0.00123, 0.5. What" in text


def test_the_plot_that_it_shows_is_there(report: Path) -> None:
    assert "(loss.png)" in (report / "report.md").read_text()
    assert (report / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("history", [HISTORY, []])
def test_tells_what_layers_came_to(tmp_path: Path, history: list[StepMetrics]) -> None:
    layers = [LayerMetrics(n, s, 0.1 * n / s, 1e-4, 0.5, 500, 0.25) for n in (1, 2) for s in (1, 2)]
    write_report(tmp_path, METADATA, FIGURES, history, layers)
    text = (tmp_path / "report.md").read_text()
    first = "First, each" if history else "Each"
    assert f"{first} of 2 decoder layers was trained for 2 steps, one after the other" in text
    assert "relative to the teacher's squared norm: 0.05, 0.1." in text
    tokens = "4 steps, 6,000" if history else "In all 2,000"
    assert f"\n{tokens} tokens in 2 s" in text
    assert (tmp_path / "loss.png").exists() == bool(history) == ("loss `" in text)
