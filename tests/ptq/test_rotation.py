"""Rotations: orthogonal, folded away without a trace, and refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.errors import ConfigError
from qatc.numerics.hadamard import hadamard
from qatc.ptq import rotate
from tests.conftest import make_small
from tests.ptq.conftest import assert_same_function, logits, make_model


@pytest.mark.parametrize("size", [1, 2, 9, 48, 64, 576])
def test_matrices_are_orthogonal_and_spread(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    odd = size // (size & -size)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12
    if odd == 1:
        assert torch.equal(matrix.abs(), matrix.abs()[:1].expand(size, size))


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {}, {"r2": False}),
        ("llama", {}, {"r1": False}),
        ("llama", {"hidden_size": 24, "num_key_value_heads": 1, "attention_bias": True}, {}),
        ("qwen2", {}, {}),
        ("gemma", {}, {}),
        ("granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0}, {}),
        ("phi3", {}, {"r2": False}),
    ],
)
def test_the_function_stays(kind: str, changes: dict[str, Any], parts: dict[str, bool]) -> None:
    model = make_model(kind, **changes)
    before, original = logits(model), make_model(kind, **changes)
    rotate(model, seed=3, **parts)
    assert_same_function(model, before)
    names = {name: "qkv" if kind == "phi3" else name for name in ("q", "v")}
    for name, turned in (("q", parts.get("r1", True)), ("v", True)):
        weight = f"model.layers.1.self_attn.{names[name]}_proj.weight"
        same = torch.equal(model.get_parameter(weight), original.get_parameter(weight))
        assert same == (not turned)


def test_outliers_are_spread() -> None:
    """A channel of the stream that is ten times the others is so no more."""
    model = make_model()
    model.model.embed_tokens.weight.data[:, 5] *= 30
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    rotate(model)
    seen.clear()
    logits(model)
    channels = seen[0].abs().amax((0, 1))
    assert channels.max() < 3 * channels.median()


def test_a_tied_head_gets_a_weight_of_its_own() -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_seeds() -> None:
    tables = []
    for seed in (0, 0, 1):
        model = make_model()
        rotate(model, seed=seed)
        tables.append(model.model.embed_tokens.weight)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("phi3", r"no linear of its own for V .* r2=False"),
        ("olmo2", "which only linears may write to"),  # norms behind the linears
        ("stablelm", "cannot be rotated; choose the method gptq or smoothquant"),  # LayerNorms
    ],
)
def test_refused_and_nothing_changed(kind: str, says: str) -> None:
    model = make_small(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=says):
        rotate(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
