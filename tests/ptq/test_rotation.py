"""Rotations: orthogonal, folded away without a trace, and refused where they cannot be."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatc.errors import ConfigError
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore
from qatc.models.preparation import prepare
from qatc.models.regions import find_regions
from qatc.numerics.hadamard import hadamard
from qatc.passes import Canonicalize, RotateLinearInputs
from qatc.ptq import gptq, rotate, rotate_inputs
from qatc.ptq.gptq import round_columns
from qatc.ptq.rotation import rotated_inputs
from qatc.ptq.structure import layer_graphs
from qatc.recipe.recipe import Recipe
from tests.conftest import make_small
from tests.ptq.conftest import assert_same_function, logits, make_model, make_rows


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


DOWN = Recipe.from_bits("8-8-16", rotate_inputs=("*.down_proj.weight",))


@torch.no_grad()
def rotated_logits(model: Any, recipe: Recipe) -> Tensor:
    """What a model computes in float on a graph that rotates inputs, and quantizes nothing."""

    def transform(gm: Any, owner: TemplateForward) -> None:
        Canonicalize()(gm)
        if rotated := owner.present().rotated:
            RotateLinearInputs(rotated)(gm)

    store = TemplateStore(transform)
    forwards = [
        TemplateForward(
            region, name, store, recipe.exceptions(name, dict(region.named_parameters()))
        )
        for name, region in find_regions(model)
    ]
    for forward in forwards:
        forward.install()
    try:
        return logits(model)
    finally:
        for forward in forwards:
            forward.remove()


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("llama", {"tie_word_embeddings": True}, ("*.down_proj.weight",)),
        (
            "llama",
            {"mlp_bias": True, "intermediate_size": 43},
            ("*.down_proj.*", "*.o_proj.*"),
        ),
        ("gemma", {}, ("*.layers.1.mlp.down_proj.weight",)),
        ("phi3", {}, ("*.down_proj.weight", "*.gate_up_proj.weight")),
    ],
)
def test_rotated_inputs_leave_the_function(
    kind: str, changes: dict[str, Any], names: tuple[str, ...]
) -> None:
    """In the graph, and by hooks, and behind the rotations that are folded."""
    recipe = dataclasses.replace(DOWN, rotate_inputs=names)
    model = make_model(kind, **changes)
    before = logits(model)
    rotate(model, r2=kind != "phi3")
    rotate_inputs(model, recipe)
    assert (logits(model) - before).abs().max() > 0.1 * before.abs().max()
    found = rotated_logits(model, recipe)
    assert (found - before).abs().max() < 1e-5 * before.abs().max()
    with rotated_inputs(layer_graphs(model), recipe):
        assert_same_function(model, before)


def test_weights_in_full_precision_are_not_turned() -> None:
    recipe = dataclasses.replace(DOWN, skip=("*.layers.0.mlp.*",))
    model, original = make_model(), make_model()
    rotate_inputs(model, recipe)
    for number in (0, 1):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        same = torch.equal(model.get_parameter(name), original.get_parameter(name))
        assert same == (number == 0)
    wanted = logits(original)
    assert (rotated_logits(model, recipe) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("*.fc2.weight",), "rotate_inputs pattern '.*fc2.weight' matches no weight .*--recipe"),
        (("*norm.weight",), "rotate_inputs pattern '.*norm.weight' matches no weight"),
        (("lm_head.weight",), "rotate_inputs pattern 'lm_head.weight' matches no weight"),
    ],
)
def test_names_of_nothing(names: tuple[str, ...], says: str) -> None:
    model, recipe = make_model(), dataclasses.replace(DOWN, rotate_inputs=names)
    with pytest.raises(ConfigError, match=says):
        rotate_inputs(model, recipe)


def test_gptq_sees_rotated_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first down projection the codes are the same: its Hessian is the turned one."""

    module = sys.modules["qatc.ptq.gptq"]  # whose name in the package is the function's

    def hessian(model: Any, recipe: Recipe) -> Tensor:
        seen: list[Tensor] = []

        def note(weight: Tensor, given: Tensor, spec: Any, **options: Any) -> Any:
            if weight.shape == (32, 48):
                seen.append(given)
            return round_columns(weight, given, spec, **options)

        monkeypatch.setattr(module, "round_columns", note)
        gptq(model, make_rows(), recipe, dtype=torch.float64)
        return seen[0]

    model, turned = make_model(), make_model()
    plain = hessian(model, dataclasses.replace(DOWN, rotate_inputs=()))
    rotate_inputs(turned, DOWN)
    matrix = hadamard(48)
    wanted = matrix.T @ plain @ matrix
    torch.testing.assert_close(hessian(turned, DOWN), wanted, rtol=1e-5, atol=1e-5)


def test_gptq_tells_rotated_inputs_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linears that read one input some may have it rotated: each has its own Hessian."""
    module = sys.modules["qatc.ptq.gptq"]
    seen: list[Tensor] = []

    def note(weight: Tensor, given: Tensor, spec: Any, **options: Any) -> Any:
        seen.append(given)
        return round_columns(weight, given, spec, **options)

    monkeypatch.setattr(module, "round_columns", note)
    recipe = dataclasses.replace(DOWN, rotate_inputs=("*.q_proj.weight",))
    model = make_model()
    rotate_inputs(model, recipe)
    gptq(model, make_rows(), recipe, dtype=torch.float64)
    query, key, value = seen[:3]
    matrix = hadamard(32)
    torch.testing.assert_close(query, matrix.T @ key @ matrix, rtol=1e-5, atol=1e-5)
    assert torch.equal(key, value) and not torch.allclose(query, key)


def test_a_prepared_model_with_turned_weights_is_not_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = make_model()
    rotate_inputs(model, DOWN)
    prepare(model, DOWN, compile=False)
    with pytest.raises(ConfigError, match="take a recipe without rotate_inputs"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
