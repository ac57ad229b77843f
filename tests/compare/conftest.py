"""A grid whose cells take no time: outputs as ``qatc quantize`` writes them, but for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qatc.compare.grid import Cell


def metrics(perplexity: float, kl: float, agreement: float) -> dict[str, Any]:
    return {"perplexity": perplexity, "kl": kl, "top1_agreement": agreement, "tokens": 10}


def models(kl: float) -> dict[str, Any]:
    return {
        "full precision": metrics(4.0, 0.0, 1.0),
        "RTN": metrics(8.0, 1.0, 0.5),
        "QAT": metrics(4.0 + 4 * kl, kl, 0.9),
    }


class Quantizer:
    """Stands for ``qatc quantize``; remembers the options that it was run with."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        assert arguments[0] == "--config" and arguments[2] == "--output"
        options = yaml.safe_load(Path(arguments[1]).read_text())
        self.runs.append(options)
        log.write_text("0:00 Loading\n")
        output = Path(arguments[3])
        output.mkdir()
        (output / "model.safetensors").write_bytes(bytes(1000))
        (output / "report.md").write_text("# Report\n")
        steps = [{"step": n, "kl": 1 / n} for n in range(1, 501)]
        (output / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        metadata = {"model": "m", "figures": {"generated": models(0.25)}, "training_seconds": 2.0}
        (output / "qatc.json").write_text(json.dumps(metadata))
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
