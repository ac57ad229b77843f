"""The parity gate on rotated inputs: it passes what is right, and names what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch.fx import GraphModule

import qatc.evaluation.parity as parity
from qatc.errors import ParityError
from qatc.evaluation.checks import ParityReport
from qatc.models.pipelines import training_pipeline
from qatc.numerics.hadamard import HADAMARD, cosine_transform
from qatc.passes import Pipeline
from qatc.ptq import rotate, rotate_inputs
from qatc.recipe.exceptions import Exceptions
from qatc.recipe.recipe import Recipe
from qatc.runtime import forward, operators, program
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output

RECIPE = Recipe.from_bits("4-4-4", rotate_inputs=("*.down_proj.weight",), rotate_keys=True)
WHERE = r"differs at model\.layers\.0, input of mlp\.down_proj\.weight"


def verify(directory: Path) -> ParityReport:
    return parity.verify(directory, reload=False)


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LENGTH", 12)


def rotated_model(recipe: Recipe = RECIPE) -> Any:
    """Where an inverse is another matrix than the transform: 44 is 4 times 11, 6 is 2 times 3."""
    model = make_llama(intermediate_size=44, head_dim=6)
    rotate(model)
    rotate_inputs(model, recipe)
    return model


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("parity") / "o", RECIPE, rotated_model())


def rotations(output: Path) -> list[int]:
    """How many there are in every graph of a loaded output, with a cache."""
    graphs = runtime_of(load(output, compile=False)).cached
    return [
        len(t.graph_module.graph.find_nodes(op="call_function", target=HADAMARD)) for t in graphs
    ]


def test_what_is_right_passes(output: Path) -> None:
    verify(output).require("it")
    assert rotations(output) == [1 + 2]


def test_some_layers_alone(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, rotate_inputs=("*.1.mlp.down_proj.weight",))
    assert rotations(make_output(tmp_path / "o", recipe, rotated_model(recipe))) == [2, 3]


def test_a_missing_rotation(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(recipe: Recipe, own: Exceptions, *others: Any) -> Pipeline:
        return training_pipeline(recipe, dataclasses.replace(own, rotated=()), *others)

    monkeypatch.setattr(forward, "training_pipeline", without)
    with pytest.raises(ParityError, match=WHERE):
        verify(output).require("it")


@pytest.mark.parametrize(
    ("which", "where"), [(-1, WHERE), (0, "query of attention"), (1, "key of attention")]
)
def test_a_wrong_rotation(
    output: Path, monkeypatch: pytest.MonkeyPatch, which: int, where: str
) -> None:
    def backwards(gm: GraphModule) -> None:
        node = [*gm.graph.find_nodes(op="call_function", target=HADAMARD)][which]
        node.args = (node.args[0], True)
        gm.recompile()

    def wrong(*arguments: Any) -> Pipeline:
        return Pipeline((*training_pipeline(*arguments).passes, backwards))

    monkeypatch.setattr(forward, "training_pipeline", wrong)
    with pytest.raises(ParityError, match=where):
        verify(output).require("it")


@pytest.mark.skipif(program.obstacle() is not None, reason="no C compiler")
def test_a_wrong_rotation_in_c(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        operators, "cosine_transform", lambda size: cosine_transform(size).t().contiguous()
    )
    with pytest.raises(ParityError, match="decoding program from the graphs"):
        verify(output).require("it")
