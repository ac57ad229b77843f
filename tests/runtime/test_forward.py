"""A loaded layer: how often it is compiled, and how it may be called."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import qatc
from qatc.errors import CaptureError, ConfigError
from qatc.runtime.forward import SIGNATURES, runtime_of
from tests.conftest import make_llama, make_output
from tests.runtime.conftest import IDS, RECIPES, in_chunks, logits


def test_a_model_that_was_cast_or_moved(outputs: dict[str, Path]) -> None:
    model: Any = qatc.load(outputs["4-8-4"], compile=False)
    with pytest.raises(ConfigError, match=r"loaded for torch.float32 on cpu.*qatc\.load\(OUT"):
        model.to(torch.float64)(input_ids=IDS)


class Compiles:
    """Counts the graphs that Inductor gets."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: Any) -> Any:
        def backend(graph: Any, example_inputs: Any) -> Any:
            self.count += 1
            return graph.forward

        return torch.compile(gm, backend=backend)


@torch.no_grad()
def compile_count(layers: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    torch._dynamo.reset()
    output = make_output(directory, RECIPES["4-8-4"], make_llama(num_hidden_layers=layers))
    counter = Compiles()
    monkeypatch.setattr("qatc.runtime.forward.inductor", counter)
    model: Any = qatc.load(output, compile=True, decode_program=False)
    for prompt in (5, 9, 30):
        model.generate(
            input_ids=IDS[:1, :1].expand(1, prompt).contiguous(), max_new_tokens=20,
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return counter.count


def test_prefill_and_decode_are_two_graphs_at_any_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_count(2, tmp_path / "2", monkeypatch) == 2
    assert compile_count(6, tmp_path / "6", monkeypatch) == 2


def test_its_user_may_compile_a_loaded_model(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    wanted = logits(model, IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled, IDS), wanted)
    for got in (in_chunks(compiled, IDS, [9, 12]), in_chunks(compiled, IDS, [19, 1, 1])):
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_hooks_inside_a_loaded_layer_are_refused(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp, which"):
        logits(model, IDS)


class Items(float):
    """A number of which one can tell whether anything still holds it."""


def test_an_argument_that_changes_does_not_fill_the_memory(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    wanted = logits(model, IDS[:, :4])
    given: list[weakref.ref[Items]] = []
    for step in range(2 * SIGNATURES):
        items = Items(step)
        given.append(weakref.ref(items))
        assert torch.equal(logits(model, IDS[:, :4], items=items), wanted)
    del items
    gc.collect()
    kept = sum(reference() is not None for reference in given)
    assert kept <= SIGNATURES + 1
    assert len(list(runtime_of(model).scoring)) == 2, "with the argument and without it"
