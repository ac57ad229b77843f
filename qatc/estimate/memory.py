"""The memory of every phase of ``qatc quantize``, by what takes it.

Each phase is reckoned at the moment when it holds most. Bytes are those of one GPU, or of the
process on a CPU; what a run on GPUs keeps in the host's memory stands beside them. Of parameters it
is exact, of activations it counts the tensors that compiled graphs were seen to save, and of what
lives for a moment within a layer it counts the largest.

With several GPUs both models, gradients and optimizer are shared out (FSDP2): a layer's parameters
are gathered while it runs, and those of the next one beside them. The teacher is whole on each GPU
while it writes, the largest weight while the student is packed, and the first GPU verifies alone.
Runs that need whole models (``divided`` of a setup) have them but in training.
"""

from __future__ import annotations

from qatc.data.config import CorpusConfig
from qatc.estimate.parts import (
    PACKING,
    PhaseMemory,
    gathered,
    head_copy,
    in_host,
    layer_copies,
    models,
    passing,
)
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.estimate.training import training
from qatc.evaluation.parity import LENGTH, ROWS
from qatc.sensitivity.answers import PROBE_TOKENS

CORPUS = "writing the corpus"

LIBRARIES = 1.0e9
"""Bytes of torch, its compiler and a GPU's context, whatever the model."""

GRAPHS = 0.05e9
"""Bytes of captured and compiled graphs, which the host holds."""

MOST_SLOTS = 256
"""Sequences side by side that ``auto`` is taken for, where memory allows."""


def phases(shape: Shape, setup: Setup, memory: float | None = None) -> list[PhaseMemory]:
    """All phases, in the order of a run.

    Args:
        shape: of the model.
        setup: of the run.
        memory: bytes of a GPU, which slots of ``auto`` are limited by.
    """
    found = [
        _load(shape, setup),
        _corpus(shape, setup, memory),
        *([_record(shape, setup)] if setup.teacher == "recorded" else []),
        _evaluation(shape, setup),
        training(shape, setup),
        *([] if setup.shares_out else [_by_layer(shape, setup)]),
        _writing(shape, setup),
        *([_verifying(shape, setup)] if setup.verify else []),
    ]
    return [_with_libraries(phase, setup) for phase in found]


def largest(found: list[PhaseMemory]) -> PhaseMemory:
    """The phase that holds most."""
    return max(found, key=lambda phase: phase.total)


def slots_of(shape: Shape, setup: Setup, memory: float | None) -> int:
    """Sequences side by side: what is asked for, or what ``auto`` takes at most."""
    most = max(2, min(setup.samples, CorpusConfig.shard_size))
    if setup.slots is not None:
        return max(2, min(setup.slots, most))
    if memory is None:
        return min(MOST_SLOTS, most)
    held = LIBRARIES + (0.0 if setup.on_gpu else GRAPHS)
    free = memory - held - sum(models(shape, setup, CORPUS).values())
    return int(max(2, min(MOST_SLOTS, most, free / 2 // slot_bytes(shape, setup))))


def slot_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of a sequence being written: its KV cache, and a row of logits."""
    cache = 2 * shape.keys * shape.layers * (setup.max_length + 1) * setup.width
    return cache + shape.vocabulary * setup.width


def _load(shape: Shape, setup: Setup) -> PhaseMemory:
    moved = shape.parameters * max(setup.master, setup.width)
    if setup.shares_out:  # one tensor after the other is read as a whole, for its fingerprint
        moved = shape.largest * (shape.stored + setup.master)
    host = {"models on their way": float(moved * setup.gpus), **in_host(shape, setup, "loading")}
    return PhaseMemory("loading", models(shape, setup, "loading"), host)


def _corpus(shape: Shape, setup: Setup, memory: float | None) -> PhaseMemory:
    slots = slots_of(shape, setup, memory)
    cache = 2 * shape.keys * shape.layers * (setup.max_length + 1) * setup.width * slots
    parts = models(shape, setup, CORPUS)
    parts |= {
        "KV cache": cache,
        "logits and loss": slots * shape.vocabulary * setup.width * 2.0,
        "workspace": passing(shape, setup, slots),
    }
    return PhaseMemory(f"{CORPUS}, {slots} side by side", parts)


def _record(shape: Shape, setup: Setup) -> PhaseMemory:
    """The teacher's distribution of whole rows, in fp32, sorted for the most likely tokens."""
    tokens = 4 * setup.max_length
    parts = models(shape, setup, "recording the teacher")
    parts |= {
        "logits and loss": tokens * shape.vocabulary * setup.width
        + setup.max_length * shape.vocabulary * 4 * 3.0,
        "workspace": passing(shape, setup, tokens),
    }
    return PhaseMemory("recording the teacher", parts)


def _evaluation(shape: Shape, setup: Setup) -> PhaseMemory:
    """Two models' logits, beside those of the batch before, until they are replaced."""
    title = "evaluating, before and after"
    parts = models(shape, setup, title) | gathered(shape, setup, title)
    parts |= {
        "logits and loss": 3.0 * setup.tokens * shape.vocabulary * setup.width,
        "compute copies": layer_copies(shape, setup) + head_copy(shape, setup),
        "workspace": passing(shape, setup, setup.tokens),
    }
    return PhaseMemory(title, parts, in_host(shape, setup, title))


def _by_layer(shape: Shape, setup: Setup) -> PhaseMemory:
    """Distributions of some tokens in fp32, and what every layer of both models gave for them."""
    tokens = max(2 * setup.max_length, PROBE_TOKENS)
    batch = min(tokens, setup.tokens)
    scores = tokens * shape.vocabulary * 4 + batch * shape.vocabulary * (setup.width + 8)
    title = "measuring KL by layer"
    parts = models(shape, setup, title)
    parts |= {
        "activations": (tokens + 2.0 * batch) * shape.hidden * shape.layers * setup.width,
        "logits and loss": float(scores),
        "compute copies": layer_copies(shape, setup) + head_copy(shape, setup),
        "workspace": passing(shape, setup, batch),
    }
    return PhaseMemory(title, parts, in_host(shape, setup, title))


def _codes(shape: Shape) -> float:
    """Bytes of the codes of all quantized weights, a byte each, with their scales."""
    return float(shape.linear)


def _writing(shape: Shape, setup: Setup) -> PhaseMemory:
    parts = models(shape, setup, PACKING)
    floats = (shape.parameters - shape.linear) * (
        0 if setup.master == shape.stored else shape.stored
    )
    packed = {"codes": _codes(shape) + floats}
    whole = setup.master if setup.shares_out else 0
    parts["workspace"] = shape.largest * (4 * 2.0 + whole)
    if setup.shares_out and setup.verify:
        packed["whole masters"] = float(shape.linear * setup.master)
    if setup.on_gpu:
        return PhaseMemory(PACKING, parts, packed)
    return PhaseMemory(PACKING, parts | packed)


def _verifying(shape: Shape, setup: Setup) -> PhaseMemory:
    """The masters and their codes, the trained graph in fp32, and the integer model, twice."""
    packed = shape.linear * (0.5 if setup.weight_bits <= 4 else 1.0)
    rest = (shape.parameters - shape.linear) * 4.0
    tokens = ROWS * LENGTH
    parts = {
        # Of four forms of the model in fp32, two of which are compared in fp64.
        "logits and loss": tokens * shape.vocabulary * (4 * 4 + 5 * 8.0),
        "masters": float(shape.linear * setup.master),
        "codes": 2 * _codes(shape),
        "trained graph": shape.parameters * 4.0,
        "integer model": packed + rest,
        "workspace": shape.largest * 4 * 2.0,
    }
    if setup.shares_out and setup.on_gpu:
        return PhaseMemory("verifying", parts, {"masters": parts.pop("masters")})
    return PhaseMemory("verifying", parts)


def _with_libraries(phase: PhaseMemory, setup: Setup) -> PhaseMemory:
    parts = {**phase.parts, "libraries": LIBRARIES}
    if not setup.on_gpu:
        return PhaseMemory(phase.title, parts | {"graphs": GRAPHS})
    of_host = {**phase.host, "libraries": (LIBRARIES + GRAPHS) * setup.gpus}
    return PhaseMemory(phase.title, parts, of_host)
