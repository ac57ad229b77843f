from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qatc.graph.nodes import find_attentions, shape_of
from qatc.passes import Canonicalize
from qatc.testing import check_pass, count_ops


def test_repeated_heads_are_folded(masked_llama_layer: Any) -> None:
    edited = check_pass(
        Canonicalize(),
        masked_llama_layer.graph,
        masked_llama_layer.args,
        before={"aten.expand": 2, "aten.scaled_dot_product_attention": 1},
        after={"aten.expand": 0, "aten.scaled_dot_product_attention": 1},
        check_outputs=1e-6,
    )
    (attention,) = find_attentions(edited)
    assert shape_of(attention.key)[1] == shape_of(attention.value)[1] == 2
    assert attention.node.kwargs["enable_gqa"] is True


def test_asserts_are_dropped(llama_layer: Any) -> None:
    assert "aten._assert_tensor_metadata" in count_ops(llama_layer.graph)
    check_pass(
        Canonicalize(),
        llama_layer.graph,
        llama_layer.args,
        before={},
        after={"aten._assert_tensor_metadata": 0},
        check_outputs=0,
    )


def test_sizes_are_read_off_the_hidden_states(masked_llama_layer: Any) -> None:
    edited = Canonicalize()(masked_llama_layer.graph).graph_module
    sizes = [n for n in edited.graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert sizes and all(n.args[0].name.endswith("tensors_0") for n in sizes)


def test_sizes_planted_on_the_mask_are_moved(masked_llama_layer: Any) -> None:
    gm = Canonicalize()(masked_llama_layer.graph).graph_module
    mask = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["val"].dim() == 4)
    size = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.sym_size.int)
    anchor, dim = size.args
    size.args = (mask, 0 if dim == 0 else 2)
    gm.recompile()
    assert Canonicalize()(gm).modified
    assert size.args == (anchor, dim)


def test_a_graph_without_anything_to_do_is_fine(plain: Any) -> None:
    gm = Canonicalize()(plain.graph).graph_module
    assert not Canonicalize()(gm).modified


def repeat(x: Tensor) -> Tensor:
    """Heads ``0 0 1 1``: what grouped-query attention means."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, 2, length, width).reshape(batch, -1, length, width)


def tile(x: Tensor) -> Tensor:
    """Heads ``0 1 0 1``."""
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, 2, heads, length, width).reshape(batch, -1, length, width)


def repeat_swapped(x: Tensor) -> Tensor:
    """``unsqueeze(2)``, but of the transposed heads and tokens."""
    return repeat(x.transpose(1, 2)).transpose(1, 2).flip(1)


def repeat_rows(x: Tensor) -> Tensor:
    """The repetition lies behind the tokens: as many numbers, in another order."""
    batch, heads, length, width = x.shape
    whole = x[:, :, :, None].expand(batch, heads, length, 2, width)
    return whole.reshape(batch, heads * 2, length, width)


def repeat_and_cut(x: Tensor) -> Tensor:
    """The last tokens alone, cut off after the repetition."""
    return repeat(x)[:, :, -3:]


def grouped(spelling: Callable[[Tensor], Tensor], tokens: int = 5) -> tuple[GraphModule, Any]:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, spelling(k), spelling(v))

    torch.manual_seed(0)
    heads = tokens * 2 if spelling is repeat_swapped else 4
    q, k, v = torch.randn(2, heads, tokens, 8), *torch.randn(2, 2, 2, tokens, 8)
    if spelling is repeat_swapped:
        q = torch.randn(2, 2, tokens * 2, 8)
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    exported = torch.export.export(
        Attention(), (q, k, v), dynamic_shapes=(dynamic, dynamic, dynamic), strict=False
    )
    return exported.graph_module, (q, k, v)


def test_the_right_order_of_heads_is_folded() -> None:
    gm, args = grouped(repeat)
    check_pass(
        Canonicalize(),
        gm,
        args,
        before={"aten.expand": 2},
        after={"aten.expand": 0},
        check_outputs=1e-6,
    )


@pytest.mark.parametrize("spelling", [tile, repeat_swapped, repeat_rows, repeat_and_cut])
def test_another_order_of_heads_is_not_folded(spelling: Callable[[Tensor], Tensor]) -> None:
    gm, args = grouped(spelling)
    edited = check_pass(
        Canonicalize(),
        gm,
        args,
        before={"aten.expand": 2},
        after={"aten.expand": 2},
        check_outputs=1e-6,
    )
    assert "enable_gqa" not in find_attentions(edited)[0].node.kwargs


def test_one_side_alone_is_not_folded() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, repeat(k), tile(v))

    torch.manual_seed(0)
    args = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    gm = torch.export.export(Attention(), args, strict=False).graph_module
    check_pass(
        Canonicalize(),
        gm,
        args,
        before={"aten.expand": 2},
        after={"aten.expand": 2},
        check_outputs=0,
    )
