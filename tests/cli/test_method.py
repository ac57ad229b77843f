"""``qatc quantize --method`` on the model of the examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.cli.conftest import TINY, refused, run

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


def test_rotated_inputs_of_4_bit_activations(shared_model_path: Path, tmp_path: Path) -> None:
    """Verified, said, refused by other runtimes, and not there at 8 bits."""
    out, other = tmp_path / "out", tmp_path / "other"
    command = ["quantize", "--model", shared_model_path, *TINY, "--data", tmp_path / "data"]
    result = run(
        *(*command, "--output", out, "--bits", "4-4-4", "--method", "rotate+gptq"),
        *("--eval-samples", 8, "--json"),
    )
    assert result.exit_code == 0, result.output
    assert "rotated while it runs, so that qatc alone loads it" in " ".join(result.stderr.split())
    figures = json.loads(result.stdout)["figures"]["generated"]
    assert figures["rotate+gptq"]["kl"] < figures["RTN"]["kl"]
    metadata = json.loads((out / "qatc.json").read_text())
    assert metadata["parity"]["passed"] and metadata["decoding"]
    assert metadata["recipe"]["rotate_inputs"] == ["*.down_proj.weight"]
    assert metadata["recipe"]["rotate_keys"] is True
    card = (out / "README.md").read_text()
    assert "library_name: qatc" in card and "Other runtimes do not rotate inputs" in card
    assert "Hadamard transform | `*.down_proj.weight`" in card and "qatc export" not in card
    shown = " ".join(run("inspect", out).stdout.split())
    assert "rotated inputs of *.down_proj.weight" in shown and "loads in qatc" in shown
    assert "queries and keys rotated" in shown and "queries and keys | rotated" in card
    with pytest.raises(ValueError, match="its inputs are rotated online: run it by qatc"):
        AutoModelForCausalLM.from_pretrained(out)
    for format, runtime in (("compressed-tensors", "transformers"), ("torchao", "torchao")):
        says = f"which {runtime} does not; run it by qatc, or quantize it again without"
        refused(2, says, "export", out, "--format", format, "--output", other)
    assert not other.exists()
    generated = run("generate", out, "--prompt", "The", "--max-new-tokens", 3, "--no-compile")
    assert generated.exit_code == 0, generated.output

    method = ["--method", "rotate", "--no-verify"]
    assert run(*command, "--output", other, "--bits", "4-8-4", *method).exit_code == 0
    assert "rotate_inputs" not in yaml.safe_load((other / "run.yaml").read_text())["recipe"]
    recipe = {"activations": {"bits": 4}, "rotate_inputs": ["*.down_proj.weight"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command += ["--method", "gptq", "--recipe", tmp_path / "recipe.yaml"]
    says = "method gptq turns no weights for them"
    refused(2, says, *command, "--output", tmp_path / "third")
