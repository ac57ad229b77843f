"""Layer templates: one captured graph for all layers of one structure.

The decoder layers of a model share one structure, so one of them is exported with
``torch.export``, with its parameters lifted to graph *inputs*. That one graph is transformed once
and compiled once, and every layer of the structure calls it with its own parameters. The state
dict, the module tree and their hooks stay as they are, whatever the depth.

``TemplateForward`` (:mod:`qatc.graph.template_forward`) is what a layer gets as its ``forward``: it
asks the ``TemplateStore`` for a template that fits its arguments, and the store captures one where
there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qatc.errors import PassError
from qatc.graph import captures
from qatc.graph.capture import Template, serves
from qatc.graph.captures import Known, constants_of
from qatc.graph.constants import comparable
from qatc.graph.edits import insert_between
from qatc.graph.nodes import aten, is_fake_quantize, reads_master
from qatc.graph.probes import is_watched
from qatc.graph.structure import Structure

if TYPE_CHECKING:
    from qatc.graph.template_forward import TemplateForward

_CAPTURING = compile_lock
"""Held while a layer is captured. Capturing and compiling change the same globals of torch, so that
the lock that torch itself holds while it compiles is the one that keeps several threads apart."""


@dataclass
class TemplateStore:
    """The templates of one prepared model, and how new ones are made.

    Args:
        transform: edits, in place, the graph captured for the given module and its variant.
        compile: maps the graph module to what is called; ``None`` calls it as it is.
        compute_dtype: the float dtype that graphs compute in, whatever the parameters' own (fp32
            masters under bf16 compute); ``None`` for the parameters' dtype.
        dry_run: capture what is called, but compute nothing where a module's result is one tensor
            whose sizes are known, see :meth:`qatc.graph.capture.Template.empty_result`.
        checkpoint: keep a call's inputs alone for the backward pass, which computes the rest again.
    """

    transform: Callable[[GraphModule, TemplateForward], None]
    compile: Callable[[GraphModule], Callable[..., Any]] | None = None
    compute_dtype: torch.dtype | None = None
    dry_run: bool = False
    checkpoint: bool = False
    _known: dict[Structure, dict[Any, list[Known]]] = field(default_factory=dict)
    _captured: dict[str, list[tuple[Structure, Any, Known]]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[Template]:
        found = (k for calls in self._known.values() for known in calls.values() for k in known)
        return iter({id(known.template): known.template for known in found}.values())

    def of(self, owner: TemplateForward) -> list[Template]:
        """The templates captured so far that serve ``owner``, as it is now."""
        calls = self._known.get(owner.structure(), {})
        return [
            known.template
            for candidates in calls.values()
            for known in candidates
            if serves(known.numbers, owner.module)
        ]

    def find(
        self, owner: TemplateForward, leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> Template:
        """The template that fits a call of ``owner``, captured if there is none yet."""
        structure = owner.structure()
        call = (spec, tuple(_kind_of(leaf) for leaf in leaves))

        def known() -> Template | None:
            candidates = self._known.get(structure, {}).get(call, ())
            serving = (k.template for k in candidates if k.serves(owner.module, leaves))
            return next(serving, None)

        if (template := known()) is not None:
            return template
        with _CAPTURING:
            return known() or self._capture(owner, structure, call, leaves)

    def _capture(
        self, owner: TemplateForward, structure: Structure, call: Any, leaves: Sequence[Any]
    ) -> Template:
        template = captures.find(owner, structure, self.compute_dtype, call, leaves)
        try:
            self.transform(template.graph_module, owner)
        except PassError as error:
            raise PassError(f"{owner.name} ({type(owner.module).__name__}): {error}") from error
        if self.compute_dtype is not None:
            _cast_parameters(template.graph_module, self.compute_dtype)
        template.find_parameters()
        constants = constants_of(template, leaves)
        candidates = self._known.setdefault(structure, {}).setdefault(call, [])
        equal = next((t for t in self if t.computes_like(template)), None)
        if equal is None and self.compile is not None:
            template.call = self.compile(template.graph_module)
        known = Known(equal or template, [template.numbers], constants)
        for other in candidates:
            if other.template is equal and other.constants == constants:
                other.numbers.append(template.numbers)
                return other.template
        candidates.append(known)
        self._bound(owner, (structure, call, known))
        return known.template

    def _bound(self, owner: TemplateForward, new: tuple[Structure, Any, Known]) -> None:
        """Drop the oldest graph of a module that keeps needing another one, and say so once."""
        captured = self._captured.setdefault(owner.name, [])
        captured.append(new)
        if len(captured) <= GRAPHS_PER_MODULE:
            return
        structure, call, known = captured.pop(0)
        calls = self._known.get(structure, {})
        calls[call] = [k for k in calls.get(call, []) if k is not known]
        if not any(calls.values()):
            self._known.pop(structure, None)
        if owner.name in self._warned:
            return
        self._warned.add(owner.name)
        warnings.warn(
            f"{owner.name or 'the module'} has been captured {GRAPHS_PER_MODULE + 1} times, as"
            f" {_what_changed(captured[-2:])} from call to call; each value takes a graph of its"
            f" own, which is slow, and only the last {GRAPHS_PER_MODULE} are kept: pass what"
            " changes as a tensor, or leave it out",
            stacklevel=2,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TemplateStore:
        # Templates hold no parameters, so that a copied model can go on using them.
        return self


@contextmanager
def dry_run(stores: Sequence[TemplateStore]) -> Iterator[None]:
    """Capture what is called inside the block, and compute nothing; compile it at the end."""
    compilers = [store.compile for store in stores]
    for store in stores:
        store.compile, store.dry_run = None, True
    try:
        yield
    finally:
        for store, compiler in zip(stores, compilers, strict=True):
            store.compile, store.dry_run = compiler, False
    for store, compiler in zip(stores, compilers, strict=True):
        if compiler is not None:
            for template in store:
                template.call = compiler(template.graph_module)


GRAPHS_PER_MODULE = 16
"""Graphs that are kept of those that were captured for one module. Masks, sizes of one, dtypes and
training or not need a few; more are needed only where a constant changes all the time."""


def _what_changed(captured: Sequence[tuple[Structure, Any, Known]]) -> str:
    """What differs between two calls of one module, in words."""
    (before, old_call, old), (after, call, new) = captured
    names = before.differences(after)
    if old_call == call:
        spec, kinds = call
        numbered = pytree.tree_unflatten(list(range(len(kinds))), spec)
        paths = pytree.tree_flatten_with_path(numbered)[0]
        changed = [i for i in new.constants if new.constants[i] != old.constants.get(i)]
        names += [f"its argument {pytree.keystr(paths[i][0][1:]).strip('[]')}" for i in changed]
    listed = ", ".join(names[:3]) or "what it is made of"
    return f"{listed} change{'' if len(names) > 1 else 's'}"


def _kind_of(leaf: Any) -> Any:
    """What decides a graph about an argument, but for its value if that turns out to be read."""
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype, leaf.device.type
    if is_watched(leaf):
        return type(leaf)
    return comparable(leaf)


def _cast_parameters(gm: GraphModule, dtype: torch.dtype) -> None:
    """Read every float parameter through a cast, so that masters of any dtype can be passed.

    A weight is quantized before the cast: its codes are those of the master, as an export has them.
    """
    for node in [n for n in gm.graph.nodes if n.op == "placeholder" and "parameter" in n.meta]:
        if node.meta["val"].is_floating_point():
            masters = [user for user in node.users if reads_master(user, node)]
            rounded = [m for m in masters if is_fake_quantize(m) and m.args[0] is node]
            for source in (node, *rounded):
                users = [user for user in source.users if user not in masters]
                if users:
                    insert_between(source, users, aten.to.dtype, (dtype,), {})
    gm.recompile()


def same_for_all(
    edit: Callable[[GraphModule], object],
) -> Callable[[GraphModule, TemplateForward], None]:
    """The ``transform`` of a store that edits every graph alike."""

    def transform(gm: GraphModule, owner: TemplateForward) -> None:
        edit(gm)

    return transform
