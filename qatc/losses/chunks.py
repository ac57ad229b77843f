"""The loss in chunks of tokens, so that no logits of a whole batch are ever there.

Logits are the largest tensors of a step: 2,048 tokens of a vocabulary of 128,256 take 1 GB in fp32,
and the loss needs five such. What stands before them, the hidden states, is a hundredth of that. So
both models run up to their hidden states, and then, for some tokens at a time, the logits, the loss
and its gradient with respect to hidden states and head are computed and dropped, all within the
forward pass; the backward pass only scales what is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qatc.losses.tails import Tail, check
from qatc.models import is_transformers_model

LARGE = 2**26
"""Logits of a batch from which on they are computed in chunks, unless a run says otherwise."""

CHUNK = 2**24
"""Logits of a chunk, about, unless a run says otherwise: 64 MB in fp32."""

Around = AbstractContextManager[Any]

Losses = Callable[[Tensor, slice], tuple[Mapping[str, Tensor], Tensor]]
"""Maps logits ``[N, V]`` of some tokens of a batch, and which those are, to terms and KL."""


def chunk_size(asked: int | None, tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk, 0 for whole logits.

    Args:
        asked: by the user; ``None`` for chunks where the logits of a batch are large.
        tokens: of a batch.
        vocabulary: width of the logits.
    """
    if asked is not None:
        return asked
    if tokens * vocabulary < LARGE:
        return 0
    return 1 << max(4, (CHUNK // vocabulary).bit_length() - 1)


@dataclass(frozen=True, eq=False)
class Chunks:
    """How the loss of a student is computed in chunks.

    Attributes:
        student, teacher: the models in two parts; no teacher if its answers are recorded.
        size: tokens of a chunk.
    """

    student: Tail
    teacher: Tail | None
    size: int

    def losses(
        self,
        ids: Tensor,
        compare: Callable[[Tensor, Any, slice], Any],
        mix: Mapping[str, float],
        around: tuple[Around, Around],
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The terms of a batch by name, and KL, each summed over its tokens.

        Args:
            ids: int64 ``[B, T]``.
            compare: maps logits of student and teacher ``[N, V]`` of some tokens, and which of the
                ``B*T`` those are, to terms by name and KL, summed over them. Logits of no teacher
                are None.
            mix: the terms that carry a gradient, and the proportions that they are going to be
                added up in: gradients are those of such a sum.
            around: contexts that the trunks of student and teacher run in.
        """
        found: list[tuple[Mapping[str, Tensor], Tensor]] = []
        trains = torch.is_grad_enabled()

        def of_student(wanted: Callable[[slice], Any]) -> None:
            def losses(logits: Tensor, span: slice) -> Any:
                return compare(logits, wanted(span), span)

            def body(hidden: Tensor) -> Mapping[str, Tensor]:
                found.append(chunked(self.student, hidden.flatten(0, 1), losses, self.size, mix))
                return found[0][0]

            with torch.set_grad_enabled(trains):
                self.student.run(ids, body, around[0])

        def of_teacher(teacher: Tail, hidden: Tensor) -> None:
            hidden = hidden.flatten(0, 1)

            @torch.no_grad()
            def wanted(span: slice) -> Tensor:
                return teacher.logits(hidden[span])

            with teacher.product(None):
                of_student(wanted)

        if self.teacher is None:
            of_student(lambda span: None)
        else:
            with torch.no_grad():
                self.teacher.run(ids, functools.partial(of_teacher, self.teacher), around[1])
        return found[0]


def chunked(
    tail: Tail, hidden: Tensor, losses: Losses, size: int, mix: Mapping[str, float]
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Losses of the logits of hidden states, computed in chunks.

    Args:
        tail: makes logits.
        hidden: ``[N, D]``.
        losses: maps logits of a chunk to terms by name and KL, each summed over its tokens.
        size: tokens of a chunk.
        mix: the terms that carry a gradient, and the proportions that they are going to be added up
            in.

    Returns:
        The terms of ``mix`` and KL: scalars, summed over all tokens. Where gradients are enabled,
        the terms have one with respect to hidden states and to all parameters of the tail, right
        for a sum in these proportions.
    """
    weight = () if tail.head is None else (tail.head.weight,)
    work = _Work(tail, losses, size, mix)
    inputs = work, hidden, *weight, *tail.parameters
    kl, *values = _Chunked.apply(*inputs)  # type: ignore[no-untyped-call]
    return dict(zip(mix, values, strict=True)), kl


@dataclass(eq=False)
class _Work:
    """A loop over the chunks of a batch, and the gradients that it adds up."""

    tail: Tail
    losses: Losses
    size: int
    mix: Mapping[str, float]

    def run(
        self, hidden: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """KL and the terms, and the gradients of hidden states and parameters that are wanted."""
        wanted = wanted if self.mix else [False] * len(wanted)
        totals = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if w else None
            for p, w in zip((hidden, *parameters), wanted, strict=True)
        ]
        own = 1 if self.tail.head is None else 2
        sources = [p for p, w in zip(self.tail.parameters, wanted[own:], strict=True) if w]
        sums = [total for total in totals[own:] if total is not None]
        values: list[Tensor] = []
        with self.tail.product(totals[1] if own == 2 else None):
            for start in range(0, len(hidden), self.size):
                span = slice(start, start + self.size)
                found, gradients = self._chunk(hidden, span, sources, any(wanted))
                values = [a + b for a, b in zip(values, found, strict=True)] if values else found
                if totals[0] is not None and gradients[0] is not None:
                    totals[0][span] = gradients[0]
                for total, gradient in zip(sums, gradients[1:], strict=True):
                    if gradient is not None:
                        total += gradient
        return values, totals

    def _chunk(
        self, hidden: Tensor, span: slice, sources: Sequence[Tensor], trains: bool
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """Values of a chunk, and gradients of its hidden states and of the tail's parameters."""
        with torch.set_grad_enabled(trains):
            part = hidden[span].detach().requires_grad_(trains)
            terms, kl = self.losses(self.tail.logits(part), span)
            values = [kl, *(terms[name] for name in self.mix)]
            if not trains:
                return values, [hidden[:0]]
            total = torch.stack([f * terms[name] for name, f in self.mix.items()]).sum()
        gradients = torch.autograd.grad(total, [part, *sources], allow_unused=True)
        return [value.detach() for value in values], gradients


class _Chunked(torch.autograd.Function):
    """KL and the terms of some work, with the gradients that it found in the forward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values, ctx.gradients = work.run(hidden, parameters, ctx.needs_input_grad[1:])
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *parameters)]
        factors = [*work.mix.values()]
        ctx.largest = max(range(len(factors)), key=factors.__getitem__, default=0)
        ctx.factor = factors[ctx.largest] if factors else 1.0
        ctx.mark_non_differentiable(values[0])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *scales: Tensor) -> tuple[Tensor | None, ...]:
        # In place, and none is kept: they are as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of a loss in chunks is there once"
        scale = scales[ctx.largest] / ctx.factor
        scaled = [
            None if g is None else g.mul_(scale.to(g.dtype)).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, *scaled


def _obstacle(chunks: Chunks, ids: Tensor) -> str | None:
    """Why the logits of chunks cannot stand for whole ones, or None if they can."""
    for name, tail in ("student", chunks.student), ("teacher", chunks.teacher):
        try:
            error = None if tail is None else check(tail, ids)
        except torch.OutOfMemoryError:
            raise  # whole logits take more
        except Exception as problem:  # whatever a model does otherwise, is why it is not used
            error = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        if error is not None:
            return f"the {name}'s tail cannot be run by itself ({error})"
    return None


def find_chunks(
    student: nn.Module,
    teacher: nn.Module | None,
    ids: Tensor,
    asked: int | None,
    tokens: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    note: Callable[[str], object] = lambda text: None,
) -> Chunks | None:
    """The chunks that a loss is to be computed in; None for whole logits.

    Args:
        student, teacher: the models; None for a teacher whose answers are recorded.
        ids: int64 ``[B, T]``: a few tokens to try them on.
        asked: tokens of a chunk, see :func:`chunk_size`.
        tokens: of a batch.
        autocast: makes a context for the student's forward pass.
        note: is told why there are whole logits where chunks were due.
    """
    vocabulary = getattr(getattr(student, "config", None), "vocab_size", 0)
    size = chunk_size(asked, tokens, vocabulary)
    if not size:
        return None
    if not all(is_transformers_model(m) for m in (student, teacher) if m is not None):
        reason: str | None = "the models are none of transformers"
    else:
        chunks = Chunks(Tail(student, autocast), None if teacher is None else Tail(teacher), size)
        reason = _obstacle(chunks, ids)
        if reason is None:
            return chunks
    note(f"the loss reads whole logits, as {reason}: it takes more memory")
    return None
