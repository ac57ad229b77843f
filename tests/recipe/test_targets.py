from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qatc
from qatc.errors import ConfigError
from qatc.numerics.learned import least_error_scale
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.recipe.targets import TARGETS
from qatc.sensitivity.budget import check_budget
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
        bits = "4-8-16" if name == "executorch" else "4-8-8"
        recipe = Recipe.from_bits(bits, target=name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_bad_targets() -> None:
    with pytest.raises(
        ConfigError,
        match=r"torchao, vllm, llama\.cpp, executorch \(gguf for llama\.cpp\); got 'tvm'",
    ):
        Recipe.from_bits("4-8-4", target="tvm")
    with pytest.raises(ConfigError, match="no symmetric KV cache of 4 bits; choose .* 8, 16"):
        Recipe.from_bits("4-8-4", target="vllm")
    with pytest.raises(ConfigError, match="target must be one of"):
        Recipe.from_dict({"target": 3})


def test_for_executorch() -> None:
    recipe = Recipe.from_bits("4-8-16", target="executorch", head_bits=8, embedding_bits=4)
    assert recipe.weights == recipe.embedding == QuantSpec(4, 32) and recipe.head == QuantSpec(8)
    assert recipe.activations == QuantSpec(8, range="affine")
    plain = {"target": "executorch", "weights": {"bits": 6}, "kv": {"bits": 16}}
    assert Recipe.from_dict(plain).weights == QuantSpec(6)
    assert Recipe.from_dict(plain).activations == recipe.activations
    plain["weights"] = {"bits": 4, "group_size": None}
    wider = Recipe.from_dict(plain | {"weight_bits": {"*v_proj*": 8}})
    assert wider.weights_of("a.v_proj.weight") == QuantSpec(8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": "4-8-8"}, "no symmetric KV cache of 8 bits; choose KV bits of 16"),
        ({"bits": "4-4-16"}, "to 8 bits, and 4-4-16 leaves them at 4; choose 8"),
        ({"bits": "4-16-16"}, "to 8 bits, and 4-16-16 leaves them at 16"),
        ({"bits": "16-8-16"}, "inputs only where weights are quantized"),
        ({"group_size": 48}, "cannot hold weights: it has groups of 48, .* multiples of 32"),
        ({"bits": "8-8-16", "group_size": 32}, "cannot hold weights: it has 8 bits in groups"),
        (
            {"weight_bits": (("*v_proj*", 8),)},
            r"weight_bits of \*v_proj\*: it has 8 bits in groups",
        ),
        ({"preset": "best"}, r"cannot hold weights: it has negative scales, .*\(--preset paper"),
    ],
)
def test_what_executorch_cannot_run(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"the target executorch .*{reason}"):
        Recipe.from_bits(**{"bits": "4-8-16", "target": "executorch"} | options)


def test_learned_scales_for_executorch_are_positive() -> None:
    plain = {"target": "executorch", "kv": {"bits": 16}}
    plain["weights"] = {"bits": 4, "range": "full", "clip": "learned"}
    recipe = Recipe.from_dict(plain)
    assert recipe.weights == QuantSpec(4, 32, "full", clip="learned")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert bool((least_error_scale(weight, recipe.weights) > 0).all())


def test_no_budget_where_wide_weights_have_no_groups() -> None:
    check_budget(4.5, Recipe.from_bits("4-8-16", group_size=32))
    with pytest.raises(ConfigError, match="up to 8 bits, .* executorch cannot hold such a weight"):
        check_budget(4.5, Recipe.from_bits("4-8-16", target="executorch"))


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
