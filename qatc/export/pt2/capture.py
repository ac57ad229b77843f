"""A whole model on integers as one graph: tokens, positions and a cache in, logits out.

What is captured is the model of :func:`qatc.load`, with the graphs of its layers as they are
lowered, so that the numbers are those of qatc. Around them stands transformers' own code: the
embedding, the rotary factors, the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qatc.export.base import context_of, refuse_windows
from qatc.export.programs import capture
from qatc.export.pt2.portable import PlainInterpreter, use_torch_alone
from qatc.export.pt2.tidy import tidy
from qatc.graph.capture import Template
from qatc.output import Output
from qatc.runtime.cache import SLOTS, cache_tensors
from qatc.runtime.forward import LoweredForward, runtime_of, take_out
from qatc.runtime.model import load

PHASES = {"prefill": 8, "decode": 1}
"""The programs of a model, and the tokens of their examples."""


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a KV cache: ``[1, heads, slots, width]``."""

    heads: int
    width: int
    dtype: torch.dtype

    def empty(self, slots: int) -> Tensor:
        """It with room for so many tokens."""
        return torch.zeros((1, self.heads, slots, self.width), dtype=self.dtype)


class Steps:
    """The steps of an output as programs of torch.

    Args:
        output: opened.
        to_compile: spell products as Inductor makes them fast.

    Attributes:
        cache: the tensors of the cache, layer after layer.
        same: tensors that are another as well, and that other, by their names.
        dtype: of what is not quantized.

    Raises:
        ConfigError: layers have a sliding window, or operators that torch has not.
    """

    def __init__(self, output: Output, *, to_compile: bool = False) -> None:
        refuse_windows(output, "torch", context_of(output))
        model = load(output, compile=False, decode_program=False, kernels="qatc")
        runtime = runtime_of(model)
        self.dtype = runtime.dtype
        templates = [runtime.cached.of(forward)[0] for forward in runtime.forwards]
        shapes = [_cache_of(template) for template in templates]
        self.cache = [tensor for of_layer in shapes for tensor in of_layer]
        inputs, first = _Inputs(to_compile), 0
        for forward, template, of_layer in zip(runtime.forwards, templates, shapes, strict=True):
            mine = slice(first, first := first + len(of_layer))
            forward.module.forward = _Layer(forward, template, inputs, mine)
        for end in runtime.ends:
            end.module.forward = _Layer(end, end.store.of(end)[0], inputs)
        for module in model.modules():  # shared codes are a part of the state, stored once
            module._non_persistent_buffers_set.clear()
        self.same = _same(model.state_dict())
        self._step = _Step(model, inputs)

    def program(self, phase: str) -> ExportedProgram:
        """A step as a program ``(ids, positions, cache) -> logits``.

        ``ids`` and ``positions`` are int64 ``[1, T]``, with T 1 for ``decode`` and at least 2 for
        ``prefill``; ``cache`` is a list of tensors as :attr:`cache` says, of any number of slots,
        changed in place; ``logits`` ``[1, V]`` are those behind the last token.

        Raises:
            CaptureError: torch cannot export the model.
            ConfigError: an operator has no counterpart in torch.
        """
        count = PHASES[phase]
        ids, cache = torch.zeros((1, count), dtype=torch.long), [c.empty(SLOTS) for c in self.cache]
        tokens = {1: Dim("tokens", min=2)} if count > 1 else {}
        slots = {2: Dim("slots", min=2)}
        shapes = (tokens, tokens, [slots] * len(cache))
        example = (ids, torch.arange(count)[None], cache)
        exported = capture(self._step, example, shapes)
        use_torch_alone(exported)
        tidy(exported)
        return exported


def _same(state: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    found = {name: first.setdefault(own.data_ptr(), name) for name, own in state.items()}
    return {name: other for name, other in found.items() if name != other}


def _cache_of(template: Template) -> list[CacheTensor]:
    return [CacheTensor(*sizes, dtype) for sizes, dtype in cache_tensors(template)]


@dataclass
class _Inputs:
    """What the layers read besides their arguments, while the model is captured."""

    to_compile: bool
    positions: Tensor = field(init=False)
    cache: list[Tensor] = field(init=False)


class _Step(nn.Module):
    """A model as a function of tokens, their positions and its cache."""

    def __init__(self, model: Any, inputs: _Inputs) -> None:
        super().__init__()
        self.model, self._inputs = model, inputs

    def forward(self, ids: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        self._inputs.positions, self._inputs.cache = positions, cache
        result = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        logits: Tensor = result.logits[:, -1]
        return logits


class _Layer:
    """The forward of a layer while the model is captured: its graph, on its part of the cache.

    An end of the model is one without a cache.
    """

    def __init__(
        self,
        forward: LoweredForward,
        template: Template,
        inputs: _Inputs,
        mine: slice | None = None,
    ) -> None:
        self._forward, self._template, self._inputs = forward, template, inputs
        self._mine = mine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, _, _ = take_out(args, kwargs)
        leaves, _ = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        template, inputs = self._template, self._inputs
        given = [*self._forward.parameters(template), *(leaves[i] for i in template.inputs)]
        if self._mine is not None:
            given += [*inputs.cache[self._mine], inputs.positions]
        plain = PlainInterpreter(template.graph_module, to_compile=inputs.to_compile)
        outputs = plain.run(*given)
        return pytree.tree_unflatten(list(outputs), template.out_spec)
