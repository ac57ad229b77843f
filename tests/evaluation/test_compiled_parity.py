"""Compiled layers compute what uncompiled ones do, up to codes that lie on a rounding tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qatc
from qatc.evaluation.forced import distance
from qatc.evaluation.traces import entered
from qatc.models.preparation import can_compile
from qatc.recipe.recipe import Recipe
from qatc.runtime.forward import runtime_of
from tests.conftest import make_output

CHUNKS = [24] + [1] * 8


@torch.no_grad()
def run(model: Any, ids: Tensor, given: list[Tensor]) -> tuple[list[Tensor], Any]:
    """What every layer returns in every call, and the cache.

    Layers are called with ``given``, in order, or, if that is empty, fill it.
    """
    forwards, outs, known = runtime_of(model).forwards, [], list(given)

    def enter(number: int, hidden: Tensor) -> Tensor:
        if known:
            return known.pop(0)
        given.append(hidden)
        return hidden

    def leave(module: Any, args: Any, out: Any) -> None:
        outs.append(out if isinstance(out, Tensor) else out[0])

    hooks = [forward.module.register_forward_hook(leave) for forward in forwards]
    cache, start = None, 0
    with entered(forwards, enter):
        for size in CHUNKS:
            now = ids[:, start : start + size]
            cache = model(input_ids=now, past_key_values=cache, use_cache=True).past_key_values
            start += size
    for hook in hooks:
        hook.remove()
    return outs, cache


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_layers_on_the_same_inputs(tmp_path: Path) -> None:
    """Fused sums differ in their last bits, and so one code in some 100,000 falls the other way.

    That moves the tokens that it reaches. Any other rule for scales or codes would move them all.
    """
    recipe = Recipe.from_bits("4-8-4")
    output = make_output(tmp_path / "o", recipe)
    ids = torch.randint(112, (8, sum(CHUNKS)), generator=torch.Generator().manual_seed(0))
    given: list[Tensor] = []
    wanted, plain = run(qatc.load(output, compile=False), ids, given)
    got, compiled = run(qatc.load(output, compile=True), ids, given)
    assert len(got) == len(wanted) == len(given) == 2 * len(CHUNKS)
    moved = tokens = 0
    for one, other in zip(wanted, got, strict=True):
        far = (one - other).abs().amax(-1) > 1e-5 * one.abs().max()
        moved, tokens = moved + int(far.sum()), tokens + far.numel()
        assert distance(other, one) <= 0.05
    assert moved <= 0.05 * tokens
    codes = others = 0
    for one, other in zip(plain.layers, compiled.layers, strict=True):
        assert one.length == other.length == sum(CHUNKS)
        for mine, theirs in zip(one.tensors, other.tensors, strict=True):
            mine, theirs = mine[:, :, : one.length], theirs[:, :, : one.length]
            if mine.is_floating_point():
                torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=0)
            else:
                codes, others = codes + mine.numel(), others + int((mine != theirs).sum())
    assert others <= 1e-3 * codes
