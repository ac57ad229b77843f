"""What a training step takes in memory: the loss alone, and whole steps with each option.

    python -m benchmarks.memory --shape large-vocabulary --parts loss
    python -m benchmarks.memory --shape smollm2 --device cuda

Every variant runs in a process of its own, on random weights: the loss of 2,048 tokens from their
hidden states, with its gradient, and two steps of quantization-aware training, 4-8-4. Memory is the
most that was held at once (on a CPU the resident set, on a GPU what torch allocated), less what is
there before: for the loss, all of the models and their hidden states; for a step, the interpreter.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from qatc.data.corpus import Rows
from qatc.graph import compilation
from qatc.losses.chunks import Chunks, chunk_size
from qatc.losses.objective import distillation_losses
from qatc.losses.tails import Tail
from qatc.models.preparation import prepare
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller

SHAPES: dict[str, dict[str, Any]] = {
    "large-vocabulary": {
        "vocab_size": 128_256, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 4,
    },
    "smollm2": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip
ROWS, LENGTH = 8, 256

LOSSES = ("plain", "chunked, compiled")

STEPS: dict[str, dict[str, Any]] = {
    "plain": {"loss_chunk": 0},
    "chunked": {},
    "all": {
        "checkpoint_activations": True, "optimizer": "adamw8bit", "fused_step": True,
        "offload": "optimizer", "master_dtype": "bfloat16",
    },
}  # fmt: skip


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="large-vocabulary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=["loss", "step"], default=["loss", "step"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(options.threads)
        kind, name = options.child
        print(json.dumps({"loss": loss, "step": step}[kind](name, options.shape, options.device)))
        return
    name = f"memory-{options.shape}-{options.device}"
    file = common.RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result |= {"shape": options.shape, "device": options.device}
    for kind in options.parts:
        names = {"loss": LOSSES, "step": STEPS}[kind]
        found = {name: in_a_process(kind, name, options) for name in names}
        plain = found["plain"]["bytes"]
        result[kind] = {
            n: {**f, "of_plain": round(f["bytes"] / plain, 3)} for n, f in found.items()
        }
    common.save(name, result)


def in_a_process(kind: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--shape", options.shape]
    command += ["--device", options.device, "--threads", str(options.threads)]
    done = subprocess.run(
        [*command, "--child", kind, name],
        cwd=common.ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(kind, name, found, flush=True)
    return found


def make(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A random model, its head tied to its embedding."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"tie_word_embeddings": True, "attn_implementation": "sdpa"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **how))
        return model.to(device).eval()
    finally:
        torch.set_default_dtype(before)


def loss(name: str, shape: str, device: str) -> dict[str, Any]:
    """The loss alone: the trunks of both models answer with hidden states that are there."""
    student, teacher = (make(shape, device, torch.float32) for _ in range(2))
    size = chunk_size(None, ROWS * LENGTH, SHAPES[shape]["vocab_size"])
    chunks = Chunks(Tail(student), Tail(teacher), size) if "chunked" in name else None
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.long, device=device)
    real = torch.ones_like(ids, dtype=torch.bool)
    for model in (student, teacher):
        output = type(model.model(input_ids=ids[:1, :1]))
        hidden = torch.randn(ROWS, LENGTH, SHAPES[shape]["hidden_size"], device=device)
        hidden.requires_grad_(model is student)
        model.model.forward = lambda input_ids, output=output, hidden=hidden, **_: output(
            last_hidden_state=hidden[: len(input_ids)]
        )

    def once(rows: slice) -> None:
        part = ids[rows], real[rows], real[rows]
        compiles = "compiled" in name and compilation.obstacle() is None
        losses, _ = distillation_losses(student, teacher, *part, chunks=chunks, compile=compiles)
        (losses["logits"] / ids.numel()).backward()
        student.zero_grad()

    started = time.perf_counter()
    if "compiled" in name:  # what compiling takes is no memory of the loss
        once(slice(0, 1))
    compiled = time.perf_counter()
    start_measuring(device)
    before = held(device)
    once(slice(None))
    seconds = time.perf_counter() - compiled
    return {"bytes": peak(device) - before, "seconds": seconds, "first": compiled - started}


def step(name: str, shape: str, device: str) -> dict[str, Any]:
    """Two steps of training; in bf16 where masters are, else in fp32."""
    start_measuring(device)
    before = held(device)
    config = replace(TrainingConfig(steps=2, learning_rate=1e-4), **STEPS[name])
    dtype = getattr(torch, config.master_dtype)
    student, teacher = (make(shape, device, dtype) for _ in range(2))
    compiles = compilation.obstacle() is None
    prepare(
        student, Recipe.from_bits("4-8-4"), compile=compiles,
        checkpoint_activations=config.checkpoint_activations,
    )  # fmt: skip
    random = np.random.default_rng(0)
    tokens = random.integers(1, SHAPES[shape]["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    rows = Rows(tokens, np.ones_like(tokens), np.ones_like(tokens, dtype=bool))
    with tempfile.TemporaryDirectory(prefix="qatc-memory-") as scratch:
        run = Distiller(student, teacher, rows, config, Path(scratch), compile=compiles)
        run.checkpoints.save = lambda *_: None  # type: ignore[method-assign]
        history = run.run()
    return {"bytes": peak(device) - before, "seconds": history[-1].seconds}


def start_measuring(device: str) -> None:
    """Forget the peak so far."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def held(device: str) -> int:
    """Bytes that are held now."""
    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    """The most bytes held since :func:`start_measuring`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


if __name__ == "__main__":
    main()
