"""Turn quantized linears into torchao's integer products."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from qatc.errors import PassError
from qatc.graph.nodes import spec_of
from qatc.kernels import packed_linear
from qatc.kernels.site import PHASES, Kernels
from qatc.kernels.table import choose
from qatc.passes.base import Edits
from qatc.passes.lower_linear import LowerLinear


@dataclass(frozen=True)
class LowerToTorchao(LowerLinear):
    """Replace fake-quant(x), fake-quant(w), linear by torchao's product of our codes and scales.

    It is :class:`LowerLinear` with torchao's kernels before all others. A linear that they cannot
    compute exactly, one with groups say, gets the next kernel of the table; a graph of which they
    can compute none is refused, with the reason.

    Raises:
        PassError: torchao has an exact kernel for none of the graph's quantized linears.
    """

    kernels: Kernels = "torchao"

    def edit(self, gm: GraphModule) -> Edits:
        edits = super().edit(gm)
        nodes = gm.graph.find_nodes(op="call_function", target=packed_linear.PACKED_LINEAR)
        choices = [
            choose(packed_linear.site_of(node, self.device), phase, self.kernels)
            for node in nodes
            for phase in PHASES
        ]
        if choices and all(choice.kernel.library != "torchao" for choice in choices):
            node, reasons = nodes[0], choices[0].passed_over
            bits = spec_of(node, "weight_spec").bits
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons if "torchao" in name)
            raise PassError(
                f"no kernel of torchao can compute the linears of this model, such as one of {bits}"
                f" bits ({why}); leave the choice to qatc (--kernels auto)"
            )
        return edits
