"""Quantized head and embedding: what is prepared, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from qatc.errors import ConfigError
from qatc.models.preparation import prepare, prepared_state, quantized_specs, restore
from qatc.models.vocabulary import tying_note
from qatc.output import load_reference
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output
from tests.models.vocabularies import CASES, IDS, inside, recipe_of, rounded, tiny


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
        own: dict[str, Any] = {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "pad_token_id": 5,
        }
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
