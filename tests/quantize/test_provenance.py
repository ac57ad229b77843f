"""A run is one run of one model, on one corpus, by one version."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatc.data.generate import generate_corpus
from qatc.errors import ConfigError
from qatc.models import load_model, load_tokenizer
from qatc.quantize.provenance import package_version
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from tests.conftest import contents
from tests.quantize.conftest import Notes, NothingBegun, interrupted, make


class TestInputs:
    """A run is one run of one model, on one corpus, by one version."""

    def change(self, name: str, config: QuantizeConfig) -> None:
        """Change an input in place, keeping its size and its times."""
        path = {
            "model": Path(config.model) / "model.safetensors",
            "config": Path(config.model) / "config.json",
            "corpus": config.data_directory / "manifest.json",
            "text": config.eval_text,
        }[name]
        assert path is not None
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        if name == "model":
            state = load_file(path)
            state["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
            save_file(state, path, metadata={"format": "pt"})
        elif name == "config":
            plain = json.loads(path.read_text())
            path.write_text(json.dumps(plain | {"rms_norm_eps": 1e-3}))
        elif name == "text":
            path.write_text(path.read_text().replace("The old", "The odd", 1))
        else:
            shutil.rmtree(config.data_directory)
            generation = dataclasses.replace(config.generation, seed=1)
            teacher = load_model(config.model, dtype=torch.float32)
            tokenizer = load_tokenizer(config.model)
            generate_corpus(teacher, tokenizer, path.parent, generation, compile=False)
        os.utime(path, ns=times)

    @pytest.mark.parametrize("name", ["model", "config", "corpus", "text"])
    def test_changed_in_place(
        self, model_path: Path, text_file: Path, tmp_path: Path, name: str
    ) -> None:
        text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
        data = tmp_path / "data"
        config = make(model_path, tmp_path / "out", eval_text=text, data=data)
        interrupted(config)
        before = contents(config.partial)
        self.change(name, config)
        called = {"text": "the evaluation text", "config": "the model"}.get(name, f"the {name}")
        with pytest.raises(ConfigError, match=f"since it began {called} .* changed .*--overwrite"):
            quantize(config)
        assert contents(config.partial) == before
        notes = Notes()
        result = quantize(dataclasses.replace(config, overwrite=True), notes)
        assert any(note.startswith(f"starting over: {called}") for note in notes.notes)
        inputs = json.loads((result.output / "qatc.json").read_text())["inputs"]
        assert len(inputs) == 3 and any(key.startswith(called) for key in inputs)
        steps = (result.output / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in steps] == list(range(1, 7))

    @pytest.mark.parametrize("package", ["qatc", "torch", "transformers"])
    def test_another_version(
        self,
        shared_model_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        package: str,
    ) -> None:
        config = make(shared_model_path, tmp_path / "out")
        interrupted(config)
        real = package_version
        monkeypatch.setattr(
            "qatc.quantize.provenance.package_version",
            lambda name: "9.9" if name == package else real(name),
        )
        with pytest.raises(ConfigError, match=f"the version of {package} changed from .* to 9.9"):
            quantize(config, NothingBegun())

    def test_a_corpus_that_does_not_fit_is_found_before_the_old_run_is_deleted(
        self, shared_model_path: Path, tmp_path: Path
    ) -> None:
        config = make(shared_model_path, tmp_path / "out")
        interrupted(config)
        before = contents(config.partial)
        generation = dataclasses.replace(config.generation, seed=1)
        other = dataclasses.replace(config, generation=generation, overwrite=True)
        with pytest.raises(ConfigError, match="was made with seed 0, not 1"):
            quantize(other)
        assert contents(config.partial) == before
