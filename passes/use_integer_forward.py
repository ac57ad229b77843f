"""Compute quantized linears of a training graph on integers."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from qatc.graph.nodes import (
    Linear,
    argument,
    find_integer_linears,
    find_linears,
    quantizer_of,
    shape_of,
)
from qatc.kernels import integer_linear
from qatc.passes.base import Edits, GraphPass
from qatc.passes.quantize_linear_inputs import QuantizeLinearInputs
from qatc.passes.quantize_weights import QuantizeWeights


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
            _replace(gm, linear)
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
    whole_rows = all(argument(node, 2, "group_size", 0) == 0 for node in (x, weight))
    width = shape_of(linear.weight)[1]
    return whole_rows and int(width) <= integer_linear.LARGEST_WIDTH


def _replace(gm: GraphModule, linear: Linear) -> None:
    x, weight = quantizer_of(linear.input), quantizer_of(linear.weight)
    assert x is not None and weight is not None
    node = linear.node
    bias: Node | None = argument(node, 2, "bias", None)
    kwargs = {
        "x_range": argument(x, 3, "range", "restricted"),
        "weight_range": argument(weight, 3, "range", "restricted"),
    }
    if "scale_dtype" in weight.kwargs:
        kwargs["weight_scale_dtype"] = weight.kwargs["scale_dtype"]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(
            integer_linear.INTEGER_LINEAR,
            (x.args[0], weight.args[0], bias, x.args[1], weight.args[1]),
            kwargs,
        )
    new.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
