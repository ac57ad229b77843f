"""The gate asks the runtime that a model was trained for, where that is installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qatc.errors import ConfigError
from qatc.evaluation import parity
from qatc.evaluation.checks import Check
from qatc.export import compressed_tensors, consumers
from qatc.export.gguf.llama_cpp import binding
from qatc.export.vllm import engine
from qatc.output import Output, open_output
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from tests.conftest import make_output, make_small, make_tokenizer


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LENGTH", 12)


def output_of(place: Path, target: str, bits: str = "4-8-16") -> Path:
    sizes: Any = {"vocab_size": 112, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    recipe = Recipe.from_bits(bits, target=target)
    return make_output(place / "out", recipe, make_small(**sizes), make_tokenizer())


def asked(place: Path) -> list[Check]:
    report = parity.verify(place, reload=False)
    return [check for check in report.checks if check.point == "runtime"]


needs_vllm = pytest.mark.skipif(not engine.is_installed(), reason="make test-vllm installs it")
needs_llama = pytest.mark.skipif(binding() is None, reason="make test-runtimes installs it")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("transformers", "transformers"),
        ("torchao", "transformers"),
        pytest.param("llama.cpp", "llama.cpp", marks=needs_llama),
        pytest.param("vllm", "vLLM", marks=needs_vllm),
    ],
)
def test_the_runtime_computes_what_was_trained(target: str, name: str, tmp_path: Path) -> None:
    (check,) = asked(output_of(tmp_path, target))
    assert f"divergence of {name}" in check.what and "from the trained graph" in check.what
    assert check.limit is not None and 0 <= check.figure <= check.limit


def test_what_differs_there_is_told_and_not_judged(tmp_path: Path) -> None:
    (check,) = asked(output_of(tmp_path, "transformers", "4-8-8"))
    assert "with other numerics (K and V in float (8 bits here))" in check.what
    assert check.limit is None and check.figure > 0


@pytest.mark.parametrize(
    ("bits", "activations", "said"),
    [
        ("16-8-16", {}, "inputs in float (8 bits here)"),
        ("4-8-16", {"range": "restricted"}, "max / 127.5 per token (by another rule here)"),
        ("4-8-16", {"range": "affine"}, "max / 127.5 per token (by another rule here)"),
        ("4-4-16", {}, "max / 127.5 per token (by another rule here)"),
    ],
)
def test_another_rule_of_inputs_is_told(
    bits: str, activations: dict[str, Any], said: str, tmp_path: Path
) -> None:
    recipe = Recipe.from_bits(bits, target="transformers")
    inputs = dataclasses.replace(recipe.activations, **activations)
    out = make_output(tmp_path / "out", dataclasses.replace(recipe, activations=inputs))
    (check,) = asked(out)
    assert said in check.what and check.limit is None


def test_without_another_target_nobody_is_asked(tmp_path: Path) -> None:
    assert not asked(output_of(tmp_path, "qatc"))


def test_other_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong export, which all that qatc loads itself does not show."""

    def write(output: Output, directory: Path, observer: Observer) -> None:
        weights = {
            name: dataclasses.replace(weight, scale=weight.scale * 2)
            for name, weight in output.weights.items()
        }
        changed = dataclasses.replace(output, weights=weights)
        compressed_tensors.write(changed, directory, observer)

    kind = consumers._KINDS["transformers"]
    open = consumers._by_transformers(write, lambda recipe: [])
    kinds = {"transformers": dataclasses.replace(kind, open=open)}
    monkeypatch.setattr(consumers, "_KINDS", kinds)
    (check,) = asked(output_of(tmp_path, "transformers"))
    assert not check.passed


@pytest.mark.parametrize("error", [ConfigError("no such tokenizer"), ValueError("a bug of theirs")])
def test_a_runtime_that_fails_is_no_verdict(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(output: Output, slots: int) -> Any:
        raise error

    kinds = {"transformers": consumers._Kind(lambda: True, fail)}
    monkeypatch.setattr(consumers, "_KINDS", kinds)
    (check,) = asked(output_of(tmp_path, "transformers"))
    assert check.passed and f"transformers could not be asked ({error})" in check.what
    assert check.limit is None and check.figure == 0


def test_one_that_is_not_installed_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    kinds = {"vllm": dataclasses.replace(consumers._KINDS["vllm"], is_installed=lambda: False)}
    monkeypatch.setattr(consumers, "_KINDS", kinds)
    assert consumers.consumer_of(open_output(output_of(tmp_path, "vllm")), 12) is None
