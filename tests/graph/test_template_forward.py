"""A layer served by graphs: what its user may do with it, and what is refused."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import DynamicCache

from qatc.errors import CaptureError
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import GRAPHS_PER_MODULE, TemplateStore
from qatc.models.preparation import prepare, prepared_state, quantized_parameters, restore
from qatc.recipe.exceptions import Exceptions
from tests.conftest import make_small
from tests.graph.conftest import FLOAT, QUANTIZED, Factor, gradients, logits, tokens

# What stays as it was


def test_a_forward_of_its_own_comes_back() -> None:
    model = make_small()
    layer = model.model.layers[1]
    own = layer.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) * 2

    layer.forward = doubled
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    prepare(model, FLOAT, compile=False)
    assert torch.equal(logits(model, ids), wanted)
    restore(model)
    assert layer.forward is doubled and torch.equal(logits(model, ids), wanted)


class Adapted(nn.Module):
    """A linear below an adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.adapter = base, nn.Linear(4, 4)


def test_bits_stay_with_a_weight_that_moves() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = Exceptions(bits=(("0.weight", 6),), rotated=("1.weight",))
    forward = TemplateForward(module, "", TemplateStore(lambda gm, owner: None), own)
    before = forward.structure()
    assert before == forward.structure() and forward.present() == own
    plain = TemplateForward(module, "", forward.store)
    assert plain.structure() != before and plain.present() == Exceptions()
    module[0], module[1] = Adapted(module[0]), Adapted(module[1])
    found = forward.present()
    assert found.bits == (("0.base_layer.weight", 6),)
    assert found.rotated == ("1.base_layer.weight",)
    assert [name for name in found.skip if "adapter" in name]


def test_restoring_the_original_leaves_a_deep_copy_prepared() -> None:
    model = prepare(make_small(), QUANTIZED, compile=False)
    ids = tokens(2, 6)
    wanted = logits(model, ids)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), wanted)
    assert prepared_state(copied).store is prepared_state(model).store, "nothing is compiled again"
    restore(model)
    assert torch.equal(logits(copied, ids), wanted)
    assert quantized_parameters(copied)
    restore(copied)
    assert torch.equal(logits(copied, ids), logits(model, ids))
    assert not torch.equal(logits(copied, ids), wanted)


@pytest.mark.parametrize("how", ["use_cache", "past_key_values"])
def test_a_cache_is_refused(how: str) -> None:
    model = prepare(make_small(), FLOAT, compile=False)
    cache = {"use_cache": True} if how == "use_cache" else {"past_key_values": DynamicCache()}
    with pytest.raises(CaptureError) as raised:
        logits(model, tokens(2, 6), **cache)
    assert str(raised.value) == (
        "model.layers.0 was called with a DynamicCache, which a captured graph cannot take;"
        " generate with use_cache=False"
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(
    when: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 6)
    model: Any = prepare(make_small(), QUANTIZED, compile=False).train()
    wanted = gradients(model, ids)
    if when == "before":
        restore(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if when == "before":
        prepare(model, QUANTIZED, compile=False)
    runs: list[Any] = []
    store = prepared_state(model).store
    find = store.find

    def counted(*args: Any) -> Any:
        runs.append(args)
        return find(*args)

    monkeypatch.setattr(store, "find", counted)
    found = gradients(model, ids)
    assert len(runs) == 4, "each layer runs in the forward pass and again in the backward pass"
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_what_changes_after_prepare_is_seen() -> None:
    model = make_small()
    model.model.layers[0].mlp = Factor(model.model.layers[0].mlp, {"factor": 1.5})
    reference, ids = copy.deepcopy(model), tokens(2, 6)
    prepare(model, FLOAT, compile=False)
    before = logits(model, ids)

    def change(model: Any) -> None:
        layers = model.model.layers
        layers[0].mlp.held["factor"] = 3.0
        layers[0].self_attn.scaling *= 2
        layers[1].input_layernorm.variance_epsilon = 0.5

    change(model)
    change(reference)
    found = logits(model, ids)
    assert torch.equal(found, logits(reference, ids)) and not torch.equal(found, before)
    model.model.layers[0].self_attn.scaling /= 2
    reference.model.layers[0].self_attn.scaling /= 2
    assert torch.equal(logits(model, ids), logits(reference, ids))


class Scaled(nn.Module):
    """A region of its own, with arguments that it reads and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float = 1.0, **unread: Any) -> Tensor:
        out: Tensor = self.linear(x) * factor
        return out


def test_an_argument_that_is_not_read_takes_no_graph() -> None:
    model, x = prepare(Scaled(), FLOAT, compile=False), torch.randn(2, 3, 8)
    store, captured = prepared_state(model).store, []
    transform = store.transform

    def counted(gm: GraphModule, owner: TemplateForward) -> None:
        captured.append(owner)
        transform(gm, owner)

    store.transform = counted
    wanted = model(x)
    for step in range(5):
        found = model(x, items=step, ratio=step / 2, name=str(step), anything=object())
        assert torch.equal(found, wanted)
    assert len(captured) == 2, "without the arguments and with them"
    assert torch.equal(model(x, factor=True), model(x, factor=1)), "but a bool is another call"


def test_an_argument_that_is_read_keeps_a_bounded_number_of_graphs() -> None:
    model, x = prepare(Scaled(), FLOAT, compile=False), torch.randn(2, 3, 8)
    reference = copy.deepcopy(model)
    restore(reference)
    store = prepared_state(model).store
    with pytest.warns(UserWarning, match=r"as its argument 'factor' changes from call to call"):
        for step in range(GRAPHS_PER_MODULE + 1):
            assert torch.equal(model(x, factor=step), reference(x, factor=step))
    assert len(list(store)) == GRAPHS_PER_MODULE
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(x, factor=99)
    assert len(list(store)) == GRAPHS_PER_MODULE


def test_an_object_that_is_read_is_refused() -> None:
    model = prepare(Scaled(), FLOAT, compile=False)
    with pytest.raises(CaptureError, match="called with a SimpleNamespace, which a captured"):
        model(torch.randn(2, 3, 8), factor=SimpleNamespace())


# What the modules inside of a layer would do themselves


def test_hooks_inside_a_layer_are_refused() -> None:
    model: Any = prepare(make_small(), FLOAT, compile=False)
    ids = tokens(2, 6)
    calls: list[str] = []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *a: calls.append("layer"))
    logits(model, ids)
    assert calls == ["layer"]
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        handle = getattr(layer.mlp.up_proj, f"register_{register}")(lambda *a: None)
        with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp\.up_proj, which"):
            logits(model, ids)
        handle.remove()
    handle = layer.mlp.register_forward_hook(lambda *a: None)
    restore(model)
    with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp, which"):
        prepare(model, FLOAT, compile=False)
    handle.remove()
    assert prepare(model, FLOAT, compile=False)


def test_outputs_of_parts_of_a_layer_are_refused() -> None:
    model, ids = make_small(), tokens(2, 6)
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    prepare(model, FLOAT, compile=False)
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == 3 and all(map(torch.equal, found, wanted))
    with pytest.raises(CaptureError, match="output_attentions=True"):
        logits(model, ids, output_attentions=True)


# Compiled by its user


def test_a_prepared_model_may_be_compiled_as_a_whole() -> None:
    model, ids = prepare(make_small(), QUANTIZED, compile=False), tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in (ids, ids[:, :4]):
        assert torch.equal(logits(compiled, batch), logits(model, batch))
    wanted, found = gradients(model, ids), gradients(compiled, ids)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)
