"""Fake-quantize the rows that are looked up in an embedding table, one scale per row."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from qatc.graph.edits import insert_quantizer
from qatc.graph.nodes import find_embeddings
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.quantize_linear_inputs import check_groups
from qatc.recipe.patterns import matches
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class QuantizeEmbeddings(GraphPass):
    """Insert a fake-quant node, with its scales rounded to bf16, behind every lookup in a table.

    A scale belongs to a row, so that to round the rows of a batch is to round the whole table, at a
    fraction of the work. Where the table is the weight of the output head as well, a row is an
    output channel of it, and codes and scales of the two are the same.

    Args:
        spec: bits, range and (optional) group size of the table.
        skip: patterns of names of tables that stay in full precision.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=8))
    skip: tuple[str, ...] = ()
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        sites = [e for e in find_embeddings(gm) if not matches(e.parameter, self.skip)]
        edited = 0
        for embedding in sites:
            if embedding.readers:
                continue
            check_groups(self.spec, embedding.node, embedding.parameter)
            users = list(embedding.node.users)
            insert_quantizer(embedding.node, users, self.spec, snap_scale=True)
            edited += 1
        return Edits(matched=len(sites), edited=edited)

    def nothing_matched(self) -> str:
        return (
            "there is no aten.embedding whose table is a parameter"
            f" and that skip={list(self.skip)} leaves to quantize"
        )
