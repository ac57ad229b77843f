"""SmoothQuant: equation 4 against fp64, and a function that stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qatc.errors import ConfigError
from qatc.ptq import smoothquant
from tests.conftest import make_llama
from tests.ptq.conftest import assert_same_function, logits, make_model, make_rows


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", {}),  # biases in Q, K and V
        ("gemma", {}),  # norms that multiply by 1 + weight
        ("phi3", {}),  # Q, K and V in one linear
        ("opt", {}),  # LayerNorms with biases
    ],
)
def test_the_function_stays(kind: str, changes: dict[str, Any]) -> None:
    model = make_model(kind, **changes)
    before, names = logits(model), [n for n, p in model.named_parameters() if p.dim() == 2]
    weights = {n: model.get_parameter(n).detach().clone() for n in names}
    smoothquant(model, make_rows(), alpha=0.6)
    assert_same_function(model, before)
    layers = [n for n in names if "layers" in n]
    changed = [n for n in layers if not torch.equal(weights[n], model.get_parameter(n))]
    assert len(changed) >= (3 if kind == "phi3" else len(layers) // 2)


def inputs(model: Any, modules: list[Any]) -> list[Tensor]:
    """The largest magnitude in each input channel of modules, over the tokens that are real."""
    rows, seen = make_rows(), []
    hooks = [m.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for m in modules]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(rows.tokens).long())
    for hook in hooks:
        hook.remove()
    real = torch.from_numpy(rows.real)
    return [x[real].double().abs().amax(0) for x in seen]


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_factors_are_those_of_equation_4(alpha: float) -> None:
    model = make_model()
    original = copy.deepcopy(model)
    layer, own = model.model.layers[1], original.model.layers[1]
    smoothquant(model, make_rows(), alpha=alpha, batch_size=3)
    x_qkv, x_o, x_down = inputs(
        original, [own.self_attn.q_proj, own.self_attn.o_proj, own.mlp.down_proj]
    )

    def factors(x: Tensor, *weights: Tensor) -> Tensor:
        w = torch.cat([w.double() for w in weights]).abs().amax(0)
        return x**alpha / w ** (1 - alpha)

    attention = own.self_attn
    qkv = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    s = factors(x_qkv, *qkv)
    expected = own.input_layernorm.weight.double() / s
    torch.testing.assert_close(layer.input_layernorm.weight.double(), expected, rtol=1e-5, atol=0)
    k = attention.k_proj.weight.double() * s
    torch.testing.assert_close(layer.self_attn.k_proj.weight.double(), k, rtol=1e-5, atol=0)
    # 4 query heads of 8 values read 2 heads of V.
    x = x_o.view(2, 2, 8).amax(1).flatten()
    w = attention.o_proj.weight.double().abs().amax(0).view(2, 2, 8).amax(1).flatten()
    per_row = x**alpha / w ** (1 - alpha)
    v = attention.v_proj.weight.double() * s / per_row[:, None]
    torch.testing.assert_close(layer.self_attn.v_proj.weight.double(), v, rtol=1e-5, atol=0)
    down = own.mlp.down_proj.weight.double() * factors(x_down, own.mlp.down_proj.weight)
    torch.testing.assert_close(layer.mlp.down_proj.weight.double(), down, rtol=1e-5, atol=0)


def test_memory_of_another_model_is_left_alone() -> None:
    model, other = make_model(), make_model()
    for name, parameter in model.named_parameters():
        parameter.data = other.get_parameter(name).data
    before = logits(other)
    smoothquant(model, make_rows())
    assert torch.equal(logits(other), before)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="alpha .* from 0 to 1; got 1.5"):
        smoothquant(make_llama(40), make_rows(), alpha=1.5)
