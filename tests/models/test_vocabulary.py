"""Quantized head and embedding, from preparation to the packed model."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatc.errors import CheckpointError, ConfigError, ParityError
from qatc.evaluation.parity import verify
from qatc.export import export
from qatc.kernels.integer_linear import int_mm
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.models.preparation import prepare, prepared_state, quantized_specs, restore
from qatc.models.vocabulary import find_ends, tying_note
from qatc.output import load_codes, load_reference, loads_elsewhere, read_metadata
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.recipe.spec import QuantSpec
from qatc.report.usage import kernel_report, memory
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output

IDS = torch.randint(0, 112, (2, 9), generator=torch.Generator().manual_seed(3))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CASES = [(True, 8, 8), (True, 4, 4), (True, 8, 16), (False, 8, 4), (False, 16, 4), (True, 16, 8)]


def tiny(tied: bool = True) -> Any:
    return make_llama(tie_word_embeddings=tied, num_hidden_layers=1)


def recipe_of(head: int, embedding: int, bits: str = "4-8-4") -> Recipe:
    return Recipe.from_bits(bits, head_bits=head, embedding_bits=embedding)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Codes times scales in fp64: the contract, spelled without the code under test."""
    if bits == 16:
        return weight.detach().double()
    largest = weight.detach().abs().amax(-1, keepdim=True)
    steps = 2 ** (bits - 1) - 1
    scale = (largest / steps).to(torch.bfloat16).double()
    return (weight.detach().double() / scale).round().clamp(-steps, steps) * scale


def inside(model: Any, ids: Tensor = IDS) -> tuple[Tensor, Tensor, Tensor]:
    """What the embedding gives, what the head is given, and the logits."""
    seen: dict[str, Tensor] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    hooks = [
        embedding.register_forward_hook(lambda m, args, out: seen.update(embedded=out)),
        head.register_forward_hook(lambda m, args, out: seen.update(hidden=args[0])),
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen["embedded"], seen["hidden"], logits


def family(name: str) -> Any:
    """A model of one layer that does something of its own around its embedding or its head."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 112, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 64, "attn_implementation": "sdpa",
    }  # fmt: skip
    if name == "Gemma":  # multiplies what it looked up
        config: Any = transformers.GemmaConfig(
            intermediate_size=48, head_dim=8, num_key_value_heads=2, **sizes
        )
        return transformers.GemmaForCausalLM(config).eval()
    if name == "Granite":  # multiplies what it looked up, and divides its logits
        own = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "pad_token_id": 5}
        config = transformers.GraniteConfig(intermediate_size=48, **own, **sizes)
        return transformers.GraniteForCausalLM(config).eval()
    if name == "OPT":  # learned positions beside its tokens
        config = transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **sizes)
        return transformers.OPTForCausalLM(config).eval()
    model = transformers.PhiForCausalLM(transformers.PhiConfig(intermediate_size=48, **sizes))
    nn.init.normal_(model.lm_head.bias)  # an untied head with a bias
    return model.eval()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("tied", "head", "embedding"), CASES[1:4])
def test_the_numbers_of_the_prepared_model(
    tied: bool, head: int, embedding: int, integers: bool
) -> None:
    model = tiny(tied)
    prepare(model, recipe_of(head, embedding), compile=False, integer_forward=integers)
    with torch.no_grad():
        embedded, hidden, logits = inside(model)
    table = rounded(model.get_input_embeddings().weight, embedding)
    assert torch.equal(embedded, table[IDS].float())
    x = hidden.double()
    if head != 16:
        scale = (hidden.abs().amax(-1, keepdim=True) / 127).double()
        x = (x / scale).round() * scale
    wanted = x @ rounded(model.get_output_embeddings().weight, head).t()
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.lm_head.weight, tiny(tied).lm_head.weight)


def test_off_by_default_and_restored_as_it_was() -> None:
    model, original = make_llama(), make_llama()
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    assert not prepared_state(model).ends and len(quantized_specs(model)) == 14
    restore(model)
    prepare(model, recipe_of(8, 8), compile=False)
    restore(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


def test_the_gradient_reaches_a_tied_table_on_both_paths() -> None:
    """It is the gradient of the two uses apart: the table of the rows, and the head of all."""
    tied, apart = make_llama(), make_llama()
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    for model in (tied, apart):
        prepare(model, recipe_of(8, 8), compile=False)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    embedding, head = apart.model.embed_tokens.weight.grad, apart.lm_head.weight.grad
    assert embedding is not None and head is not None
    unseen = torch.ones(112, dtype=torch.bool)
    unseen[IDS.flatten()] = False
    assert not embedding[unseen].any() and embedding[~unseen].any() and head.abs().amax(-1).all()
    torch.testing.assert_close(tied.lm_head.weight.grad, embedding + head)


def test_masters_are_rounded_under_bf16_compute() -> None:
    """The codes are those of the fp32 masters, which a cast to bf16 would move."""
    model = make_llama()
    prepare(model, recipe_of(8, 8), compile=False, compute_dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedded, hidden, logits = inside(model)
    table = rounded(model.lm_head.weight, 8)
    assert torch.equal(embedded, table[IDS].float())
    x = hidden.to(torch.bfloat16).double()
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).double()
    wanted = ((x / scale).round() * scale) @ table.t()
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.double(), wanted, rtol=2**-8, atol=1e-4)


def test_a_scaled_embedding() -> None:
    model: Any = prepare(family("Gemma"), recipe_of(8, 8), compile=False)
    with torch.no_grad():
        embedded, _, _ = inside(model)
    factor = float(model.model.embed_tokens.embed_scale)
    assert factor != 1
    assert torch.equal(embedded, rounded(model.lm_head.weight, 8)[IDS].float() * factor)


@pytest.mark.parametrize("name", ["Gemma", "Granite", "OPT", "Phi"])
def test_what_models_do_around_their_ends_stays(name: str, tmp_path: Path) -> None:
    model, recipe = family(name), recipe_of(8, 8)
    output = make_output(tmp_path / "out", recipe, model)
    reference = prepare(load_reference(output), recipe, compile=False, integer_forward=True)
    with torch.no_grad():
        wanted, actual = inside(reference), inside(load(output, compile=False))
    assert torch.equal(actual[0], wanted[0])
    torch.testing.assert_close(actual[2], wanted[2], rtol=0, atol=1e-5)
    if name == "OPT":
        positions = "model.decoder.embed_positions.weight"
        stored = load_file(output / "model.safetensors")[positions]
        assert torch.equal(stored, model.get_parameter(positions))


# Stored and loaded


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
    loaded = load(make_output(tmp_path / "out", recipe_of(8, 8), tiny()), compile=False)
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
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
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


# What is refused


@pytest.mark.parametrize(
    ("recipe", "tied", "says"),
    [
        (recipe_of(8, 4), True, "one tied weight.* 4 bits in the embedding and 8 in the head"),
        (
            dataclasses.replace(recipe_of(8, 16), skip=(*DEFAULT_SKIP, "lm_h*")),
            True,
            r"quantizes lm_head\.weight and skips it with 'lm_h\*'; leave out --head-bits",
        ),
    ],
)
def test_contradictions(recipe: Recipe, tied: bool, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(make_llama(tie_word_embeddings=tied), recipe, compile=False)


def test_a_head_or_an_embedding_of_another_kind() -> None:
    class Head(nn.Module):
        weight = None

    model: Any = make_llama()
    model.lm_head = Head()
    with pytest.raises(ConfigError, match="lm_head is a Head that does more.*--head-bits"):
        prepare(model, recipe_of(8, 16), compile=False)
    model = make_llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ConfigError, match=r"embed_tokens is a Embedding.*--embedding-bits"):
        prepare(model, recipe_of(16, 8), compile=False)
    with pytest.raises(ConfigError, match="Linear has no head that transformers knows"):
        prepare(nn.Linear(4, 4), recipe_of(8, 16), compile=False)


def test_what_one_end_of_a_tied_weight_costs_is_said() -> None:
    model = make_llama(vocabulary=4096, hidden_size=512, num_hidden_layers=1)
    note = tying_note(model, recipe_of(8, 16))
    assert note is not None and "take 2 MB on top" in note and "--embedding-bits 8" in note
    assert tying_note(model, recipe_of(8, 8)) is None
    assert tying_note(model, Recipe()) is None
    assert tying_note(make_llama(tie_word_embeddings=False), recipe_of(8, 16)) is None
