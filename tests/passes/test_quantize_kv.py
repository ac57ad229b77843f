from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from qatc.errors import PassError
from qatc.graph.nodes import find_attentions, find_linears, is_fake_quantize, shape_of
from qatc.numerics.hadamard import HADAMARD
from qatc.passes import (
    Canonicalize,
    CenterKeys,
    InsertKVCache,
    Pipeline,
    QuantizeKV,
    QuantizeWeights,
    RotateKeys,
)
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass


@pytest.mark.parametrize("layer", ["llama_layer", "masked_llama_layer", "neox_layer"])
def test_the_cache_site_is_what_attention_reads(layer: str, request: pytest.FixtureRequest) -> None:
    captured = request.getfixturevalue(layer)
    gm = Canonicalize()(captured.graph).graph_module
    heads = 4 if layer == "neox_layer" else 2
    edited = check_pass(
        QuantizeKV(QuantSpec(4)),
        gm,
        before={"qatc.fake_quantize": 0},
        after={"qatc.fake_quantize": 2, "aten.scaled_dot_product_attention": 1},
    )
    (attention,) = find_attentions(edited)
    for node in (attention.key, attention.value):
        assert is_fake_quantize(node) and node.kwargs["snap_scale"] is False
        assert shape_of(node)[1] == heads and shape_of(node)[3] == 8
    assert not is_fake_quantize(attention.query)


def test_the_projection_site_is_what_the_projections_give(llama_layer: Any) -> None:
    edited = check_pass(
        QuantizeKV(QuantSpec(4), site="projection"),
        Canonicalize()(llama_layer.graph).graph_module,
        before={},
        after={"qatc.fake_quantize": 2},
    )
    quantized = {
        linear.parameter
        for linear in find_linears(edited)
        if all(is_fake_quantize(user) for user in linear.node.users)
    }
    assert quantized == {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}


def test_the_projection_site_of_a_fused_projection_is_refused(neox_layer: Any) -> None:
    gm = Canonicalize()(neox_layer.graph).graph_module
    with pytest.raises(PassError) as raised:
        QuantizeKV(site="projection")(gm)
    assert str(raised.value) == (
        "K and V come from one projection (attention.query_key_value.weight);"
        " use the cache site (--kv-site cache)"
    )


def test_a_group_size_that_does_not_divide(llama_layer: Any) -> None:
    gm = Canonicalize()(llama_layer.graph).graph_module
    with pytest.raises(PassError, match="does not divide the 8 values of the cache site"):
        QuantizeKV(QuantSpec(4, group_size=3))(gm)
    QuantizeKV(QuantSpec(4, group_size=4))(gm)


def test_a_graph_without_attention(plain: Any) -> None:
    with pytest.raises(PassError, match="or leave K and V alone with 16 KV bits"):
        QuantizeKV()(plain.graph)


def test_a_projection_that_several_read() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in "qkv")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            key = self.k(x)
            key = key / key.norm(dim=-1, keepdim=True)
            return torch.nn.functional.scaled_dot_product_attention(self.q(x), key, self.v(x))

    example = (torch.randn(2, 2, 3, 4),)
    gm = torch.export.export(Attention(), example, strict=False).graph_module
    check_pass(
        QuantizeKV(site="projection"),
        Canonicalize()(gm).graph_module,
        before={},
        after={"qatc.fake_quantize": 2},
    )


@pytest.mark.parametrize(
    "values", [QuantSpec(), QuantSpec(8, range="full"), QuantSpec(4, clip="learned")]
)
def test_values_have_the_rule_of_keys(llama_layer: Any, values: QuantSpec) -> None:
    gm = Canonicalize()(llama_layer.graph).graph_module
    for pass_ in (
        QuantizeKV(QuantSpec(4), values=values),
        InsertKVCache(QuantSpec(4), False, values),
    ):
        with pytest.raises(PassError, match="in more than their bits"):
            pass_(gm)


def test_keys_without_a_projection() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    example = (torch.randn(2, 2, 3, 4),)
    gm = torch.export.export(Attention(), example, strict=False).graph_module
    with pytest.raises(PassError, match=r"0 were found; use the cache site \(--kv-site cache\)"):
        QuantizeKV(site="projection")(gm)
    with pytest.raises(PassError, match="one tensor here, and would get 8 and 4 bits"):
        QuantizeKV(QuantSpec(8), values=QuantSpec(4))(gm)
    edited = check_pass(QuantizeKV(), gm, before={}, after={"qatc.fake_quantize": 1})
    (attention,) = find_attentions(edited)
    assert attention.key is attention.value is not attention.query


def test_sites_and_weights_do_not_disturb_each_other(llama_layer: Any) -> None:
    gm = Canonicalize()(llama_layer.graph).graph_module
    QuantizeKV(site="projection")(gm)
    check_pass(QuantizeWeights(), gm, before={}, after={"qatc.fake_quantize": 9})


def test_rotated_keys_leave_the_scores(llama_layer: Any) -> None:
    """Two transforms, before the center is taken off and the quantizer; what comes out stays."""
    edited = check_pass(
        RotateKeys(),
        llama_layer.graph,
        llama_layer.args,
        before={"qatc.hadamard": 0},
        after={"qatc.hadamard": 2},
    )
    wanted = llama_layer.graph(*llama_layer.args)[0]
    torch.testing.assert_close(edited(*llama_layer.args)[0], wanted, rtol=1e-5, atol=1e-6)
    Pipeline((Canonicalize(), CenterKeys(), QuantizeKV(QuantSpec(4))))(edited)
    (attention,) = find_attentions(edited)
    centered = attention.key.args[0]
    assert isinstance(centered, Node) and isinstance(centered.args[0], Node)
    assert centered.target is torch.ops.aten.sub.Tensor and centered.args[0].target is HADAMARD
    counts = {"qatc.hadamard": 2, "qatc.fake_quantize": 2}
    check_pass(RotateKeys(), edited, before=counts, after=counts)


def test_rotated_keys_of_nothing(plain: Any) -> None:
    with pytest.raises(PassError, match="whose keys could be rotated"):
        RotateKeys()(plain.graph)
