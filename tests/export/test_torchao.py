"""torchao: transformers' own loader finds the codes that were trained, and torchao's rule runs."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchao.quantization import Int8Tensor

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
from tests.output.conftest import IDS, assert_same_codes, logits, make_model, make_tokenizer

FULL = QuantSpec(8, range="full")

GROUPS = QuantSpec(4, 16)

RECIPES = {
    "8-8-16": Recipe.from_bits("8-8-16"),
    "4-8-4": Recipe.from_bits("4-8-4"),
    "3-8-16": Recipe.from_bits("3-8-16", skip=("*lm_head*", "*embed*", "*o_proj*")),
    "8-16-16": Recipe.from_bits("8-16-16"),
    "groups": Recipe.from_bits("4-16-16", group_size=16),
    "ends": Recipe.from_bits("4-8-16", head_bits=4, embedding_bits=4),
    "head": Recipe.from_bits("4-8-16", head_bits=8),
    "embedding": Recipe.from_bits("8-16-16", embedding_bits=6),
    "ends in groups": Recipe(GROUPS, QuantSpec(), QuantSpec(), head=GROUPS, embedding=GROUPS),
    "ends alone": Recipe.from_bits("16-16-16", head_bits=8, embedding_bits=8),
}

UNHELD = {
    "quantizes no weights": Recipe.from_bits("16-16-4"),
    "leaves the weights of linear layers in float": Recipe.from_bits("16-8-16", head_bits=8),
    "trained with 6; export it as compressed-tensors": Recipe.from_bits("4-6-16"),
    "trained with groups of 32": Recipe.from_bits("4-8-16", target="llama.cpp"),
    "has groups of 16; export it": Recipe.from_bits("4-8-16", group_size=16),
    "has groups of 8": dataclasses.replace(
        Recipe.from_bits("4-8-16"), head=QuantSpec(4, 8), embedding=QuantSpec(4)
    ),
}


def width_of(recipe: Recipe) -> int:
    """Of the middle of an MLP: odd, where groups allow it."""
    return 29 if recipe.weights.group_size is None else 48


def assert_held(model: Any, weights: dict[str, QuantizedWeight]) -> None:
    """Every weight is what torchao makes of these codes and scales, and no other is quantized."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name for name, p in parameters.items() if isinstance(p.data, Int8Tensor)}
    assert found == weights.keys()
    for name, weight in weights.items():
        tensor = parameters[name].data
        assert torch.equal(tensor.qdata, weight.codes) and tensor.qdata.dtype == torch.int8
        assert torch.equal(tensor.scale, weight.scale) and tensor.scale.dtype == torch.float32
        assert tensor.dtype == model.dtype
        assert torch.equal(tensor.dequantize(), weight.dequantize(model.dtype))


def linear_of_torchao(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The linear layer of torchao in numpy: fp32, but for sums, which are integers."""
    rows = x.numpy().reshape(-1, x.shape[-1])
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scale = np.maximum(largest / np.float32(127.5), np.float32(2.0**-23))
    codes = np.clip(np.round(rows * (np.float32(1) / scale)), -128, 127)
    assert scale.dtype == codes.dtype == np.float32
    sums = codes.astype(np.int64) @ weight.codes.numpy().astype(np.int64).T
    values = sums.astype(np.float32) * scale * weight.scale.numpy().T
    return torch.from_numpy(values).reshape(*x.shape[:-1], -1)


def run_by(reference: Any, weights: dict[str, QuantizedWeight], model: Any) -> None:
    """Let the quantized linear layers of a float model compute what ``linear_of_torchao`` does.

    Other tensors are those of ``model``: a product in float depends on where a weight lies.
    """
    for name, parameter in reference.named_parameters():
        if name not in weights:
            parameter.data = model.get_parameter(name).data
    for name, weight in weights.items():
        if "embed" not in name:
            layer = reference.get_submodule(name.removesuffix(".weight"))
            layer.forward = lambda x, weight=weight: linear_of_torchao(x, weight)


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
    directory_module.write_output(out, open_output(source), max_shard_bytes=3_000, for_torchao=True)
    assert len(list(out.glob("model-*.safetensors"))) > 5
    model = load_with_transformers(out)
    assert_held(model, load_codes(out))
    whole = export(source, tmp_path / "whole", format="torchao")
    assert torch.equal(logits(model), logits(load_with_transformers(whole)))


@pytest.mark.parametrize("name", ["4-8-4", "groups", "ends", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_a_trained_model_in_place(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model = make_model(dtype=dtype, width=width_of(recipe))
    source = make_output(tmp_path / "source", recipe, copy.deepcopy(model))
    given = load_with_transformers(export(source, tmp_path / "out", format="torchao"))

    use_cache = model.config.use_cache
    qatc.prepare(model, recipe, compile=False)
    model.train()
    with pytest.raises(ConfigError, match=r"model\.layers\.0 was not captured .* training mode"):
        qatc.to_torchao(model)
    logits(model)
    assert qatc.to_torchao(model) is model and not model.training
    assert model.config.use_cache == use_cache
    for own, value in given.named_parameters():
        same = model.get_parameter(own).data
        if isinstance(value.data, Int8Tensor):
            assert isinstance(same, Int8Tensor)
            assert torch.equal(same.qdata, value.data.qdata)
            assert torch.equal(same.scale, value.data.scale)
        else:
            assert torch.equal(same, value)
    wanted = logits(given)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    written = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, given.generate(IDS, max_new_tokens=5, do_sample=False))

    for own in (model, copy.deepcopy(model)):
        own.save_pretrained(tmp_path / "saved")
        loaded = load_with_transformers(tmp_path / "saved")
        assert torch.equal(logits(loaded), wanted)
    assert loaded.config.tie_word_embeddings == (name in ("4-8-4", "groups"))


@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_it_compiles() -> None:
    model: Any = make_model()
    qatc.to_torchao(qatc.prepare(model, RECIPES["4-8-4"], compile=False))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for part in (x, x[:1, :1]):
            torch.testing.assert_close(compiled(part), layer(part), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:transformers runs it with other numerics")
def test_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(13, 7), nn.Linear(7, 5)
    model = nn.Sequential(first, nn.ReLU(), last)
    qatc.prepare(model, Recipe.from_bits("4-8-16"), compile=False)
    with pytest.raises(ConfigError, match="run the model once"):
        qatc.to_torchao(model)
    x = torch.randn(11, 13)
    model(x)
    codes = [QuantizedWeight.from_float(own.weight, QuantSpec(4)) for own in (first, last)]
    with torch.no_grad():
        actual = qatc.to_torchao(model)(x)
        hidden = (linear_of_torchao(x, codes[0]) + first.bias).relu()
        assert torch.equal(actual, linear_of_torchao(hidden, codes[1]) + last.bias)


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
    model = make_model(tied=False, width=64)
    source = make_output(tmp_path / "source", recipe, model)
    with pytest.raises(ConfigError, match=reason):
        export(source, tmp_path / "out", format="torchao")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    qatc.prepare(model, recipe, compile=False)
    wanted = logits(model)
    with pytest.raises(ConfigError, match=reason):
        qatc.to_torchao(model)
    assert torch.equal(logits(model), wanted), "as it was"
    qatc.restore(model)


def test_a_model_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not prepared"):
        qatc.to_torchao(make_model())


@dataclasses.dataclass(frozen=True)
class Reciprocal(QuantSpec):
    """Activations that were trained by torchao's rule."""

    rounding: str = "reciprocal"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe.from_bits("4-16-16"), ()),
        (dataclasses.replace(RECIPES["8-8-16"], activations=Reciprocal(8, range="full")), ()),
        (RECIPES["8-8-16"], ("trained with max / 127)", "--target torchao")),
        (Recipe(activations=FULL, kv=QuantSpec()), ("another rounding", "--target torchao")),
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


def test_a_model_says_so_too() -> None:
    model = qatc.prepare(make_model(), RECIPES["8-8-16"], compile=False)
    with pytest.warns(UserWarning, match="another activation rule"):
        qatc.to_torchao(model)


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
