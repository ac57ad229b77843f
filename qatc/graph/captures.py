"""Captured graphs of one piece of work, which its models of one structure share.

A run loads the model several times: the student, the reference that it is held against, and what
runs on integers. Their layers are of one structure, so that capturing one for each of them gives
the same graph, at a third of a second and more. Inside of :func:`shared` a layer of a structure is
captured once, and every model gets a copy of the graph, which its passes may edit.

That holds as long as nobody changes the code that is captured: what a module's class refers to is
not looked at. So captures are shared within one run of qatc only, and not between those of a
process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qatc.graph.capture import Number, Template, capture, serves
from qatc.graph.constants import Same, comparable
from qatc.graph.structure import Structure, refuse_hooks, refuse_rounded_masters

if TYPE_CHECKING:
    from qatc.graph.template_forward import TemplateForward

LARGEST = 64
"""Graphs that are kept: more structures than that, no model has."""


@dataclass
class Known:
    """A template, and which calls of which modules it is known to serve.

    Attributes:
        numbers: the layer numbers that were read while capturing, once for every layer that was
            captured, of one structure, and gave this graph.
        constants: the values of the arguments that were read, by their position.
    """

    template: Template
    numbers: list[dict[Number, Any]]
    constants: dict[int, Any]

    def serves(self, module: nn.Module, leaves: Sequence[Any]) -> bool:
        """Whether a call of ``module``, of the structure that was captured, is one of these."""
        return (
            self.template.fits(leaves)
            and all(comparable(leaves[i]) == value for i, value in self.constants.items())
            and serves(self.numbers, module)
        )


def constants_of(template: Template, leaves: Sequence[Any]) -> dict[int, Any]:
    """The values of the arguments that were read while a template was captured."""
    return {i: comparable(leaves[i]) for i in template.read}


_SHARED: ContextVar[list[tuple[Any, Known]] | None] = ContextVar("captures", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Share captures among all models of the block; one inside of another is one with it."""
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set([])
    try:
        yield
    finally:
        _SHARED.reset(token)


def find(
    owner: TemplateForward,
    structure: Structure,
    dtype: torch.dtype | None,
    call: Any,
    leaves: Sequence[Any],
) -> Template:
    """The graph of a call of a module: a copy of one that is known, or captured.

    Args:
        owner: of the module.
        structure: of the module, as it is now.
        dtype: that graphs compute in, if that is not the parameters' own.
        call: how its arguments are put together, and of what kind they are.
        leaves: its arguments.
    """
    graphs = _SHARED.get()
    key = (structure.constants, structure.tensors, dtype, call)
    for other, known in graphs or ():
        if other == key and known.serves(owner.module, leaves):
            refuse_hooks(owner.module, owner.name)  # as capturing it would
            refuse_rounded_masters(owner.module, owner.name, owner.root)
            return _copied(known.template)
    args, kwargs = pytree.tree_unflatten(list(leaves), call[0])
    template = capture(owner.twin(), args, kwargs, owner.name)
    if graphs is None or not _is_plain(structure.constants):
        return template
    graphs.append((key, Known(template, [template.numbers], constants_of(template, leaves))))
    del graphs[:-LARGEST]
    return _copied(template)


def _copied(template: Template) -> Template:
    """The same graph with nodes of its own; what it holds besides is not edited, and shared."""
    old = template.graph_module
    new = GraphModule(old, copy.deepcopy(old.graph))
    new.meta = dict(old.meta)
    return replace(template, graph_module=new, call=new, numbers=dict(template.numbers))


def _is_plain(constants: Any) -> bool:
    """Whether nothing in them is compared by identity but code: then other modules may be equal.

    What is not would be kept alive, and never be found again.
    """
    if isinstance(constants, Same):
        return isinstance(constants.value, (type, FunctionType, BuiltinFunctionType, dict))
    if isinstance(constants, (tuple, frozenset)):
        return all(map(_is_plain, constants))
    return True
