"""What transformers makes of a written directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatc.output.reading import load_codes, load_reference, read_metadata
from qatc.recipe.recipe import Recipe
from tests.conftest import load_with_transformers
from tests.output.conftest import (
    IDS,
    W4A8,
    logits,
    make_model,
    quantized_linears,
    stored_tensors,
    write,
)


def quantize_inputs_as_transformers_does(model: PreTrainedModel) -> None:
    """8 bits, one scale per token: amax / 127.5, codes -128 to 127."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = args[0].abs().amax(dim=-1, keepdim=True) / 127.5
        return (torch.round(args[0] / scale).clamp(-128, 127) * scale,)

    for linear in quantized_linears(model).values():
        linear.register_forward_pre_hook(hook)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "width"),
    [
        ("4-8-4", None, 52),  # 52 values do not fill the last word
        ("4-8-4", 32, 96),
        ("3-8-16", 4, 52),
        ("8-8-8", None, 52),
        ("6-16-16", 4, 52),
        ("4-16-16", None, 52),
    ],
)
def test_transformers_computes_the_reference_under_its_own_activation_rule(
    tmp_path: Path, bits: str, group_size: int | None, width: int, tied: bool
) -> None:
    recipe = Recipe.from_bits(bits, group_size=group_size)
    weights = write(tmp_path / "out", make_model(tied=tied, width=width), recipe)

    loaded = load_with_transformers(tmp_path / "out")
    actual = logits(loaded)

    reference = load_reference(tmp_path / "out")
    without_activations = logits(reference)
    if recipe.activations.quantizes:
        quantize_inputs_as_transformers_does(reference)
        assert (actual - without_activations).abs().max() > 1e-3
    assert torch.equal(actual, logits(reference))
    torch.testing.assert_close(
        logits(loaded, IDS[:1, :1]), logits(reference, IDS[:1, :1]), rtol=0, atol=1e-5
    )

    state = loaded.state_dict()  # decompressed by the forward above
    for name, weight in weights.items():
        assert torch.equal(state[name], weight.dequantize())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_dequantizes_exactly_in_half_precision(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = write(tmp_path / "out", make_model(dtype=dtype), W4A8)
    stored = stored_tensors(tmp_path / "out")
    assert {v.dtype for k, v in stored.items() if k.endswith("_scale")} == {dtype}

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(loaded)
    assert loaded.dtype == dtype
    for name, weight in weights.items():
        assert torch.equal(loaded.state_dict()[name], weight.dequantize(dtype))


def test_a_float_model_is_written_as_it_is(tmp_path: Path) -> None:
    model = make_model()
    write(tmp_path / "out", model, Recipe.from_bits("16-8-4"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert read_metadata(tmp_path / "out")["layout"] == "float"
    assert load_codes(tmp_path / "out") == {}
    for read in (AutoModelForCausalLM.from_pretrained, load_reference):
        assert torch.equal(logits(read(tmp_path / "out")), logits(model))
