"""A grid whose cells take no time: outputs as ``qatc quantize`` writes them, but for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qatc.compare.grid import Cell
from qatc.quantize.provenance import package_version


def metrics(perplexity: float, kl: float, agreement: float) -> dict[str, Any]:
    return {"perplexity": perplexity, "kl": kl, "top1_agreement": agreement, "tokens": 10}


def models(kl: float) -> dict[str, Any]:
    return {
        "full precision": metrics(4.0, 0.0, 1.0),
        "RTN": metrics(8.0, 1.0, 0.5),
        "QAT": metrics(4.0 + 4 * kl, kl, 0.9),
    }


class Quantizer:
    """Stands for ``qatc``; remembers what it was run with.

    Attributes:
        runs: options of ``qatc quantize``.
        evaluated: the model, and the options, of each ``qatc evaluate``.
    """

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.evaluated: list[tuple[str, list[str]]] = []

    def __call__(self, arguments: Sequence[str], out: Path, log: Path) -> int:
        log.write_text("0:00 Loading\n")
        if arguments[0] == "evaluate":
            return self.evaluate(arguments[1], list(arguments[2:]), out)
        assert arguments[:2] == ["quantize", "--config"] and arguments[3] == "--output"
        options = yaml.safe_load(Path(arguments[2]).read_text())
        self.runs.append(options)
        output = Path(arguments[4])
        output.mkdir()
        (output / "model.safetensors").write_bytes(bytes(1000))
        (output / "report.md").write_text("# Report\n")
        steps = [{"step": n, "kl": 1 / n} for n in range(1, 501)]
        (output / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        metadata: dict[str, Any] = {
            "model": "m",
            "versions": {"torch": package_version("torch")},
            "inputs": {"the model": "abc"},
        }
        metadata |= {"figures": {"generated": models(0.25)}, "training_seconds": 2.0}
        (output / "qatc.json").write_text(json.dumps(metadata))
        return 0

    def evaluate(self, model: str, options: list[str], out: Path) -> int:
        self.evaluated.append((model, options))
        worse = 0 if model == "m" else 1
        found: dict[str, Any] = {
            "average": {"value": 0.5 - 0.1 * worse, "stderr": 0.01, "tasks": 2}
        }
        if "--text" in options:
            found = metrics(10.0 + worse, 0.2, 0.8) if worse else {"perplexity": 10.0, "kl": None}
        out.write_text(json.dumps(found))
        return 0


def operations(metadata: Mapping[str, Any], trust_remote_code: bool) -> float:
    return 5e6


@pytest.fixture
def quantizer() -> Quantizer:
    return Quantizer()


@pytest.fixture
def cells() -> list[Cell]:
    """Two cells that share a corpus."""
    base = {"model": "m", "seed": 0}
    return [Cell("t", base | {"bits": "4-8-4"}), Cell("t", base | {"bits": "8-8-8"})]
