"""Fake-quantize the weights of linear layers, one scale per output channel or group of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from qatc.graph.edits import add_parameter, insert_quantizer
from qatc.graph.nodes import find_quantizable, is_quantized, parameter_name, shape_of
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.quantize_linear_inputs import check_groups
from qatc.recipe.spec import QuantSpec

SCALE_START, SCALE_GAIN = "_scale_start", "_scale_gain"
"""What the names of a weight's learned scales add to its own, see :mod:`qatc.numerics.learned`."""


@dataclass(frozen=True)
class QuantizeWeights(GraphPass):
    """Insert a fake-quant node, with its scales rounded to bf16, between weight and linear.

    Args:
        spec: bits, range and (optional) group size of the weights.
        skip: patterns of weight names that stay in full precision.
        other_bits: names of weights with other bits than ``spec``, and these.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4))
    skip: tuple[str, ...] = ()
    other_bits: tuple[tuple[str, int], ...] = ()
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        users: dict[Node, list[Node]] = {}
        own, done = dict(self.other_bits), 0
        for linear in find_quantizable(gm, self.skip):
            if is_quantized(linear.weight):
                done += 1
                continue
            check_groups(self.spec, linear.weight, linear.parameter)
            users.setdefault(linear.weight, []).append(linear.node)
        for weight, linears in users.items():
            added = self._scales(gm, weight) if self.spec.learned else {}
            bits = own.get(parameter_name(weight) or "", self.spec.bits)
            spec = replace(self.spec, bits=bits)
            insert_quantizer(weight, linears, spec, snap_scale=True, **added)
        return Edits(matched=len(users) + done, edited=len(users))

    def _scales(self, gm: GraphModule, weight: Node) -> dict[str, Node]:
        """The learned scales of a weight, ``[N, G]``, as inputs of the graph."""
        name, (outputs, inputs) = parameter_name(weight), shape_of(weight)
        shape = (int(outputs), int(inputs) // (self.spec.group_size or int(inputs)))
        return {
            "gain": add_parameter(gm, f"{name}{SCALE_GAIN}", shape, weight),
            "start": add_parameter(gm, f"{name}{SCALE_START}", shape, weight),
        }

    def nothing_matched(self) -> str:
        return (
            "there is no aten.linear whose weight is a parameter"
            f" and that skip={list(self.skip)} leaves to quantize (weights that are multiplied by"
            " other operations, as those of GPT-2 and Falcon, are not supported)"
        )
