"""Turn quantized linears into linears on packed integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import replace_node
from qatc.graph.nodes import (
    argument,
    find_integer_linears,
    find_linears,
    parameter_name,
    quantizer_of,
    shape_of,
    spec_of,
)
from qatc.kernels import integer_linear, packed_linear
from qatc.kernels.site import PHASES, Kernels, Site
from qatc.kernels.table import choose
from qatc.numerics import packing
from qatc.passes.base import Edits, GraphPass
from qatc.passes.quantize_weights import QuantizeWeights
from qatc.recipe.spec import QuantSpec, spec_arg

PACKED, SCALE = "_packed", "_scale"
"""What the names of packed codes and scales add to the name of the weight that they replace."""


@dataclass(frozen=True)
class LowerLinear(GraphPass):
    """Replace linears over a quantized weight by ``torch.ops.qatc.packed_linear``.

    The weight, a graph input, gives way to two: its packed codes, named like the weight with
    ``_packed`` added, and its scales, with ``_scale``. No float copy is left. Kernels are taken
    from :data:`qatc.kernels.table.KERNELS`.

    Args:
        device: type of the device that the graph will run on.
        kernels: which of them are preferred, see :func:`qatc.kernels.table.choose`.
    """

    device: str = "cpu"
    kernels: Kernels = "auto"
    requires: ClassVar = (QuantizeWeights,)

    def edit(self, gm: GraphModule) -> Edits:
        sites = [_site(linear.node) for linear in [*find_integer_linears(gm), *find_linears(gm)]]
        replaced: dict[Node, tuple[Node, Node]] = {}
        lowered = [site for site in sites if site is not None]
        for site in lowered:
            if site["weight"] not in replaced:
                replaced[site["weight"]] = add_packed_inputs(gm, site["weight"], site["weights"])
            self._replace(site, *replaced[site["weight"]])
        gm.graph.eliminate_dead_code()
        for weight in replaced:
            if weight.users:
                raise PassError(
                    f"{weight.meta['parameter']} is read by {next(iter(weight.users))} as well,"
                    " which needs it in float; add it to the recipe's skip"
                )
            gm.graph.erase_node(weight)
        for scale in {node: None for site in lowered for node in site["scales"]}:
            gm.graph.erase_node(scale)
        done = sum(node.target is packed_linear.PACKED_LINEAR for node in gm.graph.nodes)
        return Edits(matched=done, edited=len(lowered))

    def _replace(self, found: dict[str, Any], packed: Node, scale: Node) -> None:
        outputs, inputs = (int(size) for size in shape_of(found["weight"]))
        site = Site(found["weights"], found["activations"], outputs, inputs, self.device)
        prefill, decode = (choose(site, phase, self.kernels).kernel.name for phase in PHASES)
        read = (found["x"], packed, scale, found["bias"], inputs)
        specs = (spec_arg(site.activations), spec_arg(site.weights))
        kernels = {"prefill": prefill, "decode": decode}
        replace_node(found["node"], packed_linear.PACKED_LINEAR, (*read, *specs), kernels)


def _site(node: Node) -> dict[str, Any] | None:
    """What a quantized linear is made of, whether it is computed on integers or in float."""
    bias = argument(node, 2, "bias", None)
    if node.target is integer_linear.INTEGER_LINEAR:
        x, weight = node.args[:2]
        activations, weights = spec_of(node, "x_spec"), spec_of(node, "weight_spec")
        rounds = node
    else:
        quantizer = quantizer_of(node.args[1])  # type: ignore[arg-type]
        if quantizer is None:
            return None
        rounds = quantizer
        weights, weight = spec_of(quantizer), quantizer.args[0]
        x, activations = node.args[0], QuantSpec(16)
        before = quantizer_of(x)  # type: ignore[arg-type]
        if before is not None and not spec_of(before).group_size:
            x, activations = before.args[0], spec_of(before)
    assert isinstance(weight, Node)
    if weight.op != "placeholder" or parameter_name(weight) is None:
        raise PassError(
            f"the weight of {node.name} is no parameter of its own but computed by {weight.name};"
            " add it to the recipe's skip"
        )
    return {
        "node": node, "x": x, "weight": weight, "bias": bias, "weights": weights,
        "activations": activations,
        "scales": [rounds.kwargs[name] for name in ("start", "gain") if name in rounds.kwargs],
    }  # fmt: skip


def add_packed_inputs(gm: GraphModule, weight: Node, spec: QuantSpec) -> tuple[Node, Node]:
    """Graph inputs for the packed codes and the scales of ``weight``, a graph input itself."""
    outputs, inputs = (int(size) for size in shape_of(weight))
    value = weight.meta["val"]
    dtype = torch.int8 if spec.bits == 8 else torch.uint8
    width = packing.packed_width(inputs, spec.bits)
    groups = inputs // spec.group_size if spec.group_size else 1
    with gm.graph.inserting_before(weight):
        packed = gm.graph.placeholder(f"{weight.name}{PACKED}")
        scale = gm.graph.placeholder(f"{weight.name}{SCALE}")
    packed.meta["val"] = value.new_empty((outputs, width), dtype=dtype)
    scale.meta["val"] = value.new_empty((outputs, groups), dtype=torch.float32)
    for node, suffix in ((packed, PACKED), (scale, SCALE)):
        node.meta["parameter"] = weight.meta["parameter"] + suffix
    return packed, scale
