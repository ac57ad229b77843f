from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qatc.errors import PassError
from qatc.graph.capture import capture
from qatc.numerics import packing
from qatc.numerics.minmax import quantize
from qatc.passes import LowerEmbedding, QuantizeEmbeddings
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * 3 + self.tokens(ids.flip(-1))


class Tied(Table):
    """Reads its table in another way as well."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.tokens(ids), self.tokens.weight)


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4), QuantSpec(3), QuantSpec(4, 5)])
def test_the_rows_are_those_that_were_trained(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    module = Table()
    table = module.tokens.weight.detach()
    gm = capture(module, (IDS,), {}).graph_module
    QuantizeEmbeddings(spec)(gm)
    (wanted,) = gm(table, IDS)
    lowered = check_pass(
        LowerEmbedding(),
        gm,
        before={"aten.embedding": 2, "qatc.fake_quantize": 2, "qatc.packed_embedding": 0},
        after={"aten.embedding": 0, "qatc.fake_quantize": 0, "qatc.packed_embedding": 2},
    )
    names = [n.meta.get("parameter") for n in lowered.graph.nodes if n.op == "placeholder"]
    assert names == ["tokens.weight_packed", "tokens.weight_scale", None]
    codes, scale = quantize(table, spec, snap=True)
    assert torch.equal(lowered(packing.pack(codes, spec.bits), scale, IDS)[0], wanted)


def test_a_table_that_is_read_in_float_as_well_is_refused() -> None:
    gm = capture(Tied(), (IDS,), {}).graph_module
    QuantizeEmbeddings(QuantSpec(8))(gm)
    with pytest.raises(PassError, match=r"tokens\.weight is read by linear as well"):
        LowerEmbedding()(gm)


def test_needs_a_quantized_table() -> None:
    assert LowerEmbedding.requires == (QuantizeEmbeddings,)
    with pytest.raises(PassError, match="LowerEmbedding found nothing to work on"):
        LowerEmbedding()(capture(Table(), (IDS,), {}).graph_module)
