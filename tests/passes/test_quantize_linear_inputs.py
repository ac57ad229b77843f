from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from qatc.errors import PassError
from qatc.graph.nodes import find_linears, is_fake_quantize
from qatc.numerics.fake_quant import fake_quantize
from qatc.numerics.hadamard import HADAMARD
from qatc.passes import Canonicalize, Pipeline, QuantizeLinearInputs, RotateLinearInputs
from qatc.recipe.spec import QuantSpec
from qatc.testing import check_pass


def test_linears_that_share_an_input_share_a_node(llama_layer: Any) -> None:
    """q, k, v | o | gate, up | down."""
    edited = check_pass(
        QuantizeLinearInputs(QuantSpec(8)),
        llama_layer.graph,
        before={"aten.linear": 7, "qatc.fake_quantize": 0},
        after={"aten.linear": 7, "qatc.fake_quantize": 4},
    )
    for linear in find_linears(edited):
        assert is_fake_quantize(linear.input)
        assert linear.input.args[1:] == ("int8",)
        assert linear.input.kwargs["snap_scale"] is False


def test_one_scale_per_token(plain: Any) -> None:
    edited = check_pass(
        QuantizeLinearInputs(QuantSpec(4)),
        plain.graph,
        plain.args,
        before={"aten.linear": 3},
        after={"qatc.fake_quantize": 3},
    )
    weight, bias, head, x = plain.args
    hidden = torch.nn.functional.linear(fake_quantize(x, QuantSpec(4)), weight, bias).relu()
    hidden = torch.nn.functional.linear(fake_quantize(hidden, QuantSpec(4)), weight, bias)
    wanted = torch.nn.functional.linear(fake_quantize(hidden, QuantSpec(4)), head)
    assert torch.equal(edited(*plain.args)[0], wanted)


def test_skipped_linears_read_the_input_as_it_was(llama_layer: Any) -> None:
    edited = check_pass(
        QuantizeLinearInputs(skip=("*.k_proj.weight", "mlp.down_proj.weight")),
        llama_layer.graph,
        before={},
        after={"qatc.fake_quantize": 3},
    )
    whole = {m.parameter for m in find_linears(edited) if not is_fake_quantize(m.input)}
    assert whole == {"self_attn.k_proj.weight", "mlp.down_proj.weight"}


def test_a_group_size_that_does_not_divide_names_the_linear(llama_layer: Any) -> None:
    with pytest.raises(PassError, match="the 48 values of the input of mlp.down_proj.weight; 16"):
        QuantizeLinearInputs(QuantSpec(8, group_size=32))(llama_layer.graph)


def test_skipping_everything_is_an_error(plain: Any) -> None:
    with pytest.raises(PassError, match="as those of GPT-2 and Falcon, are not supported"):
        QuantizeLinearInputs(skip=("*",))(plain.graph)


def test_rotated_inputs_are_turned_once_and_before_they_are_quantized(llama_layer: Any) -> None:
    """Linears that share an input share the transform; others read it as it was."""
    names = ("mlp.down_proj.weight", "self_attn.[qk]_proj.weight")
    edited = check_pass(
        RotateLinearInputs(names),
        llama_layer.graph,
        before={"qatc.hadamard": 0},
        after={"qatc.hadamard": 2, "aten.linear": 7},
    )
    linears = {linear.parameter: linear for linear in find_linears(edited)}
    q, k, v = (linears[f"self_attn.{name}_proj.weight"].input for name in "qkv")
    assert q is k and q.args == (v,) and q.target is HADAMARD
    QuantizeLinearInputs(QuantSpec(4))(edited)
    turned = linears["mlp.down_proj.weight"].input.args[0]
    assert isinstance(turned, Node) and turned.target is HADAMARD
    counts = {"qatc.hadamard": 2, "qatc.fake_quantize": 5}
    check_pass(RotateLinearInputs(names), edited, before=counts, after=counts)


def test_rotated_inputs_in_numbers(plain: Any) -> None:
    graph = plain.graph
    Pipeline((Canonicalize(), RotateLinearInputs(("head.weight",))))(graph)
    weight, bias, head, x = (tensor.double() for tensor in plain.args)
    hidden = ((x @ weight.T + bias).relu() @ weight.T + bias).reshape(-1, 8)
    signs = [[(-1) ** (i & j).bit_count() for j in range(8)] for i in range(8)]
    turned = hidden @ torch.tensor(signs, dtype=torch.float64) / 8**0.5
    torch.testing.assert_close(
        graph(*plain.args)[0].double().reshape(-1, 6), turned @ head.T, rtol=1e-5, atol=1e-6
    )


def test_rotated_inputs_of_nothing_are_an_error(llama_layer: Any) -> None:
    with pytest.raises(PassError, match=r"whose weight matches rotate_inputs=\['\*.fc2.weight'\]"):
        RotateLinearInputs(("*.fc2.weight",))(llama_layer.graph)
