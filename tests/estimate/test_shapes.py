"""A model's sizes, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig

from qatc.errors import ConfigError
from qatc.estimate import read_shape, shape_of
from tests.conftest import make_small, save

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "float16",
}
LLAMA_3_8B = LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("settings", "parameters"), [(LLAMA_7B, 6_738_415_616), (LLAMA_3_8B, 8_030_261_248)]
)
def test_parameters_are_those_that_are_known(settings: dict[str, object], parameters: int) -> None:
    shape = shape_of(LlamaConfig(**settings), "llama")  # type: ignore[arg-type]
    assert shape.parameters == parameters
    assert (shape.heads, shape.head_size, shape.ups, shape.stored) == (32, 128, 2, 2)
    widths = 32 * (2 * 4096 + 2 * (4096 + shape.keys) + 3 * (4096 + shape.inner)) + 32 * 2 * 4096
    assert shape.edges == widths
    assert shape.inner == settings["intermediate_size"]
    assert shape.kv_heads == settings.get("num_key_value_heads", 32)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "opt"])
def test_every_parameter_is_of_one_kind(kind: str, tmp_path: Path) -> None:
    model = make_small(kind)
    shape = read_shape(str(save(tmp_path, model)))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert shape.linear + shape.ends <= sum(p.numel() for p in matrices)
    assert shape.ups == (2 if kind in ("llama", "qwen2") else 1)
    assert shape.layers == 2 and shape.active == shape.linear


def test_a_mixture_of_experts_passes_some_of_them() -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    shape = shape_of(config, "moe")
    assert shape.linear - shape.active == 2 * 6 * 3 * 32 * 48
    assert shape.inner == 2 * 48


def test_a_file_says_as_much_as_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "some-name.json"
    file.write_text(json.dumps(LLAMA_7B | {"model_type": "llama"}))
    assert read_shape(str(file)).parameters == 6_738_415_616
    file.write_text(json.dumps(LLAMA_7B | {"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match="unheard-of"):
        read_shape(str(file))
    file.write_text("[]")
    with pytest.raises(ConfigError, match="none at all"):
        read_shape(str(file))
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_shape(str(file))
    with pytest.raises(ConfigError, match="there is no model directory"):
        read_shape(str(tmp_path / "missing"))
