"""Compute quantized linears of a training graph on integers."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qatc.graph.edits import replace_node
from qatc.graph.nodes import (
    Linear,
    argument,
    find_integer_linears,
    find_linears,
    quantizer_of,
    shape_of,
    spec_of,
)
from qatc.kernels import integer_linear
from qatc.passes.base import Edits, GraphPass
from qatc.passes.quantize_linear_inputs import QuantizeLinearInputs
from qatc.passes.quantize_weights import QuantizeWeights
from qatc.recipe.spec import spec_arg


@dataclass(frozen=True)
class UseIntegerForward(GraphPass):
    """Replace fake-quant(x), fake-quant(w), linear by one ``torch.ops.qatc.integer_linear``.

    The forward becomes an exact int32 product of int8 codes and one scaling, which is what integer
    kernels compute; the backward stays that of the fake-quantized linear, and keeps int8 codes for
    it instead of float copies. Linears with a scale per group of weights, or wider than an int32
    sum holds, stay as they are: their sums are of several scaled parts.
    """

    requires = (QuantizeLinearInputs, QuantizeWeights)

    def edit(self, gm: GraphModule) -> Edits:
        done = len(find_integer_linears(gm))
        sites = [linear for linear in find_linears(gm) if _is_exact(linear)]
        for linear in sites:
            _replace(linear)
        return Edits(matched=len(sites) + done, edited=len(sites))

    def nothing_matched(self) -> str:
        return (
            "there is no linear whose input and weight are both fake-quantized, with one scale per"
            " row of the weight"
        )


def _is_exact(linear: Linear) -> bool:
    x, weight = quantizer_of(linear.input), quantizer_of(linear.weight)
    if x is None or weight is None:
        return False
    whole_rows = not any(spec_of(node).group_size for node in (x, weight))
    width = int(shape_of(linear.weight)[1])
    return whole_rows and width <= integer_linear.largest_width(spec_of(x))


def _replace(linear: Linear) -> None:
    x, weight = quantizer_of(linear.input), quantizer_of(linear.weight)
    assert x is not None and weight is not None
    node = linear.node
    bias: Node | None = argument(node, 2, "bias", None)
    specs = (spec_arg(spec_of(x)), spec_arg(spec_of(weight)))
    args = (x.args[0], weight.args[0], bias, *specs)
    scale = {name: n for name, n in weight.kwargs.items() if name in ("start", "gain")}
    replace_node(node, integer_linear.INTEGER_LINEAR, args, scale)
