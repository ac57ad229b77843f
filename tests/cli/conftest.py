"""The command line, driven for real: how it is run, and an output that it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qatc.cli.main import app
from qatc.evaluation.parity import verify
from tests.conftest import made_once

TINY = ["--samples", "24", "--max-length", "16", "--eval-samples", "8", "--steps", "4"]
TINY += ["--batch-size", "4", "--generation-batch-size", "8", "--no-compile"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(code: int, says: str, *arguments: Any) -> str:
    """The command ends with ``code`` and one line on stderr; returns that line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and says in lines[0], result.stderr
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate loads no output in a new process: 6 s, which a few tests of it are enough for."""
    monkeypatch.setattr("qatc.evaluation.parity.verify", partial(verify, reload=False))


@pytest.fixture(scope="session")
def output(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model, made by the command in a process of its own."""

    def make(directory: Path) -> None:
        command = [sys.executable, "-m", "qatc.cli", "quantize", "--model", str(shared_model_path)]
        done = subprocess.run(
            [*command, "--output", str(directory / "out"), "--json", *TINY],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)  # nothing but JSON on stdout
        assert set(result["figures"]["generated"]) == {"full precision", "RTN", "QAT"}
        assert "Training for 4 steps" in done.stderr and "Warning" not in done.stderr

    return made_once(tmp_path_factory, "cli", make) / "out"
