"""The written directory: what is in it, and what cannot be written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qatc import output as output_package
from qatc.errors import CheckpointError, ConfigError
from qatc.output import directory as directory_module
from qatc.output.codes import QuantizedWeight
from qatc.output.reading import load_codes, load_reference
from qatc.recipe.recipe import Recipe
from tests.conftest import load_with_transformers
from tests.output.conftest import (
    W4A8,
    assert_same_codes,
    logits,
    make_model,
    make_tokenizer,
    quantize,
    quantized_linears,
    stored_tensors,
    write,
)

# What is in it


@pytest.mark.parametrize("bits", ["4-8-4", "2-8-4", "8-8-8"])
def test_no_float_copy_of_a_quantized_weight_is_written(tmp_path: Path, bits: str) -> None:
    recipe = Recipe.from_bits(bits)
    weights = write(tmp_path / "out", make_model(width=64), recipe)
    stored = stored_tensors(tmp_path / "out")
    floats = {name for name, value in stored.items() if value.is_floating_point()}
    norms = {name for name in stored if name.endswith("norm.weight")}
    scales = {f"{name}_scale" for name in weights}
    assert floats == scales | norms | {"model.embed_tokens.weight"}
    for name, weight in weights.items():
        codes = stored[name if recipe.weights.bits == 8 else f"{name}_packed"]
        rows, width = weight.codes.shape
        assert codes.nbytes == rows * width // (1 if recipe.weights.bits == 8 else 2)


def test_the_config_is_replaced_in_the_file_only(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    model.config.quantization_config = {"quant_method": "another", "bits": 3}
    before = copy.deepcopy(model.config.to_dict())
    write(tmp_path / "out", model, W4A8)
    assert model.config.to_dict() == before
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_layers_that_stay_float_are_ignored(tmp_path: Path) -> None:
    model = make_model()
    weights = {n: w for n, w in quantize(model, W4A8).items() if ".layers.0." not in n}
    write(tmp_path / "out", model, W4A8, weights=weights)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {n for n in quantized_linears(model) if ".layers.0." in n} | {"lm_head"}
    assert set(config["quantization_config"]["ignore"]) == expected
    loaded = load_with_transformers(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_files_carry_the_pt_format_and_are_readable_by_all(tmp_path: Path) -> None:
    write(tmp_path / "out", make_model(), W4A8)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_tokenizer_and_generation_config_are_saved(tmp_path: Path) -> None:
    # A temperature without sampling: transformers refuses to save what many models ship.
    generation = GenerationConfig(max_new_tokens=7, do_sample=False, temperature=0.5)
    write(
        tmp_path / "out",
        make_model(),
        W4A8,
        tokenizer=make_tokenizer(),
        generation_config=generation,
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("b") == [2]
    read = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (read.max_new_tokens, read.temperature) == (7, 0.5)


# Tied weights


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    model = make_model()
    write(tmp_path / "both", model, W4A8)
    state = {n: v for n, v in model.state_dict().items() if n != "model.embed_tokens.weight"}
    write(tmp_path / "head", model, W4A8, state=state)
    for out in (tmp_path / "both", tmp_path / "head"):
        assert "lm_head.weight" not in stored_tensors(out)
        assert "model.embed_tokens.weight" in stored_tensors(out)


def test_untied_weights_that_share_storage_are_both_written(tmp_path: Path) -> None:
    model = make_model(tied=False)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    write(tmp_path / "out", model, W4A8, state=state)
    stored = stored_tensors(tmp_path / "out")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_tied_weights_that_differ_are_a_bug(tmp_path: Path) -> None:
    state = dict(make_model().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(AssertionError, match="lm_head"):
        write(tmp_path / "out", make_model(), W4A8, state=state)


def test_a_tied_weight_cannot_be_quantized(tmp_path: Path) -> None:
    model = make_model()
    weights = quantize(model, W4A8)
    head = model.state_dict()["lm_head.weight"]
    weights["lm_head.weight"] = QuantizedWeight.from_float(head, W4A8.weights)
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*tied.*skip"):
        write(tmp_path / "out", model, W4A8, weights=weights)


# Shards


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    model = make_model()
    weights = write(tmp_path / "one", model, W4A8)
    write(tmp_path / "many", model, W4A8, max_shard_bytes=5_000)
    one, many = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)

    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert index["weight_map"].keys() == one.keys()
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        shard = load_file(tmp_path / "many" / file)
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 5_000

    assert_same_codes(load_codes(tmp_path / "many"), weights)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    assert torch.equal(logits(loaded[0]), logits(loaded[1]))
    assert torch.equal(
        logits(load_reference(tmp_path / "one")), logits(load_reference(tmp_path / "many"))
    )


def test_weights_that_cannot_be_written_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(directory_module, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors.*No space"):
        write(tmp_path / "out", make_model(), W4A8)


def test_the_package_re_exports_the_api() -> None:
    for name in output_package.__all__:
        assert hasattr(output_package, name)
