"""The paths of a GPU, without one: shapes, devices, waits and generated code are real."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_llama, make_output
from tests.cuda.on_fake_gpu import SECOND, START
from tests.runtime.conftest import RECIPES

ROOT = Path(__file__).resolve().parents[2]

NAMES = ("4-8-4", "8-8-8", "4-8-16", "groups")

STEP = """
triton_red triton_linears {rotate} code_attention triton_red triton_linear
triton_red triton_linears triton_red triton_linear
"""

LAUNCHES = {
    "LLaMA-7B, 1": STEP.format(rotate="triton_poi store_codes").split(),
    "Llama 3.2 1B, 8": STEP.format(rotate="triton_poi store_codes triton_poi").split(),
}
"""What a layer starts in a decoding step, Inductor's own kernels as ``triton_`` and their kind:
reductions of a row in a loop (red) and at once (per), and pointwise (poi)."""

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for GPUs"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the guard needs g++"),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``guard.cpp``, built."""
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    line = [
        "g++",
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        str(Path(__file__).with_name("guard.cpp")),
    ]
    line += ["-o", str(library), f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    line += [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    built = subprocess.run(line, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the guard cannot be built: {built.stderr.strip().splitlines()[-1]}")
    return library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of models whose widths are those of kernels."""
    root = tmp_path_factory.mktemp("outputs")
    for name in NAMES:
        small = make_llama(
            hidden_size=256, intermediate_size=512, head_dim=64, tie_word_embeddings=False
        )
        make_output(root / name, RECIPES[name], small)
    return root


def found_by(guard: Path, part: str, folder: Path, *names: str) -> Any:
    """What a part found, in a process of its own.

    One time in ten torch's own export ends such a process by a signal: its devices are not there,
    and what is made and freed on them is nobody's. Then another one is started; what a process
    finds, and any error of Python's, counts at once.
    """
    line = [sys.executable, "-c", START, str(guard), part, str(folder), *names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode >= 0:
            break
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_step_stays_on_its_gpu_and_waits_for_no_value(
    guard: Path, tmp_path: Path
) -> None:
    assert found_by(guard, "train", tmp_path, "4-8-4") == {
        "4-8-4, fake-quant": [SECOND],
        "4-8-4, integers": [SECOND],
    }


def test_a_loaded_model_decodes_on_its_gpu_and_waits_for_no_token(
    guard: Path, folder: Path
) -> None:
    """FakeTensors raise where a value is asked for: scoring, prefill and every step have none."""
    found = found_by(guard, "run", folder, *NAMES)
    assert list(found) == list(NAMES)
    for name, one in found.items():
        assert one["devices"] == [SECOND], name
        assert (one["recorded"], one["replayed"], one["reason"]) == (1, 3, None), name
        assert one["shapes"] == [[2, 20, 112]] * 2 + [[2, 1, 112]] * 6, name
        assert one["prefills"] == [[20, 20, True]] * 2, name  # causal attention without a mask


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_step_of_a_layer_is_few_kernels_and_divides_exactly(guard: Path, tmp_path: Path) -> None:
    """Each waits for the one before, which takes longer than most of them compute."""
    found = found_by(guard, "generate", tmp_path, *LAUNCHES)
    for name, launches in LAUNCHES.items():
        assert found[name]["launches"] == launches, name
        # div.full and approximations would move codes and scales off those of the CPU.
        divisions = set(found[name]["divisions"])
        assert "div.rn.f32" in divisions <= {"div.rn.f32", "div.rn.f64", "rcp.rn.f64"}
