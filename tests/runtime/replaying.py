"""A model whose steps are replayed, with something on the CPU in the place of CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qatc
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.forward import runtime_of

IDS = torch.randint(2, 112, (3, 40), generator=torch.Generator().manual_seed(3))


class Again:
    """Takes a recorded step anew when it is replayed, into the memory that it gave at first."""

    def __init__(self) -> None:
        self.steps = 0

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        result = step()
        self.steps += 1

        def replay() -> Tensor:
            with torch.no_grad():
                return result.copy_(step())

        return replay


def graphed_and_plain(directory: Path) -> tuple[Any, GraphedForward, Any]:
    """A model whose steps are replayed, what replays them, and the same model without that."""
    model: Any = qatc.load(directory, dtype=torch.float32, compile=False, decode_program=False)
    plain = copy.copy(model)  # of the very same modules
    forward = GraphedForward(model, runtime_of(model), Again())
    model.forward, runtime_of(model).decode = forward, forward
    return model, forward, plain


@torch.no_grad()
def steps(model: Any, ids: Tensor, prompt: int, cache: Any = None, **options: Any) -> Tensor:
    """The logits of the tokens behind a prompt, one after the other."""
    out = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    found = []
    for new in ids[:, prompt:].split(1, 1):
        out = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True, **options)
        found.append(out.logits)
    return torch.cat(found, 1)
