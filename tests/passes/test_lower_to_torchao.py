from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.errors import PassError
from qatc.kernels.torchao_linear import obstacle
from qatc.passes import LowerLinear, LowerToTorchao, Pipeline, QuantizeWeights
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass
from tests.passes.test_lower_linear import lowered_args, trained

pytestmark = pytest.mark.skipif(obstacle("cpu") is not None, reason=str(obstacle("cpu")))

EIGHT = QuantSpec(8, range="full", rounding="reciprocal")


@pytest.mark.parametrize("weights", [QuantSpec(8), QuantSpec(4)])
def test_the_lowered_layer_computes_the_trained_one(llama_layer: Any, weights: QuantSpec) -> None:
    gm = trained(llama_layer, weights, EIGHT, integers=True)
    edited = check_pass(
        LowerToTorchao(), gm, before={"qatc.packed_linear": 0}, after={"qatc.packed_linear": 7}
    )
    nodes = [n for n in edited.graph.nodes if "packed_linear" in str(n.target)]
    assert {n.kwargs["prefill"] for n in nodes} == {"torchao int_scaled_matmul"}
    assert {n.kwargs["decode"] for n in nodes} == {"torchao int_scaled_matmul"}
    with torch.no_grad():
        wanted = gm(*llama_layer.args)[0]
        got = edited(*lowered_args(gm, edited, llama_layer.args, weights))[0]
    assert torch.equal(got, wanted)


def test_groups_are_refused_with_the_reason(llama_layer: Any) -> None:
    gm = trained(llama_layer, QuantSpec(4, group_size=16), EIGHT, integers=False)
    with pytest.raises(PassError, match="groups have several scales.*--kernels auto"):
        LowerToTorchao()(gm)


def test_what_cannot_goes_to_the_next_kernel(llama_layer: Any) -> None:
    """Some linears of a layer with a quantized input, and some without."""
    from qatc.passes import QuantizeLinearInputs

    gm = llama_layer.graph
    QuantizeLinearInputs(QuantSpec(8), skip=("mlp.*",))(gm)
    QuantizeWeights(QuantSpec(8))(gm)
    LowerToTorchao()(gm)
    kernels = {
        str(n.args[1].meta["parameter"]).split(".")[0]: n.kwargs["prefill"]
        for n in gm.graph.nodes
        if "packed_linear" in str(n.target)
    }
    assert kernels["self_attn"] == "torchao int_scaled_matmul"
    assert "torchao" not in kernels["mlp"]


def test_it_stands_where_the_other_lowering_does() -> None:
    assert LowerToTorchao.requires == LowerLinear.requires == (QuantizeWeights,)
    with pytest.raises(PassError, match="needs QuantizeWeights before it"):
        Pipeline((LowerToTorchao(),))
