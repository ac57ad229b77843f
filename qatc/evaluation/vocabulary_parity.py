"""The part of the parity gate about the output head and the token embedding, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qatc.models.preparation import prepared_state
from qatc.runtime.forward import runtime_of


@torch.no_grad()
def compare_ends(reference: Any, lowered: Any, ids: Tensor) -> Iterator[tuple[str, float]]:
    """Compare the quantized head and embedding of a lowered model with the trained ones.

    Args:
        reference: the prepared model.
        lowered: the model that runs on integers.
        ids: int64 ``[B, T]``: text; what the trained head and embedding are called with goes into
            both.

    Yields:
        Where, and the largest difference between the outputs, relative to the largest output: of a
        whole text, and of a single token.
    """
    calls: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    forwards = [forward for _, forward in prepared_state(reference).ends]
    hooks = [f.module.register_forward_pre_hook(note(f.name), with_kwargs=True) for f in forwards]
    reference(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    own = {forward.name: forward for forward in runtime_of(lowered).ends}
    for forward in forwards:
        given = calls[forward.name]
        for title, part in (("prefill", given), ("decode", given[:, :1])):
            wanted, got = forward(part), own[forward.name](part)
            largest = max(float(wanted.abs().max()), 1e-30)
            figure = float((got - wanted).abs().max()) / largest
            yield f"{forward.name} ({title})", figure if math.isfinite(figure) else math.inf
