"""``qatc estimate``, driven for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run
from tests.estimate.test_shapes import LLAMA_7B


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("estimate") / "llama-7b.json"
    file.write_text(json.dumps(LLAMA_7B | {"model_type": "llama"}))
    return file


def test_a_config_alone_says_what_fits_a_gpu(config: Path) -> None:
    result = run("estimate", config, "--memory", "48GB", "--tflops", "100")
    assert result.exit_code == 0, result.output
    for text in ("6.74 billion", "does not fit", "--optimizer adamw8bit", "recording the teacher"):
        assert text in result.stdout
    assert result.stderr == ""


def test_json_has_the_numbers(config: Path) -> None:
    given = ("--memory", "80GB", "--gpus", 8, "--json", "--bits", "8-8-8")
    plain = json.loads(run("estimate", config, *given).stdout)
    assert plain["setup"]["gpus"] == 8 and plain["setup"]["weight_bits"] == 8
    assert plain["setup"]["compute"] == "bfloat16" and plain["setup"]["on_gpu"]
    assert plain["seconds"] is None
    options = ("--optimizer", "adamw8bit", "--teacher", "recorded", "--loss-chunk", "64")
    less = json.loads(run("estimate", config, *given, *options).stdout)

    def training(found: dict[str, list[dict[str, int | str]]]) -> int:
        return next(int(p["bytes"]) for p in found["phases"] if p["phase"] == "training")

    assert training(less) < training(plain)


def test_this_machine_is_asked_about_by_default(shared_model_path: Path) -> None:
    result = run("estimate", shared_model_path, "--device", "cpu", "--tflops", "0.1", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["fits"] and not plain["setup"]["on_gpu"] and plain["seconds"]["training"] > 0


def test_what_cannot_be_is_refused(config: Path) -> None:
    refused(2, "give --memory", "estimate", config, "--gpus", 8)
    refused(2, "memory is an amount", "estimate", config, "--memory", "lots")
    refused(2, "cannot be shared by 3 GPUs", "estimate", config, "--gpus", 3, "--memory", "80GB")
    refused(2, "there is no model directory", "estimate", config.parent / "missing")
