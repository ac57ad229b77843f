"""Outputs and GGUF files scored through llama.cpp, which ``make test-runtimes`` installs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatc.data.corpus import text_rows
from qatc.errors import CheckpointError, ConfigError
from qatc.evaluation.evaluate import AssessConfig, TasksConfig, assess
from qatc.export import export
from qatc.export.gguf import llama_cpp
from qatc.export.gguf.card import cache_options, cache_types
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from tests.cli.conftest import run
from tests.conftest import TEXT, make_output, make_small, make_tokenizer, save
from tests.export.gguf_files import of_bytes

needs_llama = pytest.mark.skipif(
    llama_cpp.binding() is None, reason="no llama.cpp is installed; make test-runtimes installs it"
)


class Notes(Observer):
    """What was noted."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


def make_model() -> Any:
    return make_small(vocab_size=400, hidden_size=64, intermediate_size=128, head_dim=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher; it unquantized, and quantized; and the GGUF of this."""
    root, tokenizer = tmp_path_factory.mktemp("llama"), of_bytes("gpt-2")
    (root / "text.txt").write_text(TEXT)
    save(root / "teacher", make_model(), tokenizer)
    for bits in ("16-16-16", "4-8-8", "4-8-4"):
        recipe = Recipe.from_bits(bits, target="gguf")
        make_output(root / bits, recipe, make_model(), tokenizer)
    export(root / "4-8-8", root / "gguf", format="gguf")
    return root


def found_of(root: Path, model: str, runtime: Any, **changes: Any) -> Any:
    given: dict[str, Any] = {"teacher": str(root / "teacher"), "length": 48, "max_tokens": 480}
    given |= {"text": root / "text.txt", "compile": False}
    return assess(AssessConfig(str(root / model), runtime=runtime, **(given | changes)))


@needs_llama
def test_unquantized_it_is_what_transformers_computes(root: Path) -> None:
    """K and V in fp16 alone differ: the same rows are scored, and what is scored of them."""
    wanted = found_of(root, "16-16-16", "trained")
    found = found_of(root, "16-16-16", "llama.cpp")
    assert found.tokens == wanted.tokens and wanted.kl == pytest.approx(0, abs=1e-5)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-3)
    assert 0 <= found.kl < 1e-4 and found.top1_agreement > 0.98


@needs_llama
def test_an_output_and_its_file_are_the_same(root: Path) -> None:
    found, trained = (found_of(root, "4-8-8", runtime) for runtime in ("llama.cpp", "trained"))
    for name in ("gguf", next((root / "gguf").glob("*.gguf")).relative_to(root)):
        assert found_of(root, str(name), "llama.cpp") == found
    coarse = found_of(root, "4-8-4", "llama.cpp")
    assert coarse.kl > found.kl
    assert found.kl == pytest.approx(trained.kl, rel=0.15) and found.kl > 0.01


@needs_llama
def test_figures_are_those_of_its_logits(root: Path) -> None:
    """Written again in fp64, from the logits of the file, without a class of the evaluation."""
    (file,) = (root / "gguf").glob("*.gguf")
    rows = text_rows(TEXT, of_bytes("gpt-2"), 48, 480)
    one = llama_cpp.LlamaFile(file, 48, keys="q8_0", values="q8_0")
    losses = []
    for ids, counted in zip(rows.tokens.tolist(), rows.labelled, strict=True):
        one.reset()
        told = one.log_probabilities(ids)
        losses += [-told[i, ids[i + 1]] for i in np.flatnonzero(counted)]
    found = found_of(root, "4-8-8", "llama.cpp")
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)


@needs_llama
def test_the_command_says_what_ran(root: Path) -> None:
    given = ["evaluate", root / "4-8-8", "--text", root / "text.txt", "--max-tokens", "96"]
    done = run(*given, "--length", "48", "--runtime", "llama.cpp", "--json")
    assert json.loads(done.stdout)["perplexity"] > 1
    status = " ".join(done.stderr.split())
    assert "with K in q8_0 and V in q8_0" in status and "which llama.cpp is told to have" in status


@needs_llama
def test_another_tokenizer_is_noticed(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", make_model(), make_tokenizer())
    with pytest.raises(ConfigError, match="makes other tokens than the one in the GGUF file"):
        found_of(root, "gguf", "llama.cpp", teacher=str(tmp_path / "other"))


@needs_llama
def test_a_damaged_file_is_no_crash(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(next((root / "gguf").glob("*.gguf")).read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        llama_cpp.LlamaFile(tmp_path / "x.gguf", 8)


@pytest.mark.parametrize("content", [b"", b"no GGUF file", b"GGUF\x03\0\0\0"])
def test_what_is_no_gguf_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="copy or export it again"):
        llama_cpp.open_gguf(tmp_path / "x.gguf", 8)


def test_a_gguf_file_is_for_llama_cpp() -> None:
    for runtime in ("trained", "packed"):
        with pytest.raises(ConfigError, match="add --runtime llama.cpp"):
            AssessConfig("x.gguf", text=Path("t.txt"), runtime=runtime)


def test_without_a_binding_it_says_what_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in llama_cpp.BINDINGS else there(n)
    )
    for model in ("4-8-8", "gguf"):
        with pytest.raises(ConfigError, match="pip install cyllama"):
            found_of(root, model, "llama.cpp")


def test_wrong_uses(root: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"text": root / "text.txt", "runtime": "llama.cpp"}
    with pytest.raises(ConfigError, match="teacher is neither, .* quantize it first"):
        AssessConfig(str(root / "teacher"), **text)
    with pytest.raises(ConfigError, match="give that by --teacher"):
        AssessConfig(str(root / "gguf"), **text)
    with pytest.raises(ConfigError, match="rounded by --bits; quantize it"):
        AssessConfig(str(root / "gguf"), recipe=Recipe(), **text)
    with pytest.raises(ConfigError, match="leave out --tasks, or --runtime"):
        TasksConfig(str(root / "4-8-8"), tasks=("piqa",), runtime="llama.cpp")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="has 2 GGUF files"):
        llama_cpp.find_gguf(tmp_path)


def test_k_and_v_have_the_nearest_types() -> None:
    for bits, types in (("4-8-4", "q4_0"), ("4-8-6", "q8_0"), ("4-8-16", "f16")):
        assert cache_types(Recipe.from_bits(bits), 64) == (types, types)
    mixed = Recipe.from_bits("4-8-8", value_bits=3)
    assert cache_types(mixed, 64) == ("q8_0", "q4_0") and "-k q8_0" in cache_options(mixed, 64)
    assert cache_types(mixed, 24) == ("f16", "f16") and cache_options(mixed, 24) == ""


@needs_llama
def test_an_output_is_what_is_run_whatever_lies_in_it(root: Path, tmp_path: Path) -> None:
    """Not a GGUF file that somebody put beside it."""
    shutil.copytree(root / "4-8-8", tmp_path / "out")
    (tmp_path / "out" / "other.gguf").write_bytes(b"")
    model, notes = llama_cpp.open_in_llama(tmp_path / "out", 8)
    assert notes and model.scratch is not None
