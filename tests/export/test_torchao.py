"""torchao: transformers' own loader finds the codes that were trained, and torchao's rule runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import qatc
from qatc.errors import CheckpointError, ConfigError
from qatc.evaluation.parity import verify
from qatc.export import FORMATS, export
from qatc.output import QuantizedWeight, load_codes, load_reference, open_output
from qatc.output import directory as directory_module
from qatc.output import torchao as held
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import load_with_transformers, make_output
from tests.export.conftest import (
    RECIPES,
    UNHELD,
    assert_held,
    linear_of_torchao,
    run_by,
    width_of,
)
from tests.output.conftest import IDS, assert_same_codes, logits, make_model, make_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_the_codes_that_were_trained(
    name: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    model = make_model(tied=tied, dtype=dtype, width=width_of(recipe))
    source = make_output(tmp_path / "source", recipe, model, make_tokenizer())
    given = qatc.load_codes(source)
    if {"lm_head.weight", "model.embed_tokens.weight"} & given.keys() and name.startswith("ends"):
        given |= {"lm_head.weight": given["model.embed_tokens.weight"]} if tied else {}

    out = export(source, tmp_path / "out", format="torchao")
    loaded = load_with_transformers(out)
    assert loaded.dtype == dtype
    assert_held(loaded, given)
    for own, value in open_output(source).state.items():
        assert torch.equal(loaded.state_dict()[own], value), own

    back = FORMATS["torchao"].read(out)
    assert_same_codes(dict(back), given)

    wanted = load_reference(source)
    if recipe.activations.quantizes:
        if dtype == torch.float32:
            run_by(wanted, given, loaded)
            assert torch.equal(logits(loaded), logits(wanted))
            assert torch.equal(logits(loaded, IDS[:1, :1]), logits(wanted, IDS[:1, :1]))
    elif dtype == torch.float32:
        torch.testing.assert_close(logits(loaded), logits(wanted), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(logits(loaded).float(), logits(wanted), rtol=0.1, atol=0.3)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 22)


def test_an_export_is_an_output(tmp_path: Path) -> None:
    """qatc runs it as it runs the source, and it can be exported again."""
    recipe = Recipe.from_bits("4-8-4", head_bits=4, embedding_bits=4)
    source = make_output(tmp_path / "source", recipe, make_model(), make_tokenizer())
    out = export(source, tmp_path / "out", format="torchao")
    assert verify(out, reload=False).passed
    wanted = logits(qatc.load(source, compile=False))
    assert torch.equal(logits(qatc.load(out, compile=False)), wanted)
    again = export(out, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert_same_codes(load_codes(again), load_codes(out))
    export(source, out, format="torchao", overwrite=True)


def test_shards(tmp_path: Path) -> None:
    """Each file's header must know all tensors: transformers keeps the last one's list."""
    source = make_output(tmp_path / "source", RECIPES["ends"], make_model())
    out = tmp_path / "out"
    out.mkdir()
    directory_module.write_output(out, open_output(source), max_shard_bytes=3_000, form="torchao")
    assert len(list(out.glob("model-*.safetensors"))) > 5
    model = load_with_transformers(out)
    assert_held(model, load_codes(out))
    whole = export(source, tmp_path / "whole", format="torchao")
    assert torch.equal(logits(model), logits(load_with_transformers(whole)))


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (7, 13), (33, 577), (192, 64)])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_weights_of_odd_sizes(rows: int, width: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = QuantizedWeight.from_float(
        torch.randn(rows, width, generator=generator), QuantSpec(bits)
    )
    tensor = held.int8_tensor(weight, torch.float32, quantizes_inputs=True)
    x = torch.randn(17, width, generator=generator)
    x[3], x[4] = 0, x[4] * 1e-9  # below the smallest scale
    assert torch.equal(nn.functional.linear(x, tensor), linear_of_torchao(x, weight))


@pytest.mark.parametrize("reason", UNHELD)
def test_what_torchao_cannot_hold_is_refused(reason: str, tmp_path: Path) -> None:
    recipe = UNHELD[reason]
    source = make_output(tmp_path / "source", recipe, make_model(tied=False, width=64))
    with pytest.raises(ConfigError, match=reason):
        FORMATS["torchao"].notes(open_output(source))
    with pytest.raises(ConfigError, match=reason):
        export(source, tmp_path / "out", format="torchao")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe.from_bits("4-16-16"), ()),
        (Recipe.from_bits("8-8-16", target="torchao"), ()),
        (RECIPES["8-8-16"], ("trained with max / 127)", "--target torchao")),
        (
            Recipe(activations=QuantSpec(8, range="full"), kv=QuantSpec()),
            ("another rounding", "--target torchao"),
        ),
        (Recipe.from_bits("4-16-4"), ("no KV quantization (4 bits here)",)),
        (RECIPES["4-8-4"], ("no KV", "max / 127)", "--target torchao")),
    ],
)
def test_other_numerics_are_said_in_a_line(recipe: Recipe, said: tuple[str, ...]) -> None:
    output: Any = type("Opened", (), {"recipe": recipe})
    notes = FORMATS["torchao"].notes(output)
    assert len(notes) == bool(said)
    assert all(part in note for note in notes for part in said)
    assert all("--target" in note for note in notes) == ("--target torchao" in said or not said)


def test_the_card_says_what_is_so(tmp_path: Path) -> None:
    source = make_output(tmp_path / "source", RECIPES["4-8-4"], make_model(dtype=torch.bfloat16))
    out = export(source, tmp_path / "out", format="torchao")
    card = (out / "README.md").read_text()
    codes = load_codes(out)
    numbers = sum(weight.codes.numel() for weight in codes.values())
    assert f"| codes of {len(codes)} weights | {numbers:,} | {numbers:,} |" in card
    scales = sum(weight.scale.numel() for weight in codes.values())
    assert f"| their scales | {scales:,} | {4 * scales:,} |" in card
    assert "- torchao\n" in card and "library_name: transformers" in card
    assert "`pip install torchao`), with other numerics: no KV quantization (4 bits" in card
    assert "keeps the scales of activations in bfloat16, unless" in card
    assert "compressed-tensors" not in card and "vLLM" not in card


def test_companions_are_copied(tmp_path: Path) -> None:
    source = make_output(tmp_path / "source", RECIPES["8-8-16"], make_model(), make_tokenizer())
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    out = export(source, tmp_path / "out", format="torchao")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model.layers.0.mlp.up_proj.weight"])["_type"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    source = make_output(tmp_path / "source", RECIPES["8-8-16"], make_model())
    monkeypatch.setattr(directory_module, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space"):
        export(source, tmp_path / "out", format="torchao")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_export_is_noticed(tmp_path: Path) -> None:
    source = make_output(tmp_path / "source", RECIPES["8-8-16"], make_model())
    out = export(source, tmp_path / "out", format="torchao")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        FORMATS["torchao"].read(out)
    path = out / "qatc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": "pack-quantized"}))
    with pytest.raises(CheckpointError):
        FORMATS["torchao"].read(out)
    with pytest.raises(CheckpointError, match="no output of qatc"):
        (tmp_path / "empty").mkdir()
        FORMATS["torchao"].read(tmp_path / "empty")
