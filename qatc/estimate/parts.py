"""What several phases hold: models, copies of them, and activations that pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.losses.chunks import chunk_size

DIVIDED = frozenset({"training"})
"""Phases in which GPUs share models out; in all others each has whole ones."""

IN_HOST = frozenset({"loading", "evaluating, before and after", "measuring KL by layer"})
"""Phases in which a teacher that is recorded lies in the host's memory, beside a GPU."""

PACKING = "packing and writing"
"""Phase in which no teacher is there any more."""

WITHOUT_STUDENT = frozenset({"writing the corpus", "recording the teacher"})
"""Phases that generate-data has to itself, where the teacher is recorded."""


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


def chunk_of(shape: Shape, setup: Setup) -> int:
    """Tokens whose logits are there at a time; 0 for all of a batch."""
    return chunk_size(setup.loss_chunk, setup.tokens, shape.vocabulary)


def models(shape: Shape, setup: Setup, phase: str) -> dict[str, float]:
    """Bytes of student and teacher as they lie in a phase, on each GPU.

    An embedding and a head that are not trained are the teacher's own, where dtypes agree.
    """
    recorded, found = setup.teacher == "recorded", {}
    share = setup.gpus if phase in DIVIDED else 1
    if not (recorded and phase in WITHOUT_STUDENT):
        found["masters"] = shape.parameters * setup.master / share
    dropped = phase == "training" or (phase in IN_HOST and setup.on_gpu)
    if phase != PACKING and not (recorded and dropped):
        shared = "masters" in found and not setup.train_embeddings and setup.master == setup.width
        own = shape.parameters - (shape.ends if shared else 0)
        found["teacher"] = own * setup.width / share
    return found


def in_host(shape: Shape, setup: Setup, phase: str) -> dict[str, float]:
    """Bytes of a teacher that lies in the host's memory in a phase, of every process."""
    if setup.teacher != "recorded" or phase not in IN_HOST or not setup.on_gpu:
        return {}
    return {"teacher": float(shape.parameters * setup.width * setup.gpus)}


def layer_copies(shape: Shape, setup: Setup) -> float:
    """Bytes of what a layer's weights are turned into while it runs: codes, or rounded values."""
    width = 1 if setup.integer_forward else setup.width
    return shape.active / shape.layers * width


def head_copy(shape: Shape, setup: Setup) -> float:
    """Bytes of the head in the compute dtype, which autocast keeps from the forward pass on."""
    return 0.0 if setup.width == setup.master else shape.embedding * setup.width


def passing(shape: Shape, setup: Setup, tokens: int) -> float:
    """Bytes of activations while tokens pass one layer: of the residual stream and the MLP."""
    return tokens * ((shape.ups + 1) * shape.inner + 3 * shape.hidden) * setup.width
