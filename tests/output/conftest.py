"""A tiny model and the directory that is written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from qatc.output.codes import QuantizedWeight
from qatc.output.contents import Output
from qatc.output.directory import write_output
from qatc.recipe.recipe import Recipe

W4A8 = Recipe.from_bits("4-8-4")

IDS = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))


def make_model(
    *, tied: bool = True, width: int = 52, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def quantize(model: nn.Module, recipe: Recipe) -> dict[str, QuantizedWeight]:
    if not recipe.weights.quantizes:
        return {}
    return {
        f"{name}.weight": QuantizedWeight.from_float(linear.weight, recipe.weights)
        for name, linear in quantized_linears(model).items()
    }


def write(
    directory: Path, model: PreTrainedModel, recipe: Recipe, **changes: Any
) -> dict[str, QuantizedWeight]:
    directory.mkdir()
    arguments: dict[str, Any] = {
        "config": model.config,
        "state": model.state_dict(),
        "weights": quantize(model, recipe),
        "recipe": recipe,
        "metadata": {"source": "a tiny model"},
    }
    given = arguments | changes
    own = ("tokenizer", "max_shard_bytes", "form")
    options = {name: given.pop(name) for name in own if name in given}
    write_output(directory, Output(**given), **options)
    weights: dict[str, QuantizedWeight] = given["weights"]
    return weights


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: value
        for path in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_same_codes(
    actual: dict[str, QuantizedWeight], expected: dict[str, QuantizedWeight]
) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name].codes, weight.codes)
        assert torch.equal(actual[name].scale, weight.scale)
        assert actual[name].spec == weight.spec


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
    )


def write_whole_and_in_shards(root: Path) -> Path:
    """The model in ``one`` file, and in ``many``."""
    write(root / "one", make_model(), W4A8)
    write(root / "many", make_model(), W4A8, max_shard_bytes=5_000)
    return root
