"""Models with code of their own: trusted all the way, or refused with a line; never asked about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qatc
from qatc.cli.main import app
from qatc.errors import CheckpointError, ConfigError
from qatc.evaluation.parity import verify
from qatc.export import export
from qatc.output import load_reference
from tests.conftest import make_llama, save

FILES = {
    "configuration_odd.py": """
from transformers import LlamaConfig
class OddConfig(LlamaConfig):
    model_type = "odd"
""",
    "scaling_odd.py": "FACTOR = 0.5\n",
    "modeling_odd.py": """
from transformers import LlamaForCausalLM
from .configuration_odd import OddConfig
from .scaling_odd import FACTOR
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * FACTOR
        return out
""",
}
AUTO_MAP = {
    "AutoConfig": "configuration_odd.OddConfig",
    "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
}
TINY = ["--samples", "24", "--max-length", "16", "--eval-samples", "8", "--steps", "2"]
TINY += ["--batch-size", "4", "--generation-batch-size", "8", "--no-compile"]


def qatc_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process that has not seen the model's classes, and a terminal to ask on."""
    return subprocess.run(
        [sys.executable, "-m", "qatc.cli", *map(str, arguments)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def odd_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose class comes with it, in a file that needs two others."""
    path = save(tmp_path_factory.mktemp("remote") / "odd", make_llama(), tokenizer)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": AUTO_MAP}
    (path / "config.json").write_text(json.dumps(config))
    for name, content in FILES.items():
        (path / name).write_text(content)
    return path


@pytest.fixture(scope="module")
def output(odd_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized by the command, from a source that is gone afterwards."""
    root = tmp_path_factory.mktemp("output")
    source = shutil.copytree(odd_path, root / "source")
    command = ["quantize", "--model", source, "--output", root / "out", *TINY]
    done = qatc_command(*command, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run" not in done.stdout + done.stderr
    shutil.rmtree(source)
    return root / "out"


def test_its_files_are_in_the_output(output: Path) -> None:
    for name, content in FILES.items():
        assert (output / name).read_text() == content
    assert json.loads((output / "config.json").read_text())["auto_map"] == AUTO_MAP
    checks = json.loads((output / "qatc.json").read_text())["parity"]["checks"]
    assert "reload in a new process" in checks[-1]["what"] and checks[-1]["passed"]


def test_the_output_runs_its_code(output: Path, tmp_path: Path) -> None:
    ids = torch.arange(2, 20)[None]
    model = qatc.load(output, compile=False, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, 0.5 * model.lm_head(hidden))
    plain = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(plain).__name__ == "OddForCausalLM"
    written = export(output, tmp_path / "exported", trust_remote_code=True)
    assert {p.name: p.read_bytes() for p in written.iterdir() if p.suffix == ".py"} == {
        name: content.encode() for name, content in FILES.items()
    }


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--text", "TEXT", "--length", "16", "--no-compile"],
        ["generate", "--prompt", "The old", "--max-new-tokens", "3", "--no-compile"],
        ["verify"],
        ["inspect", "--kernels"],
        ["export", "--output", "NEW"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_the_flag(
    command: list[str], output: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("qatc.evaluation.parity.verify", partial(verify, reload=False))
    places = {"TEXT": str(text_file), "NEW": str(tmp_path / "new")}
    arguments = [command[0], str(output), *(places.get(a, a) for a in command[1:])]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and not refused.stdout, refused.output
    (line,) = [x for x in refused.stderr.splitlines() if x.startswith("error:")]
    assert "configuration_odd.py, modeling_odd.py" in line and "--trust-remote-code" in line
    done = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert done.exit_code == 0, done.output


def test_without_trust_nothing_is_asked(output: Path, odd_path: Path, tmp_path: Path) -> None:
    done = qatc_command("generate", output, "--prompt", "The old", "--no-compile")
    assert done.returncode == 2 and "Do you wish" not in done.stdout + done.stderr
    for function in (qatc.load, load_reference, verify):
        with pytest.raises(ConfigError, match="trust_remote_code=True"):
            function(output)
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        export(output, tmp_path / "new")


def test_a_lost_file_is_an_error(output: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(output, tmp_path / "broken")
    (broken / "modeling_odd.py").unlink()
    with pytest.raises(CheckpointError, match="modeling_odd.py.* with its Python files"):
        qatc.load(broken, trust_remote_code=True)


def test_code_that_did_not_run_is_not_named(tmp_path: Path, shared_model_path: Path) -> None:
    """A model of a class that transformers has, too, quantized without trust."""
    path = shutil.copytree(shared_model_path, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    named = {"AutoModelForCausalLM": "modeling_absent.Absent"}
    (path / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    out = tmp_path / "out"
    command = ["quantize", "--model", str(path), "--output", str(out), *TINY]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    qatc.load(out, compile=False)
