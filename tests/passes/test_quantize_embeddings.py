from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qatc.errors import PassError
from qatc.graph.capture import capture
from qatc.numerics.fake_quant import fake_quantize
from qatc.passes import Canonicalize, QuantizeEmbeddings
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])


class Tables(nn.Module):
    """Two tables, the first of which is looked up twice and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds = nn.Embedding(6, 10, padding_idx=1), nn.Embedding(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * 3 + self.kinds(ids) + self.tokens(ids.flip(-1))


@pytest.fixture
def tables() -> Tables:
    torch.manual_seed(0)
    return Tables()


def graph(tables: Tables) -> GraphModule:
    return capture(tables, (IDS,), {}).graph_module


def weights(tables: Tables) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in tables.named_parameters()}


@pytest.mark.parametrize(("skip", "count"), [((), 3), (("kinds.*",), 2)])
def test_every_lookup_gets_one_node(tables: Tables, skip: tuple[str, ...], count: int) -> None:
    edited = check_pass(
        QuantizeEmbeddings(QuantSpec(4), skip),
        graph(tables),
        (*weights(tables).values(), IDS),
        before={"aten.embedding": 3, "qatc.fake_quantize": 0},
        after={"aten.embedding": 3, "qatc.fake_quantize": count},
    )
    nodes = [n for n in edited.graph.nodes if "fake_quantize" in str(n.target)]
    assert all(n.kwargs["snap_scale"] for n in nodes)


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4), QuantSpec(3, 5, "full")])
def test_rounded_rows_are_rows_of_the_rounded_table(tables: Tables, spec: QuantSpec) -> None:
    own = weights(tables)
    wanted = Tables()
    wanted.load_state_dict({n: fake_quantize(w, spec, snap_scale=True) for n, w in own.items()})
    edited = check_pass(QuantizeEmbeddings(spec), graph(tables), before={}, after={})
    (actual,) = edited(*own.values(), IDS)
    assert torch.equal(actual, wanted(IDS))


def test_nothing_to_do_is_an_error(plain: Any) -> None:
    with pytest.raises(PassError, match=r"no aten\.embedding whose table is a parameter"):
        QuantizeEmbeddings()(plain.graph)


def test_groups_must_divide_a_row(tables: Tables) -> None:
    with pytest.raises(PassError, match=r"does not divide the 10 values of tokens\.weight"):
        QuantizeEmbeddings(QuantSpec(8, 4))(graph(tables))


def test_needs_canonicalize() -> None:
    assert QuantizeEmbeddings.requires == (Canonicalize,)
