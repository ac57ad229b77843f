"""A program of small steps in C, with its buffers planned: how one token is decoded in one call.

:class:`Steps` takes the steps one after another, with the values that they read and write;
:meth:`Steps.finish` finds places in memory for those and makes a :class:`Program`, which runs all
steps in one call of ``csrc/program.c``, by a team of threads. Small steps are run by every thread
for itself; products and attention are shared out, and a barrier is put before the first step that
reads what they wrote.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from qatc.machine import toolchain

LIBRARY = toolchain.Library(
    ("program.c", "packed.c"), {"qatc_run_program": "ppp nnn i", "qatc_is_parallel": ""}
)
"""The functions of ``csrc/program.c``."""

ALIGNMENT = 64
PADDING = 512
"""Zeros behind the codes of a quantized value, which products may read."""


class Op(IntEnum):
    """What a step does; ``enum op`` in C."""

    BARRIER = 0
    LOAD = 1
    UNARY = 2
    BINARY = 3
    MEAN = 4
    LAYER_NORM = 5
    EMBED = 6
    EMBED_PACKED = 7
    TO_FLOAT = 8
    QUANTIZE = 9
    PRODUCT = 10
    LINEAR = 11
    ATTEND = 12
    MERGE = 13
    STORE = 14
    HADAMARD = 15


SHARED_OUT = (Op.PRODUCT, Op.LINEAR, Op.ATTEND)
"""Steps of which every thread does a part, for all to read."""

UNARY = (
    "copy", "neg", "silu", "gelu", "gelu_tanh", "rsqrt", "sqrt", "tanh", "relu", "exp", "sigmoid",
    "cos", "sin", "square",
)  # fmt: skip
"""``enum unary`` in C."""

BINARY = ("add", "sub", "mul", "div")
"""``enum binary`` in C."""

_ABSOLUTE, _PRIVATE, _SHARED, _CALL = range(4)
_LAYOUT = struct.Struct("<18qd")


@dataclass(eq=False)
class Buffer:
    """Memory that one step writes and later ones read.

    Attributes:
        size: bytes.
        shared: whether all threads see the same one, or each has its own.
        last: the number of the last step that reads it.
        offset: where it lies, once that is planned.
    """

    size: int
    shared: bool
    last: int = -1
    offset: int = -1


@dataclass(frozen=True)
class Place:
    """An address: ``offset`` bytes into a buffer, a pointer, or a pointer that a call brings."""

    kind: int
    offset: int
    buffer: Buffer | None = None

    def encode(self) -> int:
        base = 0 if self.buffer is None else self.buffer.offset
        return (base + self.offset) * 8 + self.kind


def per_call(number: int) -> Place:
    """The pointer of this number among those that a call brings."""
    return Place(_CALL, number)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of :data:`LIBRARY`, built for this processor; None where that fails."""
    return LIBRARY.load()


def obstacle() -> str | None:
    """Why no program runs on this machine, or None."""
    if not toolchain.compilers():
        return "there is no C compiler here"
    if library() is None:
        return f"the C compiler here cannot build it ({LIBRARY.failure})"
    return None


@dataclass
class Steps:
    """Steps in order, before they have places in memory.

    Attributes:
        threads: the largest team that is to run them.
    """

    threads: int
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _buffers: list[tuple[int, Buffer]] = field(default_factory=list)
    _unseen: set[int] = field(default_factory=set)
    _held: list[Tensor] = field(default_factory=list)

    def buffer(self, size: int, shared: bool = False) -> Place:
        """Memory for the result of the next step."""
        made = Buffer(size, shared)
        self._buffers.append((len(self._steps), made))
        return Place(_SHARED if shared else _PRIVATE, 0, made)

    def tensor(self, tensor: Tensor) -> Place:
        """A tensor of the model, which stays where it is."""
        assert tensor.is_contiguous()
        self._held.append(tensor)
        return Place(_ABSOLUTE, tensor.data_ptr())

    def emit(self, op: Op, out: Place | None = None, **fields: Any) -> None:
        """Add a step; fields are those of ``step`` in C, addresses among them a :class:`Place`."""
        read = [value.buffer for value in fields.values() if isinstance(value, Place)]
        if any(id(buffer) in self._unseen for buffer in read):
            self._steps.append({"op": Op.BARRIER})
            self._unseen.clear()
        for buffer in read:
            if buffer is not None:
                buffer.last = len(self._steps)
        if out is not None:
            if out.buffer is not None:
                out.buffer.last = max(out.buffer.last, len(self._steps))
                if out.buffer.shared:
                    self._unseen.add(id(out.buffer))
            fields["out"] = out
        self._steps.append({"op": op, **fields})

    def finish(self) -> Program:
        """The program, with every buffer in its place."""
        sizes = self._place()
        encoded = b"".join(_encode(step) for step in self._steps)
        return Program(encoded, len(self._steps), *sizes, self.threads, tuple(self._held))

    def _place(self) -> tuple[int, int]:
        """Give buffers places, those of the dead among them; bytes shared, and of each thread.

        Private memory is free again after its last reader. Shared memory is free again after the
        barrier behind its last reader: until then another thread may still be reading.
        """
        barriers = [i for i, step in enumerate(self._steps) if step["op"] is Op.BARRIER]
        ends = []
        for shared in (True, False):
            arena = _Arena()
            living: list[tuple[int, Buffer]] = []
            for born, buffer in self._buffers:
                if buffer.shared is not shared:
                    continue
                for free, dead in list(living):
                    if free < born:
                        arena.release(dead)
                        living.remove((free, dead))
                arena.place(buffer)
                free = buffer.last
                if shared:
                    free = next((b for b in barriers if b > buffer.last), len(self._steps))
                living.append((free, buffer))
            ends.append(arena.end)
        return ends[0], ends[1]


class _Arena:
    """Memory that buffers share, one after another."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []

    def place(self, buffer: Buffer) -> None:
        size = _aligned(buffer.size)
        fitting = [gap for gap in self._free if gap[1] >= size]
        if fitting:
            start, room = min(fitting, key=lambda gap: gap[1])
            self._free.remove((start, room))
            if room > size:
                self._free.append((start + size, room - size))
        else:
            start, self.end = self.end, self.end + size
        buffer.offset = start

    def release(self, buffer: Buffer) -> None:
        start, size = buffer.offset, _aligned(buffer.size)
        for gap in sorted(self._free):
            if gap[0] + gap[1] == start:
                self._free.remove(gap)
                start, size = gap[0], gap[1] + size
            elif start + size == gap[0]:
                self._free.remove(gap)
                size += gap[1]
        self._free.append((start, size))


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


_ADDRESSES = ("out", "a", "b", "c", "d")
_NUMBERS = ("rows", "cols", "a_row", "a_col", "b_row", "b_col", "i0", "i1", "i2", "i3")


def _encode(step: dict[str, Any]) -> bytes:
    assert step.keys() <= {"op", "kind", "rounds", "f0", *_ADDRESSES, *_NUMBERS}
    addresses = [step[name].encode() if step.get(name) is not None else 0 for name in _ADDRESSES]
    return _LAYOUT.pack(
        int(step["op"]),
        int(step.get("kind", 0)),
        int(step.get("rounds", 0)),
        *addresses,
        *(int(step.get(name, 0)) for name in _NUMBERS),
        float(step.get("f0", 0)),
    )


class Program:
    """Steps that run in one call; several threads may call it at once."""

    def __init__(
        self,
        encoded: bytes,
        count: int,
        shared: int,
        own: int,
        threads: int,
        held: tuple[Tensor, ...],
    ) -> None:
        self.count, self.threads = count, threads
        self._steps, self._shared, self._own, self._held = encoded, shared, _aligned(own), held
        self._pointer = ctypes.cast(ctypes.c_char_p(encoded), ctypes.c_void_p)
        self._scratch = threading.local()

    def __call__(self, pointers: Sequence[int]) -> None:
        """Run all steps.

        Args:
            pointers: addresses of what belongs to this call, as the steps number them.
        """
        loaded = library()
        assert loaded is not None, "checked by obstacle()"
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        scratch = self._memory()
        threads = min(torch.get_num_threads(), self.threads)
        loaded.qatc_run_program(
            self._pointer, scratch, array, self.count, self._shared, self._own, threads
        )

    def _memory(self) -> int:
        """The scratch memory of the calling thread."""
        held: tuple[int, Tensor] | None = getattr(self._scratch, "held", None)
        if held is None:
            size = self._shared + self.threads * self._own + ALIGNMENT
            memory = torch.zeros(size, dtype=torch.uint8)
            address = memory.data_ptr() + -memory.data_ptr() % ALIGNMENT
            held = self._scratch.held = (address, memory)
        return held[0]
