"""``qatc generate``: prompts, conversations, and terminals that cannot show them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qatc.cli.main import app
from tests.cli.conftest import refused, run


@pytest.mark.parametrize("seed", [str(2**43), str(2**64), "1" + "0" * 30])
def test_a_seed_of_any_size(output: Path, seed: str) -> None:
    command = ["generate", output, "--prompt", "The", "--max-new-tokens", "2", "--no-compile"]
    assert run(*command, "--seed", seed).exit_code == 0


def test_generate(output: Path, tmp_path: Path) -> None:
    common = ["--max-new-tokens", "6", "--no-compile"]
    result = run("generate", output, "--prompt", "The old fox", *common)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The old fox") and "tokens/s" in result.stderr
    again = run("generate", output, "--prompt", "The old fox", *common, "--json")
    written = json.loads(again.stdout)
    assert result.stdout.strip() == ("The old fox" + written["text"]).strip()
    assert written["new_tokens"] <= 6 and written["prompt_tokens"] > 1
    greedy = [*common, "--temperature", "0", "--json"]
    one, two = (run("generate", output, "--prompt", "The", *greedy).stdout for _ in range(2))
    assert json.loads(one)["text"] == json.loads(two)["text"]
    refused(2, "--prompt TEXT or --chat", "generate", output)
    refused(2, "has no chat template", "generate", output, "--chat", "--no-compile")
    refused(2, "takes at most 128", "generate", output, "--prompt", "x", "--max-new-tokens", "999")
    refused(2, "top-p", "generate", output, "--prompt", "x", "--top-p", "0")
    refused(1, "qatc quantize", "generate", tmp_path, "--prompt", "x")


@pytest.mark.usefixtures("verified_here")
def test_what_the_terminal_cannot_encode(output: Path, tmp_path: Path) -> None:
    """Neither a prompt, nor a path, nor the drawing of a table ends a command."""

    def ascii_only(*arguments: Any) -> Any:
        return CliRunner(charset="ascii").invoke(app, [str(a) for a in arguments])

    command = ["generate", output, "--max-new-tokens", "3", "--no-compile", "--prompt"]
    result = ascii_only(*command, "caf\u00e9 \u2192")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("caf\\xe9 \\u2192")
    result = ascii_only("inspect", tmp_path / "caf\u00e9")
    assert result.exit_code == 2 and "caf\\xe9" in result.stderr
    odd = tmp_path / "caf\u00e9"
    made = ascii_only("export", output, "--output", odd)
    assert made.exit_code == 0 and made.stdout.splitlines() == [
        f"{tmp_path}/caf\\xe9: compressed-tensors"
    ]
    refused(2, "is not UTF-8", *command, "caf\udce9")
    refused(2, "caf\\udce9", "evaluate", output, "--text", "caf\udce9")


def test_a_terminal_of_ascii(output: Path) -> None:
    """As above in a process, whose streams and arguments are made by Python itself."""
    command = [sys.executable, "-m", "qatc.cli", "generate", str(output), "--no-compile"]
    command += ["--max-new-tokens", "3", "--prompt", "caf\u00e9"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=os.environ | locale)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf\\xe9")


def test_chat(output: Path, tmp_path: Path) -> None:
    """A turn that cannot be answered does not end the conversation."""
    talks = Path(shutil.copytree(output, tmp_path / "talks"))
    (talks / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = b"The old fox\n" + b"caf\xe9\n" + b"fox " * 200 + b"\nThe\n\n"
    command = ["generate", str(talks), "--chat", "--max-new-tokens", "3", "--no-compile"]
    result = CliRunner().invoke(app, command, input=said)
    assert result.exit_code == 0, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "UTF-8" in errors[0] and "at most 128 tokens" in errors[1]
    assert result.stderr.count("tokens/s") == 2


def test_settings_that_are_left_out_are_told_once(output: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(output, tmp_path / "odd"))
    own = {"return_dict_in_generate": True, "num_return_sequences": 2, "temperature": 0.1}
    (odd / "generation_config.json").write_text(json.dumps(own))
    command = ["generate", odd, "--max-new-tokens", "3", "--no-compile", "--json", "--prompt"]
    result = run(*command, "The fox", "--stop", "unheard of")
    assert result.exit_code == 0 and json.loads(result.stdout)["new_tokens"] == 3
    assert result.stderr.splitlines() == [
        "left out of the model's generation config: return_dict_in_generate=True,"
        " num_return_sequences=2"
    ]
