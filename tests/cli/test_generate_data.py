"""``qatc generate-data``: a corpus, and signals that interrupt it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qatc.data.decode import Decoder
from tests.cli.conftest import TINY, refused, run
from tests.conftest import TEXT


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


def test_from_text(shared_model_path: Path, tmp_path: Path) -> None:
    """A corpus of documents, inspected, and trained on with a loss that sees the layers."""
    text, target, out = tmp_path / "text.jsonl", tmp_path / "corpus", tmp_path / "out"
    lines = [json.dumps({"text": part + "."}) for part in TEXT.split(". ")]
    text.write_text("\n".join(lines))
    command = ["generate-data", "--model", shared_model_path, "--output", target]
    command += ["--from-text", text, "--max-length", "24"]
    refused(2, "leave out --strategy, --seed", *command, "--seed", 1, "--strategy", "sample")
    refused(2, "takes at most 128 tokens", *command, "--max-length", 129)
    assert not target.exists()
    result = run(*command, "--preview", "1")
    assert result.exit_code == 0, result.output
    count = json.loads((target / "manifest.json").read_text())["sequences"]
    assert f"{target}: {count} sequences" in result.stdout
    assert "The old fox sleeps" in result.stdout
    plain = json.loads(run("inspect", target, "--json").stdout)
    assert plain["manifest"]["text"] == str(text) and plain["sequences"] == count
    assert "tokenizer of" in run("inspect", target).stdout
    train = ["quantize", "--model", shared_model_path, "--data", target, "--output", out, *TINY]
    result = run(
        *train, "--max-length", "24", "--loss", "logits+0.5*hidden:decay", "--json", "--no-verify"
    )
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["figures"]) == {"held out"}
    report, card = ((out / name).read_text() for name in ("report.md", "README.md"))
    assert f"{count} sequences of at most 24 tokens of the text {text}" in report
    assert "`held out` is the end of the corpus" in report
    assert "loss `logits+0.5*hidden:decay`" in report
    assert "of text.jsonl" in card and "data-free" not in card
    assert "logits+0.5*hidden:decay" in (out / "run.yaml").read_text()
    shown = " ".join(run("inspect", out).stdout.split())
    assert f"{count} sequences of at most 24 tokens of the text" in shown


@pytest.mark.parametrize("of_text", [False, True])
def test_the_teacher_is_recorded(shared_model_path: Path, tmp_path: Path, of_text: bool) -> None:
    target = tmp_path / "corpus"
    command = ["generate-data", "--model", shared_model_path, "--output", target]
    command += ["--samples", "6", "--max-length", "12"]
    if of_text:
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        command += ["--from-text", tmp_path / "text.txt"]
    else:
        command += ["--no-compile", "--batch-size", "4"]
    refused(2, "32 most likely tokens alone", *command, "--record-logits", "32")
    assert run(*command).exit_code == 0 and not (target / "recorded.json").exists()
    told = run(*command, "--record-logits", "8+4")
    assert told.exit_code == 0 and "teacher recorded: 8+4, " in told.stdout
    found = json.loads(run(*command, "--record-logits", "8+4", "--json").stdout)["recorded"]
    assert found["record_logits"] == "8+4" and found["dtype"] == "float32"
    refused(2, "already, with record_logits '8+4'", *command, "--record-logits", "8+8")
