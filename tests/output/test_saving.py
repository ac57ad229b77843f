"""A loaded model is saved whole, and says so where it cannot be."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qatc
from qatc.errors import ConfigError
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from tests.conftest import contents, make_llama, make_output

RECIPES = {
    "4-8-4": Recipe.from_bits("4-8-4"),
    "8-8-8": Recipe.from_bits("8-8-8"),
    "3-6-5": Recipe.from_bits("3-6-5"),
    "16-8-4": Recipe.from_bits("16-8-4"),
    "groups": dataclasses.replace(Recipe.from_bits("4-8-4"), weights=QuantSpec(4, 16)),
}
IDS = torch.arange(2, 30).reshape(2, 14)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    return {
        name: make_output(root / name, recipe, make_llama().bfloat16(), tokenizer)
        for name, recipe in RECIPES.items()
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in RECIPES), ("4-8-4", torch.bfloat16)],
)
def test_saved_and_loaded_it_is_the_same(
    name: str, dtype: torch.dtype, outputs: dict[str, Path], tmp_path: Path
) -> None:
    model = qatc.load(outputs[name], dtype=dtype, compile=False)
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(outputs[name])
    again = qatc.load(tmp_path / "saved", dtype=dtype, compile=False)
    assert torch.equal(logits(again), logits(model))


def test_saved_in_shards_into_an_empty_directory(outputs: dict[str, Path], tmp_path: Path) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    model.save_pretrained(tmp_path, max_shard_size="9KB", is_main_process=True, push_to_hub=False)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1 and all(path.stat().st_size < 16_000 for path in files)
    assert torch.equal(logits(qatc.load(tmp_path, compile=False)), logits(model))


def test_what_was_changed_is_saved_without_the_figures(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(outputs["4-8-4"], tmp_path / "source"))
    metadata = json.loads((source / "qatc.json").read_text())
    (source / "qatc.json").write_text(json.dumps(metadata | {"figures": {}, "seed": 3}))
    (source / "report.md").write_text("what the model did before it was changed")
    model = qatc.load(source, compile=False)
    model.save_pretrained(tmp_path / "same")
    model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "changed")
    for name, measured in (("same", True), ("changed", False)):
        metadata = json.loads((tmp_path / name / "qatc.json").read_text())
        assert metadata["seed"] == 3
        assert ("figures" in metadata) == (tmp_path / name / "report.md").exists() == measured
    assert torch.equal(logits(qatc.load(tmp_path / "changed", compile=False)), logits(model))


def test_what_save_pretrained_refuses(outputs: dict[str, Path], tmp_path: Path) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for place in (tmp_path / "full", outputs["4-8-4"]):
        before = contents(place)
        with pytest.raises(ConfigError, match="exists"):
            model.save_pretrained(place)
        assert contents(place) == before
    refused: list[dict[str, Any]] = [{"push_to_hub": True}, {"state_dict": {}}, {"variant": "fp16"}]
    for options in refused:
        with pytest.raises(ConfigError, match=f"cannot be saved with {next(iter(options))}="):
            model.save_pretrained(tmp_path / "new", **options)
    with pytest.raises(ConfigError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "new", max_shard_size="much")
    assert not (tmp_path / "new").exists()


def test_without_its_source_it_warns(outputs: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(outputs["4-8-4"], tmp_path / "source"))
    model = qatc.load(source, compile=False)
    shutil.rmtree(source)
    with pytest.warns(UserWarning, match="no tokenizer"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(qatc.load(tmp_path / "saved", compile=False)), logits(model))


@pytest.mark.parametrize("name", ["4-8-4", "8-8-8"])
def test_the_state_dict_holds_the_packed_weights(name: str, outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs[name], compile=False)
    state = model.state_dict()
    names = json.loads((outputs[name] / "qatc.json").read_text())["quantized"]
    stored = load_file(outputs[name] / "model.safetensors")
    assert len(names) == 14
    for weight in names:
        assert torch.equal(state[f"{weight}_scale"], stored[f"{weight}_scale"].float())
    other = qatc.load(outputs[name], compile=False)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_a_deep_copy_is_a_model_of_its_own(outputs: dict[str, Path], tmp_path: Path) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    before, copied = logits(model), copy.deepcopy(model)
    copied.model.norm.weight.mul_(2)
    copied.model.layers[1].mlp.up_proj.weight_scale.mul_(2)
    assert torch.equal(logits(model), before) and not torch.equal(logits(copied), before)
    copied.save_pretrained(tmp_path / "copied")
    model.save_pretrained(tmp_path / "model")
    for name, source in (("copied", copied), ("model", model)):
        assert torch.equal(logits(qatc.load(tmp_path / name, compile=False)), logits(source))


def test_pickling_says_why_not(outputs: dict[str, Path], tmp_path: Path) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    with pytest.raises(ConfigError, match=r"cannot be pickled.*save_pretrained.*qatc\.load"):
        pickle.dumps(model)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        torch.save(model, tmp_path / "model.pt")
    prepared = qatc.prepare(make_llama(), RECIPES["4-8-4"], compile=False)
    with pytest.raises(ConfigError, match=r"cannot be pickled.*qatc\.restore"):
        pickle.dumps(prepared)
    pickle.dumps(qatc.restore(prepared))
