"""Graphs that models of one structure share within a piece of work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qatc.errors import CaptureError
from qatc.graph import captures
from qatc.graph.capture import capture
from qatc.models.preparation import prepare, prepared_state
from qatc.recipe.recipe import Recipe
from tests.conftest import make_llama

IDS = torch.randint(112, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were captured, in order."""
    names: list[str] = []

    def noting(module: Any, args: Any, kwargs: Any, name: str = "") -> Any:
        names.append(name)
        return capture(module, args, kwargs, name)

    monkeypatch.setattr(captures, "capture", noting)
    return names


def prepared(bits: str = "4-8-4", **changes: Any) -> Any:
    return prepare(make_llama(**changes), Recipe.from_bits(bits), compile=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_models_of_one_structure_are_captured_once(counted: list[str]) -> None:
    """And get what they would alone, whatever passes have made of the graphs of others."""
    alone = {bits: logits(prepared(bits, seed=3)) for bits in ("4-8-4", "8-16-16", "16-16-3")}
    assert len(counted) == 3
    with captures.shared():
        for _ in range(2):
            for bits, wanted in alone.items():
                assert torch.equal(logits(prepared(bits, seed=3)), wanted)
        assert len(counted) == 4
        one, other = (next(prepared_state(m).templates()) for m in (prepared(), prepared()))
        assert one.graph_module is not other.graph_module and one.computes_like(other)
        assert not {*one.graph_module.graph.nodes} & {*other.graph_module.graph.nodes}
    prepared()
    assert len(counted) == 5, "another piece of work begins anew"


def test_where_a_model_was_read_decides_no_graph(counted: list[str]) -> None:
    """But what else its configuration holds does, and where code is that transformers has not."""
    one, other, own, changed = (make_llama() for _ in range(4))
    one.config._name_or_path, other.config._name_or_path = "a/model", "its/output"
    changed.config.a_setting = "other"
    own.config.__class__ = type("Own", (type(own.config),), {"__module__": "remote.code"})
    own.config._name_or_path = "a/model"
    elsewhere = copy.deepcopy(own)
    elsewhere.config._name_or_path = "its/output"
    with captures.shared():
        captured = []
        for model in (one, other, changed, own, elsewhere):
            prepare(model, Recipe.from_bits("4-8-4"), compile=False)
            captured.append(len(counted))
    assert captured == [1, 1, 2, 3, 4]


def test_one_inside_of_another_is_one_with_it(counted: list[str]) -> None:
    with captures.shared():
        with captures.shared():
            prepared()
        prepared()
    assert len(counted) == 1


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {"hidden_size": 64}, {"attention_bias": True}],
)
def test_another_structure_is_captured(changes: Any, counted: list[str]) -> None:
    wanted = logits(prepared(**changes))
    with captures.shared():
        prepared()
        assert torch.equal(logits(prepared(**changes)), wanted)
    assert len(counted) == 3


def test_other_dtypes_and_arguments_are_captured(counted: list[str]) -> None:
    with captures.shared():
        model = prepared()
        prepare(make_llama().bfloat16(), Recipe(), compile=False)
        prepare(make_llama(), Recipe(), compile=False, compute_dtype=torch.bfloat16)
        assert len(counted) == 3
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        with torch.no_grad():
            model(input_ids=IDS, attention_mask=mask)
        assert len(counted) == 4


def test_hooks_are_refused_as_ever() -> None:
    with captures.shared():
        prepared()
        model = make_llama()
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(CaptureError, match="would never be called"):
            prepare(model, Recipe(), compile=False)


def test_code_that_was_patched_in_between_counts_in_the_next_piece_of_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = logits(prepared())
    mlp = type(make_llama().model.layers[0].mlp)
    own = mlp.forward
    with captures.shared():
        prepared()
        monkeypatch.setattr(mlp, "forward", lambda self, x: own(self, x) * 2)
        assert not torch.equal(logits(prepared()), before), "of a class it counts at once"
