"""Fake-quantize the weights of linear layers, one scale per output channel or group of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from qatc.graph.edits import insert_quantizer
from qatc.graph.nodes import find_quantizable, is_quantized
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.quantize_linear_inputs import check_groups
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class QuantizeWeights(GraphPass):
    """Insert a fake-quant node, with its scales rounded to bf16, between weight and linear.

    Args:
        spec: bits, range and (optional) group size of the weights.
        skip: patterns of weight names that stay in full precision.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4))
    skip: tuple[str, ...] = ()
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        users: dict[Node, list[Node]] = {}
        done = 0
        for linear in find_quantizable(gm, self.skip):
            if is_quantized(linear.weight):
                done += 1
                continue
            check_groups(self.spec, linear.weight, linear.parameter)
            users.setdefault(linear.weight, []).append(linear.node)
        for weight, linears in users.items():
            insert_quantizer(weight, linears, self.spec, snap_scale=True)
        return Edits(matched=len(users) + done, edited=len(users))

    def nothing_matched(self) -> str:
        return (
            "there is no aten.linear whose weight is a parameter"
            f" and that skip={list(self.skip)} leaves to quantize (weights that are multiplied by"
            " other operations, as those of GPT-2 and Falcon, are not supported)"
        )
