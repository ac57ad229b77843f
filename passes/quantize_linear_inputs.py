"""Fake-quantize the inputs of linear layers, one scale per token; turn some of them before."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import insert_between, insert_quantizer
from qatc.graph.nodes import (
    as_node,
    find_quantizable,
    is_fake_quantize,
    quantizer_of,
    shape_of,
)
from qatc.numerics.hadamard import HADAMARD
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.recipe.patterns import matches
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class RotateLinearInputs(GraphPass):
    """Insert one Hadamard transform before the linears that share an input (QuaRot, 2404.00456).

    It spreads the outliers of an input over all channels before they are quantized. Their weights
    have to be turned alike, see :func:`qatc.ptq.rotate_inputs`: the two cancel out.

    Args:
        weights: patterns of the names of their weights.
    """

    weights: tuple[str, ...] = ()
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        users: dict[Node, list[Node]] = {}
        done = 0
        for linear in find_quantizable(gm):
            if not matches(linear.parameter, self.weights):
                continue
            if _is_rotated(linear.input):
                done += 1
            else:
                users.setdefault(linear.input, []).append(linear.node)
        for source, linears in users.items():
            insert_between(source, linears, HADAMARD, (), {})
        return Edits(matched=len(users) + done, edited=len(users))

    def nothing_matched(self) -> str:
        return (
            "there is no aten.linear that may be quantized and whose weight matches"
            f" rotate_inputs={list(self.weights)}"
        )


def _is_rotated(node: Node) -> bool:
    quantizer = quantizer_of(node)
    source = node if quantizer is None else as_node(quantizer.args[0])
    return source.target is HADAMARD


@dataclass(frozen=True)
class QuantizeLinearInputs(GraphPass):
    """Insert one fake-quant node before the linears that share an input.

    Args:
        spec: bits, range and (optional) group size of the activations.
        skip: patterns of weight names whose linear keeps a full-precision input.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=8))
    skip: tuple[str, ...] = ()
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        users: dict[Node, list[Node]] = {}
        done = 0
        for linear in find_quantizable(gm, self.skip):
            if is_fake_quantize(linear.input):
                done += 1
                continue
            check_groups(self.spec, linear.input, f"the input of {linear.parameter}")
            users.setdefault(linear.input, []).append(linear.node)
        for source, linears in users.items():
            insert_quantizer(source, linears, self.spec, snap_scale=False)
        return Edits(matched=len(users) + done, edited=len(users))

    def nothing_matched(self) -> str:
        return (
            "there is no aten.linear whose weight is a parameter"
            f" and that skip={list(self.skip)} leaves to quantize (weights that are multiplied by"
            " other operations, as those of GPT-2 and Falcon, are not supported)"
        )


def check_groups(spec: QuantSpec, node: Node, what: str) -> None:
    """Raise ``PassError`` if the group size does not divide the last dimension of ``node``."""
    width = int(shape_of(node)[-1]) if "val" in node.meta else 0
    if spec.group_size and width % spec.group_size:
        divisors = [d for d in (16, 32, 64, 128, 256) if width % d == 0]
        choice = f"{', '.join(map(str, divisors))} divide it" if divisors else "leave groups out"
        raise PassError(
            f"group_size {spec.group_size} does not divide the {width} values of {what};"
            f" {choice}, or skip that layer"
        )
