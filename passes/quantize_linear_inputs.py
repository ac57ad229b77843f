"""Fake-quantize the inputs of linear layers, one scale per token."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import insert_quantizer
from qatc.graph.nodes import find_quantizable, is_fake_quantize, shape_of
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.recipe.spec import QuantSpec


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
