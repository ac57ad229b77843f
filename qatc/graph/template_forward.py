"""What a layer calls in the place of its own forward: the template that fits the call."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as recomputed

from qatc.errors import CaptureError, ConfigError
from qatc.graph.capture import Template
from qatc.graph.constants import Constants
from qatc.graph.structure import (
    Structure,
    copy_of,
    every_parameter,
    every_tensor,
    hooks_inside,
    refuse_hooks,
    refuse_rounded_masters,
)
from qatc.graph.templates import TemplateStore
from qatc.recipe.exceptions import NONE, Exceptions


class TemplateForward:
    """The ``forward`` of a module whose graph is shared with others of its structure.

    Args:
        module: the module; its own ``forward`` is left alone and is used for capturing.
        name: its full name, for errors.
        store: where templates are kept and made.
        own: what a recipe says of single parameters of the module.
        root: the model that the module is a part of, which may be sharded around it.

    Attributes:
        updates: by the name of a parameter, what makes of it the tensor that the graph gets.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        store: TemplateStore,
        own: Exceptions = NONE,
        root: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.root = root
        self.name = name
        self.store = store
        self.own = own
        self.updates: dict[str, Callable[[Tensor], Tensor]] = {}
        self.original: Callable[..., Any] | None = module.__dict__.get("forward")
        self._names = frozenset(name for name, _ in every_parameter(module))
        self._paths = weakref.WeakKeyDictionary({m: p for p, m in module.named_modules()})
        self._look()

    def _look(self) -> None:
        """Look at the module anew: what is known of it was of another one."""
        opaque = (TemplateForward, TemplateStore)
        self._constants = Constants(self.module, opaque, lambda: self.original)
        self._tensors: list[tuple[str, Tensor]] = []
        self._hooks: list[Any] | None = None
        self._known: tuple[list[Any], Structure] | None = None

    def structure(self) -> Structure:
        """What must be equal for two modules to share a graph, whatever their arguments.

        It is looked up in every call, since attributes, parameters and submodules may change at any
        time; where nothing has, that costs microseconds.
        """
        if self._constants.refresh():
            self._tensors = every_tensor(self.module)
            self._hooks = self._known = None
        properties = [(t.shape, t.dtype, t.device) for _, t in self._tensors]
        if self._known is None or self._known[0] != properties:
            first: dict[int, int] = {}
            tensors = tuple(
                (name, *held, first.setdefault(id(tensor), number))
                for number, ((name, tensor), held) in enumerate(
                    zip(self._tensors, properties, strict=True)
                )
            )
            structure = Structure(self._constants.value, tensors, self.present())
            self._known = properties, structure
        return self._known[1]

    def present(self) -> Exceptions:
        """What the recipe says of single parameters, by their present names.

        Submodules may have moved since, as below a LoRA adapter; what they were called at first
        decides. What was added since then, such as the adapter, stays in full precision.
        """
        return self.own.renamed(self._first_names(), self._names)

    def _first_names(self) -> Iterator[tuple[str, str]]:
        """What every parameter is called, and what it was called at first."""
        for path, child in self.module.named_modules():
            first = self._paths.get(child, path)
            for name in child._parameters:
                yield (f"{path}.{name}" if path else name), (f"{first}.{name}" if first else name)

    def check_call(self, kwargs: dict[str, Any]) -> None:
        """Refuse a call that asks for what the submodules' own forwards would do.

        Raises:
            CaptureError: a submodule has hooks, or its outputs are asked for.
        """
        if self._hooks is None:
            self._hooks = hooks_inside(self.module)
        if any(self._hooks):
            refuse_hooks(self.module, self.name)
        for name, value in kwargs.items():
            if name.startswith("output_") and name != "output_hidden_states" and value:
                raise CaptureError(
                    f"{self.name} was called with {name}={value!r}, but runs as one captured graph,"
                    " which shows nothing of what its submodules compute; leave it out, or call"
                    " qatc.restore(model) first"
                )

    def twin(self) -> nn.Module:
        """A module that computes what this one does, in the compute dtype, to be captured."""
        dtype = self.store.compute_dtype
        refuse_hooks(self.module, self.name)
        refuse_rounded_masters(self.module, self.name, self.root)
        self.remove()
        try:
            twin = copy_of(self.module)
        finally:
            self.install()
        for child in twin.modules():
            vars(child).pop("gradient_checkpointing", None)
        return twin if dtype is None else _cast_module(twin, dtype)

    def parameters(self, template: Template) -> list[Tensor]:
        """The tensors that this module passes for the template's lifted parameters."""
        held = [getattr(module, leaf) for module, leaf in self.owners(template)]
        for number, name in enumerate(template.parameters if self.updates else ()):
            if name in self.updates:
                held[number] = self.updates[name](held[number])
        return held

    def owners(self, template: Template) -> list[tuple[nn.Module, str]]:
        """The submodule and attribute of each of them; submodules may be replaced at any time."""
        paths = [name.rpartition(".") for name in template.parameters]
        return [(self.module.get_submodule(path), leaf) for path, _, leaf in paths]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _called_from_a_graph(self.call, *args, **kwargs)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the module."""
        self.check_call(kwargs)
        if self._checkpoints():
            checkpoint: Any = self.module._gradient_checkpointing_func
            return checkpoint(partial(self._run, **kwargs), *args)
        if self.store.checkpoint and torch.is_grad_enabled():
            return recomputed(self._run, *args, use_reentrant=False, **kwargs)
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
        copied.root = memo.get(id(self.root), self.root)  # a copy of the layer alone leaves it
        copied.updates = copy.deepcopy(self.updates, memo)
        copied._paths = weakref.WeakKeyDictionary(
            {copy.deepcopy(child, memo): path for child, path in self._paths.items()}
        )
        copied._look()
        return copied

    def __copy__(self) -> TemplateForward:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a prepared model cannot be pickled, as its compiled graphs belong to this process;"
            " save its state_dict(), call its save_pretrained(DIRECTORY), or qatc.restore it first"
        )

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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _called_from_a_graph(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a call outside of the graph of whoever compiles the whole model: it has its own."""
    return call(*args, **kwargs)
