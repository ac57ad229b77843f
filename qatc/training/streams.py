"""What decoder layers read, layer after layer, for a bounded number of rows, in host memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qatc.data.corpus import Rows
from qatc.errors import ConfigError
from qatc.models import find_regions


class Stream:
    """The hidden states between two layers of a model, over some rows of text.

    It begins in front of the first layer; :meth:`advance` takes it behind the next one, in place.

    Args:
        model: a transformers causal LM.
        rows: text, as many rows as batches take.
        batch_size: rows at a time.
        dtype: of the hidden states, that in which the layers compute.
        autocast: makes a context for the model's forward pass.

    Attributes:
        hidden: ``[R, T, D]`` on the CPU.

    Raises:
        ConfigError: a layer reads something else than what the layer before it gives and what is
            the same for all rows.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        rows: Rows,
        batch_size: int,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._layers = find_regions(model)
        self._autocast, self._batch_size = autocast, batch_size
        self._device = next(model.parameters()).device
        parts = [rows.tokens[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        batches = (torch.from_numpy(part).to(self._device, torch.long) for part in parts)
        first = next(batches)
        with autocast():
            self._calls = self._noted(model, first)
            self._require_same(self._noted(model, first.flip(1)))
            start = self._embedded(model, first)
            shape = (len(rows), *start.shape[1:])
            self.hidden = torch.empty(shape, dtype=dtype)
            self.hidden[:batch_size] = start
            for number, ids in enumerate(batches, 1):
                self._batch(number).copy_(self._embedded(model, ids))

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """What layer ``number`` gives for ``hidden [B, T, D]``, a whole batch of rows."""
        args, kwargs = self._calls[number]
        with self._autocast():
            return _first(self._layers[number][1](hidden, *args, **kwargs))

    @torch.no_grad()
    def advance(self, number: int) -> None:
        """Go on behind layer ``number``, as it is now."""
        for batch in range(len(self.hidden) // self._batch_size):
            hidden = self._batch(batch)
            hidden.copy_(self.run(number, hidden.to(self._device)))

    def _batch(self, number: int) -> Tensor:
        return self.hidden[number * self._batch_size : (number + 1) * self._batch_size]

    def _noted(self, model: Any, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every layer but for the hidden states."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        before: list[Tensor] = []

        def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, args, named = _hidden_first(args, kwargs)
            if before and hidden is not before[-1]:
                raise ConfigError(
                    f"{name} reads something else than what the layer before it gives, so that"
                    " layers cannot be trained one after the other; train end to end (--train full)"
                )
            calls.append((args, named))

        def gave(module: nn.Module, args: Any, output: Any) -> None:
            before[:] = [_first(output)]

        with ExitStack() as hooks:
            for name, layer in self._layers:
                pre = layer.register_forward_pre_hook(partial(note, name), with_kwargs=True)
                hooks.callback(pre.remove)
                hooks.callback(layer.register_forward_hook(gave).remove)
            model.base_model(input_ids=ids, use_cache=False)
        return calls

    def _require_same(self, others: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Raise if another text has other arguments."""
        for (name, _), *calls in zip(self._layers, self._calls, others, strict=True):
            mine, other = ([*filter(torch.is_tensor, pytree.tree_leaves(c))] for c in calls)
            if len(mine) != len(other) or not all(map(torch.equal, mine, other)):
                raise ConfigError(
                    f"{name} reads something of the text besides what the layer before it gives,"
                    " so that layers cannot be trained one after the other; train end to end"
                    " (--train full)"
                )

    def _embedded(self, model: Any, ids: Tensor) -> Tensor:
        """What the first layer reads; the layers are not computed."""

        def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(_hidden_first(args, kwargs)[0])

        _, first = self._layers[0]
        hook = first.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
        try:
            model.base_model(input_ids=ids, use_cache=False)
        except _Reached as found:
            return found.hidden
        finally:
            hook.remove()
        raise AssertionError("the model has not called its first layer")


class _Reached(Exception):
    """The first layer has been called."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _hidden_first(args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, tuple[Any, ...], Any]:
    """A layer's call as its hidden states and all else."""
    named = dict(kwargs)
    hidden: Tensor = args[0] if args else named.pop("hidden_states")
    return hidden, args[1:], named


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
