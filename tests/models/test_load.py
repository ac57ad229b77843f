"""Loading: what is wrong with a model is said in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qatc.errors import CheckpointError, ConfigError
from qatc.models import load_config, load_model, load_tokenizer
from qatc.models.load import check_length, load_skeleton


def test_loads_a_model_as_it_is(shared_model_path: Path) -> None:
    stored = load_file(shared_model_path / "model.safetensors")
    loaded = load_model(str(shared_model_path), dtype=torch.bfloat16)
    assert (loaded.dtype, loaded.model.dtype) == (torch.float32, torch.bfloat16)
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    for name, value in stored.items():
        assert torch.equal(loaded.model.get_parameter(name), value.bfloat16())


def test_a_skeleton_needs_no_weights(model_path: Path) -> None:
    (model_path / "model.safetensors").unlink()
    model = load_skeleton(str(model_path)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_quantized_model_is_refused(model_path: Path) -> None:
    config = json.loads((model_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (model_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized already; qatc starts from a full-precision"):
        load_model(str(model_path))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no model directory {name}; give a directory"):
        load_config(name)


def test_a_file_is_no_model(model_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model directory"):
        load_config(str(model_path / "config.json"))


def test_a_directory_of_something_else_is_no_model(tmp_path: Path) -> None:
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ConfigError, match="has no config.json, so it is no model directory"):
            load(str(tmp_path))


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot load nobody/nothing: the hub cannot be reached"):
        load_config("nobody/nothing")


@pytest.mark.parametrize("keep", [1 / 2, 0])
def test_truncated_weights(model_path: Path, keep: float) -> None:
    file = model_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="the weights of .* are damaged .* copy or download"):
        load_model(str(model_path))


def test_a_missing_tensor_is_no_random_one(model_path: Path) -> None:
    """Transformers fills it with random numbers, and only warns."""
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are missing, among them .*1.mlp.up_proj"):
        load_model(str(model_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named(
    model_path: Path, value: float, dtype: torch.dtype
) -> None:
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5:7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"{name} of .* 2 values .* first at \[3, 5\] \(.*\)"
    ):
        load_model(str(model_path), dtype=dtype)


def test_settings_for_generation_that_exclude_each_other(model_path: Path) -> None:
    file = model_path / "generation_config.json"
    file.write_text(json.dumps({"num_return_sequences": 3, "eos_token_id": 7}))
    found = load_model(str(model_path)).model.generation_config
    assert (found.num_return_sequences, found.eos_token_id) == (3, 7)
    for damage in ("[]", '{"eos_token_id":'):
        file.write_text(damage)
        with pytest.raises(CheckpointError, match="generation_config.json .*correct or remove it"):
            load_model(str(model_path))


def test_missing_files(model_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_path / name).unlink()
    with pytest.raises(ConfigError, match="it has no tokenizer files, such as tokenizer.json"):
        load_tokenizer(str(model_path))
    (model_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no file named model.safetensors"):
        load_model(str(model_path))
    (model_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ConfigError, match="not a valid JSON file"):
        load_config(str(model_path))


def test_attention_without_sdpa(bloom_path: Path) -> None:
    with pytest.raises(ConfigError, match="no attention through SDPA .*; choose another model"):
        load_model(str(bloom_path))


def test_length() -> None:
    config: Any = SimpleNamespace(max_position_embeddings=128)
    check_length("tiny", config, 128)
    check_length("tiny", SimpleNamespace(), 10**9)
    with pytest.raises(ConfigError, match="tiny takes at most 128 tokens; got 129"):
        check_length("tiny", config, 129)


@pytest.mark.parametrize("model", [False, True])
def test_an_adapter_is_no_model(tmp_path: Path, shared_model_path: Path, model: bool) -> None:
    """Nor is a model to be quantized with an adapter beside it, which would be loaded as well."""
    path = tmp_path / "adapter"
    if model:
        shutil.copytree(shared_model_path, path)
    else:
        path.mkdir()
    text = '{"base_model_name_or_path": "some/model", "peft_type": "LORA"}'
    (path / "adapter_config.json").write_text(text)
    for load in (load_model, load_skeleton):
        with pytest.raises(ConfigError, match="holds an adapter of some/model and.*merge it into"):
            load(str(path))


def test_soft_capping_is_named(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=30.0,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    for load in (load_model, load_skeleton):
        with pytest.raises(ConfigError, match=r"caps scores at 30 \(soft capping\)"):
            load(str(tmp_path))
