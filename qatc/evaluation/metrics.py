"""How far a model is from its teacher: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qatc.data.corpus import Rows
from qatc.errors import DataError, EvaluationError
from qatc.losses.distances import agreements, compiled, negative_log_likelihood, soft_cross_entropy
from qatc.machine.world import ALONE, World


@dataclass(frozen=True)
class Metrics:
    """Figures of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        kl: KL(teacher || model), nats per token, over all tokens that count: the real ones, and of
            conversations what predicts an answer; None without a teacher.
        top1_agreement: share of these tokens where teacher and model rank the same token first.
        tokens: scored tokens.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Rows,
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 8,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    compile: bool = False,
    world: World = ALONE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Evaluate ``model`` on packed rows.

    Args:
        model: a causal LM, prepared or not.
        rows: text.
        teacher: the full-precision model, for KL and agreement.
        batch_size: rows per forward pass, of all processes together.
        autocast: context of the model's forward pass.
        compile: compile what reads the logits with Inductor.
        world: the processes that models are divided among; each runs some rows of every batch.
        on_progress: called with the rows done and all rows.

    Raises:
        DataError: no token of the rows can be scored.
        EvaluationError: the model or the teacher answers NaN or infinity.
    """
    if not rows.labelled.any():
        raise DataError(
            f"none of the {int(rows.real.sum())} tokens to evaluate on can be scored: a sequence"
            " is scored behind its first tokens, which the model did not choose; give longer text"
        )
    device = next(model.parameters()).device
    likelihood: Any = compiled(negative_log_likelihood, compile)
    divergence: Any = compiled(soft_cross_entropy, compile)
    agreeing_in: Any = compiled(agreements, compile)
    nll = kl = 0.0
    agreeing = scored = compared = 0
    for start in range(0, len(rows), batch_size):
        batch = _own_share(world, rows[start : start + batch_size], batch_size)
        ids = torch.from_numpy(batch.tokens).to(device, torch.long)
        with autocast():
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        labelled = torch.from_numpy(batch.labelled).to(device).flatten()
        loss = float(likelihood(logits, ids.roll(-1, dims=1).flatten(), labelled))
        if math.isnan(loss):
            raise _not_a_number("the model", start, len(batch))
        nll += loss
        scored += int(labelled.sum())
        if teacher is not None:
            counted = torch.from_numpy(batch.counted).to(device).flatten()
            reference = logits
            if teacher is not model:
                # A teacher that lies in the host's memory answers there.
                asked = ids.to(next(teacher.parameters()).device)
                reference = teacher(input_ids=asked, use_cache=False).logits.flatten(0, 1)
                reference = reference.to(device)
            distance = float(divergence(logits, reference, counted)[1])
            if math.isnan(distance):
                unclear = bool(reference[counted].isfinite().all())
                raise _not_a_number("the model" if unclear else "the teacher", start, len(batch))
            kl += distance
            agreeing += int(agreeing_in(logits, reference, counted))
            compared += int(counted.sum())
        if on_progress is not None:
            on_progress(min(start + batch_size, len(rows)), len(rows))
    nll, kl, agreed, tokens, places = world.sum([nll, kl, agreeing, scored, compared])
    perplexity = math.exp(min(nll / tokens, 700.0))
    if teacher is None:
        return Metrics(perplexity, None, None, int(tokens))
    return Metrics(perplexity, kl / places, agreed / places, int(tokens))


def _own_share(world: World, batch: Rows, batch_size: int) -> Rows:
    """The rows of a batch that this process runs: as many for each, of which some count nothing."""
    if world.size == 1:
        return batch
    share = -(-batch_size // world.size)
    own = batch[world.rank * share : (world.rank + 1) * share]
    missing = share - len(own)

    def padded(part: Any) -> Any:
        return np.pad(part, ((0, missing), (0, 0)))

    parts = padded(own.tokens), padded(own.sequence), padded(own.labelled)
    return Rows(*parts, own.answers_only) if missing else own


def _not_a_number(who: str, start: int, rows: int) -> EvaluationError:
    return EvaluationError(
        f"{who} answers NaN or infinity in rows {start} to {start + rows - 1} of the text, so that"
        " no perplexity can be given. Weights are checked when they are loaded, so an activation"
        " overflows: compute in float32 if this was bfloat16, or take another checkpoint"
    )


def recovery(full_precision: float, rounded: float, trained: float) -> float | None:
    """How much of what rounding lost was won back: (RTN - QAT) / (RTN - FP), in percent.

    Returns:
        None where rounding lost nothing, so that there is nothing to recover.
    """
    lost = rounded - full_precision
    return 100 * (rounded - trained) / lost if lost > 0 else None
