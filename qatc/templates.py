"""Layer templates: one captured graph for all layers of one structure.

The decoder layers of a model share one structure, so one of them is exported with
``torch.export``, with its parameters lifted to graph *inputs*. That one graph is transformed once
and compiled once, and every layer of the structure calls it with its own parameters. The state
dict, the module tree and their hooks stay as they are, whatever the depth.

``TemplateForward`` is what a layer gets as its ``forward``: it asks the ``TemplateStore`` for a
template that fits its arguments, and the store captures one where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qatc.capture import LAYER_NUMBERS, Template, capture
from qatc.errors import CaptureError, PassError
from qatc.graph import aten, insert_between, is_fake_quantize, reads_master

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
            whose sizes are known, see :meth:`qatc.capture.Template.empty_result`.
    """

    transform: Callable[[GraphModule, TemplateForward], None]
    compile: Callable[[GraphModule], Callable[..., Any]] | None = None
    compute_dtype: torch.dtype | None = None
    dry_run: bool = False
    _templates: dict[Any, list[Template]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Template]:
        return (t for candidates in self._templates.values() for t in candidates)

    def of(self, owner: TemplateForward) -> list[Template]:
        """The templates captured so far that serve ``owner``."""
        structure = owner.structure()
        return [
            template
            for key, candidates in self._templates.items()
            for template in candidates
            if key[0] == structure and template.serves(owner.module)
        ]

    def find(
        self, owner: TemplateForward, leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> Template:
        """The template that fits a call of ``owner``, captured if there is none yet."""
        key = (owner.structure(), spec, tuple(_leaf_key(leaf, owner.name) for leaf in leaves))
        candidates = self._templates.setdefault(key, [])

        def known() -> Template | None:
            serving = (t for t in candidates if t.fits(leaves) and t.serves(owner.module))
            return next(serving, None)

        if (template := known()) is not None:
            return template
        with _CAPTURING:
            return known() or self._capture(owner, candidates, leaves, spec)

    def _capture(
        self,
        owner: TemplateForward,
        candidates: list[Template],
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
    ) -> Template:
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        template = capture(owner.twin(), args, kwargs, owner.name)
        try:
            self.transform(template.graph_module, owner)
        except PassError as error:
            raise PassError(f"{owner.name} ({type(owner.module).__name__}): {error}") from error
        if self.compute_dtype is not None:
            _cast_parameters(template.graph_module, self.compute_dtype)
        template.find_parameters()
        for other in candidates:
            if other.computes_like(template):
                other.numbers += template.numbers
                return other
        if self.compile is not None:
            template.call = self.compile(template.graph_module)
        candidates.append(template)
        return template

    def __deepcopy__(self, memo: dict[int, Any]) -> TemplateStore:
        # Templates hold no parameters, so that a copied model can go on using them.
        return self


def _leaf_key(leaf: Any, name: str) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype, leaf.device.type
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return leaf
    hint = "; generate with use_cache=False" if "Cache" in type(leaf).__name__ else ""
    raise CaptureError(
        f"{name} was called with a {type(leaf).__name__}, which a captured graph cannot take{hint}"
    )


def _cast_parameters(gm: GraphModule, dtype: torch.dtype) -> None:
    """Read every float parameter through a cast, so that masters of any dtype can be passed.

    A weight is quantized before the cast: its codes are those of the master, as an export has them.
    """
    for node in [n for n in gm.graph.nodes if n.op == "placeholder" and "parameter" in n.meta]:
        if node.meta["val"].is_floating_point():
            masters = [user for user in node.users if reads_master(user, node)]
            for source in (node, *filter(is_fake_quantize, masters)):
                users = [user for user in source.users if user not in masters]
                if users:
                    insert_between(source, users, aten.to.dtype, (dtype,), {})
    gm.recompile()


class TemplateForward:
    """The ``forward`` of a module whose graph is shared with others of its structure.

    Args:
        module: the module; its own ``forward`` is left alone and is used for capturing.
        name: its full name, for errors.
        store: where templates are kept and made.
        skip: names of its parameters that stay in full precision, relative to the module.
    """

    def __init__(
        self, module: nn.Module, name: str, store: TemplateStore, skip: tuple[str, ...] = ()
    ) -> None:
        self.module = module
        self.name = name
        self.store = store
        self.skip = skip
        self.original: Callable[..., Any] | None = module.__dict__.get("forward")
        self._constants = _constants(module)

    def structure(self) -> Any:
        """What must be equal for two modules to share a graph, whatever their arguments."""
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        return (
            type(self.module),
            tuple((name, t.shape, t.dtype, t.device) for name, t in tensors),
            self.module.training,
            self._constants,
            self.skip,
        )

    def twin(self) -> nn.Module:
        """A module that computes what this one does, in the compute dtype, to be captured."""
        dtype = self.store.compute_dtype
        self.remove()
        try:
            # The same tensors under new modules, so that nothing is copied unless it is cast.
            memo = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
            twin = copy.deepcopy(self.module, memo)
        finally:
            self.install()
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
        for child in twin.modules():
            vars(child).pop("gradient_checkpointing", None)
        return twin if dtype is None else _cast_module(twin, dtype)

    def parameters(self, template: Template) -> list[Tensor]:
        """The tensors that this module passes for the template's lifted parameters."""
        return [getattr(module, leaf) for module, leaf in self.owners(template)]

    def owners(self, template: Template) -> list[tuple[nn.Module, str]]:
        """The submodule and attribute of each of them; submodules may be replaced at any time."""
        paths = [name.rpartition(".") for name in template.parameters]
        return [(self.module.get_submodule(path), leaf) for path, _, leaf in paths]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._checkpoints():
            checkpoint: Any = self.module._gradient_checkpointing_func
            return checkpoint(partial(self._run, **kwargs), *args)
        return self._run(*args, **kwargs)

    def _checkpoints(self) -> bool:
        """Whether transformers would checkpoint the forward that this one stands in for.

        Newer versions do it in ``forward``, older ones in ``__call__``, which still runs.
        """
        return (
            self.module.training
            and getattr(self.module, "gradient_checkpointing", False)
            and type(self.module).__call__ is nn.Module.__call__
        )

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], store: TemplateStore
    ) -> tuple[Template, list[Any]]:
        """The template of ``store`` that serves a call, and the call's arguments as its leaves."""
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        if store.compute_dtype is not None:
            leaves = [_cast(leaf, store.compute_dtype) for leaf in leaves]
        return store.find(self, leaves, spec), leaves

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.serve(self.store, args, kwargs)

    def serve(
        self,
        store: TemplateStore,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        extra_inputs: Callable[[Template], list[Tensor]] | None = None,
    ) -> Any:
        """Run a call on the template of ``store`` that serves it.

        Args:
            store: where the template is kept, or put if there is none yet.
            args, kwargs: of the call.
            extra_inputs: makes the tensors for the graph inputs that passes added, in order.
        """
        template, leaves = self.find(args, kwargs, store)
        if store.dry_run and (result := template.empty_result(leaves)) is not None:
            return pytree.tree_unflatten([result], template.out_spec)
        parameters = self.parameters(template)
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            leaves = _with_gradient(leaves, template.inputs)
        device = parameters[0].device.type if parameters else "cpu"
        extra = [] if extra_inputs is None else extra_inputs(template)
        if not torch.is_autocast_enabled(device):
            return template(parameters, leaves, extra)
        with torch.autocast(device, enabled=False):
            return template(parameters, leaves, extra)

    def __deepcopy__(self, memo: dict[int, Any]) -> TemplateForward:
        # The copied module is already in the memo: deepcopy creates it before its attributes.
        module = memo.get(id(self.module), self.module)
        copied = copy.copy(self)
        copied.module = module
        copied.original = copy.deepcopy(self.original, memo)
        return copied

    def install(self) -> None:
        """Make this the module's forward."""
        self.module.forward = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)
        if self.original is not None:
            self.module.forward = self.original


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the float parameters and buffers of ``module`` by copies of ``dtype``."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(_cast(parameter.detach(), dtype))
        for name, buffer in child._buffers.items():
            child._buffers[name] = _cast(buffer, dtype)
    return module


def _with_gradient(leaves: Sequence[Any], inputs: Sequence[int]) -> list[Any]:
    """Let the first input require a gradient, as it does in every layer but the first.

    Otherwise the first layer would need a compiled graph of its own.
    """
    leaves = list(leaves)
    first = leaves[inputs[0]]
    if first.is_floating_point() and not first.requires_grad:
        leaves[inputs[0]] = first.detach().requires_grad_()
    return leaves


def _constants(module: nn.Module) -> tuple[Any, ...]:
    """What Python code may branch on: the classes and plain attributes of a module tree.

    A tensor that is neither parameter nor buffer becomes a constant of the graph, so that only
    modules that hold the very same one can share it.
    """
    found: list[Any] = []
    for path, child in module.named_modules():
        found.append((path, type(child)))
        for name, value in sorted(vars(child).items()):
            if name in _CHANGING or name in LAYER_NUMBERS:
                continue
            if isinstance(value, Tensor):
                found.append((path, name, id(value)))
            elif isinstance(value, _PLAIN):
                found.append((path, name, value))
            elif isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value):
                found.append((path, name, tuple(value)))
    return tuple(found)


_PLAIN = (bool, int, float, str, NoneType, FunctionType, BuiltinFunctionType, torch.dtype)

_CHANGING = ("training", "gradient_checkpointing")
"""Attributes that may change after :func:`qatc.prepare`, and that are looked at in every call."""
