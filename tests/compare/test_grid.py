"""A grid file gives the cells that it spells out, and every mistake in it is named."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import typer
import yaml

from qatc.cli.compare import quantize_options
from qatc.cli.main import app
from qatc.cli.options import build_recipe
from qatc.compare.grid import EVALUATIONS, SET_BY_THE_GRID, Cell, read_grid
from qatc.compare.running import unique
from qatc.errors import ConfigError
from qatc.quantize.settings import QuantizeConfig

KNOWN = {"model": None, "bits": "4-8-4", "steps": 1500, "group_size": None}
KNOWN |= {"strategy": "hybrid", "output": None, "seed": 0}
PAPER = sorted((Path(__file__).resolve().parents[2] / "examples/paper").glob("*.yaml"))


def read(tmp_path: Path, text: str) -> list[Cell]:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(path, KNOWN)


def test_every_combination_is_a_cell_and_the_table_wins(tmp_path: Path) -> None:
    cells = read(
        tmp_path,
        """
        base: {model: m, steps: 7, group_size: 32}
        seeds: [0, 1]
        grids:
          - name: one
            base: {steps: 9}
            axes: {bits: [4-8-4, 8-8-8], group-size: [null, 64]}
          - {base: {strategy: greedy}, seeds: [5]}
        """,
    )
    one = [
        {"model": "m", "steps": 9, "bits": bits, "seed": seed}
        | ({"group-size": 64} if group else {})
        for bits in ("4-8-4", "8-8-8")
        for group in (None, 64)
        for seed in (0, 1)
    ]
    assert [dict(c.options) for c in cells if c.table == "one"] == one
    (last,) = [c for c in cells if c.table == "table 2"]
    assert last.options == {
        "model": "m",
        "steps": 7,
        "group-size": 32,
        "strategy": "greedy",
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not valid YAML"),
        ("grids: []", "list of tables"),
        ("grid: []", "there is no 'grid'; there is grids"),
        ("grids: [3]", "table 1 is not a mapping"),
        ("grids: [{axis: {}}]", "there is no 'axis'; there is axes"),
        ("grids: [{axes: {bits: [4-8-4]}}]", "names no model"),
        ("base: {model: m, bist: 4-8-4}\ngrids: [{}]", "'bist'; there is bits"),
        ("base: {model: m, zzz: 1}\ngrids: [{}]", "there is bits, group-size, model, steps"),
        ("base: {model: m}\ngrids: [{axes: {step: [1]}}]", "'step'; there is steps"),
        ("base: {model: m}\ngrids: [{axes: {bits: 4-8-4}}]", "the axis bits takes a list"),
        ("base: {model: m}\ngrids: [{axes: {bits: []}}]", "the axis bits takes a list"),
        ("base: [m]\ngrids: [{}]", "base is not a mapping"),
        ("base: {model: m, output: o}\ngrids: [{}]", "sets output itself"),
        ("base: {model: m, seed: 3}\ngrids: [{}]", "seeds: [0, 1, 2]"),
        ("base: {model: m}\nseeds: 3\ngrids: [{}]", "seeds takes a list"),
        ("base: {model: m}\nseeds: [1, 1]\ngrids: [{}]", "different whole numbers"),
        ("base: {model: m}\ngrids: [{name: a}, {name: a}]", "a table 'a' already"),
        ("base: {model: m}\nevaluate: wiki.txt\ngrids: [{}]", "evaluate takes a list"),
        ("base: {model: m}\nevaluate: [wiki.txt]\ngrids: [{}]", "evaluate takes a list"),
        ("base: {model: m}\nevaluate: [{length: 3}]\ngrids: [{}]", "takes text or tasks"),
        ("base: {model: m}\nevaluate: [{text: a, tasks: b}]\ngrids: [{}]", "takes text or tasks"),
        ("base: {model: m}\nevaluate: [{txt: a}]\ngrids: [{}]", "takes text or tasks"),
        (
            "base: {model: m}\ngrids: [{evaluate: [{tasks: a, teacher: b}]}]",
            "there is no 'teacher'",
        ),
        ("base: {model: m}\ngrids: [{evaluate: [{tasks: a, max-tokens: 9}]}]", "no 'max-tokens'"),
        ("base: {model: m}\ngrids: [{evaluate: [{text: a, limit: 9}]}]", "there is no 'limit'"),
        ("base: {model: m}\ngrids: [{evaluate: [{text: no/such.txt}]}]", "no text no/such.txt"),
    ],
)
def test_mistakes(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        read(tmp_path, text)
    assert says in str(found.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the grid file"):
        read_grid(tmp_path / "none.yaml", KNOWN)


def test_names_tell_cells_apart_and_corpora_are_those_of_the_data() -> None:
    one = Cell("a", {"model": "org/m", "bits": "4-8-4", "steps": 3, "seed": 0})
    assert one.name.startswith("m-4-8-4-seed0-")
    reordered = Cell("b", dict(reversed(list(one.options.items()))))
    assert reordered.name == one.name
    for change in ({"steps": 4}, {"seed": 1}, {"bits": "4-8-8"}, {"model": "other/m"}):
        assert Cell("a", {**one.options, **change}).name != one.name
    for change, shared in (({"steps": 4}, True), ({"bits": "8-8-8"}, True), ({"seed": 1}, False)):
        assert (Cell("a", {**one.options, **change}).corpus == one.corpus) is shared
    for name, value in (("samples", 9), ("strategy", "greedy"), ("max-length", 8)):
        assert Cell("a", {**one.options, name: value}).corpus != one.corpus


def test_what_cells_are_measured_on(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("text")
    tasks = "{tasks: [x, y], include_path: d, limit: null}"
    head = f"base: {{model: m}}\nevaluate: [{{text: {place}}}]\n"
    text = f"{head}grids: [{{}}, {{evaluate: []}}, {{evaluate: [{tasks}]}}]"
    first, none, other = read(tmp_path, text)
    assert first.evaluations == ({"text": str(place)},) and none.evaluations == ()
    assert other.evaluations == ({"tasks": ["x", "y"], "include-path": "d"},)
    assert len({cell.name for cell in (first, none, other)}) == 1, "one run serves all three"
    (cell,) = unique([first, none, other])
    assert cell.evaluations == first.evaluations + other.evaluations
    with pytest.raises(ConfigError, match=r"two texts to evaluate on are called a.txt"):
        read(tmp_path, f"{head}grids: [{{evaluate: [{{text: {place}}}, {{text: {place}}}]}}]")


def test_evaluations_are_options_of_the_command() -> None:
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    names = {str(p.name).replace("_", "-") for p in command.params}
    assert set(itertools.chain(*EVALUATIONS.values())) <= names


def test_a_default_that_is_spelled_out_makes_no_other_cell() -> None:
    defaults = {"bits": "4-8-4", "method": "qat", "steps": 1500, "strategy": "hybrid"}
    plain = Cell("a", {"model": "m", "seed": 0}, defaults)
    spelled = Cell("b", {"model": "m", "seed": 0, **defaults}, defaults)
    assert spelled.name == plain.name and spelled.corpus == plain.corpus
    assert plain.name.startswith("m-4-8-4-qat-seed0-")
    assert "strategy" in spelled.setting  # for the table, which has a column of it
    for name, value in {"bits": "8-8-8", "method": "rtn", "steps": 3, "strategy": "greedy"}.items():
        assert Cell("a", {**plain.options, name: value}, defaults).name != plain.name


def test_the_defaults_are_those_of_quantize() -> None:
    options = quantize_options()
    wanted = {
        "bits": "4-8-4",
        "preset": "paper",
        "method": "qat",
        "loss": "logits",
        "target": "qatc",
    }
    assert wanted.items() <= options.items()
    config = QuantizeConfig("m", Path("o"), recipe=build_recipe(None, None))
    assert config.recipe == build_recipe(
        **{n: options[n] for n in ("bits", "preset", "target")}, recipe=None
    )
    assert config.method == options["method"] and config.training.loss == options["loss"]


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_grids_of_the_paper_name_options_that_there_are(path: Path) -> None:
    cells = read_grid(path, quantize_options())
    assert len({cell.name for cell in cells}) > 1
    for cell in cells:
        assert not cell.options.keys() & set(SET_BY_THE_GRID)


def test_the_small_grid_has_what_it_is_for() -> None:
    (path,) = [p for p in PAPER if p.stem == "small"]
    activations = "4-bit activations"
    assert {
        *("bits", "KV cache alone", "quantizer", "keys and values", "data", "loss", activations),
        *(f"{activations}, groups of 32", "data, demonstration model"),
    } == {grid["name"] for grid in yaml.safe_load(path.read_text())["grids"]}
    cells = read_grid(path, quantize_options())
    # They do not divide the 172 inputs of a down projection of stories260K.
    in_groups = [cell.options["model"] for cell in cells if cell.options.get("group-size")]
    assert set(in_groups) == {"examples/demo-model"}
    assert {cell.seed for cell in cells} == {0, 1, 2}
    of_bits = [cell for cell in cells if cell.table in ("bits", "KV cache alone")]
    assert len({cell.options["bits"] for cell in of_bits}) == 10
