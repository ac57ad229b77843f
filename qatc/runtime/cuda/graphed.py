"""One token of every row in one launch: a loaded model's decoding step as a CUDA graph.

On a GPU a decoding step computes little and launches hundreds of kernels, each after Python for its
layer: the processor is what takes the time. :class:`GraphedForward` stands in for the forward of a
loaded model. For a call that is one new token of every row behind a packed cache it copies the
tokens and their positions to fixed places and replays the step, recorded once for each number of
slots read (:func:`qatc.runtime.cuda.arena.bucket`). All other calls go to the model's own forward.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qatc.graph.watch import Watch
from qatc.runtime.cache import PackedLayer, packed_layer
from qatc.runtime.cuda.arena import Arena, bucket
from qatc.runtime.cuda.recorder import CudaRecorder, Recorder
from qatc.runtime.decode_program import DecodeForward, tokens_behind
from qatc.runtime.forward import Runtime, runtime_of

ARENAS = 2
"""Caches that are decoded in turn without being recorded again."""

FUTILE = 16
"""Recordings after which there must have been more replays than recordings."""

PAUSE = 1000
"""Calls after which what may have passed, as a lack of memory, is tried again."""

SAME = 0.1
"""How far a replayed step may be from the model's own: the norm of the difference, relative to that
of the logits. It sums other slots in another order, and a code on a rounding tie may fall the other
way. What it must not do is to compute something else."""

UNMOVED = 0.02
"""How far it may be from itself where its cache claims to hold more: it does the very same."""


class GraphedForward(DecodeForward):
    """The forward of a model on a GPU: a replayed step for new tokens, else the model's own.

    Args:
        model: a model of :func:`qatc.load`.
        runtime: its own.
        recorder: records the steps; ``None`` for CUDA graphs on the device of its parameters.

    Attributes:
        reason: why steps are not replayed, for good or for some calls; None where they are. Said
            as a ``RuntimeWarning``, too.
        recorded: how many steps have been recorded.
        replayed: how many times one was replayed.
    """

    def __init__(self, model: Any, runtime: Runtime, recorder: Recorder | None = None) -> None:
        super().__init__(model, runtime)
        self._recorder = recorder or CudaRecorder(next(model.parameters()).device)
        self._arenas: list[Arena] = []
        self._watch: Watch | None = None
        self.recorded = self.replayed = 0
        self._before = 0, 0  # both, when the last pause ended
        self._pause: int | None = None  # calls that are left of it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._pause is not None:
            self._go_on_later()
        step = None if self.reason is not None else _step_of(self, args, kwargs)
        if step is not None:
            with self._recorder.turn():
                output = self._step(step, args, kwargs)
            if output is not None:
                return output
        return self._own(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        return GraphedForward(memo.get(id(self.model), self.model), self.runtime, self._recorder)

    def program(self) -> None:
        """None: a program is C for a CPU."""

    def describe(self) -> str:
        """What runs a decoding step, in words."""
        if self.reason is not None:
            return f"the layers' graphs, one after another (no CUDA graph: {self.reason})"
        return "a CUDA graph of all layers, one launch a token, recorded when it is first needed"

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    def _step(self, step: _Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a call, or None if it is to be the model's own."""
        if not self._is_what_was_recorded():
            return None
        numbers = range(len(self.runtime.forwards))
        layers = [packed_layer(step.cache, number) for number in numbers]
        held = layers[0].length
        slots = bucket(held + 1)
        try:
            arena = self._arena(layers, slots)
        except torch.OutOfMemoryError as error:
            return self._give_up(_line(error), None, PAUSE)
        kind = slots, 1 if step.positions is None else len(step.positions)
        if kind not in arena.graphs:
            return self._record(step, arena, kind, self._own(*args, **kwargs))
        arena.fill(step.ids, step.positions, held)
        logits = arena.graphs[kind]().clone()
        self.replayed += 1
        for layer in layers:
            layer.advance(1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=step.cache)

    def _arena(self, layers: list[PackedLayer], slots: int) -> Arena:
        """The arena that holds these layers' tensors; they are moved to one if none does."""
        batch = layers[0].tensors[0].shape[0]
        own = next((arena for arena in self._arenas if arena.holds(layers)), None)
        if own is not None:
            self._arenas.remove(own)
            if own.capacity >= slots:
                self._arenas.append(own)  # the last to be given up
                return own
        for arena in self._arenas:
            if arena.is_free() and arena.batch == batch and arena.capacity >= slots:
                arena.take(layers)
                return arena
        device = layers[0].tensors[0].device
        with torch.inference_mode(False):
            for layer, forward in zip(layers, self.runtime.forwards, strict=True):
                template = self.runtime.cached.of(forward)[0]  # all of a layer know its cache
                layer.reserve(template, batch, slots, device)
        arena = Arena(layers)
        self._arenas = [*self._arenas[1 - ARENAS :], arena]
        return arena

    def _record(self, step: _Step, arena: Arena, kind: tuple[int, int], output: Any) -> Any:
        """Record a step that the model itself has just taken, and compare; its own output."""
        (slots, rows), model = kind, self.model
        cache = arena.cache(slots)

        def taken() -> Tensor:
            logits: Tensor = self._own(
                input_ids=arena.ids, position_ids=arena.positions[rows],
                past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
            return logits

        recorded, replayed = self.recorded - self._before[0], self.replayed - self._before[1]
        if recorded >= FUTILE and recorded > replayed:
            reason = "caches change more often than steps are replayed"
            return self._give_up(reason, output, PAUSE)
        held = packed_layer(step.cache, 0).length - 1
        fixed: list[Any] = cache.layers
        arena.fill(step.ids, step.positions, held)
        try:
            with torch.inference_mode(False), torch.no_grad(), arena.untouched(held):
                for layer in fixed:
                    layer.length = 1
                claimed_less = taken()
                for layer in fixed:
                    layer.length = slots
                # What runs while it is recorded and not when it is replayed must show: it gets
                # other tokens, and what it gave is overwritten.
                arena.ids.copy_(step.ids == 0)
                replay = self._recorder.record(taken)
                replay().fill_(math.nan)
                arena.ids.copy_(step.ids)
                logits = replay()
        except Exception as error:  # whatever keeps it from being recorded, is why it is not
            reason = f"recording {type(model).__name__} failed: {_line(error)}"
            return self._give_up(reason, output, PAUSE if _is_for_memory(error) else None)
        same = _agree(logits, output.logits, SAME)
        if not same and _agree(claimed_less, output.logits, SAME):
            return self._give_up("what was recorded computes something else", output)
        if not same or not _agree(logits, claimed_less, UNMOVED):
            return self._give_up(f"{type(model).__name__} asks its cache where a token is", output)
        self.recorded += 1
        arena.graphs[kind] = replay
        return output

    def _give_up(self, reason: str, output: Any, calls: int | None = None) -> Any:
        """Replay nothing for so many calls, or for good."""
        self._arenas, self._pause = [], calls
        later = "" if calls is None else f", tried again after {calls:,} calls"
        self.reason = reason + later
        warnings.warn(f"decoding steps are not replayed: {self.reason}", RuntimeWarning, 2)
        return output

    def _go_on_later(self) -> None:
        self._pause = (self._pause or 0) - 1
        if self._pause <= 0:
            self._before = self.recorded, self.replayed
            self.reason = self._pause = None

    def _is_what_was_recorded(self) -> bool:
        """Whether nobody listens inside the model; steps over other tensors are dropped."""
        if self._watch is None or not self._watch.unchanged():
            self._watch, self._arenas = Watch(self.model), []
        return not self._watch.overheard()


def why_not_replayed(model: Any) -> str | None:
    """Why a loaded model's steps are not replayed on a GPU; None where they are, and on a CPU."""
    decode = runtime_of(model).decode
    return decode.reason if isinstance(decode, GraphedForward) else None


@dataclass(frozen=True)
class _Step:
    ids: Tensor
    positions: Tensor | None
    cache: Cache


def _step_of(decode: GraphedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | None:
    """The step that a call asks for, if it is one token of every row behind what a cache holds.

    Rows have one length and nothing is hidden from them. A mask is looked at, for which the
    processor waits; whoever leaves it out, does not wait.
    """
    found = tokens_behind(decode, args, kwargs)
    if found is None:
        return None
    ids, cache = found
    layers: list[Any] = cache.layers
    held, rows = layers[0].length, ids.shape[0]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    alike = all(layer.length == held and not layer.forgotten for layer in layers)
    if not alike or any(layer.window is not None and held >= layer.window for layer in layers):
        return None
    if positions is not None and positions.shape not in ((rows, 1), (1, 1)):
        return None
    if mask is not None and (mask.shape != (rows, held + 1) or not bool(mask.all())):
        return None
    return _Step(ids, positions, cache)


def _line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _is_for_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory is behind an error: what ends a recording may hide it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _agree(logits: Tensor, wanted: Tensor, limit: float) -> bool:
    """Whether two results of one step differ by no more than a part of their size."""
    if logits.shape != wanted.shape or logits.dtype is not wanted.dtype:
        return False
    difference, size = (logits.float() - wanted.float()).norm(), wanted.float().norm()
    same: Tensor = torch.where(size.isfinite(), difference <= limit * size, ~difference.isfinite())
    return bool(same)
