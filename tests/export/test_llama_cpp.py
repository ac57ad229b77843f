"""llama.cpp itself loads what is exported, makes the same tokens and computes the same model.

Skipped where no binding of llama.cpp is installed; ``make test-runtimes`` installs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qatc.export import export
from qatc.export.gguf.llama_cpp import LlamaFile, binding
from qatc.output import load_reference
from qatc.recipe.recipe import Recipe
from tests.conftest import make_output, make_small
from tests.export.gguf_files import SAMPLES, TRAINED_ON, file_in, of_bytes, of_pieces

pytestmark = pytest.mark.skipif(
    binding() is None, reason="no llama.cpp is installed; make test-runtimes installs it"
)

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


def exported(root: Path, kind: str, recipe: Recipe, tokenizer: Any, **changes: Any) -> Path:
    """A random model's output and its GGUF, ``source`` and ``out`` in ``root``."""
    settings = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    model = make_small(kind, **(settings | {"max_position_embeddings": 256} | changes))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn(value.shape) / 8)
    make_output(root / "source", recipe, model, tokenizer)
    return file_in(export(root / "source", root / "out", format="gguf"))


def log_probabilities(path: Path, ids: list[int]) -> NDArray[np.float64]:
    """Of llama.cpp after each token, with K and V in fp32."""
    return LlamaFile(path, 128, keys="f32", values="f32").log_probabilities(ids)


def expected(source: Path, ids: list[int]) -> NDArray[np.float64]:
    """The same of transformers, with the weights ``code * scale`` and inputs in fp32."""
    with torch.no_grad():
        logits = load_reference(source)(torch.tensor([ids])).logits[0].double()
    found: NDArray[np.float64] = torch.log_softmax(logits, -1).numpy()
    return found


IDS = torch.randint(3, 330, (48,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"hidden_size": 128}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_it_computes_the_same_model(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Unquantized, so that nothing is rounded: rotary embedding, biases, norms, order of rows."""
    path = exported(tmp_path, kind, Recipe.from_bits("16-16-16"), of_bytes("gpt-2"), **changes)
    wanted = expected(tmp_path / "source", IDS)
    np.testing.assert_allclose(log_probabilities(path, IDS), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "recipe", "width"),
    [
        ("llama", Recipe.from_bits("4-8-16", target="llama.cpp", preset="best"), 128),
        ("llama", Recipe.from_bits("8-8-16", head_bits=8, embedding_bits=8), 80),
        ("qwen3", Recipe.from_bits("4-8-16", group_size=32), 128),
        ("llama", Recipe.from_bits("5-8-16", target="llama.cpp", preset="best"), 128),
    ],
)
def test_quantized_it_differs_by_its_rounding_of_inputs(
    kind: str, recipe: Recipe, width: int, tmp_path: Path
) -> None:
    path = exported(tmp_path, kind, recipe, of_bytes("gpt-2"), intermediate_size=width)
    wanted, found = expected(tmp_path / "source", IDS), log_probabilities(path, IDS)
    divergence = (np.exp(wanted) * (wanted - found)).sum(-1)
    assert divergence.mean() < 0.003
    assert (wanted.argmax(-1) == found.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_the_same_tokens_of_bytes(kind: str, tmp_path: Path) -> None:
    tokenizer = of_bytes(kind)
    path = exported(tmp_path, "llama", Recipe.from_bits("4-8-16"), tokenizer)
    _assert_same_tokens(path, tokenizer)


@pytest.mark.parametrize("form", ["prepend", "replace", "metaspace"])
def test_the_same_tokens_of_pieces(form: str, tmp_path: Path) -> None:
    tokenizer = of_pieces(form)
    path = exported(tmp_path, "llama", Recipe.from_bits("4-8-16"), tokenizer)
    _assert_same_tokens(path, tokenizer, spaces_differ=form == "metaspace")


def _assert_same_tokens(path: Path, tokenizer: Any, spaces_differ: bool = False) -> None:
    file = LlamaFile(path, 0)
    for text in (*SAMPLES, *TRAINED_ON, "<s>The old fox</s> sleeps"):
        if text[0] in " <" and spaces_differ:
            continue
        wanted = tokenizer(text)["input_ids"]
        assert file.tokenize(text) == wanted, text
    assert file.detokenize(file.tokenize(SAMPLES[0])[1:]).strip() == SAMPLES[0]
    assert file.ends() == (tokenizer.bos_token_id, tokenizer.eos_token_id)
