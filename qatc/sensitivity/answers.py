"""What a model answers to some rows, kept to see how far a change takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


def probe_rows(length: int) -> int:
    """How many rows of this length have about :data:`PROBE_TOKENS` tokens; at least one."""
    return max(1, PROBE_TOKENS // length)


class Answers:
    """What a model, as it was when this was made, expects after every token of some rows.

    Args:
        model: a transformers causal LM whose layers run in float.
        rows: text.
        batch_size: rows at a time.

    Raises:
        DataError: there is no row.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Rows, batch_size: int) -> None:
        self._model = model
        self._layers = [layer for _, layer in find_regions(model)]
        self._batches: list[tuple[Tensor, Tensor, Tensor, list[Any]]] = []
        for ids, real in batches(model, rows, batch_size):
            outputs: list[Any] = []
            with ExitStack() as hooks:
                for layer in self._layers:
                    hook = layer.register_forward_hook(partial(_note, outputs))
                    hooks.callback(hook.remove)
                scores = self._scores(ids, real)
            self._batches.append((ids, real, scores, outputs))

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return sum(len(scores) for _, _, scores, _ in self._batches)

    @torch.no_grad()
    def divergence(self, first: int = 0) -> float:
        """How far the model is from what it was, if no layer before number ``first`` has changed.

        Those are not computed again: they give what they gave.

        Returns:
            KL(as it was || as it is), nats per token, over all real tokens.
        """
        total = 0.0
        for ids, real, before, outputs in self._batches:
            with _giving(self._layers[:first], outputs[:first]):
                after = self._scores(ids, real)
            # Term by term, and not as a difference of two entropies, beside which it is small.
            total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        return total / self.tokens

    def _scores(self, ids: Tensor, real: Tensor) -> Tensor:
        """Log-probabilities ``[n, V]`` of the real tokens."""
        logits = self._model(input_ids=ids, use_cache=False).logits
        scores: Tensor = logits[real].float().log_softmax(-1)
        return scores


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
