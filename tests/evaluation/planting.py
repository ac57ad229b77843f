"""Bugs that the parity gate has to find, and how they are planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatc.kernels import cached_attention, row_attention, table
from qatc.numerics import affine, learned
from qatc.passes import InsertKVCache
from qatc.recipe.spec import QuantSpec


def broken(function: Callable[..., Any], *names: str, **edits: Callable[[Any], Any]) -> Any:
    """``function`` with some of its arguments, or its result, changed."""
    import inspect

    signature = inspect.signature(function)

    def changed(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, edit in edits.items():
            if name != "result":
                bound.arguments[name] = edit(bound.arguments[name])
        result = function(*bound.args, **bound.kwargs)
        return edits["result"](result) if "result" in edits else result

    return changed


class Module:
    """Stands for a module some of whose functions are others."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self._module, self._changes = module, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name) or getattr(self._module, name)


def rounded_scale(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """An activation scale in bf16."""
    codes, scale, zero = affine.quantize_inputs(x, spec)
    return codes, scale.bfloat16().float(), zero


def before_rotation(self: Any, node: Any) -> Any:
    """What K was before the rotary embedding; V is left alone."""
    source = _unquantized(self, node)
    found = [n for n in _backwards(source) if "transpose" in str(n.target)]
    return found[0]


def _backwards(node: Any) -> list[Any]:
    found, queue = [], [node]
    while queue:
        current = queue.pop(0)
        found.append(current)
        queue += current.all_input_nodes
    return found


_unquantized = InsertKVCache._unquantized
_attend, _visible = cached_attention._attend_to_codes, row_attention.visible


def later(visible: Tensor) -> Tensor:
    """One slot more than a query may see."""
    return visible | visible.roll(1, -1)


# Each is looked for in shallow and in deep models by tests/evaluation/test_deep_parity.py.
LOWERED: dict[str, tuple[Any, str, Any, str]] = {
    "bf16 activation scales": (
        table, "affine", Module(affine, quantize_inputs=rounded_scale), "q_proj.weight"
    ),
    "K scale of the wrong head": (
        cached_attention, "_attend_to_codes", broken(_attend, key_scale=lambda t: t.roll(1, 1)),
        "attention .decode",
    ),
    "V scale left out": (
        cached_attention, "_attend_to_codes", broken(_attend, value_scale=torch.ones_like),
        "attention .decode",
    ),
    "K codes read for V": (
        cached_attention, "_attend_to_codes",
        lambda q, kc, ks, vc, vs, visible, **o: _attend(q, kc, ks, kc, vs, visible, **o),
        "attention .decode",
    ),
    "RoPE after the cache instead of before": (
        InsertKVCache, "_unquantized", before_rotation, "key of attention"
    ),
    "mask off by one, which shows a stale slot": (
        row_attention, "visible", broken(_visible, result=later), "attention .prefill"
    ),
    "a query that does not see itself": (
        row_attention, "visible", broken(_visible, result=lambda v: v & v.roll(-1, -1)),
        "attention .prefill",
    ),
    "padding that is not masked": (
        row_attention, "visible", broken(_visible, mask=lambda mask: None),
        "attention .decode with padding",
    ),
    "KV codes of another range": (
        cached_attention, "learned",
        Module(
            learned,
            quantize=broken(learned.quantize, spec=lambda s: QuantSpec(s.bits, None, "full")),
        ),
        "KV cache",
    ),
    "activations of 7 bits": (
        table, "affine",
        Module(affine, quantize_inputs=broken(affine.quantize_inputs, spec=lambda s: QuantSpec(7))),
        "q_proj.weight",
    ),
}  # fmt: skip
