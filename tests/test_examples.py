"""The examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from qatc.output import load_codes
from tests.conftest import TEXT

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embedding_the_passes() -> None:
    printed = run("embed_the_passes.py", "60")
    assert "quantized, 4-8-4" in printed
    assert "QuantizeWeights  matched  8, edited  8" in printed


def test_quantizing_in_ten_lines(shared_model_path: Path, tmp_path: Path) -> None:
    printed = run(
        "quantize_in_ten_lines.py", str(shared_model_path), str(tmp_path / "out"), "4", "32"
    )
    assert "RTN" in printed and "codes" in printed


def test_training_what_torchao_prepared(shared_model_path: Path, tmp_path: Path) -> None:
    printed = run("train_torchao_qat.py", str(shared_model_path), str(tmp_path / "out"), "12", "32")
    assert "KL" in printed and "IntxUnpackedToInt8Tensor" in printed


def test_training_in_the_trainer_of_transformers(shared_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = str(tmp_path / "out")
    printed = run(
        "train_with_hf_trainer.py",
        *(str(shared_model_path), str(tmp_path / "text.txt"), out, "10", "16"),
    )
    first, last = map(float, re.findall(r"KL (\S+) at first, (\S+) at the end", printed)[0])
    assert last < first and f"written: {out}" in printed
    assert {weight.spec.bits for weight in load_codes(out).values()} == {4}


def test_the_demo_model_loads() -> None:
    from qatc.models import load_model, load_tokenizer

    model = load_model(str(EXAMPLES / "demo-model")).model
    tokenizer = load_tokenizer(str(EXAMPLES / "demo-model"))
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
