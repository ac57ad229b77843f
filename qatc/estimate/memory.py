"""The memory of every phase of ``qatc quantize``, by what takes it.

Each phase is reckoned at the moment when it holds most. Bytes are those of one GPU, or of the
process on a CPU; what a run on GPUs keeps in the host's memory stands beside them. Of parameters it
is exact, of activations it counts the tensors that compiled graphs were seen to save, and of what
lives for a moment within a layer it counts the largest.

With several GPUs the student, its gradients and its optimizer are shared out, and so is the teacher
(FSDP2); a layer's parameters are gathered while it runs, and those of the next one beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qatc.data.config import CorpusConfig
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape

LIBRARIES = 1.0e9
"""Bytes of torch, its compiler and a GPU's context, whatever the model."""

MOST_SLOTS = 256
"""Sequences side by side that ``auto`` is taken for, where memory allows."""

_GATHERED = 2
"""Layers whose parameters are gathered at a time: one runs, the next one is on its way."""


@dataclass(frozen=True)
class PhaseMemory:
    """What a phase holds at the most.

    Attributes:
        title: of the phase.
        parts: bytes on a GPU by what takes them, or in all where there is none.
        host: bytes in the host's memory, beside GPUs, of all processes of a node together.
    """

    title: str
    parts: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        """Bytes in the host's memory."""
        return sum(self.host.values())


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
        _training(shape, setup),
        _writing(shape, setup),
        *([_verifying(shape, setup)] if setup.verify else []),
    ]
    return [_with_libraries(phase, setup) for phase in found]


def largest(found: list[PhaseMemory]) -> PhaseMemory:
    """The phase that holds most."""
    return max(found, key=lambda phase: phase.total)


def trained(shape: Shape, setup: Setup) -> int:
    """Parameters that are trained."""
    return shape.parameters - (0 if setup.train_embeddings else shape.ends)


def saved_activations(shape: Shape, setup: Setup) -> float:
    """Bytes that a layer saves for its backward pass, a token.

    Counted from what compiled layers were seen to save. On codes: the layer's input and what stands
    behind its attention; queries, keys, values and attention's output; what the MLP widens to, and
    the codes of what it narrows; sums and scales in fp32. In float, the inputs of all linears
    beside them. Uncompiled, hardly anything is computed again.
    """
    attention = (2 * shape.queries + 2 * shape.keys) * setup.width + 4 * shape.heads
    wide = shape.ups * shape.inner * setup.width
    if setup.integer_forward:
        saved = attention + wide + 2 * shape.hidden * setup.width + shape.inner + 6 * 4
        return saved if setup.compile else 1.9 * saved
    saved = attention + wide + (5 * shape.hidden + shape.inner) * setup.width
    return saved if setup.compile else 1.9 * saved


def slots_of(shape: Shape, setup: Setup, memory: float | None) -> int:
    """Sequences side by side: what is asked for, or what ``auto`` takes at most."""
    most = max(2, min(setup.samples, CorpusConfig.shard_size))
    if setup.slots is not None:
        return max(2, min(setup.slots, most))
    if memory is None:
        return min(MOST_SLOTS, most)
    free = memory - LIBRARIES - sum(_models(shape, setup, alone=_apart(setup)).values())
    return int(max(2, min(MOST_SLOTS, most, free / 2 // slot_bytes(shape, setup))))


def slot_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of a sequence being written: its KV cache, and a row of logits."""
    cache = 2 * shape.keys * shape.layers * (setup.max_length + 1) * setup.width
    return cache + shape.vocabulary * setup.width


def _apart(setup: Setup) -> bool:
    """Whether the corpus is written by a command of its own, which has the teacher alone."""
    return setup.teacher == "recorded"


def _models(shape: Shape, setup: Setup, *, alone: bool = False) -> dict[str, float]:
    """Student and teacher as they lie, or the teacher alone.

    An embedding and a head that are not trained are the teacher's own, where dtypes agree.
    """
    student = shape.parameters * setup.master / setup.gpus
    teacher = shape.parameters * setup.width / setup.gpus
    if alone:
        return {"teacher": teacher}
    if setup.teacher == "recorded":
        return {"masters": student}
    if not setup.train_embeddings and setup.master == setup.width:
        student -= shape.ends * setup.master / setup.gpus
    return {"masters": student, "teacher": teacher}


def _gathered(shape: Shape, setup: Setup, width: int) -> float:
    """Bytes of parameters that FSDP gathers at a time: some layers, embedding and head."""
    if setup.gpus == 1:
        return 0.0
    return (_GATHERED * shape.linear / shape.layers + shape.ends) * width


def _of_both(shape: Shape, setup: Setup) -> dict[str, float]:
    found = _gathered(shape, setup, setup.master)
    if setup.teacher == "online":
        found += _gathered(shape, setup, setup.width)
    return {"gathered layers": found} if found else {}


def _layer_copies(shape: Shape, setup: Setup) -> float:
    """Bytes of what a layer's weights are turned into while it runs: codes, or rounded values."""
    width = 1 if setup.integer_forward else setup.width
    return shape.active / shape.layers * width


def _head_copy(shape: Shape, setup: Setup) -> float:
    """Bytes of the head in the compute dtype, which autocast keeps from the forward pass on."""
    return 0.0 if setup.width == setup.master else shape.embedding * setup.width


def _passing(shape: Shape, setup: Setup, tokens: int) -> float:
    """Bytes of activations while tokens pass one layer: of the residual stream and the MLP."""
    return tokens * ((shape.ups + 1) * shape.inner + 3 * shape.hidden) * setup.width


def _load(shape: Shape, setup: Setup) -> PhaseMemory:
    host = {}
    if setup.gpus == 1:  # several fill their shares by slices of the checkpoint
        host = {"the model that is being moved": float(shape.parameters * setup.master)}
    return PhaseMemory("loading", _models(shape, setup), host)


def _corpus(shape: Shape, setup: Setup, memory: float | None) -> PhaseMemory:
    slots = slots_of(shape, setup, memory)
    cache = 2 * shape.keys * shape.layers * (setup.max_length + 1) * setup.width * slots
    parts = _models(shape, setup, alone=_apart(setup))
    parts |= {
        "KV cache": cache,
        "logits and loss": slots * shape.vocabulary * setup.width * 2.0,
        "workspace": _passing(shape, setup, slots),
    }
    if setup.gpus > 1:
        parts["gathered layers"] = _gathered(shape, setup, setup.width)
    return PhaseMemory(f"writing the corpus, {slots} side by side", parts)


def _record(shape: Shape, setup: Setup) -> PhaseMemory:
    """The teacher's distribution of whole rows, in fp32, sorted for the most likely tokens."""
    tokens = 4 * setup.max_length
    parts = _models(shape, setup, alone=True)
    parts |= {
        "logits and loss": tokens * shape.vocabulary * setup.width
        + setup.max_length * shape.vocabulary * 4 * 3.0,
        "workspace": _passing(shape, setup, tokens),
    }
    if setup.gpus > 1:
        parts["gathered layers"] = _gathered(shape, setup, setup.width)
    return PhaseMemory("recording the teacher", parts)


def _evaluation(shape: Shape, setup: Setup) -> PhaseMemory:
    """Two models' logits, beside those of the batch before, until they are replaced."""
    copies = 3.0 if setup.teacher == "online" else 2.0
    parts = _models(shape, setup) | _of_both(shape, setup)
    parts |= {
        "logits and loss": copies * setup.tokens * shape.vocabulary * setup.width,
        "compute copies": _layer_copies(shape, setup) + _head_copy(shape, setup),
        "workspace": _passing(shape, setup, setup.tokens),
    }
    return PhaseMemory("evaluating, before and after", parts)


def _training(shape: Shape, setup: Setup) -> PhaseMemory:
    """The more of two moments: at the loss, and at the end of the backward pass.

    Between them gradients grow as activations go, so that neither is exceeded by much.
    """
    parts = _models(shape, setup) | _of_both(shape, setup)
    state = trained(shape, setup) * setup.moments / setup.gpus
    host = {}
    if setup.offload == "optimizer" and setup.on_gpu:
        host = {"optimizer": state * setup.gpus}
    else:
        parts["optimizer"] = state
    at_loss, at_end = _at_the_loss(shape, setup), _at_the_end(shape, setup)
    parts |= at_loss if sum(at_loss.values()) > sum(at_end.values()) else at_end
    return PhaseMemory("training", parts, host)


def _at_the_loss(shape: Shape, setup: Setup) -> dict[str, float]:
    tokens, vocabulary = setup.tokens, shape.vocabulary
    layer = saved_activations(shape, setup)
    saved = layer * shape.layers
    if setup.checkpoint_activations:
        saved = shape.hidden * setup.width * shape.layers
    copies = _head_copy(shape, setup)
    if not setup.integer_forward:
        copies += shape.active * setup.width  # rounded weights, saved by every layer
    at_once = min(setup.loss_chunk or tokens, tokens)
    logits = _logits(setup) * at_once * vocabulary
    if setup.loss_chunk:
        logits += 3 * tokens * shape.hidden * setup.width
    gradients = _all_gradients(shape, setup) if setup.accumulate > 1 else 0.0
    if setup.loss_chunk and setup.train_embeddings:
        gradients = max(gradients, float(shape.embedding * setup.master))  # of the head
    return {
        "gradients": gradients,
        "activations": tokens * saved,
        "logits and loss": logits,
        "compute copies": copies,
    }


def _logits(setup: Setup) -> float:
    """Bytes that the loss holds of a logit: teacher's, student's, and the gradient's."""
    return (3.0 if setup.compile else 10.0) * setup.width


def _at_the_end(shape: Shape, setup: Setup) -> dict[str, float]:
    """In the first layer's backward pass."""
    layer = setup.tokens * saved_activations(shape, setup)
    return {
        "gradients": _gradients(shape, setup),
        "activations": layer,
        "compute copies": _layer_copies(shape, setup) + _head_copy(shape, setup),
        "workspace": 2 * _passing(shape, setup, setup.tokens)
        + shape.largest * (setup.width + setup.master),
    }


def _all_gradients(shape: Shape, setup: Setup) -> float:
    return trained(shape, setup) * setup.master / setup.gpus


def _gradients(shape: Shape, setup: Setup) -> float:
    """Of all parameters, or of those whose step is not yet due."""
    if not setup.fused_step:
        unsharded = shape.linear / shape.layers * setup.master if setup.gpus > 1 else 0.0
        return _all_gradients(shape, setup) + unsharded
    layer = shape.linear / shape.layers
    ends = shape.embedding if setup.train_embeddings else 0
    return max(layer, ends) * setup.master


def _codes(shape: Shape) -> float:
    """Bytes of the codes of all quantized weights, a byte each, with their scales."""
    return float(shape.linear)


def _writing(shape: Shape, setup: Setup) -> PhaseMemory:
    parts = _models(shape, setup)
    floats = (shape.parameters - shape.linear) * (
        0 if setup.master == shape.stored else shape.stored
    )
    parts |= {
        "codes": _codes(shape) + floats,
        "workspace": shape.largest * 4 * 2.0,
    }
    return PhaseMemory("packing and writing", parts)


def _verifying(shape: Shape, setup: Setup) -> PhaseMemory:
    """The masters and their codes, the trained graph in fp32, and the integer model, twice."""
    packed = shape.linear * (0.5 if setup.weight_bits <= 4 else 1.0)
    rest = (shape.parameters - shape.linear) * 4.0
    parts = {
        "masters": float(shape.linear * setup.master),
        "codes": 2 * _codes(shape),
        "trained graph": shape.parameters * 4.0,
        "integer model": packed + rest,
        "workspace": shape.largest * 4 * 2.0,
    }
    return PhaseMemory("verifying", parts)


def _with_libraries(phase: PhaseMemory, setup: Setup) -> PhaseMemory:
    parts = {**phase.parts, "libraries": LIBRARIES}
    if not setup.on_gpu:
        return PhaseMemory(phase.title, parts)
    return PhaseMemory(phase.title, parts, {**phase.host, "libraries": LIBRARIES * setup.gpus})
