from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qatc.graph.capture import capture
from qatc.kernels import integer_linear
from qatc.kernels.gpu import launch
from qatc.kernels.packed_linear import PACKED_LINEAR, PACKED_LINEAR_AND, PACKED_LINEARS
from qatc.numerics.packing import unpack
from qatc.passes import JoinLinears, LowerLinear, QuantizeLinearInputs, QuantizeWeights
from qatc.passes.join_linears import joined_linears
from qatc.recipe.spec import QuantSpec
from tests.passes.conftest import Captured
from tests.passes.test_lower_linear import lowered_args

W4, A8 = QuantSpec(4), QuantSpec(8)


class Biased(nn.Module):
    """Four linears of one input, of which one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, n, bias=n != 8) for n in (24, 8, 16, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


class Summed(nn.Module):
    """A sum of two linears, and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parts
        y = third(first(x) + second(x.relu()))
        return y.relu() + y


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lowers a captured layer for a GPU with Triton, whose products a CPU computes in integers."""
    monkeypatch.setattr(launch, "obstacle", lambda device: None)
    calls: list[int] = []

    def linears(
        x: Any, x_scale: Any, packed: Any, scale: Any, bias: Any, bits: int, dtype: Any
    ) -> Any:
        calls.append(len(packed))
        found = []
        for held, steps, more in zip(packed, scale, bias, strict=True):
            sums = integer_linear.int_mm(x, unpack(held, bits, x.shape[1]))
            found.append(integer_linear.scale_sums(sums, x_scale, steps, more, dtype))
        return found

    def linear(*parts: Any) -> Any:
        x, x_scale, packed, scale, bias, bits, dtype, *rest = parts
        product = linears(x, x_scale, [packed], [scale], [bias], bits, dtype)[0]
        return product + rest[0] if rest else product

    def lower(captured: Any) -> GraphModule:
        gm = captured.graph
        QuantizeLinearInputs(A8)(gm)
        QuantizeWeights(W4)(gm)
        LowerLinear("cuda")(gm)
        return gm

    lower.calls = calls  # type: ignore[attr-defined]
    with torch.library._scoped_library("qatc", "FRAGMENT") as library:
        library.impl("triton_linear", linear, "CPU")
        library.impl("triton_linears", linears, "CPU")
        yield lower


@pytest.mark.parametrize(
    ("kind", "sizes", "sums"),
    [(None, [3, 1, 2, 1], 2), (Biased, [3, 1, 1], 0), (Summed, [1, 1, 1], 1)],
)
def test_linears_of_one_input_are_one_product_of_the_same_bits(
    lowered: Any, llama_layer: Any, kind: Any, sizes: list[int], sums: int
) -> None:
    layer = llama_layer
    if kind is not None:
        torch.manual_seed(0)
        module, x = kind(), torch.randn(2, 3, 16)
        layer = Captured(capture(module, (x,), {}), module, [x])
    gm = lowered(layer)
    args = lowered_args(layer.graph, gm, layer.args, W4)
    wanted = gm(*args)
    assert set(lowered.calls) == {1}
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    JoinLinears()(gm)
    lowered.calls.clear()
    got = gm(*args)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    assert lowered.calls == sizes
    found = gm.graph.find_nodes(op="call_function", target=PACKED_LINEAR_AND)
    assert len(found) == sums
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == placeholders


def test_what_differs_stays_apart(lowered: Any, llama_layer: Any) -> None:
    gm = lowered(llama_layer)
    groups = joined_linears(gm.graph)
    assert [len(group) for group in groups] == [3, 2]
    query, key, value = groups[0]
    query.args = (*query.args[:6], "int3")  # other bits
    key.kwargs = {"prefill": "int_mm", "decode": "int_mm"}  # another kernel
    assert [len(group) for group in joined_linears(gm.graph)] == [2]
    gate, up = groups[1]
    up.args = (gate, *up.args[1:])  # another input
    assert not joined_linears(gm.graph)
    JoinLinears()(gm)
    assert not gm.graph.find_nodes(op="call_function", target=PACKED_LINEARS)
    assert value.target is PACKED_LINEAR
