"""Evaluating a model on disk. Quantized outputs: ``test_quantize.py`` and ``cli/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.data.corpus import text_rows
from qatc.errors import ConfigError, DataError
from qatc.evaluation.evaluate import AssessConfig, assess
from qatc.evaluation.metrics import evaluate
from qatc.models import load_model
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.runtime.model import load
from tests.conftest import make_output, make_tokenizer


def config(model: Path, **changes: Any) -> AssessConfig:
    return AssessConfig(str(model), **({"length": 64, "compile": False} | changes))


def test_full_precision(shared_model_path: Path, text_file: Path, tokenizer: Any) -> None:
    found = assess(config(shared_model_path, text=text_file, max_tokens=500))
    rows = text_rows(text_file.read_text(), tokenizer, 64, 500)
    expected = evaluate(load_model(str(shared_model_path)).model, rows)
    assert found.to_dict() == pytest.approx(expected.to_dict())
    assert found.tokens == 7 * 62


def test_rounded(shared_model_path: Path, text_file: Path, tokenizer: Any) -> None:
    teacher = load_model(str(shared_model_path)).model
    rounded = prepare(load_model(str(shared_model_path)).model, Recipe(), compile=False)
    rows = text_rows(text_file.read_text(), tokenizer, 64, 500)
    expected = evaluate(rounded, rows, teacher=teacher)
    found = assess(
        config(
            shared_model_path,
            text=text_file,
            max_tokens=500,
            recipe=Recipe(),
            teacher=str(shared_model_path),
        )
    )
    assert found.kl is not None and found.kl > 0
    assert found.to_dict() == pytest.approx(expected.to_dict())


def test_inputs_that_the_recipe_rotates(shared_model_path: Path, text_file: Path) -> None:
    """The weights are turned for them: nothing else than rounding makes a difference."""
    given = {"text": text_file, "max_tokens": 500, "teacher": str(shared_model_path)}
    recipes = (Recipe.from_bits("8-8-8", rotate_inputs=p) for p in ((), ("*.down_proj.weight",)))
    plain, rotated = (assess(config(shared_model_path, recipe=r, **given)) for r in recipes)
    assert plain.kl and rotated.kl and plain.kl != rotated.kl < 2 * plain.kl


def test_packed_it_is_the_integer_model(
    shared_model_path: Path, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    out = make_output(tmp_path / "out", Recipe.from_bits("4-8-4"), tokenizer=tokenizer)
    given = {"text": text_file, "max_tokens": 300, "teacher": str(shared_model_path)}
    rows = text_rows(text_file.read_text(), tokenizer, 64, 300)
    own = load(out, dtype=torch.float32, compile=False)
    expected = evaluate(own, rows, teacher=load_model(str(shared_model_path)).model)
    found = assess(config(out, runtime="packed", **given))
    assert found.to_dict() == pytest.approx(expected.to_dict()) and (found.kl or 0) > 0.01


def test_needs_one_text(text_file: Path) -> None:
    both: dict[str, Any] = {"text": text_file, "data": text_file}
    for given in ({}, both):
        with pytest.raises(ConfigError, match="either --text FILE or --data CORPUS"):
            AssessConfig("model", **given)


@pytest.mark.parametrize("change", [{"length": 3}, {"batch_size": 0}])
def test_values(text_file: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="length must be at least 4 and batch_size at least 1"):
        AssessConfig("model", text=text_file, **change)


def test_more_than_the_model_takes(shared_model_path: Path, text_file: Path) -> None:
    with pytest.raises(ConfigError, match="takes at most 128 tokens; got 129"):
        assess(config(shared_model_path, text=text_file, length=129))


def test_a_teacher_with_another_tokenizer(
    shared_model_path: Path, other_tokenizer_path: Path, text_file: Path
) -> None:
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        assess(config(shared_model_path, text=text_file, teacher=str(other_tokenizer_path)))


def test_what_cannot_be_read(shared_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="there are 0 tokens of text"):
        assess(config(shared_model_path, text=tmp_path / "empty"))
    with pytest.raises(ConfigError, match="cannot read the text"):
        assess(config(shared_model_path, text=tmp_path / "absent"))
    with pytest.raises(DataError, match="is not a corpus"):
        assess(config(shared_model_path, data=tmp_path))


def test_a_text_with_a_token_that_the_model_lacks(model_path: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model_path)
    text = tmp_path / "text"
    text.write_text("The old fox sleeps. " * 30)
    assess(config(model_path, text=text))
    text.write_text("The old [PAD] fox sleeps. " * 30)
    with pytest.raises(DataError, match=r"text holds the token '\[PAD\]', number 112"):
        assess(config(model_path, text=text))
