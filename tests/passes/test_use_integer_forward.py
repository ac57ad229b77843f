from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.errors import PassError
from qatc.graph.nodes import find_integer_linears, spec_of, weight_sites
from qatc.kernels.integer_linear import INTEGER_LINEAR
from qatc.numerics.minmax import quantize
from qatc.passes import Pipeline, QuantizeLinearInputs, QuantizeWeights, UseIntegerForward
from qatc.recipe.spec import QuantSpec, spec_arg
from qatc.testing import check_pass


def quantized(captured: Any, **weights: Any) -> Any:
    gm = captured.graph
    QuantizeLinearInputs(QuantSpec(8), weights.get("skip", ()))(gm)
    QuantizeWeights(**({"spec": QuantSpec(4)} | weights))(gm)
    return gm


def test_every_quantized_linear_is_replaced(llama_layer: Any) -> None:
    gm = quantized(llama_layer)
    edited = check_pass(
        UseIntegerForward(),
        gm,
        llama_layer.args,
        before={"aten.linear": 7, "qatc.fake_quantize": 11},
        after={"aten.linear": 0, "qatc.fake_quantize": 0, "qatc.integer_linear": 7},
        check_outputs=1e-5,
    )
    assert weight_sites(edited) == weight_sites(gm)
    assert len(find_integer_linears(edited)) == 7


def test_biases_and_shared_weights(plain: Any) -> None:
    check_pass(
        UseIntegerForward(),
        quantized(plain),
        plain.args,
        before={"aten.linear": 3},
        after={"aten.linear": 0, "qatc.integer_linear": 3},
        check_outputs=1e-5,
    )


def test_skipped_linears_stay(llama_layer: Any) -> None:
    edited = check_pass(
        UseIntegerForward(),
        quantized(llama_layer, skip=("mlp.*",)),
        before={},
        after={"aten.linear": 3, "qatc.integer_linear": 4},
    )
    assert all("self_attn" in name for name in weight_sites(edited))


def test_ranges_are_kept(llama_layer: Any) -> None:
    gm = llama_layer.graph
    QuantizeLinearInputs(QuantSpec(8, range="full"))(gm)
    QuantizeWeights(QuantSpec(4))(gm)
    counts: Any = {"before": {}, "after": {}}
    edited = check_pass(UseIntegerForward(), gm, llama_layer.args, **counts, check_outputs=1e-5)
    node = find_integer_linears(edited)[0].node
    assert node.args[3:] == ("int8,range=full", "int4")


def test_groups_stay_in_float(llama_layer: Any) -> None:
    gm = llama_layer.graph
    QuantizeLinearInputs(QuantSpec(8))(gm)
    QuantizeWeights(QuantSpec(4, group_size=16))(gm)
    with pytest.raises(PassError, match="one scale per row of the weight"):
        UseIntegerForward()(gm)


def test_it_needs_both_quantizers_before_it() -> None:
    with pytest.raises(PassError, match="UseIntegerForward needs QuantizeWeights before it"):
        Pipeline((UseIntegerForward(),))


def test_bits_are_those_of_the_nodes(llama_layer: Any) -> None:
    gm = llama_layer.graph
    QuantizeLinearInputs(QuantSpec(6))(gm)
    QuantizeWeights(QuantSpec(3))(gm)
    wanted = gm(*llama_layer.args)[0]
    UseIntegerForward()(gm)
    assert torch.allclose(gm(*llama_layer.args)[0], wanted, atol=1e-5)
    assert find_integer_linears(gm)[0].node.args[3:] == ("int6", "int3")


def test_scales_that_fp16_holds_stay_so(llama_layer: Any) -> None:
    spec = QuantSpec(4, scale_dtype="float16")
    gm = quantized(llama_layer, spec=spec)
    UseIntegerForward()(gm)
    nodes = find_integer_linears(gm)
    assert nodes and all(spec_of(n.node, "weight_spec") == spec for n in nodes)
    x, weight = torch.randn(2, 8), torch.randn(3, 8) * 1e-6
    codes, scale = quantize(weight, spec, snap=True)
    x_codes, x_scale = quantize(x, QuantSpec(8))
    wanted = (x_codes.double() * x_scale.double()) @ (codes.double() * scale.double()).t()
    got = INTEGER_LINEAR(x, weight, None, "int8", spec_arg(spec))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-12)
