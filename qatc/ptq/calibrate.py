"""Calibration: what the linears of a model read when it runs over rows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.errors import ConfigError, DataError
from qatc.ptq.structure import Layer

See = Callable[[Tensor], None]
"""Takes the input of a linear, ``[n, K]``, a row for every token that is no padding."""


def batches(model: nn.Module, rows: Rows, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids int64 ``[B, T]`` and which of them are real, on the model's device.

    Raises:
        DataError: there is no row.
    """
    if not len(rows):
        raise DataError("there are no rows to calibrate on; give at least one")
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = torch.from_numpy(batch.tokens).to(device, torch.long)
        yield ids, torch.from_numpy(batch.real).to(device)


@torch.no_grad()
def observe(
    model: Any, rows: Rows, sites: Sequence[tuple[nn.Module, See]], batch_size: int
) -> None:
    """Run the model over ``rows`` and show what the modules of ``sites`` read."""
    for ids, real in batches(model, rows, batch_size):
        with ExitStack() as hooks:
            for module, see in sites:
                hooks.enter_context(_watched(module, real, see))
            model.base_model(input_ids=ids, use_cache=False)


class LayerByLayer:
    """Runs decoder layers one after the other over the same rows, so that one may change between.

    Args:
        model: a transformers causal LM.
        layers: its decoder layers, in order.
        rows: text.
        batch_size: rows at a time.

    Raises:
        ConfigError: a layer does not read what the one before it gives.
    """

    def __init__(self, model: Any, layers: Sequence[Layer], rows: Rows, batch_size: int) -> None:
        self._layers = layers
        self._hidden: list[Tensor] = []
        self._real: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in layers]
        for ids, real in batches(model, rows, batch_size):
            self._real.append(real)
            self._note_calls(model, ids)

    @torch.no_grad()
    def observe(self, number: int, sites: Sequence[tuple[nn.Module, See]]) -> None:
        """Show what modules of layer ``number`` read, with all layers before it as they are."""
        for batch, real in enumerate(self._real):
            with ExitStack() as hooks:
                for module, see in sites:
                    hooks.enter_context(_watched(module, real, see))
                self._run(number, batch)

    @torch.no_grad()
    def advance(self, number: int) -> None:
        """Go on behind layer ``number``, as it is now."""
        self._hidden = [self._run(number, batch) for batch in range(len(self._real))]
        self._calls[number] = []

    def _run(self, number: int, batch: int) -> Tensor:
        args, kwargs = self._calls[number][batch]
        return _first(self._layers[number].module(self._hidden[batch], *args, **kwargs))

    def _note_calls(self, model: Any, ids: Tensor) -> None:
        """Keep the arguments of every layer but for the hidden states, which one kept serves."""
        given: list[Tensor] = []

        def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {**kwargs}
            hidden = args[0] if args else named.pop("hidden_states")
            if given and hidden is not given[-1]:
                raise ConfigError(
                    f"{self._layers[number].name} reads something else than what the layer before"
                    " it gives, so that layers cannot be quantized one after the other by gptq;"
                    " choose the method rtn, smoothquant or qat"
                )
            if not given:
                self._hidden.append(hidden)
            self._calls[number].append((args[1:], named))

        def after(output: Any) -> None:
            given[:] = [_first(output)]

        with ExitStack() as hooks, torch.no_grad():
            for number, layer in enumerate(self._layers):
                first = layer.module.register_forward_pre_hook(
                    lambda _, args, kwargs, number=number: before(number, args, kwargs),
                    with_kwargs=True,
                )
                second = layer.module.register_forward_hook(lambda _, args, output: after(output))
                hooks.callback(first.remove)
                hooks.callback(second.remove)
            model.base_model(input_ids=ids, use_cache=False)


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _watched(module: nn.Module, real: Tensor, see: See) -> ExitStack:
    """A context in which ``see`` gets the real tokens of what ``module`` reads."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0].reshape(-1, args[0].shape[-1])[real.flatten()])

    context = ExitStack()
    context.callback(module.register_forward_pre_hook(hook).remove)
    return context
