"""GPTQ against an independent implementation in fp64, and what its weights are rounded to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qatc.errors import ConfigError, DataError, TrainingError
from qatc.numerics.learned import least_error_scale
from qatc.numerics.minmax import compute_scale, dequantize, quantize, quantize_by
from qatc.ptq import gptq
from qatc.ptq.gptq import reproducible, round_columns
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.ptq.conftest import make_model, make_rows

SPECS = [
    QuantSpec(4),
    QuantSpec(3, group_size=8),
    QuantSpec(8, range="full"),
    QuantSpec(4, range="full", group_size=16),
    QuantSpec(4, scale_dtype="float16"),
    QuantSpec(2),
    QuantSpec(4, range="signed"),
    QuantSpec(3, range="signed", group_size=8, clip="learned"),
]


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs ``[rows, width]`` of channels that have something to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing


def optimal_brain_quantization(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, act_order: bool, damping: float
) -> Tensor:
    """Equation 2 of the paper, row by row and with an inverse for every column; its codes.

    The largest value of a group keeps the code next to it.
    """
    width = weight.shape[1]
    scales = (least_error_scale if spec.learned else partial(compute_scale, snap=True))(
        weight, spec
    )
    scales = scales.double()
    size = width // scales.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    order = sorted(range(width), key=lambda j: -float(hessian[j, j])) if act_order else range(width)
    found = torch.zeros_like(weight)
    for row, w in enumerate(weight.double()):
        w, left = w.clone(), list(order)
        original = w.clone()
        while left:
            j = left[0]
            group = original[j // size * size : (j // size + 1) * size]
            scale = scales[row, j // size]
            low, high = float(spec.code_min), float(spec.code_max)
            largest = not spec.learned and int(group.abs().argmax()) == j % size
            if not spec.learned:
                reach = float(torch.round(group.abs().max() / scale.abs()))
                low, high = max(-reach, low), min(reach, high)
            code = torch.round((original if largest else w)[j] / scale).clamp(low, high)
            inverse = torch.linalg.inv(h[left][:, left])
            w[left] -= (w[j] - code * scale) / inverse[0, 0] * inverse[0]
            found[row, j] = code
            left.pop(0)
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_an_independent_implementation(spec: QuantSpec, act_order: bool) -> None:
    x = correlated(200, 32)
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    expected = optimal_brain_quantization(weight, x.T @ x, spec, act_order, 0.01)
    codes, _ = round_columns(weight, x.T @ x, spec, act_order=act_order, block_size=5)
    assert torch.equal(codes.float(), expected)
    in_fp32, _ = round_columns(weight, (x.T @ x).float(), spec, act_order=act_order)
    assert (in_fp32 != codes).float().mean() <= 0.01  # a tie, and what follows from it


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
)
def test_the_quantizer_takes_the_weights_to_these_codes(
    spec: QuantSpec, dtype: torch.dtype, seed: int, size: float
) -> None:
    x = correlated(64, 32, seed)
    weight = (torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[0] = 0
    weight[1, 3] = weight[1].abs().max() * -4  # an outlier of negative sign
    weight[2] = weight[2].sign() * weight[2].abs().max()  # all are the largest
    codes, scale = round_columns(weight, (x.T @ x).float(), spec)
    values = reproducible(weight, codes, scale, spec)
    assert values.dtype is dtype
    if spec.learned:  # the scale is given
        assert torch.equal(quantize_by(values, scale, spec), codes)
        return
    again, scale_again = quantize(values, spec, snap=True)
    assert torch.equal(scale_again, scale) and torch.equal(again, codes)


def test_inputs_that_are_zero() -> None:
    weight = torch.randn(6, 32)
    codes, scale = round_columns(weight, torch.zeros(32, 32), QuantSpec(4))
    nearest, _ = quantize(weight, QuantSpec(4), snap=True)
    assert torch.equal(codes, nearest)


def test_a_product_loses_less_than_by_rounding_to_nearest() -> None:
    x = correlated(200, 32)
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    nearest = dequantize(*quantize(weight, QuantSpec(4), snap=True))
    errors = {
        act_order: dequantize(*round_columns(weight, x.T @ x, QuantSpec(4), act_order=act_order))
        for act_order in (False, True)
    }
    lost = {k: float((x @ (w - weight).T.double()).norm()) for k, w in errors.items()}
    assert max(lost.values()) < 0.8 * float((x @ (nearest - weight).T.double()).norm())


def rounded(model: Any, spec: QuantSpec) -> Any:
    """The model with every linear of its layers rounded to nearest."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            codes, scale = quantize(module.weight.detach(), spec, snap=True)
            module.weight.data = dequantize(codes, scale)
    return model


def outputs_of_layers(model: Any) -> Tensor:
    rows = make_rows(32)
    with torch.no_grad():
        output = model.model(input_ids=torch.from_numpy(rows.tokens).long()).last_hidden_state
    return torch.as_tensor(output[torch.from_numpy(rows.real)])


@pytest.mark.parametrize("bits", ["4-8-4", "3-16-16"])
def test_layers_lose_less_than_by_rounding_to_nearest(bits: str) -> None:
    recipe = Recipe.from_bits(bits)
    model = make_model()
    gptq(model, make_rows(32), recipe)
    before = outputs_of_layers(make_model())
    lost = (outputs_of_layers(rounded(model, recipe.weights)) - before).norm()
    nearest = outputs_of_layers(rounded(make_model(), recipe.weights))
    assert lost < 0.9 * (nearest - before).norm()


def test_later_layers_see_what_earlier_ones_became() -> None:
    """The inputs of the second layer's Hessians are those behind the quantized first layer."""
    recipe = Recipe.from_bits("2-16-16")
    model = make_model()
    gptq(model, make_rows(), recipe)
    seen: list[Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    codes, _ = quantize(down.weight.detach(), recipe.weights, snap=True)
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = make_rows()
    with torch.no_grad():
        model(input_ids=torch.from_numpy(rows.tokens).long())
    hook.remove()
    x = seen[0][torch.from_numpy(rows.real)].double()
    original = make_model().model.layers[1].mlp.down_proj.weight.detach()
    expected = round_columns(original, x.T @ x, recipe.weights)[0]
    assert (codes != expected).float().mean() < 0.01


def test_what_is_skipped_stays() -> None:
    model, plain = make_model(), make_model()
    gptq(model, make_rows(), Recipe.from_bits("4-8-4", skip=("*lm_head*", "*.layers.0.*")))
    differ = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, plain.get_parameter(name))
    }
    assert len(differ) == 7 and all(".layers.1." in name for name in differ)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="leaves them at 16 bits"):
        gptq(make_model(), make_rows(), Recipe.from_bits("16-8-4"))
    with pytest.raises(ConfigError, match="a damping above 0"):
        gptq(make_model(), make_rows(), Recipe(), damping=0)
    with pytest.raises(DataError, match="no rows to calibrate on"):
        gptq(make_model(), make_rows()[:0], Recipe())


def test_products_that_cannot_be_inverted_are_an_error_with_a_way_out() -> None:
    products = torch.full((8, 8), torch.nan)
    with pytest.raises(TrainingError, match=r"of a linear's 8 inputs .*--calibration-rows"):
        round_columns(torch.randn(4, 8), products, QuantSpec(4))
