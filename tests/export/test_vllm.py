"""vLLM's layouts, loaded by transformers with compressed-tensors, which reads the same files.

vLLM itself is not run: what is told of it is by its source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import qatc
from qatc.errors import ConfigError
from qatc.export import FORMATS, export
from qatc.output import load_codes, load_reference, open_output
from qatc.output.model_card import write_card
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import load_with_transformers, make_output
from tests.output.conftest import assert_same_codes, logits, make_model
from tests.output.test_transformers import quantize_inputs_as_transformers_does

BYTES = "int-quantized"
PACKED = "pack-quantized"

FORMS = {
    "W8A8": ("vllm", Recipe.from_bits("8-8-8", target="vllm"), BYTES, True),
    "W4A8": ("vllm", Recipe.from_bits("4-8-8", target="vllm", preset="best"), BYTES, True),
    "mixed": ("vllm", Recipe.from_bits("4-8-16", weight_bits=(("*v_proj*", 6),)), BYTES, True),
    "W4A8 packed": ("vllm-marlin", Recipe.from_bits("4-8-4"), PACKED, False),
    "groups": ("vllm-marlin", Recipe.from_bits("3-8-16", group_size=32), PACKED, False),
    "W4A16": ("vllm", Recipe.from_bits("4-16-8"), PACKED, False),
    "float": ("vllm", Recipe.from_bits("16-16-8"), None, False),
}


def written(root: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    """An output, and its export."""
    form, recipe, *_ = FORMS[name]
    source = make_output(root / "source", recipe, make_model(width=96, **changes))
    return source, export(source, root / "out", format=form)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in FORMS), ("W4A8", torch.bfloat16)],
    ids=str,
)
def test_the_codes_are_those_that_were_trained(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, recipe, layout, declared = FORMS[name]
    source, out = written(tmp_path, name, dtype=dtype)
    wanted = load_codes(source)
    assert_same_codes(dict(FORMATS["vllm"].read(out)), wanted)
    told = json.loads((out / "config.json").read_text()).get("quantization_config")
    if layout is None:
        assert told is None and not wanted
    else:
        (group,) = told["config_groups"].values()
        assert told["format"] == group["format"] == layout and told["kv_cache_scheme"] is None
        assert group["weights"]["num_bits"] == (8 if layout == BYTES else 4)
        assert (group["input_activations"] is not None) == declared
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    if layout == BYTES:
        assert all(torch.equal(stored[own], weight.codes) for own, weight in wanted.items())

    loaded = load_with_transformers(out)
    for own, weight in wanted.items():
        assert torch.equal(loaded.state_dict()[f"{own}_scale"].float(), weight.scale)
    actual = logits(loaded)
    for own, weight in wanted.items():  # decompressed by the forward above
        assert torch.equal(loaded.state_dict()[own], weight.dequantize(dtype))
    if dtype == torch.float32:
        reference = load_reference(source)
        plain = logits(reference)
        if declared:
            quantize_inputs_as_transformers_does(reference)
            assert (actual - plain).abs().max() > 1e-3
        assert torch.equal(actual, logits(reference))


@pytest.mark.parametrize("name", ["W4A8", "groups"])
def test_an_export_is_an_output(name: str, tmp_path: Path) -> None:
    """qatc runs it as it runs the source, with inputs quantized, whatever config.json declares."""
    source, out = written(tmp_path, name)
    own = qatc.load(out, dtype=torch.float32, compile=False)
    assert torch.equal(logits(own), logits(qatc.load(source, dtype=torch.float32, compile=False)))
    again = export(out, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


INPUTS = QuantSpec(8, 32)


@pytest.mark.parametrize(
    ("form", "recipe", "reason"),
    [
        ("vllm", Recipe.from_bits("4-8-16", head_bits=8), "without --head-bits"),
        ("vllm", Recipe.from_bits("16-8-16"), "inputs of quantized weights only"),
        ("vllm", Recipe.from_bits("8-16-16"), "weights of 8 bits .* activations of 16"),
        ("vllm", Recipe.from_bits("4-6-16"), "activations to 8 bits, .* with 6"),
        ("vllm", Recipe(QuantSpec(4), INPUTS, QuantSpec()), "groups of 32; quantize with --target"),
        ("vllm", Recipe.from_bits("4-8-16", group_size=16), "16; .* or take --format vllm-marlin"),
        ("vllm", Recipe.from_bits("8-8-16", group_size=16), "without --group-size$"),
        ("vllm", Recipe.from_bits("4-16-16", group_size=16), "32, 64 or 128 .* has 16"),
        ("vllm-marlin", Recipe.from_bits("4-16-16"), "take --format vllm$"),
        ("vllm-marlin", Recipe(QuantSpec(4), INPUTS, QuantSpec()), "one scale per token"),
        ("vllm-marlin", Recipe.from_bits("8-8-16"), "here are some of 8; take --format vllm$"),
        ("vllm-marlin", Recipe.from_bits("4-8-16", group_size=16), "32, 64 or 128 .* has 16"),
        (
            "vllm-marlin",
            Recipe.from_bits("4-8-16", group_size=32, preset="best"),
            "those of signed codes are not",
        ),
        (
            "vllm",
            Recipe.from_bits("4-4-16", rotate_inputs=("*.down_proj.weight",)),
            "which vLLM does not",
        ),
    ],
)
def test_what_vllm_does_not_run_is_refused(
    form: str, recipe: Recipe, reason: str, tmp_path: Path
) -> None:
    source = make_output(tmp_path / "source", recipe, make_model(tied=False, width=96))
    with pytest.raises(ConfigError, match=reason):
        FORMATS[form].notes(open_output(source))
    with pytest.raises(ConfigError, match=reason):
        export(source, tmp_path / "out", format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


KV = " --kv-cache-dtype int8_per_token_head"

TOLD = {
    "W8A8": ("vllm serve DIR" + KV, [], ["a byte each", "K and V"]),
    "W4A8": ("vllm serve DIR" + KV, ["a byte each, twice"], ["K and V"]),
    "mixed": ("vllm serve DIR", ["a byte each, twice"], ["K and V"]),
    "W4A8 packed": (
        "VLLM_MARLIN_INPUT_DTYPE=int8 vllm serve DIR",
        ["without `VLLM_MARLIN_INPUT_DTYPE=int8`", "K and V in float (4 bits here)"],
        ["byte"],
    ),
    "groups": ("VLLM_MARLIN_INPUT_DTYPE=int8 vllm serve DIR", ["in 4,096 steps"], ["K and V"]),
    "W4A16": ("vllm serve DIR" + KV, [], ["byte", "K and V"]),
    "float": ("vllm serve DIR" + KV, [], ["byte", "K and V"]),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_command_and_what_differs_are_told(name: str, tmp_path: Path) -> None:
    command, said, unsaid = TOLD[name]
    form, *_ = FORMS[name]
    source, out = written(tmp_path, name)
    opened = open_output(source)
    notes = "\n".join(FORMATS[form].notes(opened))
    assert [own.replace(str(out), "DIR") for own in FORMATS[form].commands(opened, out)] == [
        command
    ]
    assert ("this layout has not been run" in notes) == (form == "vllm-marlin")
    assert ("has run this layout on a CPU" in notes) == (form == "vllm")
    assert all(words in notes for words in said) and not any(words in notes for words in unsaid)
    card = (out / "README.md").read_text()
    if FORMS[name][2] is not None:
        assert f"\n{command.replace('DIR', 'THIS_DIRECTORY')}\n" in card
        assert "where this model has not been tried" in card
    inputs = "no quantized inputs of linear layers (8 bits here)"
    assert (inputs in card) == (form == "vllm-marlin")


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (Recipe.from_bits("4-8-8"), "\nvllm serve THIS_DIRECTORY --linear-backend humming" + KV),
        (
            Recipe.from_bits("4-8-16", group_size=32, target="transformers"),
            "activations scaled by max / 127 (max / 127.5 here)",
        ),
        (Recipe.from_bits("8-8-8", preset="best"), "K and V scaled by max / 127 per token"),
        (Recipe.from_bits("4-16-8", value_bits=4), "K and V in float (K8V4 bits here)"),
        (Recipe.from_bits("8-16-16"), "**vLLM** does not run it"),
        (FORMS["mixed"][1], "lie in two layouts, and vLLM joins those of queries"),
        (Recipe.from_bits("4-6-16"), "rounds activations to 8 bits, and this model was trained"),
    ],
)
def test_the_card_of_an_output_says_what_vllm_makes_of_it(
    recipe: Recipe, told: str, tmp_path: Path
) -> None:
    source = make_output(tmp_path / "source", recipe, make_model(width=96))
    write_card(source)
    card = (source / "README.md").read_text()
    assert told in card and card.count("**vLLM**") == 1
    assert ("humming" in card) == ("4-8" in recipe.bits)
    others = {own for own in ("--format vllm`", "`VLLM_MARLIN_INPUT_DTYPE=int8`") if own in card}
    grouped = recipe.weights.group_size is not None
    assert len(others) == (0 if "4-8" not in recipe.bits else 1 if grouped else 2)
