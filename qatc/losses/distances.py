"""The losses, and the figures that compare two distributions.

Most of them read a row of logits, as wide as the vocabulary, for every token. Uncompiled, each of
their steps writes such rows to memory and reads them again, which takes longer than the layers of
a small model do; compiled, a row is read once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatc.models.attention import AttentionMap


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Soft-label cross-entropy and KL divergence, summed over tokens.

    Args:
        student: logits ``[N, V]``.
        teacher: logits ``[N, V]``; no gradient flows into them.
        real: bool ``[N]``: which tokens count; ``None`` for all.

    Returns:
        ``(cross_entropy, kl)``: fp32 scalars in nats, summed over the tokens that count; only the
        first carries a gradient.
    """
    target = teacher.detach().float().log_softmax(-1)
    probabilities = target.exp()
    cross_entropy = -(probabilities * student.float().log_softmax(-1)).sum(-1)
    kl = cross_entropy.detach() + (probabilities * target).sum(-1)
    if real is not None:
        cross_entropy = cross_entropy.where(real, 0)
        kl = kl.where(real, 0)
    return cross_entropy.sum(), kl.sum()


def sampled_cross_entropy(
    student: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Soft-label cross-entropy with a target that has E entries, and an estimate of KL; summed.

    Args:
        student: logits ``[N, V]``.
        ids: int64 ``[N, E]``: tokens; see :class:`qatc.data.teacher_rows.Targets`.
        weights: ``[N, E]``: what they weigh.
        entropy: ``[N]``: cross-entropy of the target and the teacher, in nats.
        real: bool ``[N]``: which tokens count.

    Returns:
        ``(cross_entropy, kl)``: scalars in nats, summed over the tokens that count, in fp32 (of
        fp64 logits in fp64); only the first carries a gradient.
    """
    scores = student if student.dtype is torch.float64 else student.float()
    # Unlike that of log_softmax, this gradient needs no sum over the vocabulary of the entries'.
    whole = weights.sum(-1) * scores.logsumexp(-1)
    cross_entropy = (whole - (weights * scores.gather(-1, ids)).sum(-1)).where(real, 0)
    kl = (cross_entropy.detach() - entropy).where(real, 0)
    return cross_entropy.sum(), kl.sum()


def reverse_divergence(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """KL(student || teacher), summed over the real tokens.

    Args:
        student: logits ``[N, V]``.
        teacher: logits ``[N, V]``; no gradient flows into them.
        real: bool ``[N]``.

    Returns:
        An fp32 scalar, in nats.
    """
    scores = student.float().log_softmax(-1)
    target = teacher.detach().float().log_softmax(-1)
    return (scores.exp() * (scores - target)).sum(-1).where(real, 0).sum()


def negative_log_likelihood(logits: Tensor, following: Tensor, labelled: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens that follow, summed over those that are labelled.

    Args:
        logits: ``[N, V]``.
        following: int64 ``[N]``.
        labelled: bool ``[N]``.

    Returns:
        An fp32 scalar, in nats.
    """
    # Not by logsumexp, which takes a logit of infinity for a number.
    scores = logits.float().log_softmax(-1)
    return -scores.gather(-1, following.unsqueeze(-1)).squeeze(-1).where(labelled, 0).sum()


def relative_error(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """Squared error relative to the teacher's squared norm, summed over the real tokens.

    Relative token by token: the few of a norm far above all others (the first token's, often) would
    hide the rest in a ratio of sums.

    Args:
        student: hidden states ``[B, T, D]``.
        teacher: ``[B, T, D]``; no gradient flows into them.
        real: bool ``[B, T]``.

    Returns:
        An fp32 scalar.
    """
    target = teacher.detach().float()
    power = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((student.float() - target).square().sum(-1) / power).where(real, 0).sum()


def attention_divergence(student: AttentionMap, teacher: AttentionMap, real: Tensor) -> Tensor:
    """KL(teacher || student) of attention maps, a mean over heads, summed over the real tokens.

    Args:
        student, teacher: the maps; no gradient flows into the teacher's.
        real: bool ``[B, T]``: queries that count.

    Returns:
        An fp32 scalar, in nats.
    """
    target = teacher.log_probabilities().detach()
    divergence = (target.exp() * (target - student.log_probabilities())).sum(-1)
    return divergence.mean(1).where(real, 0).sum()


def agreements(logits: Tensor, others: Tensor, real: Tensor) -> Tensor:
    """How many of the real tokens both rank the same token first, of ``[N, V]``, as a scalar."""
    return ((logits.argmax(-1) == others.argmax(-1)) & real).sum()


def compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """``function`` of this module, compiled with Inductor if that is wanted.

    One graph serves any number of tokens.
    """
    return _compiled(function) if wanted else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    graph = torch.compile(function)

    def call(*tensors: Tensor | None) -> Any:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return graph(*tensors)

    return call
