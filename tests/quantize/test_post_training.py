"""Runs of post-training methods, alone and before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.errors import ConfigError
from qatc.numerics.learned import least_error_scale
from qatc.numerics.minmax import quantize as to_codes
from qatc.output import load_codes, open_output
from qatc.passes.quantize_kv import KEY_CENTER
from qatc.ptq import gptq
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from tests.conftest import contents, load_with_transformers
from tests.quantize.conftest import Notes, NothingTrained, Stopped, make, no_more, weights

METHODS = "qatc.quantize.post_training.apply"


def test_gptq_alone(shared_model_path: Path, tmp_path: Path) -> None:
    """No step is taken; the codes are those that GPTQ chose, and they run on integers."""
    config = make(shared_model_path, tmp_path / "out", method="gptq", verify=True)
    result = quantize(config, NothingTrained())
    figures = result.figures["generated"]
    assert [*figures] == ["full precision", "RTN", "gptq"]
    kl, rounded = figures["gptq"].kl, figures["RTN"].kl
    assert kl is not None and rounded is not None and kl < rounded
    assert not (result.output / "metrics.jsonl").exists()
    report = (result.output / "report.md").read_text()
    assert "gptq is the model in this directory" in report and "## Training" not in report
    card = (result.output / "README.md").read_text()
    assert "post-training quantization (`gptq`)" in card and "aware" not in card
    metadata = json.loads((result.output / "qatc.json").read_text())
    assert metadata["run"]["method"] == "gptq" and metadata["parity"]["passed"]
    original = dict(load_with_transformers(shared_model_path).named_parameters())
    differ = 0
    for name, weight in load_codes(result.output).items():
        nearest, scale = to_codes(original[name], weight.spec, snap=True)
        assert torch.equal(weight.scale, scale)
        differ += int((weight.codes != nearest).sum())
    assert differ > 100


def test_rounding_alone(shared_model_path: Path, tmp_path: Path) -> None:
    result = quantize(make(shared_model_path, tmp_path / "out", method="rtn"), NothingTrained())
    assert [*result.figures["generated"]] == ["full precision", "RTN"]
    original = dict(load_with_transformers(shared_model_path).named_parameters())
    for name, weight in load_codes(result.output).items():
        assert torch.equal(weight.codes, to_codes(original[name], weight.spec, snap=True)[0])


@pytest.mark.parametrize("share", [True, False])
def test_rotation_unties_the_output(shared_model_path: Path, tmp_path: Path, share: bool) -> None:
    """Also where the student's embedding is the teacher's memory, which stays as it is."""
    config = make(
        shared_model_path,
        tmp_path / "out",
        method="rotate+smoothquant",
        train_embeddings=not share,
        verify=not share,
    )
    notes = Notes()
    result = quantize(config, notes)
    assert any("which were one weight, are two" in note for note in notes.notes)
    figures = result.figures["generated"]
    assert figures["full precision"].kl == pytest.approx(0, abs=1e-6)
    assert (figures["rotate+smoothquant"].kl or 9) < 2 * (figures["RTN"].kl or 0)
    output = open_output(result.output)
    assert output.config.tie_word_embeddings is False
    assert output.metadata["divergence_by_layer"] == []  # between layers it is rotated
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= output.state.keys()


@pytest.mark.parametrize("recipe", ["4-8-4", "best"])
def test_training_goes_on_from_gptq(shared_model_path: Path, tmp_path: Path, recipe: str) -> None:
    """Learned scales start where GPTQ put them."""
    best = {"weights": {"bits": 4, "range": "signed", "clip": "learned"}, "center_keys": True}
    chosen = Recipe.from_dict(best if recipe == "best" else {})
    common: dict[str, Any] = {"recipe": chosen, "data": tmp_path / "data"}
    result = quantize(make(shared_model_path, tmp_path / "out", method="gptq+qat", **common))
    alone = quantize(make(shared_model_path, tmp_path / "alone", method="gptq", **common))
    figures = result.figures["generated"]
    assert [*figures] == ["full precision", "RTN", "gptq", "QAT"]
    assert figures["gptq"].kl == pytest.approx(alone.figures["generated"]["gptq"].kl, abs=1e-4)
    assert (figures["gptq"].kl or 9) < (figures["RTN"].kl or 0)
    assert (figures["QAT"].kl or 9) < 1.1 * (figures["gptq"].kl or 0)
    if recipe == "best":
        original = dict(load_with_transformers(shared_model_path).named_parameters())
        for name, weight in load_codes(alone.output).items():
            start = least_error_scale(original[name].detach(), weight.spec)
            assert torch.equal(weight.scale, start)
        centers = [v for n, v in open_output(alone.output).state.items() if KEY_CENTER in n]
        assert len(centers) == 2 and all(center.any() for center in centers)


def test_an_interrupted_run_calibrates_once(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"method": "rotate+gptq+qat", "data": tmp_path / "data"}
    expected = quantize(make(shared_model_path, tmp_path / "whole", **common))
    config = make(shared_model_path, tmp_path / "out", **common)

    class StopsAfterCalibrating(Notes):
        def stage(self, title: str) -> None:
            if title.startswith("Training"):
                raise Stopped

    with pytest.raises(Stopped):
        quantize(config, StopsAfterCalibrating())
    assert "student.safetensors" in {path.split("/")[-1] for path in contents(config.partial)}
    monkeypatch.setattr(METHODS, no_more)
    assert weights(quantize(config).output) == weights(expected.output)


def test_only_so_many_rows_are_looked_at(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(method: Any, model: Any, rows: Any, recipe: Recipe, **others: Any) -> Any:
        seen.append(len(rows))
        return gptq(model, rows, recipe)

    seen: list[int] = []
    monkeypatch.setattr(METHODS, counted)
    quantize(make(shared_model_path, tmp_path / "out", method="gptq", calibration_rows=3))
    assert seen == [3]


def test_rotated_inputs_that_are_not_there(shared_model_path: Path, tmp_path: Path) -> None:
    """Told before a corpus is written."""
    recipe = Recipe.from_bits("4-4-4", rotate_inputs=("*.fc2.weight",))
    with pytest.raises(ConfigError, match="rotate_inputs pattern '.*fc2.weight' matches no"):
        quantize(make(shared_model_path, tmp_path / "out", method="rotate", recipe=recipe))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "awq"}, "there is no 'awq'"),
        ({"method": "gptq", "recipe": Recipe.from_bits("16-8-4")}, "leaves them at 16"),
        ({"calibration_rows": 0}, "calibration_rows must be at least 1"),
    ],
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QuantizeConfig("m", Path("o"), **change)
