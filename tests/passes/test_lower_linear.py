from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.errors import PassError
from qatc.numerics.minmax import quantize
from qatc.numerics.packing import pack
from qatc.passes import LowerLinear, QuantizeLinearInputs, QuantizeWeights, UseIntegerForward
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass


def trained(captured: Any, weights: QuantSpec, activations: QuantSpec, integers: bool) -> Any:
    gm = captured.graph
    if activations.quantizes:
        QuantizeLinearInputs(activations)(gm)
    QuantizeWeights(weights)(gm)
    if integers:
        UseIntegerForward()(gm)
    return gm


def lowered_args(gm: Any, lowered: Any, args: Any, spec: QuantSpec) -> list[Any]:
    """The arguments of the lowered graph: codes and scales where there was a weight."""
    held = {
        n.meta["parameter"]: value
        for n, value in zip((n for n in gm.graph.nodes if n.op == "placeholder"), args, strict=True)
        if "parameter" in n.meta
    }
    rest = list(args[len(held) :])
    found = []
    for node in lowered.graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get("parameter")
        if name is None:
            found.append(rest.pop(0))
        elif name.endswith("_packed"):
            codes, _ = quantize(held[name.removesuffix("_packed")], spec, snap=True)
            found.append(pack(codes, spec.bits))
        elif name.endswith("_scale"):
            found.append(quantize(held[name.removesuffix("_scale")], spec, snap=True)[1])
        else:
            found.append(held[name])
    return found


@pytest.mark.parametrize(
    ("weights", "activations", "integers", "tolerance"),
    [
        (QuantSpec(8), QuantSpec(8), True, 0.0),
        (QuantSpec(4), QuantSpec(8), True, 0.0),
        (QuantSpec(3), QuantSpec(6, range="full"), True, 0.0),
        (QuantSpec(4), QuantSpec(8), False, 1e-5),
        (QuantSpec(4, group_size=16), QuantSpec(8), False, 0.0),
        (QuantSpec(4), QuantSpec(16), False, 0.0),
    ],
)
def test_the_lowered_layer_computes_the_trained_one(
    llama_layer: Any, weights: QuantSpec, activations: QuantSpec, integers: bool, tolerance: float
) -> None:
    gm = trained(llama_layer, weights, activations, integers)
    edited = check_pass(
        LowerLinear(), gm, before={"qatc.packed_linear": 0}, after={"qatc.packed_linear": 7}
    )
    inputs = [n for n in edited.graph.nodes if n.op == "placeholder"]
    names = [n.meta["parameter"] for n in inputs if "parameter" in n.meta]
    assert len([n for n in names if n.endswith("_packed")]) == 7
    assert not any(n.endswith("_proj.weight") for n in names)
    for node in inputs:
        if node.meta.get("parameter", "").endswith("_packed"):
            assert node.meta["val"].element_size() == 1
    with torch.no_grad():
        wanted = gm(*llama_layer.args)[0]
        got = edited(*lowered_args(gm, edited, llama_layer.args, weights))[0]
    assert (got - wanted).abs().max().item() <= tolerance


def test_a_weight_read_elsewhere_is_refused() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner.weight.sum()

    from qatc.graph.capture import capture

    gm = capture(Tied(), (torch.randn(3, 4),), {}).graph_module
    QuantizeWeights()(gm)
    with pytest.raises(PassError, match="needs it in float; add it to the recipe's skip"):
        LowerLinear()(gm)


def test_unquantized_linears_stay(llama_layer: Any) -> None:
    gm = llama_layer.graph
    QuantizeWeights(skip=("mlp.*",))(gm)
    LowerLinear()(gm)
    assert sum("packed_linear" in str(n.target) for n in gm.graph.nodes) == 4


def test_nothing_quantized_is_an_error(llama_layer: Any) -> None:
    with pytest.raises(PassError, match="found nothing"):
        LowerLinear()(llama_layer.graph)
