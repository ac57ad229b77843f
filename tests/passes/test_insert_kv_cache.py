from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qatc.errors import PassError
from qatc.kernels.cached_attention import cache_shapes, cached_attention, quantized_attention
from qatc.passes import Canonicalize, InsertKVCache, QuantizeKV
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass


def test_attention_goes_through_a_cache(llama_layer: Any) -> None:
    gm = Canonicalize()(llama_layer.graph).graph_module
    edited = check_pass(
        InsertKVCache(),
        gm,
        before={"aten.scaled_dot_product_attention": 1},
        after={"aten.scaled_dot_product_attention": 0, cached_attention: 1},
    )
    inputs = [node for node in edited.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in inputs[-3:]] == ["key_cache", "value_cache", "positions"]
    key_cache, value_cache, positions = (node.meta["val"] for node in inputs[-3:])
    assert key_cache.shape[1:] == value_cache.shape[1:] and key_cache.shape[1::2] == (2, 8)
    assert positions.dtype == torch.int64 and positions.dim() == 2


def test_an_empty_cache_gives_what_causal_attention_gives(llama_layer: Any) -> None:
    gm = Canonicalize()(llama_layer.graph).graph_module
    edited = check_pass(InsertKVCache(), gm, before={}, after={})
    stale = [torch.full((2, 2, 9, 8), 1e9) for _ in range(2)]
    positions = torch.arange(5).expand(2, 5)
    with torch.no_grad():
        one = gm(*llama_layer.args)[0]
        other = edited(*llama_layer.args, *stale, positions)[0]
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_layer_captured_with_a_mask_is_refused(masked_llama_layer: Any) -> None:
    with pytest.raises(PassError, match="captured with a mask; capture it without one"):
        InsertKVCache()(Canonicalize()(masked_llama_layer.graph).graph_module)


def test_two_attentions_are_refused() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return x

    gm = torch.export.export(Two(), (torch.randn(2, 2, 3, 4),), strict=False).graph_module
    with pytest.raises(PassError, match="2 attentions has no place for one KV cache"):
        InsertKVCache()(gm)


def test_attention_to_what_comes_later_is_refused() -> None:
    """A cache holds what came before: bidirectional attention has no use for it."""

    class Bidirectional(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    gm = torch.export.export(Bidirectional(), (torch.randn(2, 2, 3, 4),), strict=False).graph_module
    with pytest.raises(PassError, match="is not causal"):
        InsertKVCache()(gm)


def quantized(
    captured: Any, spec: QuantSpec, site: Any = "cache", values: QuantSpec | None = None
) -> Any:
    gm = Canonicalize()(captured.graph).graph_module
    QuantizeKV(spec, site, values)(gm)
    return gm


@pytest.mark.parametrize(("bits", "value_bits"), [(2, 2), (4, 4), (5, 5), (8, 8), (8, 4), (3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_codes_are_those_of_the_trained_graph(
    llama_layer: Any, bits: int, value_bits: int, masked: bool
) -> None:
    gm = quantized(llama_layer, QuantSpec(bits), values=QuantSpec(value_bits))
    edited = check_pass(
        InsertKVCache(QuantSpec(bits), masked, QuantSpec(value_bits)),
        gm,
        before={"qatc.fake_quantize": 2},
        after={"qatc.fake_quantize": 0, quantized_attention: 1},
    )
    inputs = [n for n in edited.graph.nodes if n.op == "placeholder"]
    caches = inputs[-5 - masked :][:4]
    held = [shape for own in (bits, value_bits) for shape in cache_shapes(QuantSpec(own), 8)]
    assert [(n.meta["val"].shape[-1], n.meta["val"].dtype) for n in caches] == held
    assert [n.name for n in caches] == ["key_codes", "key_scale", "value_codes", "value_scale"]
    stale = [
        torch.full((2, 2, 9, n.meta["val"].shape[-1]), 77, dtype=n.meta["val"].dtype)
        for n in caches
    ]
    extra = [*stale, torch.arange(5).expand(2, 5)]
    if masked:
        extra.append(torch.ones(2, 1, 5, 9, dtype=torch.bool))
    with torch.no_grad():
        one = gm(*llama_layer.args)[0]
        other = edited(*llama_layer.args, *extra)[0]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_projection_site_is_refused(llama_layer: Any) -> None:
    gm = quantized(llama_layer, QuantSpec(4), "projection")
    with pytest.raises(PassError, match="--kv-site cache"):
        InsertKVCache(QuantSpec(4))(gm)


def test_other_bits_than_those_of_the_graph_are_refused(llama_layer: Any) -> None:
    with pytest.raises(PassError, match="to int4, .* is to have int8"):
        InsertKVCache(QuantSpec(8))(quantized(llama_layer, QuantSpec(4)))


def test_groups_are_refused(llama_layer: Any) -> None:
    with pytest.raises(PassError, match="leave kv.group_size out"):
        InsertKVCache(QuantSpec(4))(quantized(llama_layer, QuantSpec(4, group_size=4)))


def test_a_layer_that_convolves_has_more_state_than_keys_and_values() -> None:
    """A convolution with one tap mixes nothing."""

    class Convolving(torch.nn.Module):
        def __init__(self, taps: int) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(8, 8, taps, padding=taps - 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            q = x.unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    x = (torch.randn(2, 5, 8),)
    InsertKVCache()(torch.export.export(Convolving(1), x).module())
    with pytest.raises(PassError, match="convolves neighbouring tokens"):
        InsertKVCache()(torch.export.export(Convolving(2), x).module())
