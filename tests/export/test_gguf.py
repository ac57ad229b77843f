"""GGUF: the codes and values that were trained, as the package gguf and transformers read them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatc.errors import CheckpointError, ConfigError
from qatc.export import FORMATS, export
from qatc.export.gguf import blocks
from qatc.output import QuantizedWeight, load_codes, load_reference, open_output
from qatc.output.contents import Output
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import make_output, make_small
from tests.export.gguf_files import fields, file_in, of_bytes, tensors
from tests.output.conftest import assert_same_codes

SIZE = 336
"""Rows of the embedding: two more than the tokenizer has tokens."""

RECIPES = {
    "groups": Recipe.from_bits("4-8-16", group_size=32),
    "for llama.cpp": Recipe.from_bits("4-8-8", target="llama.cpp", preset="best"),
    "channels": Recipe.from_bits("4-8-4"),
    "wide groups": Recipe.from_bits("8-16-16", group_size=64),
    "few bits": Recipe.from_bits("2-8-16", weight_bits=(("*v_proj*", 3), ("*.1.mlp.*", 5))),
    "five bits": Recipe.from_bits("5-8-16", target="llama.cpp", preset="best"),
    "six bits": Recipe.from_bits("6-8-16"),
    "ends": Recipe.from_bits("4-8-16", group_size=32, head_bits=8, embedding_bits=8),
    "head": Recipe.from_bits("8-8-16", head_bits=6),
    "embedding": Recipe.from_bits("4-16-16", embedding_bits=4),
    "skipped": Recipe.from_bits("4-8-16", skip=("*lm_head*", "*embed*", "*k_proj*")),
    "float": Recipe.from_bits("16-16-16"),
}


def model_of(kind: str, **changes: Any) -> Any:
    settings = {"vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 128} | changes
    model = make_small(kind, head_dim=32, **settings)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn(value.shape) / 8)
    return model


def exported(root: Path, recipe: Recipe, model: Any, tokenizer: Any = None) -> tuple[Path, Path]:
    source = make_output(root / "source", recipe, model, tokenizer or of_bytes("gpt-2"))
    return source, export(source, root / "out", format="gguf")


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_holds_what_was_trained(name: str, tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=name != "head")
    source, out = exported(tmp_path, RECIPES[name], model)
    codes = load_codes(source)
    assert_same_codes(dict(FORMATS["gguf"].read(out)), codes)
    wanted = load_reference(source).state_dict()
    given = AutoModelForCausalLM.from_pretrained(out, gguf_file=file_in(out).name).state_dict()
    assert given.keys() == wanted.keys()
    for own, value in wanted.items():
        assert torch.equal(given[own], value), own
    types = {key: kind for key, (kind, _) in tensors(file_in(out)).items()}
    ends = {"token_embd.weight", "output.weight"}
    assert ends & types.keys() == ends if name in ("head", "embedding") else {"token_embd.weight"}
    linears = [kind for own, kind in types.items() if "blk" in own and "norm" not in own]
    kinds = {
        "wide groups": {"Q8_0"},
        "few bits": {"Q4_0", "Q5_0"},
        "five bits": {"Q5_0"},
        "six bits": {"Q8_0"},
        "head": {"Q8_0"},
        "skipped": {"Q4_0", "F32"},
        "float": {"F32"},
    }
    assert set(linears) == kinds.get(name, {"Q4_0"})


def rows_by_hand(value: Tensor, heads: int) -> Tensor:
    """Rows of each head so that those which the rotary embedding turns together are neighbours."""
    size = len(value) // heads
    rows = []
    for head in range(heads):
        for place in range(size // 2):
            rows += [value[head * size + place], value[head * size + place + size // 2]]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 80}),
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"intermediate_size": 80, "hidden_size": 128}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_every_architecture(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Codes, scales, biases and norms of each layer, the rows of q and k in their places."""
    model = model_of(kind, **changes).bfloat16()
    source, out = exported(tmp_path, Recipe.from_bits("4-8-16"), model)
    assert_same_codes(dict(FORMATS["gguf"].read(out)), load_codes(source))
    wanted, found = load_reference(source).state_dict(), tensors(file_in(out))
    said = fields(file_in(out))
    own = said["general.architecture"]
    assert own == {"mistral": "llama"}.get(kind, kind)
    width = 96 if model.config.intermediate_size == 80 else 128
    assert said[f"{own}.feed_forward_length"] == width
    assert said[f"{own}.attention.head_count_kv"] == 2
    assert said[f"{own}.context_length"] == (32 if kind == "mistral" else 64)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    layers = [name for name in wanted if ".layers." in name]
    assert len(found) == len(layers) + (2 if model.config.tie_word_embeddings else 3)
    for name in layers:
        _, _, layer, *_, module, what = name.split(".")
        value = wanted[name]
        if module in ("q_proj", "k_proj") and own == "llama":
            value = rows_by_hand(value, 4 if module == "q_proj" else 2)
        held_as, held = found[f"blk.{layer}.{names[module]}.{what}"]
        assert held_as == ("Q4_0" if value.dim() > 1 else "F32"), name
        assert torch.equal(held[tuple(map(slice, value.shape))], value), name
        rest = held.clone()
        rest[tuple(map(slice, value.shape))] = 0
        assert not rest.any()
        wide = {"gate_proj", "up_proj"} if width == 96 else set()
        assert len(held) == (96 if module in wide else len(value)), name
    assert found["token_embd.weight"][0] in ("F16", "BF16")


def test_zeros_around_an_mlp_change_nothing(tmp_path: Path) -> None:
    model = model_of("llama", intermediate_size=80)
    source, out = exported(tmp_path, RECIPES["channels"], model)
    config = load_reference(source)
    padded = AutoModelForCausalLM.from_pretrained(out, gguf_file=file_in(out).name)
    assert padded.config.intermediate_size == 96
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(padded(ids).logits, config(ids).logits, rtol=0, atol=1e-5)
    assert any("96 hidden values in place of 80" in n for n in notes_of(source))


def notes_of(source: Path) -> list[str]:
    return list(FORMATS["gguf"].notes(open_output(source)))


def test_rotary_embeddings_of_llama_3(tmp_path: Path) -> None:
    """What llama.cpp divides frequencies by is what transformers multiplies them by."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = model_of("llama", rope_parameters=rope)
    _, out = exported(tmp_path, RECIPES["groups"], model)
    plain = model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    held = tensors(file_in(out))["rope_freqs.weight"][1]
    assert held[0] == 1 and held[-1] == 8 and len(set(held.tolist())) > 3
    torch.testing.assert_close(held, factors, rtol=1e-6, atol=0)
    assert fields(file_in(out))["llama.rope.freq_base"] == 500


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_of_all_codes(kind: str, groups: int) -> None:
    spec = QuantSpec(int(kind[1]), None if groups == 1 else 128 // groups, "signed")
    generator = torch.Generator().manual_seed(groups)
    codes = torch.randint(
        spec.code_min, spec.code_max + 1, (33, 128), generator=generator, dtype=torch.int8
    )
    codes[0] = torch.arange(128).remainder(1 << spec.bits) + spec.code_min
    scale = torch.randn(33, groups, generator=generator).bfloat16().half().float()
    scale[1] = 2.0**-17
    weight = QuantizedWeight(codes, scale, spec)
    held = blocks.to_blocks(weight)
    assert held.shape == (33, 4 * blocks.BYTES[kind])
    back, scales = blocks.from_blocks(held, kind)
    assert torch.equal(back, codes)
    assert torch.equal(scales, scale.repeat_interleave(4 // groups, dim=1))


def changed(source: Path, **changes: Any) -> Output:
    return dataclasses.replace(open_output(source), **changes)


@pytest.mark.parametrize(
    ("reason", "kind", "recipe", "changes"),
    [
        ("one for every 16; quantize with --group-size 32", "llama", {"group_size": 16}, {}),
        ("do not divide the 48 inputs of model.layers.0.self", "llama", {}, {"hidden_size": 48}),
        ("models of type llama, mistral, qwen2, qwen3, and this is gemma", "gemma", {}, {}),
        ("of type default, linear and llama3", "llama", {}, {"rope": "yarn"}),
        ("sliding window", "qwen2", {}, {"use_sliding_window": True, "hidden_size": 128}),
        ("has 4 of 32 beside 64", "qwen2", {}, {}),
        ("with silu, and this model has gelu", "llama", {}, {"hidden_act": "gelu"}),
        ("no place for the tensor model.layers.0.self_attn.o_proj.bias", "mistral", {}, {}),
        ("rotates inputs", "llama", {"rotate_inputs": ("*.down_proj.weight",)}, {}),
        ("embedding 300 rows", "llama", {}, {"vocab_size": 300}),
    ],
)
def test_what_it_cannot_hold_is_refused(
    reason: str, kind: str, recipe: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    if changes.pop("rope", None):
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
        changes["rope_parameters"] = rope | {"original_max_position_embeddings": 64}
    model = model_of(kind, **changes)
    source = make_output(
        tmp_path / "source", Recipe.from_bits("4-8-16", **recipe), model, of_bytes("gpt-2")
    )
    output = open_output(source)
    if "o_proj.bias" in reason:
        bias = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}
        output = dataclasses.replace(output, state=dict(output.state) | bias)
    with pytest.raises(ConfigError, match=reason):
        FORMATS["gguf"].notes(output)


def test_a_scale_that_fp16_does_not_hold_is_named(tmp_path: Path) -> None:
    model = model_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[5, 32:] *= 1e-6
    source = make_output(tmp_path / "source", RECIPES["groups"], model, of_bytes("gpt-2"))
    with pytest.raises(
        ConfigError, match=rf"of those of {name}, such as .*e-0. in row 5.*--target"
    ):
        notes_of(source)
    good = make_output(tmp_path / "good", RECIPES["for llama.cpp"], model, of_bytes("gpt-2"))
    export(good, tmp_path / "out", format="gguf")


def test_it_needs_a_tokenizer(tmp_path: Path) -> None:
    source = make_output(tmp_path / "source", RECIPES["groups"], model_of("llama"))
    with pytest.raises(ConfigError, match="has no tokenizer.json; copy"):
        notes_of(source)


def test_it_needs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_output(
        tmp_path / "source", RECIPES["groups"], model_of("llama"), of_bytes("gpt-2")
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install gguf"):
        export(source, tmp_path / "out", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_card_commands_and_replacement(tmp_path: Path) -> None:
    model = model_of("llama").bfloat16()
    source = make_output(tmp_path / "source", RECIPES["channels"], model, of_bytes("gpt-2"))
    path = source / "qatc.json"
    told = json.loads(path.read_text())
    told |= {"model": "somebody/Tiny Llama", "license": {"license": "mit"}}
    path.write_text(json.dumps(told))
    out = export(source, tmp_path / "out", format="gguf")
    export(source, out, format="gguf", overwrite=True)
    names = {"Tiny-Llama-Q4_0.gguf", "README.md", "qatc-export.json"}
    assert {path.name for path in out.iterdir()} == names
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and "gguf" in front["tags"]
    total = 0
    found = tensors(file_in(out))
    for kind, bits in (("Q4_0", 4.5), ("F32", 32), ("BF16", 16), ("F16", 16)):
        own = [value.numel() for held_as, value in found.values() if held_as == kind]
        size = int(sum(own) * bits / 8)
        total += size
        line = f"| {kind} | {len(own)} | {sum(own):,} | {size:,} |"
        assert (line in card) == bool(own)
    assert f"in {total:,} bytes" in card
    assert 0 < file_in(out).stat().st_size - total < 20_000
    command = "llama-server -m {}Tiny-Llama-Q4_0.gguf --ctx-size 64 --flash-attn on"
    commands = FORMATS["gguf"].commands(open_output(source), out)
    assert commands[0].startswith(command.format(f"{out}/")) and command.format("") in card
    said = fields(file_in(out))
    assert said["general.file_type"] == 2 and said["general.quantization_version"] == 2
    assert said["general.license"] == "mit" and said["qatc.bits"] == "4-8-4"
    assert Recipe.from_dict(json.loads(said["qatc.recipe"])) == RECIPES["channels"]


@pytest.mark.parametrize(
    ("recipe", "size", "said"),
    [
        (Recipe.from_bits("16-16-16"), 32, ()),
        (Recipe.from_bits("4-8-16", target="llama.cpp"), 32, ()),
        (Recipe.from_bits("4-8-4"), 32, ("one scale per token; --target", "--cache-type-v q4_0")),
        (Recipe.from_bits("4-16-8"), 32, ("inputs in float", "--cache-type-k q8_0")),
        (
            Recipe.from_bits("4-8-8", value_bits=4),
            32,
            ("", "by --flash-attn on --cache-type-k q8_0 --cache-type-v q4_0, in blocks of 32; --"),
        ),
        (
            Recipe.from_bits("4-8-8", target="llama.cpp"),
            32,
            ("which llama.cpp is told to have by --flash-attn on --cache-type-k q8_0",),
        ),
        (Recipe.from_bits("4-8-4", target="llama.cpp"), 16, ("do not divide heads of 16",)),
    ],
)
def test_other_numerics_are_said(recipe: Recipe, size: int, said: tuple[str, ...]) -> None:
    from qatc.export.gguf.card import differences

    found = differences(recipe, size)
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    _, out = exported(tmp_path, RECIPES["groups"], model_of("llama"))
    path = file_in(out)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="damaged"):
        FORMATS["gguf"].read(out)
    path.unlink()
    with pytest.raises(CheckpointError, match="0 GGUF files"):
        FORMATS["gguf"].read(out)


def test_transformers_makes_the_same_tokens(tmp_path: Path) -> None:
    _, out = exported(tmp_path, RECIPES["groups"], model_of("llama"), of_bytes("llama-bpe"))
    read = AutoTokenizer.from_pretrained(out, gguf_file=file_in(out).name)
    text = "The 1234 old foxes, don't"
    assert read(text)["input_ids"] == of_bytes("llama-bpe")(text)["input_ids"]
