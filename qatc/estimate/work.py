"""The time of a run's phases, from operations and a throughput, and the room it takes on the disk.

Operations are those of the matrices and of attention, two for a multiplication and an addition. A
pass through the teacher counts once, the student's forward once and its backward twice; where
activations are computed again, its layers once more. A token that is written costs the operations
of its row or the reading of all weights and of the cache, whichever takes longer. What is left out:
loading, compiling, packing, and what GPUs tell one another. So a time is the least to expect of the
throughput that is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qatc.estimate.memory import slots_of
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.estimate.training import trained

LINK = 16.0
"""GB/s between host and GPU, unless a user says otherwise."""

HOST = 50.0
"""GB/s that a CPU is taken to reach in its memory, which an optimizer's step is bound by."""

TOKEN_BYTES = 2.2
"""Of a token of a corpus on the disk: zstd of int32, of vocabularies of 32,000 to 128,000."""

RECORD_BYTES = 170.0
"""Of a token of a recorded teacher, by 32 tokens and 32 draws."""

_SECONDS = 0.3


@dataclass(frozen=True)
class Speed:
    """What the machine reaches, each GPU by itself.

    Attributes:
        tflops: 10^12 operations a second in products of the compute dtype.
        bandwidth: GB/s of its memory.
        link: GB/s between a GPU and the host's memory.
    """

    tflops: float
    bandwidth: float
    link: float = LINK


def forward_operations(shape: Shape, length: int, *, head: bool = True) -> float:
    """Of one token's forward pass, in a row of this many."""
    attention = 2 * 2 * shape.queries * (length / 2) * shape.layers
    ends = shape.vocabulary * shape.hidden if head else 0
    return 2.0 * (shape.active + ends) + attention


def step_operations(shape: Shape, setup: Setup) -> float:
    """Of an optimizer step, on all GPUs together."""
    length = setup.max_length
    passes = (1 if setup.teacher == "online" else 0) + 3
    each = passes * forward_operations(shape, length)
    if setup.checkpoint_activations:
        each += forward_operations(shape, length, head=False)
    return each * setup.batch_size * setup.accumulate * length


def step_seconds(shape: Shape, setup: Setup, speed: Speed) -> float:
    """Of an optimizer step, with what it sends to the host and back."""
    seconds = step_operations(shape, setup) / (speed.tflops * 1e12 * setup.gpus)
    if setup.offload == "optimizer" and setup.on_gpu:  # its state comes, and goes back updated
        moved = 2.0 * setup.moments * trained(shape, setup) / setup.gpus
        seconds += moved / (speed.link * 1e9)
    if setup.streams:
        # Weights come twice, once more for the backward pass, and gradients go.
        width = 3 * setup.master + (setup.width if setup.teacher == "online" else 0)
        seconds += width * shape.parameters / setup.gpus / (speed.link * 1e9)
        stepped = 3 * setup.master + 2 * setup.moments
        seconds += stepped * trained(shape, setup) / (HOST * 1e9)
    return seconds


def seconds(
    shape: Shape, setup: Setup, speed: Speed, memory: float | None = None
) -> dict[str, float]:
    """Seconds of the phases that take long, by name."""
    rate, length = speed.tflops * 1e12 * setup.gpus, setup.max_length
    forward = forward_operations(shape, length)
    slots = slots_of(shape, setup, memory)
    cache = 2 * shape.keys * shape.layers * setup.width * length / 2
    weights = (shape.active + shape.vocabulary * shape.hidden) * setup.width
    reading = (weights + slots * cache) / (speed.bandwidth * 1e9)
    step = max(reading, slots * forward / (speed.tflops * 1e12))
    rounds = math.ceil(setup.samples / (slots * setup.gpus))
    found = {"writing the corpus": rounds * length * step}
    if setup.teacher == "recorded":
        found["recording the teacher"] = setup.samples * length * forward / rate
    found["training"] = setup.steps * step_seconds(shape, setup, speed)
    # Full precision is its own reference; the student before and after stands beside the teacher.
    found["evaluating three times"] = 5 * setup.eval_samples * length * forward / rate
    return found


def disk(shape: Shape, setup: Setup) -> Mapping[str, float]:
    """Bytes on the disk by what takes them, while the run goes on and after it."""
    tokens = setup.samples * setup.max_length
    own = trained(shape, setup)
    checkpoint = own * ((4 if setup.train == "lora" else setup.master) + setup.moments)
    packed = 0.5 if setup.weight_bits <= 4 else 1.0
    stored = packed if setup.weight_bits <= 8 else shape.stored
    found = {"corpus": tokens * TOKEN_BYTES}
    if setup.teacher == "recorded":
        found["recorded teacher"] = tokens * RECORD_BYTES
    # One more than are kept while the newest is written.
    found["checkpoints"] = (setup.keep_checkpoints + 1) * checkpoint
    rest = shape.parameters - shape.linear
    found["output"] = shape.linear * stored + rest * shape.stored
    return found


def measure_speed(shape: Shape, compute: str, device: str) -> Speed:
    """What this machine reaches now: a product of the model's size, and a copy.

    Takes about a second. The best of some tries would flatter a busy machine; the middle one is
    what a run meets.
    """
    dtype: torch.dtype = getattr(torch, compute)
    inner = max(shape.inner, shape.hidden)
    left = torch.randn(1024, shape.hidden, device=device).to(dtype)
    right = torch.randn(inner, shape.hidden, device=device).to(dtype)
    source = torch.empty(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _middle(lambda: left @ right.t(), device)
    copy = _middle(lambda: target.copy_(source), device)
    tflops = 2 * 1024 * shape.hidden * inner / product / 1e12
    return Speed(tflops, 2 * source.nbytes / copy / 1e9)


def _middle(work: object, device: str) -> float:
    """Seconds of a call, the median of those that fit into a moment."""
    assert callable(work)
    times: list[float] = []
    work()
    ended = time.perf_counter() + _SECONDS
    while time.perf_counter() < ended or len(times) < 3:
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
