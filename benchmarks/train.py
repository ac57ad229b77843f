"""A step of training, in every way that it could be done, the ways taking turns.

    python -m benchmarks.train --model smollm2-135m --rows 4 --length 256 --dtype bfloat16

Each way is a process of its own, which loads the model, prepares it and waits; the first process
then lets them step in turn, so that what else the machine does meets all of them, and nothing runs
beside a step. All but one use the same compiled teacher and loss; optimizer and clipping are alike:

=====================  =============================================================================
way                    what the student's layers are
=====================  =============================================================================
``unquantized``        plain, each compiled with ``torch.compile``
``modules``            4-8-4 module by module in eager PyTorch, the way of LLM-QAT: a linear rounds
                       its input and its weight, and those of K and V what they give
``modules, eager``     the same, with teacher and loss eager as well, as nothing is compiled there
``torchao``            torchao's QAT, eager: weights of 4 bits in groups of 32, activations of 8
``torchao compiled``   the same, each layer compiled
``fake-quant``         ``qatc.prepare``, linears computed in float
``integers``           ``qatc.prepare``, linears computed on int8 codes
``recorded``           the same, without a teacher: its answers were recorded
=====================  =============================================================================

``--depths 2,8,32`` measures instead how long the first step of ``integers`` takes, with caches of
their own that are empty, for models of so many layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common, models

WAYS = (
    *("unquantized", "modules, eager", "modules", "torchao", "torchao compiled"),
    *("fake-quant", "integers", "recorded"),
)
BITS = "4-8-4"
SHAPES = {
    "30M": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192,
    }
}  # fmt: skip
"""Random-weight LLaMAs by what they are called."""


def main() -> None:
    """Run the benchmark, or one way of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="30M", help=f"{', '.join(SHAPES)}, a name or a directory"
    )
    parser.add_argument("--ways", default=list(WAYS), choices=WAYS, nargs="+")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--depths", help="layers of the models whose first step is measured")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        work(arguments)
    elif arguments.depths:
        measure_depths(arguments)
    else:
        take_turns(arguments)


def take_turns(arguments: argparse.Namespace) -> None:
    """Let every way step in turn, and write what the steps took."""
    ways = arguments.ways
    workers = {}
    found: dict[str, dict[str, Any]] = {}
    for way in ways:  # one after another: compilers beside each other would be timed together
        workers[way] = Worker(way, sys.argv[1:])
        found[way] = {**workers[way].ask("start"), "seconds": []}
        print(way, found[way], flush=True)
    for _ in range(arguments.turns):
        for way in ways:
            found[way]["seconds"].append(workers[way].ask("step")["seconds"])
    base = statistics.median(found[ways[0]]["seconds"])
    tokens = arguments.rows * arguments.length
    for way in ways:
        found[way] |= workers[way].ask("end")
        median = statistics.median(found[way]["seconds"])
        found[way] |= {"median": median, "tokens_per_second": tokens / median}
        found[way][f"of {ways[0]}"] = median / base
        print(f"{way:18} {median:7.3f} s  {median / base:5.2f} of {ways[0]}", flush=True)
    model = Path(models.find(arguments.model)).name
    asked = {n: getattr(arguments, n) for n in ("rows", "length", "dtype", "turns", "warmup")}
    name = arguments.name or f"train-{model.lower()}-{arguments.dtype}"
    common.save(name, {"model": model, "bits": BITS, **asked, "ways": found})


def measure_depths(arguments: argparse.Namespace) -> None:
    """How long preparing and the first step take, with nothing compiled before, by depth."""
    found = {}
    for layers in map(int, arguments.depths.split(",")):
        with tempfile.TemporaryDirectory(prefix="qatc-cold-") as cache:
            given = [*sys.argv[1:], "--layers", str(layers)]
            worker = Worker("integers", given, {"TORCHINDUCTOR_CACHE_DIR": cache})
            found[layers] = worker.ask("start")
            worker.ask("end")
        print(layers, found[layers], flush=True)
    first, last = min(found), max(found)
    ratio = found[last]["first_step"] / found[first]["first_step"]
    print(f"{last} layers take {ratio:.2f} of the time of {first}")
    result = {"rows": arguments.rows, "length": arguments.length, "dtype": arguments.dtype}
    model = Path(models.find(arguments.model)).name
    name = arguments.name or f"train-depth-{model.lower()}"
    common.save(name, {"model": model, "bits": BITS, **result, "depths": found, "ratio": ratio})


class Worker:
    """A process that trains in one way, a step whenever it is asked to."""

    def __init__(self, way: str, given: list[str], more: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.train", *given, "--way", way]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (more or {}),
            cwd=common.ROOT,
        )

    def ask(self, what: str) -> Any:
        """Say a word, and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a worker ended with {self.process.wait()}")


def work(arguments: argparse.Namespace) -> None:
    """Prepare one way when a line on standard input says so, then step at every further one."""
    from qatc.training.teacher import compiled_layers

    sys.stdin.readline()
    started = time.perf_counter()
    with ExitStack() as block:
        directory = block.enter_context(tempfile.TemporaryDirectory(prefix="qatc-train-"))
        distiller = make(arguments, Path(directory))
        block.enter_context(compiled_layers(distiller.teacher, distiller.compile))
        prepared = time.perf_counter() - started
        distiller.step(1)
        first = time.perf_counter() - started
        for number in range(arguments.warmup):
            distiller.step(2 + number)
        tell({"prepared": round(prepared, 2), "first_step": round(first, 2)})
        for number, line in enumerate(sys.stdin, 2 + arguments.warmup):
            if line.strip() == "end":
                tell({"peak_bytes": peak()})
                return
            started = time.perf_counter()
            distiller.step(number)
            tell({"seconds": time.perf_counter() - started})


def tell(answer: dict[str, Any]) -> None:
    """Say something to the process that takes turns."""
    print(json.dumps(answer), flush=True)


def peak() -> int:
    """The most memory that this process had, in bytes: of the GPU if it used one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def make(arguments: argparse.Namespace, directory: Path) -> Any:
    """What trains in the way that is asked for."""
    from qatc.data.corpus import Rows
    from qatc.training.config import TrainingConfig
    from qatc.training.distill import Distiller

    way, dtype = arguments.way, getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    student = load(arguments, torch.float32)
    teacher = None if way == "recorded" else load(arguments, dtype)
    vocabulary = student.config.vocab_size
    random = np.random.default_rng(0)
    count = 16 * arguments.rows
    tokens = random.integers(vocabulary, size=(count, arguments.length), dtype=np.int32)
    rows = Rows(tokens, np.ones_like(tokens), np.ones_like(tokens, dtype=bool))
    change(student, way, dtype)
    recorded = way == "recorded"
    if recorded:
        rows = with_records(rows, vocabulary)
    device = next(student.parameters()).device

    def autocast() -> Any:
        half = dtype is not torch.float32
        return torch.autocast(device.type, dtype=dtype) if half else nullcontext()

    return Distiller(
        student,
        teacher,
        rows,
        TrainingConfig(
            steps=10**6,
            batch_size=arguments.rows,
            learning_rate=1e-6,
            teacher="recorded" if recorded else "online",
        ),
        directory,
        autocast=autocast,
        compile=way != "modules, eager",
    )


def load(arguments: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The model, or a random one of its shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qatc.models import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model not in SHAPES:
        return load_model(models.find(arguments.model), dtype=dtype, device=device).model
    shape: dict[str, Any] = {**SHAPES[arguments.model], "attn_implementation": "sdpa"}
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    return model.eval().to(device, dtype)


def change(student: Any, way: str, dtype: torch.dtype) -> None:
    """Make the layers of a student what a way is."""
    import qatc

    layers = student.model.layers
    if way.startswith("modules"):
        for layer in layers:
            as_modules(layer)
    if way.startswith("torchao"):
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            PerGroup,
            quantize_,
        )
        from torchao.quantization.qat import QATConfig

        base = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(32),
        )
        quantize_(layers, QATConfig(base, step="prepare"))
    if way in ("unquantized", "torchao compiled"):
        torch._dynamo.config.recompile_limit = 4 * len(layers)  # else deep ones stay eager
        for layer in layers:
            layer.compile()
    if way in ("fake-quant", "integers", "recorded"):
        qatc.prepare(
            student,
            qatc.Recipe.from_bits(BITS),
            compile=True,
            compute_dtype=None if dtype is torch.float32 else dtype,
            integer_forward=way != "fake-quant",
        )


class OneRow:
    """Stands for the file of a recorded teacher: every row is one of random logits, packed."""

    def __init__(self, length: int, vocabulary: int) -> None:
        from qatc.data.config import Recording
        from qatc.data.teacher_rows import pack_row

        recording = Recording.parse("32+32")
        self.manifest = {"record_logits": str(recording), "vocabulary": vocabulary}
        logits = 4 * torch.randn(length, vocabulary)
        self.packed = pack_row(logits, recording, torch.rand(length, 32, dtype=torch.float64))

    def packed_row(self, number: int) -> bytes:
        """Of any number."""
        return self.packed


def with_records(rows: Any, vocabulary: int) -> Any:
    """Rows, and beside them what a teacher said."""
    from dataclasses import replace

    from qatc.data.teacher_logits import RecordedRows

    source: Any = OneRow(rows.tokens.shape[1], vocabulary)
    return replace(rows, recorded=RecordedRows(source, np.arange(len(rows))))


class RoundedLinear(nn.Module):
    """A linear that rounds its input by token and its weight by output channel, and its output too.

    Symmetric MinMax with a straight-through gradient (LLM-QAT, arXiv 2305.17888, section 3.3).
    """

    def __init__(self, linear: nn.Linear, output_bits: int | None) -> None:
        super().__init__()
        self.weight, self.output_bits = linear.weight, output_bits

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[..., K]``."""
        found = nn.functional.linear(rounded(x, 8), rounded(self.weight, 4))
        return found if self.output_bits is None else rounded(found, self.output_bits)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Rows on a grid, with the gradient of the identity."""
    top = 2 ** (bits - 1) - 1
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / top
    near: Tensor = (x / scale).round().clamp(-top, top) * scale
    return x + (near - x).detach()


def as_modules(layer: nn.Module) -> None:
    """Put a :class:`RoundedLinear` in the place of every linear of a layer."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                bits = 4 if name in ("k_proj", "v_proj") else None
                setattr(parent, name, RoundedLinear(child, bits))


if __name__ == "__main__":
    main()
