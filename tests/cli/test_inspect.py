"""``qatc inspect`` sees for itself what it is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qatc.cli.main import app
from qatc.recipe import Recipe
from qatc.storage import markers
from tests.conftest import make_output


def inspect(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def refused(says: str, *arguments: Any, code: int = 2) -> None:
    result = inspect(*arguments)
    assert result.exit_code == code and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and says in line


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("inspect") / "out", Recipe())


@pytest.fixture(scope="module")
def whole_corpus(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("inspect") / "corpus"
    command = ["generate-data", "--model", shared_model_path, "--output", target, "--no-compile"]
    command += ["--samples", "6", "--max-length", "12", "--shard-size", "4", "--batch-size", "4"]
    made = CliRunner().invoke(app, [str(part) for part in command])
    assert made.exit_code == 0, made.output
    return target


@pytest.fixture
def corpus(whole_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_corpus, tmp_path / "corpus"))


def test_an_output(output: Path) -> None:
    shown = inspect(output)
    assert shown.exit_code == 0, shown.output
    assert "one scale per output channel" in shown.stdout and "codes of 14 weights" in shown.stdout
    assert "qatc, transformers" in shown.stdout
    assert f"qatc inspect {output} --kernels" in shown.stderr
    plain = json.loads(inspect(output, "--json").stdout)
    assert plain["bits"] == "4-8-4" and plain["verified"] is None and plain["model"] is None
    assert plain["stored"]["weights"] == 14


def test_values_of_other_bits(shared_model_path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kv: {bits: 8}\nvalue_bits: 4\n")
    shown = inspect(shared_model_path, "--recipe", recipe).stdout
    passed = shown.partition("QuantizeKV")[2]
    assert "bits=8" in passed and "values.bits=4" in passed
    assert "values.bits" not in inspect(shared_model_path).stdout


def test_figures_and_the_reason_of_an_output(output: Path, tmp_path: Path) -> None:
    told = Path(shutil.copytree(output, tmp_path / "told"))
    metadata = json.loads((told / "qatc.json").read_text())
    figures = {"perplexity": 12.5, "kl": 0.25, "top1_agreement": 0.5, "tokens": 9}
    full = {"perplexity": None, "kl": 0.0, "top1_agreement": 1.0, "tokens": 9}
    metadata |= {
        "parity": {"passed": None, "reason": "--no-verify asked for it"},
        "figures": {"generated": {"full precision": full, "RTN": figures, "QAT": figures}},
    }
    (told / "qatc.json").write_text(json.dumps(metadata))
    shown = " ".join(inspect(told).stdout.split())
    assert "not compared with what was trained (--no-verify asked for it)" in shown
    assert "generated RTN 12.5 0.2500 50.0%" in shown


@pytest.mark.parametrize("damage", ["gone", "cut", "metadata"])
def test_a_partial_output(output: Path, tmp_path: Path, damage: str) -> None:
    partial = Path(shutil.copytree(output, tmp_path / "partial"))
    weights = partial / "model.safetensors"
    if damage == "gone":
        weights.unlink()
        refused("holds 0 of its 14 quantized weights", partial, code=1)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
        refused("damaged or cut off", partial, code=1)
    else:
        (partial / "qatc.json").write_text("{")
        refused("damaged", partial, code=1)


def test_a_corpus(corpus: Path) -> None:
    shown = " ".join(inspect(corpus).stdout.split())
    assert "state complete" in shown and "6 of 6" in shown and "4 side by side" in shown
    plain = json.loads(inspect(corpus, "--json").stdout)
    assert plain["sequences"] == 6 and len(plain["fingerprint"]) == 64 and not plain["damaged"]
    second = corpus / "shard-00001.parquet"
    second.write_bytes(second.read_bytes()[:-3])
    shown = " ".join(inspect(corpus).stdout.split())
    assert "missing or damaged: shard-00001.parquet; the same qatc generate-data command" in shown


def test_an_unfinished_corpus(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest |= {"complete": False, "shards": manifest["shards"][:1]}
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    shown = " ".join(inspect(corpus).stdout.split())
    assert "unfinished; the same qatc generate-data command completes it" in shown
    assert "4 of 6" in shown and "none yet" in shown


def test_options_that_say_nothing_of_it(
    output: Path, shared_model_path: Path, corpus: Path
) -> None:
    refused(f"qatc quantize --model {shared_model_path}", shared_model_path, "--kernels")
    refused("is a corpus; leave it out", corpus, "--kernels")
    options = ["--bits", "4-8-4", "--head-bits", "8", "--skip", "x"]
    named = "leave out --bits, --skip, --head-bits"
    refused(f"an output, quantized already; {named}", output, *options)
    refused(named, output, *options, "--kernels")
    refused(f"is a corpus; {named}", corpus, *options)


def test_the_sensitivity_of_a_model(shared_model_path: Path, corpus: Path) -> None:
    options = ["--bits", "4-8-3", "--sensitivity"]
    found = json.loads(inspect(shared_model_path, *options, "--data", corpus, "--json").stdout)
    assert found["bits"] == "4-8-3" and 0 < found["tokens"] <= 6 * 12
    assert [*found["parts"]] == ["weights", "activations", "keys", "values", "everything"]
    assert [*found["layers"]] == ["model.layers.0", "model.layers.1"] and len(found["kinds"]) == 7
    figures = [*found["parts"].values(), *found["layers"].values(), *found["kinds"].values()]
    assert min(figures) > 0
    shown = " ".join(inspect(shared_model_path, *options, "--rows", "1").stdout.split())
    assert "only these are quantized bits KL share" in shown and " activations 8 0." in shown
    assert "model.layers.1 " in shown and "mlp.down_proj " in shown
    assert "KL to full precision in nats per token, on " in shown


def test_sensitivity_of_what_has_none(output: Path, shared_model_path: Path, corpus: Path) -> None:
    refused("leave out --sensitivity", output, "--sensitivity")
    refused("leave out --sensitivity, --data", corpus, "--sensitivity", "--data", corpus)
    refused("give --sensitivity as well", shared_model_path, "--rows", "3")
    refused("at least 1 row; got 0", shared_model_path, "--sensitivity", "--rows", "0")


def test_what_is_none_of_these(output: Path, tmp_path: Path) -> None:
    refused(f"is a file; give its directory, {output}", output / "qatc.json")
    text = tmp_path / "text.txt"
    text.write_text("a text")
    refused("is not a directory; give a model", text)
    refused(f"there is no {tmp_path}/absent; give a model", tmp_path / "absent")
    refused("there is no directory some/model here", "some/model", "--kernels")
    refused("File name too long", "x" * 300)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("is empty; give a model", empty)
    (empty / "notes.txt").touch()
    refused("has no qatc.json, config.json, manifest.json", empty)
    result = inspect()
    assert result.exit_code == 2 and "MODEL|OUTPUT|CORPUS" in result.stderr


def test_an_unfinished_run(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    markers.put(partial, markers.Mark.UNFINISHED)
    refused("the same qatc quantize command goes on with it and writes out", partial)
