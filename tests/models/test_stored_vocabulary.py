"""Quantized head and embedding: stored, loaded, and read by other runtimes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatc.errors import CheckpointError, ParityError
from qatc.evaluation.parity import verify
from qatc.export import export
from qatc.kernels.integer_linear import int_mm
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.models.preparation import prepare
from qatc.models.vocabulary import find_ends
from qatc.output import load_codes, load_reference, loads_elsewhere, read_metadata
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.report.usage import kernel_report, memory
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load
from tests.conftest import load_with_transformers, make_output
from tests.models.vocabularies import CASES, IDS, inside, recipe_of, rounded, tiny

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(("tied", "head", "embedding"), CASES)
def test_stored_and_loaded(tied: bool, head: int, embedding: int, tmp_path: Path) -> None:
    recipe, model = recipe_of(head, embedding), tiny(tied)
    output = make_output(tmp_path / "out", recipe, model)
    once = tied and head == embedding
    codes, stored = load_codes(output), load_file(output / "model.safetensors")
    wanted = {EMBED: embedding, HEAD: 16 if once else head}
    for name, bits in wanted.items():
        assert (name in codes) == (bits != 16)
        float_copy = stored[name].is_floating_point() if name in stored else False
        assert float_copy == (bits == 16 and not (once and name == HEAD))
        if bits != 16:
            assert codes[name].spec == QuantSpec(bits)
            master = model.get_parameter(name)
            assert torch.equal(codes[name].dequantize(), rounded(master, bits).float())
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] == once

    loaded = load(output, compile=False)
    assert not {EMBED, HEAD} & {n for n, _ in loaded.named_parameters()} - {
        name for name, bits in ((EMBED, embedding), (HEAD, head)) if bits == 16
    }
    if once:
        for suffix in ("_packed", "_scale"):
            both = [getattr(end.module, f"weight{suffix}") for end in find_ends(loaded)]
            assert both[0] is both[1]
    reference = prepare(load_reference(output), recipe, compile=False, integer_forward=True)
    with torch.no_grad():
        embedded, _, logits = inside(loaded)
        trained = inside(reference)
    assert torch.equal(embedded, trained[0])
    torch.testing.assert_close(logits, trained[2], rtol=0, atol=1e-5)
    if (tied, head, embedding) in CASES[:1] + CASES[3:4]:
        report = verify(output, trained=model.state_dict(), reload=False)
        assert report.passed and any("head or embedding" in check.what for check in report.checks)


def test_the_packed_model_computes_on_integers_in_its_dtype(tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", recipe_of(8, 8), tiny())
    loaded, codes = load(output, dtype=torch.bfloat16, compile=False), load_codes(output)[EMBED]
    embedded, hidden, logits = inside(loaded)
    assert torch.equal(embedded, codes.dequantize(torch.bfloat16)[IDS])
    x = hidden.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    x_codes = (x / scale).round().to(torch.int8).flatten(0, 1)
    sums = int_mm(x_codes, codes.codes).double().view(*IDS.shape, -1)
    wanted = (sums * scale.double() * codes.scale.double().t()).to(torch.bfloat16)
    assert logits.dtype is torch.bfloat16 and torch.equal(logits, wanted)
    (template,) = runtime_of(loaded).head
    assert [n.target for n in template.graph_module.graph.nodes].count(PACKED_LINEAR) == 1


def test_generate_and_copies(tmp_path: Path) -> None:
    loaded: Any = load(make_output(tmp_path / "out", recipe_of(8, 8), tiny()), compile=False)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = loaded.generate(input_ids=IDS, **options)
    assert wanted.shape == (2, 14)
    copied: Any = copy.deepcopy(loaded)
    assert copied.lm_head.weight_packed is copied.model.embed_tokens.weight_packed
    assert torch.equal(copied.generate(input_ids=IDS, **options), wanted)


def test_memory_and_kernels(tmp_path: Path) -> None:
    plain, both = (
        memory(
            load(make_output(tmp_path / str(bits), recipe_of(bits, bits), tiny()), compile=False)
        )
        for bits in (16, 4)
    )
    assert (plain.ends, plain.bf16_ends) == (0, 0)
    assert (both.ends, both.bf16_ends) == (112 * 32 // 2 + 112 * 4, 112 * 32 * 2)
    assert both.quantized == plain.quantized
    assert both.other == plain.other - 112 * 32 * 4
    uses = kernel_report(load(tmp_path / "4", compile=False))
    heads = [use for use in uses if use.layer == "lm_head"]
    assert [(use.shape, use.phase) for use in heads] == [
        ((112, 32), "prefill"),
        ((112, 32), "decode"),
    ]


@pytest.mark.parametrize("suffix", ["_packed", "_scale"])
def test_the_gate_finds_a_head_that_is_not_the_trained_one(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_output(tmp_path / "out", recipe_of(8, 8), tiny())

    def damaged(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        getattr(model.lm_head, f"weight{suffix}")[7].mul_(-1)
        return model

    monkeypatch.setattr("qatc.evaluation.parity.load", damaged)
    with pytest.raises(ParityError, match=f"not the trained ones differs at {EMBED}"):
        verify(output, reload=False).require("it")


def test_the_gate_finds_a_lookup_of_the_wrong_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qatc.kernels import packed_embedding

    output = make_output(tmp_path / "out", recipe_of(8, 8), tiny())
    look_up = nn.functional.embedding

    class Next:
        @staticmethod
        def embedding(ids: Tensor, table: Tensor) -> Tensor:
            return look_up((ids + 1) % len(table), table)

    monkeypatch.setattr(packed_embedding, "F", Next)
    found = [check for check in verify(output, reload=False).checks if not check.passed]
    assert any(check.where == "model.embed_tokens (prefill)" for check in found)


# Other runtimes


@pytest.mark.parametrize(("tied", "head", "embedding"), CASES[:4])
def test_transformers_loads_the_values_or_refuses(
    tied: bool, head: int, embedding: int, tmp_path: Path
) -> None:
    recipe = recipe_of(head, embedding)
    output = make_output(tmp_path / "out", recipe, tiny(tied))
    exported = export(output, tmp_path / "exported")
    assert loads_elsewhere(exported)
    if not loads_elsewhere(output):
        with pytest.raises(ValueError, match="run: qatc export"):
            AutoModelForCausalLM.from_pretrained(output)
    state = load_reference(output).state_dict()
    for directory in filter(loads_elsewhere, (output, exported)):
        model = load_with_transformers(directory)
        model(IDS)  # decompresses
        assert model.state_dict().keys() >= state.keys()
        for name, value in state.items():
            assert torch.equal(model.state_dict()[name], value), name
        if head != 16:
            assert model.lm_head.quantization_scheme.input_activations.num_bits == 8
    for name, weight in load_codes(exported).items():
        same = load_codes(output).get(name, load_codes(output).get(EMBED))
        assert same is not None and torch.equal(weight.codes, same.codes)
    with torch.no_grad():
        wanted = load(output, compile=False)(IDS).logits
        assert torch.equal(load(exported, compile=False)(IDS).logits, wanted)


def test_outputs_from_before_are_read(tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", Recipe.from_bits("4-8-4"), tiny())
    with torch.no_grad():
        wanted = load(output, compile=False)(IDS).logits
    path = output / "qatc.json"
    metadata = json.loads(path.read_text())
    assert metadata.pop("specs") == {} and metadata["format_version"] == 3
    metadata["format_version"] = 2
    for name in ("head", "embedding"):
        del metadata["recipe"][name]
    path.write_text(json.dumps(metadata))
    with torch.no_grad():
        assert torch.equal(load(output, compile=False)(IDS).logits, wanted)


@pytest.mark.parametrize("specs", [3, {HEAD: {"bits": 5}}, {HEAD: {"bits": 9, "layout": "x"}}])
def test_damaged_specs(specs: Any, tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", recipe_of(8, 16), tiny())
    path = output / "qatc.json"
    path.write_text(json.dumps(read_metadata(output) | {"specs": specs}))
    with pytest.raises(CheckpointError, match=r"qatc\.json"):
        load_codes(output)
