"""What is read back of a written directory, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatc.errors import CheckpointError
from qatc.output.reading import (
    load_codes,
    load_reference,
    open_output,
    read_metadata,
)
from qatc.recipe.recipe import Recipe
from tests.output.conftest import (
    W4A8,
    assert_same_codes,
    make_model,
    write,
    write_whole_and_in_shards,
)


def test_codes_recipe_and_metadata_are_read_back(tmp_path: Path) -> None:
    model = make_model()
    weights = write(tmp_path / "out", model, W4A8, metadata={"seed": 3, "quantized": "ours wins"})
    assert_same_codes(load_codes(tmp_path / "out"), weights)
    assert open_output(tmp_path / "out").recipe == W4A8
    metadata = read_metadata(tmp_path / "out")
    stored = {**weights, **open_output(tmp_path / "out").state}
    assert {**metadata.pop("digests"), **metadata.pop("float_digests")}.keys() == stored.keys()
    assert metadata == {
        "seed": 3,
        "format_version": 3,
        "layout": "pack-quantized",
        "recipe": W4A8.to_dict(),
        "quantized": sorted(weights),
        "specs": {},
    }
    state = open_output(tmp_path / "out").state
    expected = {n: v for n, v in model.state_dict().items() if n not in weights}
    del expected["lm_head.weight"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_and_in_shards(tmp_path_factory.mktemp("pristine"))


def edit_metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        metadata = json.loads((out / "qatc.json").read_text())
        (out / "qatc.json").write_text(json.dumps(metadata | changes))

    return edit


def cut(pattern: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (path,) = out.glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return edit


def remove(pattern: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (path,) = out.glob(pattern)
        path.unlink()

    return edit


def drop_tensor(part: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        path = out / "model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if part not in name}
        save_file(kept, path)

    return edit


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("one", shutil.rmtree, "is not a directory"),
        ("one", remove("qatc.json"), "no output of qatc.*qatc quantize"),
        ("one", cut("qatc.json"), "not valid JSON"),
        ("one", lambda out: (out / "qatc.json").write_text("3"), "damaged"),
        ("one", lambda out: (out / "qatc.json").write_text('{"format_version": 2}'), "damaged"),
        ("one", edit_metadata(format_version=4), "format_version 4.*reads 2 and 3"),
        ("one", edit_metadata(recipe={"weight": 4}), "unknown key 'weight'"),
        ("one", edit_metadata(recipe=None), "qatc.json"),
        ("one", cut("model.safetensors"), "damaged or cut off"),
        ("one", remove("model.safetensors"), "model.safetensors is missing"),
        ("one", drop_tensor("0.mlp.up_proj.weight_scale"), "no tensor .*up_proj.weight_scale"),
        ("one", edit_metadata(recipe=Recipe.from_bits("8-8-4").to_dict()), "no tensor .*weight;"),
        (
            "one",
            edit_metadata(recipe=Recipe.from_bits("4-8-4", group_size=4).to_dict()),
            "does not belong to this recipe",
        ),
        ("many", remove("model-00002-*"), r"model-00002-of-\d+\.safetensors is missing"),
        ("many", cut("model-00002-*"), r"model-00002-of-\d+\.safetensors is damaged"),
        ("many", cut("model.safetensors.index.json"), "index.json.*not valid JSON"),
        (
            "many",
            lambda out: (out / "model.safetensors.index.json").write_text("{}"),
            "no tensor",
        ),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    tmp_path: Path, pristine: Path, kind: str, damage: Callable[[Path], Any], message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pristine / kind, out)
    assert load_codes(out)
    damage(out)
    for read in (load_codes, load_reference):
        with pytest.raises(CheckpointError, match=message) as error:
            read(out)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor("model.norm"), r"1 are missing or left over.*model\.norm\.weight"),
        (remove("config.json"), "cannot read the config"),
        (cut("config.json"), "cannot read the config"),
    ],
)
def test_a_reference_of_another_model_is_refused(
    tmp_path: Path, pristine: Path, damage: Callable[[Path], Any], message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pristine / "one", out)
    damage(out)
    with pytest.raises(CheckpointError, match=message) as error:
        load_reference(out)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["_scale", ""])
def test_a_stored_tensor_that_is_no_number_is_named(
    tmp_path: Path, pristine: Path, suffix: str
) -> None:
    out = Path(shutil.copytree(pristine / "one", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight_scale" if suffix else "model.norm.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name][0] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the tensor {name} of .* holds 1 values"):
        load_reference(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_holds_code_times_scale(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = make_model(tied=tied)
    weights = write(tmp_path / "out", model, W4A8)
    reference = load_reference(tmp_path / "out", dtype=dtype)
    assert type(reference) is type(model)
    assert not reference.training
    assert not hasattr(reference.config, "quantization_config")
    for name, value in reference.state_dict().items():
        source = weights[name].dequantize() if name in weights else model.state_dict()[name]
        assert torch.equal(value, source.to(dtype)), name
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied
