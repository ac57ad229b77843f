from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qatc.errors import CaptureError
from qatc.graph.capture import capture, serves


class Layer(nn.Module):
    """A layer with every kind of argument and state: what capture has to sort out."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.plain = torch.randn(4)

    def forward(self, x: Tensor, factor: float, mask: Tensor | None = None, **extra: Any) -> Any:
        y = self.tied(self.linear(x)) * factor + self.table + self.plain
        if mask is not None:
            y = y * mask
        return {"y": y + extra["pair"][0], "sum": y.sum(-1), "none": None}


def call(template: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    parameters = module.named_parameters(remove_duplicate=False)
    tensors = dict(parameters) | dict(module.named_buffers())
    leaves = pytree.tree_leaves((args, kwargs))
    return template([tensors[name] for name in template.parameters], leaves)


def test_a_template_computes_what_the_module_does() -> None:
    torch.manual_seed(0)
    module = Layer()
    x, pair = torch.randn(2, 3, 4), (torch.randn(2, 3, 4), None)
    template = capture(module, (x, 0.5), {"mask": None, "pair": pair})
    assert template.parameters == ("linear.weight", "linear.bias", "tied.weight", "table")
    assert len(template.inputs) == 2
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
    for batch, length in ((2, 3), (1, 1), (5, 7)):
        x, pair = torch.randn(batch, length, 4), (torch.randn(batch, length, 4), None)
        wanted = module(x, 0.5, mask=None, pair=pair)
        found = call(template, module, x, 0.5, mask=None, pair=pair)
        assert found["none"] is None
        assert torch.equal(found["y"], wanted["y"]) and torch.equal(found["sum"], wanted["sum"])


def test_keyword_arguments_in_any_order() -> None:
    """Some reach named parameters and some ``**extra``, as in GPT-2, Mixtral and Cohere2."""
    module = Layer()
    x, pair = torch.randn(2, 3, 4), (torch.randn(2, 3, 4), None)
    template = capture(module, (x,), {"pair": pair, "factor": 2.0, "mask": torch.ones(2, 3, 1)})
    assert len(template.inputs) == 3


def test_parameters_are_inputs_and_not_constants() -> None:
    template = capture(Layer(), (torch.randn(2, 3, 4), 1.0), {"pair": (torch.ones(1), None)})
    nodes = template.graph_module.graph.nodes
    named = [n.meta["parameter"] for n in nodes if n.op == "placeholder" and "parameter" in n.meta]
    assert tuple(named) == template.parameters
    (constant,) = (n for n in nodes if n.op == "get_attr")
    assert constant.meta["val"].shape == (4,)


def test_sizes_that_fit() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    template = capture(Add(), (torch.randn(2, 3, 4), torch.randn(2, 3, 1)), {})
    x = torch.randn(5, 7, 4)
    assert template.fits((x, torch.randn(5, 7, 1)))
    assert not template.fits((x, torch.randn(5, 1, 1)))
    assert not template.fits((x, torch.randn(5, 7, 4)))
    assert not template.fits((x, torch.randn(6, 7, 1)))


def test_sizes_beyond_a_branch_of_the_code_do_not_fit() -> None:
    """Export follows the branch that the example takes, and tells for which sizes that holds."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] > 6 else x

    short = capture(Branch(), (torch.randn(2, 5, 4),), {})
    long = capture(Branch(), (torch.randn(2, 9, 4),), {})
    for length in (1, 2, 6, 7, 9, 50):
        leaves = (torch.randn(3, length, 4),)
        assert short.fits(leaves) is (length <= 6)
        assert long.fits(leaves) is (length > 6)


def test_the_empty_result_has_the_shape_of_the_result() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, kind: str) -> Any:
            wide = x.new_ones(4, 6)
            results = {"same": (x + 1,), "wide": x @ wide, "two": (x, x), "joined": x.flatten(0, 1)}
            return results[kind]

    example, leaves = torch.randn(2, 3, 4), [torch.randn(5, 7, 4)]
    empty = {
        kind: capture(Add(), (example, kind), {}).empty_result([*leaves, kind])
        for kind in ("same", "wide", "two", "joined")
    }
    assert empty["same"] is leaves[0]
    assert empty["wide"] is not None and empty["wide"].shape == (5, 7, 6)
    assert empty["two"] is None
    assert empty["joined"] is None


class Numbered(nn.Module):
    def __init__(self, number: int, used: bool) -> None:
        super().__init__()
        inner: Any = nn.Linear(4, 4)
        inner.layer_idx = number
        self.inner = inner
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        if self.used and self.inner.layer_idx % 2:
            x = F.relu(x)
        return self.inner(x)


def test_the_layer_numbers_that_are_read_are_known() -> None:
    x = (torch.randn(2, 4),)
    ignored = capture(Numbered(3, used=False), x, {})
    assert ignored.numbers == {} and serves([ignored.numbers], Numbered(4, used=False))
    read = capture(Numbered(3, used=True), x, {})
    assert read.numbers == {("inner", "layer_idx"): 3}
    assert serves([read.numbers], Numbered(3, used=True))
    assert not serves([read.numbers], Numbered(4, used=True))
    other = capture(Numbered(5, used=True), x, {})
    assert read.computes_like(other) and not read.computes_like(capture(Numbered(4, True), x, {}))


def test_constants_are_part_of_what_a_graph_computes() -> None:
    args = (torch.randn(2, 3, 4), 1.0)
    one, other = Layer(), Layer()
    pair = {"pair": (torch.ones(1), None)}
    assert capture(one, args, pair).computes_like(capture(one, args, pair))
    assert not capture(one, args, pair).computes_like(capture(other, args, pair))


def test_a_module_that_cannot_be_exported() -> None:
    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError) as raised:
        capture(Data(), (torch.randn(2, 3),), {}, "model.layers.3")
    message = str(raised.value)
    assert message.startswith("cannot capture model.layers.3 (Data): ")
    assert 'attn_implementation="sdpa"' in message and "\n" not in message


def test_running_statistics_are_updated() -> None:
    module, reference = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    template = capture(module, (torch.randn(3, 4),), {})
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        assert torch.equal(call(template, module, x), reference(x))
    pairs = zip(module.buffers(), reference.buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
