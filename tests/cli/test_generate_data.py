"""``qatc generate-data``: a corpus, and signals that interrupt it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qatc.data.decode import Decoder
from tests.cli.conftest import refused, run


def test_generate_data(shared_model_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    command = ["generate-data", "--model", shared_model_path, "--output", target, "--no-compile"]
    command += ["--samples", "6", "--max-length", "12", "--shard-size", "2", "--batch-size", "4"]
    result = run(*command, "--preview", "2")
    assert result.exit_code == 0 and "sample 1" in result.stdout
    shard = target / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    assert "generate-data" in refused(1, "damaged", "evaluate", shared_model_path, "--data", target)
    assert run(*command).exit_code == 0
    assert shard.read_bytes() == whole
    refused(2, "seed", *command, "--seed", "1")
    refused(2, "batch_size 4, not 'auto'", *command, "--batch-size", "auto")
    refused(2, "a whole number, or auto; got 'many'", *command, "--batch-size", "many")
    command[command.index(target)] = tmp_path / "measured"
    measured = json.loads(run(*command, "--batch-size", "auto", "--json").stdout)
    assert (measured["batch_size"], measured["slots"]) == ("auto", 2)


def test_signals_end_a_command_without_a_traceback(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "corpus"
    command = ["generate-data", "--model", shared_model_path, "--output", target, "--no-compile"]
    command += ["--samples", "6", "--max-length", "12", "--shard-size", "2", "--batch-size", "4"]
    step = Decoder.step
    for number, after in (signal.SIGTERM, 12), (signal.SIGINT, 12), (signal.SIGHUP, 5):
        code = 128 + number
        calls: list[int] = []

        def ends(
            *args: Any, calls: list[int] = calls, number: int = number, after: int = after
        ) -> Any:
            calls.append(1)
            if len(calls) == after:
                signal.raise_signal(number)
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "step", ends)
            refused(code, "the same command goes on from the last complete shard", *command)
    assert len(json.loads((target / "manifest.json").read_text())["shards"]) == 2
    result = run(*command, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["complete"]
    assert not (tmp_path / "corpus.lock").exists()
