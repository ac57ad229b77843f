"""Turn lookups in a quantized table into lookups of packed integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import replace_node
from qatc.graph.nodes import Embedding, as_node, find_embeddings, shape_of, spec_of
from qatc.kernels import packed_embedding
from qatc.passes.base import Edits, GraphPass
from qatc.passes.lower_linear import add_packed_inputs
from qatc.passes.quantize_embeddings import QuantizeEmbeddings
from qatc.recipe.spec import spec_arg


@dataclass(frozen=True)
class LowerEmbedding(GraphPass):
    """Replace lookup and fake-quant node by ``torch.ops.qatc.packed_embedding``.

    The table, a graph input, gives way to its packed codes and its scales, named as
    :class:`qatc.passes.LowerLinear` names those of a weight. No float copy is left.
    """

    requires: ClassVar = (QuantizeEmbeddings,)

    def edit(self, gm: GraphModule) -> Edits:
        sites = [e for e in find_embeddings(gm) if e.readers]
        replaced: dict[Node, tuple[Node, Node]] = {}
        for site in sites:
            table = as_node(site.node.args[0])
            if table not in replaced:
                replaced[table] = add_packed_inputs(gm, table, spec_of(site.readers[0]))
            _replace(site, *replaced[table])
        gm.graph.eliminate_dead_code()
        for table in replaced:
            if table.users:
                raise PassError(
                    f"{table.meta['parameter']} is read by {next(iter(table.users))} as well, which"
                    " needs it in float; leave the embedding in full precision"
                )
            gm.graph.erase_node(table)
        done = sum(node.target is packed_embedding.PACKED_EMBEDDING for node in gm.graph.nodes)
        return Edits(matched=done, edited=len(sites))


def _replace(site: Embedding, packed: Node, scale: Node) -> None:
    width = int(shape_of(as_node(site.node.args[0]))[1])
    for reader in site.readers:
        read = (site.node.args[1], packed, scale, width, spec_arg(spec_of(reader)))
        dtype = {"dtype": site.node.meta["val"].dtype}
        replace_node(reader, packed_embedding.PACKED_EMBEDDING, read, dtype)
