"""``qatc quantize --method`` on the model of the examples."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.cli.conftest import run

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-model"


def test_gptq_on_the_demo_model(tmp_path: Path) -> None:
    arguments = ["--samples", 64, "--max-length", 48, "--eval-samples", 16, "--no-compile"]
    result = run(
        *("quantize", "--model", DEMO, "--output", tmp_path / "out", "--method", "gptq"),
        *("--calibration-rows", 32, "--no-verify", "--json", *arguments),
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]["generated"]
    assert [*figures] == ["full precision", "RTN", "gptq"]
    assert figures["gptq"]["kl"] < figures["RTN"]["kl"]
    options = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (options["method"], options["calibration-rows"]) == ("gptq", 32)
