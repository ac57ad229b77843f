from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.errors import PassError
from qatc.graph.nodes import find_linears, weight_sites
from qatc.numerics.fake_quant import fake_quantize
from qatc.passes import Canonicalize, QuantizeWeights
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass

LINEARS = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [
    f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
]


def test_every_linear_gets_one_node_on_its_weight(llama_layer: Any) -> None:
    edited = check_pass(
        QuantizeWeights(QuantSpec(4)),
        llama_layer.graph,
        llama_layer.args,
        before={"aten.linear": 7, "qatc.fake_quantize": 0},
        after={"aten.linear": 7, "qatc.fake_quantize": 7},
    )
    assert sorted(weight_sites(edited)) == sorted(LINEARS)
    for linear in find_linears(edited):
        node = linear.weight
        assert node.args[1:] == ("int4",)
        assert node.kwargs == {"snap_scale": True}
        assert node.args[0].meta["parameter"] == linear.parameter  # type: ignore[union-attr]


def test_outputs_are_those_of_quantized_parameters(llama_layer: Any) -> None:
    spec = QuantSpec(4, group_size=16, range="full")
    edited = check_pass(QuantizeWeights(spec), llama_layer.graph, before={}, after={})
    quantized = [
        fake_quantize(p, spec, snap_scale=True) if p.dim() == 2 else p for p in llama_layer.args[:9]
    ]
    wanted = llama_layer.graph(*quantized, *llama_layer.args[9:])[0]
    assert torch.equal(edited(*llama_layer.args)[0], wanted)
    assert not torch.equal(llama_layer.graph(*llama_layer.args)[0], wanted)


def test_a_weight_that_is_used_twice_is_quantized_once(plain: Any) -> None:
    check_pass(
        QuantizeWeights(),
        plain.graph,
        before={"aten.linear": 3},
        after={"aten.linear": 3, "qatc.fake_quantize": 2},
    )


def test_weights_may_have_bits_of_their_own(llama_layer: Any) -> None:
    spec = QuantSpec(4, 16, range="full")
    others = (("mlp.up_proj.weight", 7), ("self_attn.q_proj.weight", 2))
    edited = check_pass(QuantizeWeights(spec, (), others), llama_layer.graph, before={}, after={})
    assert weight_sites(edited) == {
        name: QuantSpec(dict(others).get(name, 4), 16, range="full") for name in LINEARS
    }


def test_skipped_weights_are_left_alone(llama_layer: Any) -> None:
    edited = check_pass(
        QuantizeWeights(skip=("mlp.*", "*.o_proj.weight")),
        llama_layer.graph,
        before={},
        after={"qatc.fake_quantize": 3},
    )
    assert sorted(weight_sites(edited)) == sorted(LINEARS[:3])


def test_a_group_size_that_does_not_divide_names_the_weight(llama_layer: Any) -> None:
    with pytest.raises(PassError) as raised:
        QuantizeWeights(QuantSpec(4, group_size=32))(llama_layer.graph)
    assert str(raised.value) == (
        "group_size 32 does not divide the 48 values of mlp.down_proj.weight;"
        " 16 divide it, or skip that layer"
    )
    QuantizeWeights(QuantSpec(4, group_size=32), skip=("*.down_proj.weight",))(llama_layer.graph)


def test_skipping_everything_is_an_error(llama_layer: Any) -> None:
    with pytest.raises(PassError, match=r"skip=\['\*'\] leaves to quantize"):
        QuantizeWeights(skip=("*",))(llama_layer.graph)


def test_a_matrix_product_of_inputs_is_no_linear() -> None:
    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, y)

    example = (torch.randn(3, 4), torch.randn(5, 4))
    gm = torch.export.export(Product(), example, strict=False).graph_module
    with pytest.raises(PassError, match="no aten.linear whose weight is a parameter"):
        QuantizeWeights()(gm)


def test_graphs_with_attribute_parameters_work(plain: Any) -> None:
    """What ``torch.export.export(...).module()`` gives."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    gm = torch.export.export(module, (torch.randn(3, 4),), strict=False).module()
    assert isinstance(gm, torch.fx.GraphModule)
    Canonicalize()(gm)
    QuantizeWeights(skip=("2.*",))(gm)
    assert [*weight_sites(gm)] == ["0.weight"]
