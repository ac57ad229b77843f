"""What has to hold on a GPU, beside a CPU, and how long training steps take there.

    python -m benchmarks.cuda

Scales and codes of random rows on the CPU, on the GPU and compiled for it; integer products of odd
shapes; the main job on the demonstration model with its gate; and steps of a model in SmolLM2's
shape with random weights, unquantized, with fake-quant nodes and on integers. It prints as it goes.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from qatc.kernels.integer_linear import int_mm
from qatc.losses.objective import distillation_losses
from qatc.models.preparation import prepare
from qatc.numerics import minmax
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

SPECS = (
    (QuantSpec(8), False),
    (QuantSpec(4), False),
    (QuantSpec(4), True),
    (QuantSpec(8, range="full", rounding="reciprocal"), False),
    (QuantSpec(4, group_size=32), True),
    (QuantSpec(4, range="signed"), True),
)
SHAPES = ((1, 576, 1536), (2, 576, 576), (16, 1536, 576), (17, 577, 130), (512, 4096, 4096))
STEPS = 10


def main() -> None:
    """Run everything."""
    print(torch.__version__, torch.cuda.get_device_name())
    compare_numerics()
    compare_products()
    run_the_main_job()
    time_steps()


def compare_numerics() -> None:
    """How many codes and scales differ from the CPU's, in eager mode and compiled."""
    torch.manual_seed(0)
    for spec, snap in SPECS:

        def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
            return minmax.quantize(x, spec, snap=snap)  # noqa: B023

        compiled = torch.compile(codes_of, dynamic=False, options=dict(minmax.COMPILE_OPTIONS))
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(4096, 576) * torch.randn(4096, 1).exp()).to(dtype)
            wanted = codes_of(x)
            for title, function in (("eager", codes_of), ("compiled", compiled)):
                got = function(x.cuda())
                differ = [int((a != b.cpu()).sum()) for a, b in zip(wanted, got, strict=True)]
                print(spec, dtype, title, "codes and scales that differ:", *differ, flush=True)
        torch.compiler.reset()


def compare_products() -> None:
    """Whether products of codes are exact."""
    for rows, width, outputs in SHAPES:
        a = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        b = torch.randint(-128, 128, (outputs, width), dtype=torch.int8)
        wanted = (a.double() @ b.double().T).int()
        same = torch.equal(int_mm(a.cuda(), b.cuda()).cpu(), wanted)
        print("int_mm", rows, width, outputs, "exact" if same else "WRONG")


def run_the_main_job() -> None:
    """``qatc quantize`` and what reads its output."""
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "out")
        model = str(common.ROOT / "examples/demo-model")
        sizes = "--steps 100 --samples 512 --eval-samples 64 --max-length 128".split()
        for command in (
            ["quantize", "--model", model, "--bits", "4-8-4", *sizes, "--output", output],
            ["verify", output],
            ["generate", output, "--prompt", "def read", "--max-new-tokens", "32"],
        ):
            line = [sys.executable, "-m", "qatc.cli", *command, "--device", "cuda"]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            print("qatc", command[0], "exit status", done.returncode)
            print(done.stdout.replace(scratch, ""), flush=True)


def time_steps() -> None:
    """Seconds of an optimizer step, and its peak memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        base: Any = LlamaForCausalLM(config)
        teacher: Any = LlamaForCausalLM(config)
        teacher.to(torch.bfloat16).eval().requires_grad_(False)
        ids = torch.randint(0, config.vocab_size, (16, 256))
    real = torch.ones_like(ids, dtype=torch.bool)
    best = Recipe.from_bits("4-8-4", preset="best")
    for title, recipe, integer_forward in (
        ("unquantized, eager layers", None, False),
        ("fake-quant", Recipe(), False),
        ("integer forward", Recipe(), True),
        ("integer forward, preset best", best, True),
    ):
        model = copy.deepcopy(base)
        if recipe is not None:
            options: Any = {"compute_dtype": torch.bfloat16, "integer_forward": integer_forward}
            prepare(model, recipe, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            sums, _ = distillation_losses(
                model, teacher, ids, real, real,  # noqa: B023
                autocast=lambda: torch.autocast("cuda", dtype=torch.bfloat16), compile=True,
            )  # fmt: skip
            (sums["logits"] / ids.numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad(set_to_none=True)  # noqa: B023

        step()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / STEPS
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{title}: {seconds:.3f} s a step of 16 x 256, peak {peak:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
