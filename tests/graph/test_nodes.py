from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qatc.graph.edits import insert_between, insert_quantizer
from qatc.graph.nodes import (
    argument,
    find_attentions,
    find_linears,
    find_projections,
    is_fake_quantize,
    is_quantized,
    parameter_name,
    weight_sites,
)
from qatc.numerics import fake_quant
from qatc.recipe.patterns import matches
from qatc.recipe.spec import QuantSpec

aten = torch.ops.aten


class Example(nn.Module):
    """Two projections, one of them through a cast, and one attention with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.kv = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x)
        kv = F.linear(x, self.kv.weight.float())
        table = F.linear(x, x)  # no parameter: not a linear layer
        query, key, value = (t[None, None] for t in (q, kv.sin(), kv))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
        return out.sum() + table.sum()


@pytest.fixture
def graph() -> GraphModule:
    x, mask = torch.randn(3, 4), torch.ones(3, 3).bool()
    gm = torch.export.export(Example(), (x, mask), strict=False).module()
    assert isinstance(gm, GraphModule)
    return gm


def test_linears_are_those_with_a_parameter(graph: GraphModule) -> None:
    assert [linear.parameter for linear in find_linears(graph)] == ["q.weight", "kv.weight"]
    q, kv = find_linears(graph)
    assert q.weight.op == "get_attr" and kv.weight.op == "call_function"
    assert q.input is kv.input and q.input.op == "placeholder"


def test_an_attention_and_its_arguments(graph: GraphModule) -> None:
    (attention,) = find_attentions(graph)
    assert attention.mask is not None and attention.mask.name == "mask"
    assert attention.scale == 0.5 and not attention.is_causal
    q, kv = (linear.node for linear in find_linears(graph))
    assert find_projections(attention.query) == [q]
    assert find_projections(attention.key) == find_projections(attention.value) == [kv]


def test_arguments_by_position_or_by_name(graph: GraphModule) -> None:
    (attention,) = find_attentions(graph)
    node = attention.node
    assert argument(node, 5, "is_causal", False) is False
    node.args = (*node.args[:3], None, 0.0, True)
    assert attention.is_causal and attention.mask is None
    node.args = node.args[:3]
    node.kwargs = {"is_causal": True}
    assert attention.is_causal


def test_insert_between_moves_the_given_users_alone(graph: GraphModule) -> None:
    q, kv = find_linears(graph)
    users = [kv.node, q.node]  # in any order
    new = insert_between(q.input, users, fake_quant.FAKE_QUANTIZE, ("int8",), {})
    graph.graph.lint()
    graph.recompile()
    assert q.input is kv.input is new and is_fake_quantize(new)
    assert new.meta["val"] is new.args[0].meta["val"]  # type: ignore[union-attr]
    assert len(new.args[0].users) > 1  # type: ignore[union-attr]


def test_weight_sites_are_found_through_casts(graph: GraphModule) -> None:
    _, kv = find_linears(graph)
    cast = kv.weight
    assert not weight_sites(graph)
    quantized = insert_quantizer(cast.all_input_nodes[0], [cast], QuantSpec(4), snap_scale=True)
    assert [*weight_sites(graph)] == ["kv.weight"]
    assert is_quantized(cast) and not is_fake_quantize(cast)
    assert parameter_name(cast) == parameter_name(quantized) == "kv.weight"


@pytest.mark.parametrize(
    ("name", "patterns", "found"),
    [
        ("mlp.up.weight", ("mlp.*",), True),
        ("mlp.up.weight", ("attn.*", "*.weight"), True),
        ("mlp.up.weight", ("MLP.*",), False),
        ("mlp.up.weight", ("mlp",), False),
        ("mlp.up.weight", (), False),
    ],
)
def test_matches(name: str, patterns: tuple[str, ...], found: bool) -> None:
    assert matches(name, patterns) is found
