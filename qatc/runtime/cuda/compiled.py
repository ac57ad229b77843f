"""A lowered layer's graph, compiled for a GPU: in as few kernels as it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from qatc.graph.compilation import compile_graph
from qatc.graph.nodes import shape_of, spec_of
from qatc.kernels.cached_attention import quantized_attention
from qatc.kernels.gpu import attention
from qatc.passes import JoinLinears


def compile_for_gpu(gm: GraphModule) -> Callable[..., Any]:
    """Compile a template's graph, whose own nodes stay as they are."""
    return compile_graph(with_few_launches(gm).forward, **options_of(gm))


def with_few_launches(gm: GraphModule) -> GraphModule:
    """A graph that computes the same in fewer kernels."""
    found = copy.deepcopy(gm)
    JoinLinears()(found)
    return found


def options_of(gm: GraphModule) -> dict[str, bool]:
    """Those of Inductor, besides what the numerics need.

    It cuts a row of more than 8,192 values in parts to find the largest, for all multiprocessors to
    have some. With a row or a few that is three kernels, which wait for one another, in place of
    one. Where it sums over the slots of a cache itself, parts are worth that.
    """
    return {"split_reductions": _sums_over_slots(gm)}


def _sums_over_slots(gm: GraphModule) -> bool:
    for node in gm.graph.find_nodes(op="call_function", target=quantized_attention):
        specs = spec_of(node, "spec"), spec_of(node, "value_spec")
        keys, values = (int(shape_of(source)[3]) for source in node.args[1:3])
        if attention.obstacle("cuda", *specs, (keys, values)) is not None:
            return True
    return False
