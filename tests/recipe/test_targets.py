from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qatc
from qatc.errors import ConfigError
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.recipe.targets import TARGETS
from tests.conftest import make_llama, make_output


def test_rules() -> None:
    assert Recipe.from_bits("4-8-4") == Recipe.from_bits("4-8-4", target="qatc")
    own = Recipe.from_bits("4-8-4", target="transformers")
    assert own.weights == QuantSpec(4)
    assert own.activations == QuantSpec(8, None, "full") and own.kv == QuantSpec(4, None, "full")
    assert Recipe.from_bits("8-8-8", target="vllm").activations == QuantSpec(8)
    blocks = Recipe.from_bits("4-8-8", target="llama.cpp")
    assert blocks.weights == QuantSpec(
        4, 32, scale_dtype="float16"
    ) and blocks.activations == QuantSpec(8, 32)
    assert Recipe.from_bits("4-16-16", target="llama.cpp").activations == QuantSpec(16)
    assert Recipe.from_bits("4-8-8", target="llama.cpp", group_size=64).weights.group_size == 64
    assert all(target.source for target in TARGETS.values())


def test_a_file_takes_the_rules_that_it_leaves_open() -> None:
    recipe = Recipe.from_dict({"target": "transformers", "weights": {"bits": 8}})
    assert recipe.weights == QuantSpec(8)
    assert recipe.activations == QuantSpec(8, None, "full")
    given = {"target": "transformers", "activations": {"bits": 8, "range": "restricted"}}
    assert Recipe.from_dict(given).activations == QuantSpec(8)
    for name in TARGETS:
        bits = "4-8-8"
        recipe = Recipe.from_bits(bits, target=name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_bad_targets() -> None:
    with pytest.raises(
        ConfigError,
        match=r"qatc, transformers, torchao, vllm, llama\.cpp \(gguf for llama\.cpp\); got 'tvm'",
    ):
        Recipe.from_bits("4-8-4", target="tvm")
    with pytest.raises(ConfigError, match="no symmetric KV cache of 4 bits; choose .* 8, 16"):
        Recipe.from_bits("4-8-4", target="vllm")
    with pytest.raises(ConfigError, match="target must be one of"):
        Recipe.from_dict({"target": 3})
    with pytest.raises(ConfigError, match="executorch is no target: .* zero point .* torchao"):
        Recipe.from_bits("4-8-16", target="executorch")


def test_the_name_of_a_format_is_one_of_its_runtime() -> None:
    recipe = Recipe.from_bits("4-8-16", target="gguf")
    assert recipe == Recipe.from_bits("4-8-16", target="llama.cpp") != Recipe.from_bits("4-8-16")
    assert recipe.target == "llama.cpp" and recipe.weights.group_size == 32
    assert Recipe.from_dict({"target": "gguf", "kv": {"bits": 16}}) == recipe


@torch.no_grad()
@pytest.mark.parametrize("bits", ["4-8-16", "8-8-16"])
def test_transformers_computes_what_the_integer_model_does(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    output = make_output(tmp_path / "o", Recipe.from_bits(bits, target="transformers"))
    ids = torch.randint(2, 112, (3, 24), generator=torch.Generator().manual_seed(0))
    theirs: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    one = theirs(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    own = qatc.load(output, dtype=torch.float32, compile=False)
    two = own(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    kl = (one.exp() * (one - two)).sum(-1)
    # Where no code lies on a tie the two are the same; the largest value of a row is on one.
    assert kl.mean() <= 1e-3 and kl.median() <= 1e-5


@torch.no_grad()
def test_scales_that_fp16_cannot_hold_are_loaded_as_they_are(tmp_path: Path) -> None:
    """transformers casts scales to the dtype that config.json names."""
    pytest.importorskip("compressed_tensors")
    recipe = Recipe.from_bits("8-8-16", target="transformers")
    name = "model.layers.0.self_attn.v_proj"
    for factor, dtype in ((1.0, torch.float16), (1e-4, torch.float32)):
        model = make_llama().half()
        model.get_parameter(f"{name}.weight").mul_(factor)
        output = make_output(tmp_path / str(factor), recipe, model=model)
        theirs: Any = AutoModelForCausalLM.from_pretrained(output)
        assert theirs.dtype is dtype
        stored = qatc.load_codes(output)[f"{name}.weight"].scale
        assert torch.equal(theirs.get_submodule(name).weight_scale.float(), stored)
