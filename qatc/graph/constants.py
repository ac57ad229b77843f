"""What Python code may branch on besides tensors, as values that can be compared.

A captured graph has the plain attributes of its module baked in: two modules may share it only if
these are equal, and a module may go on using it only while they stay as they are. Attributes are
compared by value as far as Python lets one look (numbers, strings, containers, functions with what
they close over, the fields of objects) and by identity where it does not. What is compared by
identity is never shared, so that nothing is taken for equal that might not be.

:class:`Constants` reads the attributes of a module tree again only when one has changed: it keeps
what every dictionary and list held, and compares that by identity, which takes microseconds.
"""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import logging
import operator
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qatc.graph.capture import LAYER_NUMBERS

LOOKED_AT = 2_000
"""Objects that are compared by value, at most: what lies beyond them is compared by identity."""

_PLAIN = (
    *(type(None), bool, int, str, bytes, range, type(...), CodeType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has; parameters and buffers are graph inputs, hooks are refused."""

_CHANGING = frozenset({"gradient_checkpointing", "_gradient_checkpointing_func", *LAYER_NUMBERS})
"""Attributes that do not decide a graph, or not alone: see :mod:`qatc.graph.templates`."""

_ORIGIN = "_name_or_path"
"""Of a configuration of transformers: where it was read, which no layer of transformers asks for.
A run reads a model in one place and its own output in another, whose graphs are the same."""

_HEAP_TYPE = 1 << 9
"""The flag of a class that is written in Python, whose instances hold nothing but attributes."""


class Same:
    """Equal to another only if both are of the very same object, unchanged as far as it tells."""

    __slots__ = ("value", "version")

    def __init__(self, value: Any) -> None:
        self.value, self.version = value, _version(value)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Same) and self.value is other.value and self.version == other.version
        )

    def __hash__(self) -> int:
        return hash((id(self.value), self.version))


def _version(value: Any) -> int | None:
    """How often a tensor was changed in place, where it counts that."""
    counts = isinstance(value, Tensor) and not value.is_inference()
    return value._version if counts else None


def plain_class(kind: type) -> type:
    """The class that a module had before ``fully_shard`` put one of its own in front."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it is not loaded to find out
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return next(base for base in kind.__mro__ if not issubclass(base, fsdp.FSDPModule))


def of_sharding(name: str) -> bool:
    """Whether an attribute is one that ``fully_shard`` puts on a module."""
    return name.startswith(("__composable_api", "_is_fsdp", "_fsdp"))


def comparable(value: Any) -> Any:
    """``value`` as something that is hashable, and equal only for what computes the same."""
    return _Reader({}).read(value)


class Constants:
    """The constants of a module tree.

    Args:
        module: its root.
        opaque: classes whose instances are left out: what stands under modules to run graphs.
        forward: returns what to take for the root's own attribute ``forward``.
    """

    def __init__(
        self,
        module: nn.Module,
        opaque: tuple[type, ...] = (),
        forward: Callable[[], Any] = lambda: None,
    ) -> None:
        self.module, self._opaque, self._forward = module, opaque, forward
        self._reader: _Reader | None = None
        self.value: tuple[Any, ...] = ()

    def refresh(self) -> bool:
        """Bring :attr:`value` up to date; whether anything was read again."""
        if self._reader is not None and self._reader.unchanged():
            return False
        named = list(self.module.named_modules())
        reader = _Reader({id(child): path for path, child in named}, self._opaque)
        found: list[Any] = []
        for path, child in named:
            kind = type(child)
            reader.watch(child, kind)
            found.append((path, Same(plain_class(kind)), Same(kind.forward)))
            for name, value in sorted(vars(child).items(), key=operator.itemgetter(0)):
                if name in _OWN or name in _CHANGING or name.startswith("_qatc"):
                    continue
                if of_sharding(name):
                    continue
                if child is self.module and name == "forward":
                    value = self._forward()
                if not isinstance(value, self._opaque):
                    found.append((path, name, reader.read(value)))
        self._reader, self.value = reader, tuple(found)
        return True


class _Reader:
    """Reads values by value, and remembers what it saw to tell whether anything has changed."""

    def __init__(self, paths: dict[int, str], opaque: tuple[type, ...] = ()) -> None:
        self._paths = paths
        self._by_identity = (type, enum.Enum, logging.Logger, *opaque)
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that an id stands for one object only
        self._mappings: list[tuple[dict[Any, Any], list[Any]]] = []
        self._lists: list[tuple[Iterable[Any], list[Any]]] = []
        self._tensors: list[tuple[Tensor, int | None]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._modules: list[tuple[nn.Module, type, Any]] = []
        self._unwatched = False

    def unchanged(self) -> bool:
        """Whether everything that was read holds what it held then."""
        same = operator.is_
        return not (
            self._unwatched
            or any(
                len(mapping) * 2 != len(held)
                or not all(map(same, itertools.chain(mapping, mapping.values()), held))
                for mapping, held in self._mappings
            )
            or any(
                type(module) is not kind or kind.forward is not forward
                for module, kind, forward in self._modules
            )
            or any(
                len(items) != len(held) or not all(map(same, items, held))  # type: ignore[arg-type]
                for items, held in self._lists
            )
            or any(_version(tensor) != version for tensor, version in self._tensors)
            or any(cell.cell_contents is not contents for cell, contents in self._cells)
        )

    def watch(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self._modules.append((module, kind, kind.forward))
        self._watch_mapping(vars(module))
        for tensors in (module._modules, module._parameters, module._buffers):
            if tensors:
                self._watch_mapping(tensors)

    def _watch_mapping(self, mapping: dict[Any, Any]) -> None:
        self._mappings.append((mapping, [*mapping, *mapping.values()]))

    def read(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind is float:
            return float, value.hex()  # tells 0.0 from -0.0, and one nan is like another
        if kind is complex:
            return complex, value.real.hex(), value.imag.hex()
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return "module", self._paths[id(value)]
        if len(self._seen) >= LOOKED_AT or isinstance(value, self._by_identity):
            return Same(value)
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Tensor):
            self._tensors.append((value, _version(value)))
            return Same(value)
        return self._read_parts(value, kind)

    def _read_parts(self, value: Any, kind: type) -> Any:
        """What a composite value is made of."""
        if isinstance(value, FunctionType):
            return self._read_function(value)
        if isinstance(value, MethodType):
            return "method", self.read(value.__func__), self.read(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", *map(self.read, (value.func, value.args, value.keywords))
        if isinstance(value, slice):
            return slice, *map(self.read, (value.start, value.stop, value.step))
        if isinstance(value, weakref.ref):
            self._unwatched = True
            return weakref.ref, Same(value())
        if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
            self._unwatched = True  # nothing tells that an array was written to
            if value.dtype.hasobject:
                return Same(value)
            return "numpy", Same(kind), str(value.dtype), value.shape, value.tobytes()
        base = next((c for c in kind.__mro__ if not c.__flags__ & _HEAP_TYPE), object)
        parts: tuple[Any, ...]
        if base in (int, float, complex, str, bytes):
            parts = (self.read(base(value)),)
        elif isinstance(value, tuple):
            parts = tuple(map(self.read, value))
        elif isinstance(value, (list, collections.deque)):
            self._lists.append((value, list(value)))
            parts = tuple(map(self.read, value))
        elif isinstance(value, dict):
            self._watch_mapping(value)
            parts = tuple((self.read(key), self.read(item)) for key, item in value.items())
        elif isinstance(value, (set, frozenset)):
            self._lists.append((value, list(value)))
            parts = (frozenset(map(self.read, value)),)
        elif isinstance(value, bytearray):
            self._unwatched = True
            parts = (bytes(value),)
        elif base in (object, SimpleNamespace):
            parts = ()
        else:
            return Same(value)  # written in C, which keeps to itself what it holds
        return Same(kind), parts, self._read_attributes(value, kind)

    def _read_attributes(self, value: Any, kind: type) -> Any:
        """The attributes of an instance, in order of their names."""
        slots = [slot for c in kind.__mro__ for slot in _slots(c) if slot not in _NO_SLOTS]
        held = [(slot, getattr(value, slot)) for slot in slots if hasattr(value, slot)]
        self._unwatched |= bool(held)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._watch_mapping(own)
            held += sorted(own.items(), key=operator.itemgetter(0))
        of_transformers = kind.__module__.startswith("transformers.")  # not code of a model's own
        return tuple(
            (name, self.read(item))
            for name, item in held
            if not (of_transformers and name == _ORIGIN)
        )

    def _read_function(self, function: FunctionType) -> Any:
        """Its code and what that refers to, but for the names of its module."""
        for cell in function.__closure__ or ():
            try:
                self._cells.append((cell, cell.cell_contents))
            except ValueError:  # not filled yet
                return Same(function)
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = (function.__defaults__, function.__kwdefaults__, contents, vars(function))
        self._watch_mapping(vars(function))
        return "function", function.__code__, Same(function.__globals__), *map(self.read, parts)


_NO_SLOTS = ("__dict__", "__weakref__")


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
