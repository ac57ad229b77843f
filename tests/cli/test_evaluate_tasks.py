"""``qatc evaluate --tasks``, driven for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run
from tests.evaluation.local_tasks import write_tasks


def test_tasks(output: Path, shared_model_path: Path, tmp_path: Path) -> None:
    """In a process of its own: the packed model, its teacher, a table and a file."""
    pytest.importorskip("lm_eval.models.huggingface")
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "qatc.cli", "evaluate", str(output), "--no-compile"]
    command += ["--tasks", "tiny_choice, tiny_text,tiny_answer", "--runtime", "packed"]
    command += ["--include-path", str(tmp_path / "tasks"), "--limit", "2", "--batch-size", "3"]
    done = subprocess.run(
        [*command, "--teacher", str(shared_model_path), "--output", str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout.split()
    assert {"task", "tiny_choice", "acc", "tiny_text", "average", "lost", "±"} <= set(table)
    assert "packed, float32, softmax in float32, batch 3," in " ".join(table)
    status = [line[5:] for line in done.stderr.splitlines()]
    assert status[0] == "Reading the tasks" and "Evaluating on tiny_text" in status
    assert all(line.split(" ")[0] in ("Reading", "Loading", "Evaluating") for line in status)
    found = json.loads(file.read_text())
    assert [task["items"] for task in found["tasks"]] == [2, 2, 2]
    assert set(found["flips"]) == {"tiny_choice", "tiny_answer"}
    assert found["flips"]["tiny_choice"].keys() == {"items", "lost", "gained", "p"}
    assert found["numerics"]["batch_size"] == 3 and found["numerics"]["limit"] == 2
    assert found["numerics"]["versions"].keys() == {"qatc", "lm_eval", "torch", "transformers"}
    samples = found["teacher"]["lm_eval"]["tiny_answer"]["samples"]["tiny_answer"]
    assert len(samples) == 2 and isinstance(samples[0]["resps"][0][0], str)
    assert list(tmp_path.glob("*.writing")) == []
    refused(2, "at least one task", "evaluate", shared_model_path, "--tasks", ",")


def test_wrong_uses(output: Path, shared_model_path: Path, tmp_path: Path) -> None:
    tasks = ["evaluate", shared_model_path, "--tasks", "piqa"]
    refused(2, "--text, --max-tokens", *tasks, "--text", "x", "--max-tokens", "9")
    refused(2, "--limit, --output", "evaluate", output, "--text", "x", "--limit", 1, "--output", 2)
    refused(2, "--tasks", "evaluate", output)
    refused(2, "no output of qatc quantize", *tasks, "--runtime", "packed")
    refused(2, "trained, packed, llama.cpp or vllm; got 'slow'", *tasks, "--runtime", "slow")
    refused(2, "--output takes a file", *tasks, "--output", tmp_path / "absent" / "x.json")
    refused(2, "--output takes a file", *tasks, "--output", tmp_path)
    refused(2, "takes a directory of task files", *tasks, "--include-path", tmp_path / "absent")
    assert "--include-path" in run("evaluate", "--help").stdout.replace("\n", "")
