"""What a model answers to some rows, kept to see how far a change takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.models import find_regions
from qatc.ptq.calibrate import batches

PROBE_TOKENS = 1024
"""Tokens of rows that are looked at where nobody says how many: KL of the very same tokens is
compared, so that few tell parts apart."""


_TOKENS = 64
"""Whose distributions are compared at once."""


def probe_rows(length: int) -> int:
    """How many rows of this length have about :data:`PROBE_TOKENS` tokens; at least one."""
    return max(1, PROBE_TOKENS // length)


class Answers:
    """What a model, as it was when this was made, expects after every token of some rows.

    Args:
        model: a transformers causal LM whose layers run in float.
        rows: text; of conversations whose answers alone count, those count here.
        batch_size: rows at a time.

    Raises:
        DataError: there is no row.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Rows, batch_size: int) -> None:
        self._model = model
        self._layers = [layer for _, layer in find_regions(model)]
        self._batches: list[tuple[Tensor, Tensor, Tensor, list[Any]]] = []
        for number, (ids, _) in enumerate(batches(model, rows, batch_size)):
            part = rows[number * batch_size : (number + 1) * batch_size]
            counted = torch.from_numpy(part.counted).to(ids.device)
            with _noting(self._layers) as outputs:
                scores = self._scores(ids, counted)
            self._batches.append((ids, counted, scores, outputs))

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(len(scores) for _, _, scores, _ in self._batches)

    @torch.no_grad()
    def divergence(self, first: int = 0) -> float:
        """How far the model is from what it was, if no layer before number ``first`` has changed.

        Those are not computed again: they give what they gave.

        Returns:
            KL(as it was || as it is), nats per token, over all tokens that count.
        """
        total = 0.0
        for ids, counted, before, outputs in self._batches:
            with _giving(self._layers[:first], outputs[:first]):
                total += _divergence(before, self._scores(ids, counted))
        return total / self.tokens

    @torch.no_grad()
    def divergence_by_depth(
        self, other: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[float]:
        """How far another model has moved the answers by the end of each of its layers.

        What a layer of the other model gives is read on by the layers behind it, the norm and the
        head of this one.

        Args:
            other: a model of the same layers, such as the same one quantized.
            autocast: makes a context for its forward pass.

        Returns:
            KL(this model || this model behind the other's layers up to one), nats per token, for
            each layer.
        """
        totals = [0.0] * len(self._layers)
        layers = [layer for _, layer in find_regions(other)]
        for ids, counted, before, outputs in self._batches:
            with autocast(), _noting(layers) as theirs:
                there = next(other.parameters()).device
                other.base_model(input_ids=ids.to(there), use_cache=False)
            given = [_like(*pair) for pair in zip(theirs, outputs, strict=True)]
            for end in range(1, len(given) + 1):
                with _giving(self._layers[:end], given[:end]):
                    totals[end - 1] += _divergence(before, self._scores(ids, counted))
        return [total / self.tokens for total in totals]

    def _scores(self, ids: Tensor, counted: Tensor) -> Tensor:
        """Log-probabilities ``[n, V]`` of the tokens that count."""
        logits = self._model(input_ids=ids, use_cache=False).logits
        scores: Tensor = logits[counted].float().log_softmax(-1)
        return scores


def _divergence(before: Tensor, after: Tensor) -> float:
    """KL of log-probabilities ``[n, V]``, summed over the tokens."""
    # Term by term, and not as a difference of two entropies, beside which it is small; some tokens
    # at a time, since each term is as large as all the logits.
    pairs = zip(before.split(_TOKENS), after.split(_TOKENS), strict=True)
    return sum(float((b.exp() * (b - a)).sum(dtype=torch.float64)) for b, a in pairs)


@contextmanager
def _noting(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What layers give in a forward pass, in order."""
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_hook(partial(_note, outputs))
            hooks.callback(hook.remove)
        yield outputs


def _like(output: Any, other: Any) -> Any:
    """An output of a layer with the dtypes of another one's, and where that is."""
    if isinstance(output, Tensor):
        return output.to(other)
    if isinstance(output, tuple):
        return tuple(_like(*pair) for pair in zip(output, other, strict=True))
    return output


@contextmanager
def _giving(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let layers give these outputs, whatever they are called with."""
    own = [vars(layer).get("forward") for layer in layers]
    for layer, output in zip(layers, outputs, strict=True):
        layer.forward = partial(_given, output)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _note(outputs: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs.append(output)


def _given(output: Any, *_: Any, **__: Any) -> Any:
    return output
