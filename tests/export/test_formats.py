"""Exports: the same model again, and nothing of anybody else replaced."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import GenerationConfig

from qatc.errors import CheckpointError, ConfigError
from qatc.export.formats import FORMATS, export
from qatc.export.gguf.card import differences as gguf_differences
from qatc.output import Output, open_output
from qatc.output import directory as directory_module
from qatc.recipe.recipe import Recipe
from tests.conftest import make_output
from tests.output.conftest import make_model, make_tokenizer, write, write_whole_and_in_shards

OLD = '{"format_version": 2, "recipe": {}}'


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_and_in_shards(tmp_path_factory.mktemp("pristine"))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("bits", ["4-8-4", "8-16-16", "16-16-16"])
def test_export_writes_the_same_model_again(tmp_path: Path, bits: str) -> None:
    write(
        tmp_path / "source",
        make_model(),
        Recipe.from_bits(bits),
        tokenizer=make_tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=7),
    )
    assert export(tmp_path / "source", tmp_path / "out") == tmp_path / "out"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "source")


def test_export_of_shards_leaves_no_file_of_theirs(tmp_path: Path, pristine: Path) -> None:
    export(pristine / "many", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(pristine / "one")


def test_export_refuses_an_unknown_format(tmp_path: Path, pristine: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'onnx'; valid formats: compressed-tensors, torchao, vllm, vllm-marlin, gguf",
    ):
        export(pristine / "one", tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["one", "../{name}/one", "."])
def test_export_refuses_to_replace_its_source(pristine: Path, output: str) -> None:
    before = snapshot(pristine / "one")
    path = pristine / output.format(name=pristine.name)
    with pytest.raises(ConfigError, match="would replace the source"):
        export(pristine / "one", path, overwrite=True)
    assert snapshot(pristine / "one") == before


def test_export_writes_nothing_into_its_source(pristine: Path) -> None:
    before = snapshot(pristine / "one")
    with pytest.raises(ConfigError, match="lies in the source"):
        export(pristine / "one", pristine / "one" / "exported")
    assert snapshot(pristine / "one") == before


def test_export_replaces_nothing_but_outputs(tmp_path: Path, pristine: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="is no output of qatc"):
        export(pristine / "one", tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path / "model") == {"model.safetensors": b"mine"}


def test_two_exports_at_once(tmp_path: Path, pristine: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            export(pristine / "one", tmp_path / "out")
        except ConfigError as error:
            refused.append(str(error))

    def start_another(source: Output) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    export(pristine / "one", tmp_path / "out", verify=start_another)
    assert "is being written by process" in refused[0]
    assert snapshot(tmp_path / "out") == snapshot(pristine / "one")


def test_export_replaces_an_existing_output_only_when_told(tmp_path: Path, pristine: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "qatc.json").write_text(OLD)
    with pytest.raises(ConfigError, match="--overwrite"):
        export(pristine / "one", out)
    assert snapshot(out) == {"qatc.json": OLD.encode()}
    export(pristine / "one", out, overwrite=True)
    assert snapshot(out) == snapshot(pristine / "one")


def test_a_failed_export_leaves_the_output_as_it_was(
    tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "qatc.json").write_text(OLD)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(directory_module, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space"):
        export(pristine / "one", out, overwrite=True)
    assert snapshot(out) == {"qatc.json": OLD.encode()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_formats_say_that_they_have_no_zero_points(tmp_path: Path) -> None:
    recipes = {bits: Recipe.from_bits(bits, target="executorch") for bits in ("4-8-16", "8-8-16")}
    bytes_alone, groups = (
        open_output(make_output(tmp_path / bits, recipes[bits])) for bits in ("8-8-16", "4-8-16")
    )
    said = {name: " ".join(FORMATS[name].notes(bytes_alone)) for name in ("torchao", "vllm")}
    assert "this model was trained with a zero point beside the scale)" in said["torchao"]
    assert "max / 127 (with a zero point beside the scale here)" in said["vllm"]
    in_gguf = gguf_differences(groups.recipe, 64)[0]
    assert "trained with 8 bits and one scale and zero point per token; --target llama" in in_gguf
    for name in ("torchao", "vllm"):
        with pytest.raises(ConfigError, match="groups of 32"):
            FORMATS[name].notes(groups)
    card = (tmp_path / "4-8-16" / "README.md").read_text()
    assert card.count("max / 127.5, where this model was trained with a zero point") == 2
    assert "scale = (max - min) / 255, 0 between them, and a zero point |" in card
