"""The memory of training, at the two moments when it can be at its most."""

from __future__ import annotations

from qatc.estimate.parts import (
    TRAINING,
    PhaseMemory,
    chunk_of,
    gathered,
    head_copy,
    layer_copies,
    models,
    passing,
)
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape


def training(shape: Shape, setup: Setup) -> PhaseMemory:
    """The more of two moments: at the loss, and at the end of the backward pass.

    Between them gradients grow as activations go, so that neither is exceeded by much.
    """
    parts = models(shape, setup, TRAINING) | gathered(shape, setup, TRAINING)
    state = trained(shape, setup) * setup.moments / setup.gpus
    host = {}
    if setup.on_gpu:  # one process on a CPU writes a checkpoint as it lies
        kept = trained(shape, setup) * (setup.moments + setup.master)
        host["checkpoint on its way"] = kept
    if setup.offload != "none" and setup.on_gpu:
        host["optimizer"] = state * setup.gpus
    else:
        parts["optimizer"] = state
    at_loss, at_end = _at_the_loss(shape, setup), _at_the_end(shape, setup)
    parts |= at_loss if sum(at_loss.values()) > sum(at_end.values()) else at_end
    if setup.streams:
        models_there = parts.keys() & {"masters", "teacher"}
        host |= {name: parts.pop(name) * setup.gpus for name in sorted(models_there)}
        host["gradients"] = trained(shape, setup) * setup.master
    return PhaseMemory(TRAINING, parts, host)


def _at_the_loss(shape: Shape, setup: Setup) -> dict[str, float]:
    tokens, vocabulary = setup.tokens, shape.vocabulary
    layer = saved_activations(shape, setup)
    saved = layer * shape.layers
    if setup.checkpoint_activations:
        saved = shape.hidden * setup.width * shape.layers
    copies = head_copy(shape, setup)
    if not setup.integer_forward:
        copies += shape.active * setup.width  # rounded weights, saved by every layer
    chunk = chunk_of(shape, setup)
    logits = _logits(setup) * min(chunk or tokens, tokens) * vocabulary
    if chunk:  # hidden states of both models, and their gradient in fp32
        logits += tokens * shape.hidden * (2 * setup.width + 4)
    gradients = _all_gradients(shape, setup) if setup.accumulate > 1 else 0.0
    if chunk and _ends_are_trained(setup):
        gradients = max(gradients, shape.embedding * 4.0)  # of the head, added up in fp32
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
    # The table's gradient, which is added to that of the head where they are one.
    again = shape.embedding * setup.master if _ends_are_trained(setup) and not shape.head else 0
    return {
        "gradients": _gradients(shape, setup),
        "activations": layer,
        "compute copies": layer_copies(shape, setup) + head_copy(shape, setup),
        "workspace": 2 * passing(shape, setup, setup.tokens)
        + max(again, shape.largest * (setup.width + setup.master)),
    }


def _all_gradients(shape: Shape, setup: Setup) -> float:
    """Of what is trained; updates are in fp32, whatever the masters."""
    if setup.streams:
        return 0.0
    width = 4 if setup.train == "lora" else setup.master
    return float(trained(shape, setup) * width / setup.gpus)


def _gradients(shape: Shape, setup: Setup) -> float:
    """Of all parameters, or of those whose step is not yet due."""
    if setup.train == "lora":  # a layer's, from which those of its updates are computed
        return _all_gradients(shape, setup) + shape.linear / shape.layers * setup.master
    if setup.streams:  # what a layer, or embedding and head, leave before it goes to the host
        return max(shape.linear / shape.layers, shape.ends) * setup.master
    if not setup.fused_step:
        unsharded = shape.linear / shape.layers * setup.master if setup.gpus > 1 else 0.0
        return _all_gradients(shape, setup) + unsharded
    layer = shape.linear / shape.layers
    ends = shape.embedding if setup.train_embeddings else 0
    return max(layer, ends) * setup.master


def trained(shape: Shape, setup: Setup) -> int:
    """Parameters that are trained."""
    if setup.train == "lora":
        return shape.edges * setup.lora_rank
    return shape.parameters - (0 if setup.train_embeddings else shape.ends)


def _ends_are_trained(setup: Setup) -> bool:
    return setup.train_embeddings and setup.train == "full"


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
