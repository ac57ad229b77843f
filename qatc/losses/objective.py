"""What a training lowers: a weighted sum of distances between student and teacher.

A loss is written as its terms, joined by ``+``: ``logits``, ``logits+hidden``,
``label+0.5*reverse``, ``logits+hidden:decay``. The terms, each a mean over the tokens that it
counts (LLM-QAT, arXiv 2305.17888, section 3.2 and table 5, compares the first four):

=============  =====================================================================================
term           what
=============  =====================================================================================
``logits``     soft-label cross-entropy of the student's distribution with the teacher's (eq. 4)
``label``      cross-entropy with the token that follows in the corpus
``hidden``     squared error of each decoder layer's output, relative to the teacher's squared norm
               of that token; a mean over layers
``attention``  KL(teacher || student) of the attention maps; a mean over layers and heads
``reverse``    KL(student || teacher) of the distributions
=============  =====================================================================================

A term's weight stands before it (``0.5*``), 1 if left out; behind ``:decay`` it falls linearly from
that, at the first step, towards 0 at the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.teacher_rows import Targets
from qatc.errors import ConfigError
from qatc.losses.chunks import Chunks
from qatc.losses.distances import (
    attention_divergence,
    compiled,
    negative_log_likelihood,
    relative_error,
    reverse_divergence,
    sampled_cross_entropy,
    soft_cross_entropy,
)
from qatc.models import find_regions
from qatc.models.attention import AttentionCalls, AttentionMap

TERMS = ("logits", "label", "hidden", "attention", "reverse")
_OF_LOGITS = ("logits", "label", "reverse")

RECORDED_TERMS = ("logits", "label")
"""Those that a recorded teacher (:mod:`qatc.data.teacher_logits`) is enough for."""

_TERM = re.compile(r"(?:(?P<weight>[^*]+)\*)?(?P<name>[a-z]+)(?P<decay>:decay)?")


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        name: one of :data:`TERMS`.
        weight: its factor at the first step.
        decays: whether the factor falls linearly from there towards 0.
    """

    name: str
    weight: float = 1.0
    decays: bool = False

    def weight_at(self, step: int, steps: int) -> float:
        """Its factor at a step, from 1, of this many."""
        return self.weight * (1 - (step - 1) / steps) if self.decays else self.weight


def parse_loss(text: str) -> tuple[Term, ...]:
    """The terms of a loss, as the module describes it.

    Raises:
        ConfigError: it is no such sum.
    """
    terms = tuple(_parse_term("".join(part.split()), text) for part in text.split("+"))
    names = [term.name for term in terms]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"the loss {text!r} has the term {twice[0]} twice; give it one weight")
    if all(term.decays for term in terms):
        raise ConfigError(
            f"every term of the loss {text!r} decays, so that nothing is left to lower at the end;"
            " drop :decay from one"
        )
    return terms


def _parse_term(part: str, text: str) -> Term:
    match = _TERM.fullmatch(part)
    if match is None or match["name"] not in TERMS:
        raise ConfigError(
            f"the loss {text!r} has no term {part!r}; terms are {', '.join(TERMS)}, joined by +,"
            " each with a weight before it and :decay behind it if wanted: logits+0.5*hidden:decay"
        )
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(
            f"the weight of a loss's term must be a positive number; got {match['weight']!r} in"
            f" {text!r}"
        )
    return Term(match["name"], weight, match["decay"] is not None)


def distillation_losses(
    student: nn.Module,
    teacher: nn.Module,
    ids: Tensor,
    real: Tensor,
    labelled: Tensor,
    terms: Collection[str] = ("logits",),
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    compile: bool = False,
    chunks: Chunks | None = None,
    mix: Mapping[str, float] | None = None,
) -> tuple[Mapping[str, Tensor], Tensor]:
    """What the student is to lower, and how far it is from the teacher, summed over a batch.

    Args:
        student: the prepared model.
        teacher: the full-precision model.
        ids: int64 ``[B, T]``.
        real: bool ``[B, T]``: tokens that count; no padding.
        labelled: bool ``[B, T]``: tokens whose next one is a label, for the term ``label``.
        terms: names of terms.
        autocast: makes a context for the student's forward pass.
        compile: compile what reads the logits with Inductor.
        chunks: how the logits are read in chunks of tokens; ``None`` for whole ones.
        mix: the proportions that the terms are going to be added up in, which chunks have to know;
            ``None`` for a sum of all.

    Returns:
        The terms by name, and KL(teacher || student): fp32 scalars, each summed over the ``real``
        tokens, ``label`` over the ``labelled`` ones. Only the terms carry a gradient.

    Raises:
        ConfigError: layers or attention maps are to be compared, and cannot be seen.
    """
    counted, labels = real.flatten(), labelled.flatten()
    following = ids.roll(-1, dims=1).flatten() if "label" in terms else labels

    def compare(logits: Tensor, wanted: Tensor, span: slice = slice(None)) -> Any:
        soft = compiled(soft_cross_entropy, compile)
        masks = following[span], labels[span]
        losses, kl = _of_logits(
            logits, lambda own: soft(own, wanted, counted[span]), *masks, terms, compile
        )
        if "reverse" in terms:
            reverse = compiled(reverse_divergence, compile)
            losses["reverse"] = reverse(logits, wanted, counted[span])
        return losses, kl

    inside, wanted_inside = _Inside([], []), _Inside([], [])
    seen = _watched(student, terms, inside), _watched(teacher, terms, wanted_inside)
    if chunks is None:
        with torch.no_grad(), seen[1]:
            wanted = teacher(input_ids=ids, use_cache=False).logits
        with autocast(), seen[0]:
            logits = student(input_ids=ids, use_cache=False).logits
        losses, kl = compare(logits.flatten(0, 1), wanted.flatten(0, 1))
    else:
        mix = {name: (mix or {}).get(name, 1.0) for name in _OF_LOGITS if name in terms}
        found, kl = chunks.losses(ids, compare, mix, seen)
        losses = dict(found)
    if "hidden" in terms:
        pairs = _pairs(inside.hidden, wanted_inside.hidden, "layers")
        losses["hidden"] = torch.stack([relative_error(*pair, real) for pair in pairs]).mean()
    if "attention" in terms:
        maps = _pairs(inside.attention, wanted_inside.attention, "attention maps")
        losses["attention"] = torch.stack([attention_divergence(*m, real) for m in maps]).mean()
    return losses, kl


def recorded_losses(
    student: nn.Module,
    targets: Targets,
    ids: Tensor,
    real: Tensor,
    labelled: Tensor,
    terms: Collection[str] = ("logits",),
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    compile: bool = False,
    chunks: Chunks | None = None,
    mix: Mapping[str, float] | None = None,
) -> tuple[Mapping[str, Tensor], Tensor]:
    """:func:`distillation_losses` with what is recorded of the teacher in its place.

    Args:
        targets: of the ``B * T`` tokens, on the device of ``ids``.

    Returns:
        As of :func:`distillation_losses`; KL is an estimate. Both are unbiased over what was drawn
        when the teacher was recorded.

    Raises:
        ConfigError: a term needs the teacher itself.
    """
    refuse_unrecorded(terms)
    counted, labels = real.flatten(), labelled.flatten()
    following = ids.roll(-1, dims=1).flatten() if "label" in terms else labels

    def compare(logits: Tensor, _: Any = None, span: slice = slice(None)) -> Any:
        soft = compiled(sampled_cross_entropy, compile)
        entries = (targets.ids[span], targets.weights[span], targets.entropy[span])
        masks = following[span], labels[span]
        return _of_logits(
            logits, lambda own: soft(own, *entries, counted[span]), *masks, terms, compile
        )

    if chunks is not None:
        mix = {name: (mix or {}).get(name, 1.0) for name in RECORDED_TERMS if name in terms}
        return chunks.losses(ids, compare, mix, (nullcontext(), nullcontext()))
    with autocast():
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    losses, kl = compare(logits)
    return losses, kl


def refuse_unrecorded(terms: Collection[str]) -> None:
    """Raise ``ConfigError`` if a term compares what is not recorded of a teacher."""
    for name in terms:
        if name not in RECORDED_TERMS:
            raise ConfigError(
                f"the loss's term {name} compares what is not recorded of the teacher; leave it out"
                f" (--loss takes {' and '.join(RECORDED_TERMS)} then), or let the teacher run:"
                " --teacher online"
            )


def _of_logits(
    logits: Tensor,
    distribution: Callable[[Tensor], tuple[Tensor, Tensor]],
    following: Tensor,
    labels: Tensor,
    terms: Collection[str],
    compile: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of logits ``[N, V]`` alone, and KL, summed over tokens ``[N]``.

    ``distribution`` gives cross-entropy with the teacher's distribution, and KL to it.
    """
    losses: dict[str, Tensor] = {}
    cross_entropy, kl = distribution(logits if "logits" in terms else logits.detach())
    if "logits" in terms:
        losses["logits"] = cross_entropy
    if "label" in terms:
        likelihood = compiled(negative_log_likelihood, compile)
        losses["label"] = likelihood(logits, following, labels)
    return losses, kl


@dataclass(frozen=True)
class _Inside:
    """What was seen of a forward pass, in the order of the layers."""

    hidden: list[Tensor]
    attention: list[AttentionMap]


def _pairs(student: list[Any], teacher: list[Any], what: str) -> list[tuple[Any, Any]]:
    if not student or len(student) != len(teacher):
        raise ConfigError(
            f"the loss compares {what}, of which the student shows {len(student)} and the teacher"
            f" {len(teacher)}: layers are seen of transformers' causal LMs, attention maps where"
            " both are loaded with attn_implementation='sdpa'; leave the term out of others' loss"
        )
    return list(zip(student, teacher, strict=True))


@contextmanager
def _watched(model: nn.Module, terms: Collection[str], inside: _Inside) -> Iterator[None]:
    """See as much of a forward pass as the terms compare."""
    with ExitStack() as watching:
        if "hidden" in terms:
            for name, layer in find_regions(model):
                if name:  # a model that is a region as a whole has no layers
                    hook = layer.register_forward_hook(
                        lambda layer, args, out: inside.hidden.append(
                            out[0] if isinstance(out, tuple) else out
                        )
                    )
                    watching.callback(hook.remove)
        if "attention" in terms:
            watching.enter_context(AttentionCalls(inside.attention.append))
        yield
