"""Find out whether the code of a module reads an argument that is no tensor.

Such an argument is a constant of the captured graph. Where it is only handed on, as what trainers
give to a whole model is, any other value gives the same graph. A stand-in tells: it can be passed
around, and notes whatever else is done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_watched(leaf: Any) -> bool:
    """Whether a :class:`Probe` finds out if an argument is read, so that it may change if not.

    That cannot be found out for tensors, which are inputs, nor for ``None`` and booleans, which
    code tells by ``is``.
    """
    constant = leaf is None or isinstance(leaf, (bool, torch.dtype, torch.device))
    return not (constant or isinstance(leaf, Tensor))


class _Read(Exception):
    """A stand-in for an argument was looked at."""


class Probe:
    """Stands for an argument while a module is captured, and notes if it is looked at.

    It may be handed on, but whatever else is done with it, by an operator, a function or an
    attribute (``__class__``, which ``isinstance`` reads, among them), fails.
    """

    __slots__ = ("_touch",)

    def __init__(self, position: int, touched: set[int]) -> None:
        object.__setattr__(self, "_touch", lambda: touched.add(position))

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "_touch")()
        raise _Read(name)


def _forbid(name: str) -> Callable[..., Any]:
    def touch(probe: Probe, *_: Any) -> Any:
        object.__getattribute__(probe, "_touch")()
        raise _Read(name)

    return touch


_KEPT = (
    *("__new__", "__init__", "__del__", "__class__", "__doc__", "__slots__", "__getattribute__"),
    *("__init_subclass__", "__subclasshook__", "__class_getitem__", "__setattr__", "__delattr__"),
)
_OPERATORS = {*dir(int), *dir(float), *dir(str), *dir(dict), "__iter__", "__call__", "__index__"}
for _name in sorted(_OPERATORS.difference(_KEPT)):
    if _name.startswith("__"):  # Python looks these up on the class
        setattr(Probe, _name, _forbid(_name))
