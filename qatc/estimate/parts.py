"""What several phases hold: models, copies of them, and activations that pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.losses.chunks import chunk_size

TRAINING = "training"
"""Phase in which GPUs always share models out."""

_GATHERED = 2
"""Layers whose parameters are gathered at a time: one runs, the next one is on its way."""

IN_HOST = frozenset({"loading", "evaluating, before and after", "measuring KL by layer"})
"""Phases in which a teacher that is recorded lies in the host's memory, beside a GPU."""

PACKING = "packing and writing"
"""Phase in which no teacher is there any more."""

WITHOUT_STUDENT = frozenset({"writing the corpus", "recording the teacher"})
"""Phases that generate-data has to itself, where the teacher is recorded or the corpus given."""


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

    An embedding and a head that are not trained are the teacher's own, where dtypes agree, but for
    models that are shared out. Of those the teacher is whole, beside its shares, while it writes.
    """
    recorded, found = setup.teacher == "recorded", {}
    alone = (recorded or setup.written_before) and phase in WITHOUT_STUDENT
    divided = (setup.shares_out and not alone) or phase == TRAINING
    share = setup.gpus if divided else 1
    if not alone:
        found["masters"] = shape.parameters * setup.master / share
    dropped = phase == TRAINING or bool(in_host(shape, setup, phase))
    if phase != PACKING and not (recorded and dropped):
        shared = "masters" in found and not setup.train_embeddings and setup.master == setup.width
        own = shape.parameters - (shape.ends if shared and not setup.shares_out else 0)
        found["teacher"] = own * setup.width / share
    if setup.shares_out and phase in WITHOUT_STUDENT and not alone:
        found["whole teacher"] = float(shape.parameters * setup.width)
    return found


def gathered(shape: Shape, setup: Setup, phase: str) -> dict[str, float]:
    """Bytes of parameters that FSDP gathers at a time: some layers, embedding and head."""
    streams = setup.streams and phase == TRAINING
    if not streams and (setup.gpus == 1 or not (setup.shares_out or phase == TRAINING)):
        return {}
    both = setup.teacher == "online" or phase != TRAINING
    width = setup.master + (setup.width if both else 0)
    each = _GATHERED * shape.linear / shape.layers + shape.ends
    return {"gathered layers": each * width}


def in_host(shape: Shape, setup: Setup, phase: str) -> dict[str, float]:
    """Bytes of a teacher that lies in the host's memory in a phase, of every process."""
    if setup.teacher != "recorded" or phase not in IN_HOST:
        return {}
    if setup.shares_out or not setup.on_gpu:
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
