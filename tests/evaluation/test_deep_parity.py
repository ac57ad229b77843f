"""Bugs in a deep model are found as in a shallow one, in the one layer that has them.

A model of 16 layers at 4-8-4 moves with its own rounding ties as far as a bug would move a shallow
one: only what is compared on the same inputs tells the two apart. That is done layer by layer, so
that bugs are planted in 8 of them, at half of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qatc.evaluation.parity as parity
from qatc.errors import ParityError
from qatc.evaluation.checks import Check, ParityReport
from qatc.evaluation.global_parity import MARGIN, Texts
from qatc.evaluation.layer_parity import compare_in_float
from qatc.kernels import cached_attention
from qatc.models.preparation import prepare
from qatc.output import load_reference
from qatc.recipe.recipe import Recipe
from qatc.runtime.cache import PackedLayer
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output
from tests.evaluation.planting import LOWERED, broken

DEPTHS = (2, 8)
RECIPE = Recipe.from_bits("4-8-4")


def tiny(kind: str, depth: int, **changes: Any) -> Any:
    """A tiny model of any architecture whose biases say something."""
    settings: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


class Gate:
    """A trained and a lowered model, and the local part of the gate between the two."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reference = load_reference(directory)
        prepare(self.reference, RECIPE, compile=False, integer_forward=False)
        self.lowered: Any = load(directory, compile=False)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.reference.config.vocab_size
        self.ids = torch.randint(vocabulary, (12, 8), generator=generator)

    @property
    def layers(self) -> Any:
        return self.lowered.base_model.layers

    @property
    def faulty(self) -> int:
        """The layer that gets a bug of its own."""
        return len(self.layers) * 2 // 3

    @torch.no_grad()
    def message(self) -> str:
        """What a failed gate says, or nothing."""
        found = compare_in_float(self.reference, self.lowered, RECIPE, self.ids)
        try:
            ParityReport(tuple(found)).require("it")
        except ParityError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deep")
    models: dict[str, Any] = {}
    for depth in DEPTHS:
        models[f"llama {depth}"] = make_llama(num_hidden_layers=depth)
        models[f"qwen2 {depth}"] = tiny("qwen2", depth)
        models[f"mistral {depth}"] = tiny("mistral", depth, sliding_window={2: 8, 8: 64}[depth])
    return {name: make_output(folder / name, RECIPE, model) for name, model in models.items()}


@pytest.fixture(scope="module", params=DEPTHS)
def gate(outputs: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Gate]:
    gate = Gate(outputs[f"llama {request.param}"])
    assert gate.message() == ""
    yield gate
    assert gate.message() == "", "no test may leave its bug behind"


def test_a_deep_model_passes(tmp_path: Path) -> None:
    """Its own ties move it by 0.003 nats, three times what is allowed in any case."""
    model = make_llama(num_hidden_layers=16, hidden_size=64, intermediate_size=128)
    report = parity.verify(make_output(tmp_path / "o", RECIPE, model), reload=False)
    assert report.passed
    own = [c.figure for c in report.checks if "the trained graph from itself" in c.what]
    limits = [c.limit for c in report.checks if c.what.startswith("the KL") and c.limit]
    by_program = any("the decoding program" in c.what for c in report.checks)  # needs a compiler
    assert len(own) == 2 and len(limits) == 4 + by_program
    assert set(limits) == {max(parity.KL_SHARE * 0.05, MARGIN * max(own))}


def test_further_than_the_own_ties_is_too_far() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(9, 5, 11, generator=generator) for _ in range(2))
    texts = Texts(torch.zeros(9, 5, dtype=torch.long), least=1e-6)
    texts.neighbour("itself", logits, logits + 0.1 * noise)
    texts.judge("global", "a neighbour", logits, logits - 0.1 * noise)
    texts.judge("global", "a stranger", logits, logits + 0.2 * noise)
    texts.judge("global", "no number", logits, logits * float("nan"))
    assert [check.passed for check in texts.checks] == [True, True, False, False]
    assert Check("global", "reported", 9.0).passed
    assert ParityReport((texts.checks[-1],)).to_dict()["checks"][0]["figure"] is None


@pytest.mark.parametrize(
    "bug", [bug for bug in LOWERED if bug != "RoPE after the cache instead of before"]
)
def test_bugs_of_all_layers(gate: Gate, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted, where = LOWERED[bug]
    monkeypatch.setattr(owner, name, planted)
    place = where.split()[0]
    message = gate.message()
    assert "differs at model.layers.0, " in message and place in message
    assert "\n" not in message


@pytest.mark.parametrize("depth", DEPTHS)
def test_rope_after_the_cache(
    outputs: dict[str, Path], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, planted, _ = LOWERED["RoPE after the cache instead of before"]
    monkeypatch.setattr(owner, name, planted)
    message = Gate(outputs[f"llama {depth}"]).message()
    assert "differs at model.layers.0, key of attention (prefill)" in message


Q = "self_attn.q_proj.weight"


def one_ulp(scale: Tensor) -> Tensor:
    """The scale of one row, a bf16 step larger."""
    scale = scale.clone()
    scale[3] = scale[3].bfloat16().nextafter(torch.tensor(9.0).bfloat16()).float()
    return scale


def one_code(packed: Tensor) -> Tensor:
    packed = packed.clone()
    packed[5, 2] ^= 1
    return packed


STORED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a scale off by one step of bf16": ("weight_scale", one_ulp),
    "one code of one weight": ("weight_packed", one_code),
    "rows of another channel": ("weight_packed", lambda packed: packed.roll(1, 0)),
}


@pytest.mark.parametrize("bug", STORED)
def test_bugs_of_one_layers_weights(gate: Gate, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, edit = STORED[bug]
    module = gate.layers[gate.faulty].self_attn.q_proj
    monkeypatch.setitem(module._buffers, name, edit(module._buffers[name]))
    assert f"differs at model.layers.{gate.faulty}, {Q} (" in gate.message()


def test_weights_of_another_layer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (gate.layers[n].mlp.down_proj for n in (gate.faulty, gate.faulty - 1))
    buffers = dict(one._buffers)
    for name in buffers:
        monkeypatch.setitem(one._buffers, name, other._buffers[name])
        monkeypatch.setitem(other._buffers, name, buffers[name])
    assert f"differs at model.layers.{gate.faulty - 1}, mlp.down_proj.weight (" in gate.message()


def test_a_norm_of_one_layer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = gate.layers[gate.faulty].post_attention_layernorm
    monkeypatch.setattr(norm.weight, "data", norm.weight.data * 1.01)
    message = gate.message()
    assert (
        f"differs at model.layers.{gate.faulty}, input of mlp.gate_proj.weight (no cache)"
        in message
    )


def late(self: PackedLayer, new: int, *, error: int) -> None:
    self.length += new + error


def keep_one_less(self: PackedLayer) -> None:
    forget(self)
    if self.forgotten and not getattr(self, "less", False):
        setattr(self, "less", True)  # noqa: B010
        self.tensors = [t.roll(-1, 2) for t in self.tensors]


forget = PackedLayer._forget
_attend, _quantized = cached_attention._attend_to_codes, cached_attention.quantized_attention

CACHE: dict[str, tuple[Any, str, Any, str]] = {
    "tokens one slot too late": (
        PackedLayer, "advance", lambda self, new: late(self, new, error=1), "layers.0, "
    ),
    "tokens over the last of those before": (
        PackedLayer, "advance", lambda self, new: late(self, new, error=-1), "layers.0, "
    ),
    "the position before the own": (
        PackedLayer, "get_seq_length", lambda self: max(0, self.length - 1),
        "layers.0, query of attention",
    ),
    "heads of another group": (
        cached_attention, "_attend_to_codes", broken(_attend, query=lambda q: q.flip(1)),
        "layers.0, attention (decode)",
    ),
    "heads that take turns": (
        cached_attention, "_attend_to_codes",
        broken(_attend, query=lambda q: q.view(len(q), 2, 2, 1, -1).transpose(1, 2).flatten(1, 2)),
        "layers.0, attention (decode)",
    ),
    "V of the token before": (
        cached_attention, "_attend_to_codes", broken(_attend, value_codes=lambda v: v.roll(1, 2)),
        "layers.0, attention (decode)",
    ),
    "an older token lost when the cache grows": (
        PackedLayer, "reserve", lambda self, *args: lost(self, *args), "KV cache"
    ),
}  # fmt: skip

_reserve = PackedLayer.reserve


def lost(self: PackedLayer, template: Any, batch: int, slots: int, device: Any) -> None:
    """The first slot is not copied."""
    before = self.tensors
    _reserve(self, template, batch, slots, device)
    if before and before is not self.tensors:
        for tensor in self.tensors:
            tensor[:, :, 0] = 0


@pytest.mark.parametrize("bug", CACHE)
def test_bugs_of_the_cache(gate: Gate, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted, where = CACHE[bug]
    monkeypatch.setattr(owner, name, planted)
    message = gate.message()
    assert "differs at model.layers.0, " in message and where in message


@pytest.mark.parametrize("depth", DEPTHS)
def test_windows(outputs: dict[str, Path], depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is tried out even where it is longer than the text: 96 tokens in the deep model."""
    gate = Gate(outputs[f"mistral {depth}"])
    assert gate.message() == ""
    sizes = PackedLayer.get_mask_sizes
    for attribute, planted, where in (
        ("_forget", keep_one_less, "KV cache (decode of a long row)"),
        (
            "get_mask_sizes",
            lambda self, new: (sizes(self, new)[0], sizes(self, new)[1] + bool(self.forgotten)),
            "attention (decode of a long row)",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PackedLayer, attribute, planted)
            assert f"differs at model.layers.0, {where}" in gate.message()


def test_a_linear_whose_name_begins_like_attention(tmp_path: Path) -> None:
    gate = Gate(make_output(tmp_path / "o", RECIPE, tiny("gpt_neox", 2)))
    assert "attention.dense.weight_packed" in dict(gate.layers[0].named_buffers())
    assert gate.message() == ""


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_bias_of_one_layer(outputs: dict[str, Path], depth: int) -> None:
    gate = Gate(outputs[f"qwen2 {depth}"])
    assert gate.message() == ""
    projection = gate.layers[gate.faulty].self_attn.v_proj
    projection.bias = torch.nn.Parameter(torch.zeros_like(projection.bias), requires_grad=False)
    assert f"differs at model.layers.{gate.faulty}, self_attn.v_proj.weight (" in gate.message()
