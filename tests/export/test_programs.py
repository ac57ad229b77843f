"""What is beside programs: a script that says what it lacks, and a card that says how to run it."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest

from qatc.errors import CaptureError, ConfigError
from qatc.export import FORMATS
from qatc.export.executorch import generate as of_executorch
from qatc.export.programs import capture_errors, card_of, commands, notes_on_text
from qatc.export.pt2 import generate as of_pt2
from qatc.output import open_output
from qatc.recipe.recipe import Recipe
from tests.conftest import make_output, make_tokenizer

RECIPE = Recipe.from_bits("4-8-4")


def test_both_scripts_have_one_main() -> None:
    """Each stands alone, so that what they share is written twice."""
    assert inspect.getsource(of_pt2.main) == inspect.getsource(of_executorch.main)


@pytest.mark.parametrize("script", [of_pt2, of_executorch], ids=["pt2", "executorch"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_script_says_what_it_lacks(
    script: Any,
    tokenizer: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = tmp_path / "generate.py"
    copied.write_text(inspect.getsource(script))
    if tokenizer:  # one that puts nothing before a text
        make_tokenizer(bos=False).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", [str(copied), ""])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(copied), run_name="__main__")
    assert left.value.code == 2
    wanted = "the prompt has no tokens" if tokenizer else "no tokenizer.json is beside this file"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [True, False])
def test_without_a_tokenizer_no_command_reads_a_prompt(tokenizer: bool, tmp_path: Path) -> None:
    source = make_output(tmp_path / "o", RECIPE, tokenizer=make_tokenizer() if tokenizer else None)
    output = open_output(source)
    notes = FORMATS["pt2"].notes(output)
    card = card_of(output, kind="K", about="A", packages=["p", "q"], notes=notes)
    says = "the model has no tokenizer.json, so generate.py cannot read a prompt"
    assert (says in "".join(notes)) is (says in card) is (not tokenizer)
    assert ("python generate.py" in card) is tokenizer
    assert ("pip install p q tokenizers\n" if tokenizer else "pip install p q\n") in card
    assert len(commands(output, tmp_path)) == tokenizer != len(notes_on_text(output))


def test_errors_of_others_are_errors_to_act_on() -> None:
    with (
        pytest.raises(CaptureError, match=r"it fails: KeyError: 'x'; go there"),
        capture_errors("it fails:", "go there"),
    ):
        raise KeyError("x")
    with pytest.raises(ConfigError, match="mine"), capture_errors("it fails:", "go there"):
        raise ConfigError("mine")
