"""Layer templates: one captured graph for all layers of one structure.

The decoder layers of a model share one structure, so one of them is exported with
``torch.export``, with its parameters lifted to graph *inputs*. That one graph is transformed once
and compiled once, and every layer of the structure calls it with its own parameters. The state
dict, the module tree and their hooks stay as they are, whatever the depth.

``capture`` exports a module. A ``Template`` is a captured and transformed graph, and can tell
whether a call fits it. ``TemplateForward`` is what a layer gets as its ``forward``: it looks for a
template that fits its arguments, and captures one where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qatc.errors import CaptureError, PassError
from qatc.graph import aten, insert_between


@dataclass
class Template:
    """A captured graph, and how to call it.

    Attributes:
        graph_module: takes the tensors of ``parameters`` and then those of ``inputs``.
        parameters: names of the lifted parameters and buffers, relative to the module.
        inputs: which leaves of the flattened ``(args, kwargs)`` are graph inputs.
        shapes: for every graph input, its sizes: a number, or the name of a symbol.
        out_spec: how the flat outputs make up the module's result.
        call: ``graph_module``, or its compiled form.
    """

    graph_module: GraphModule
    parameters: tuple[str, ...]
    inputs: tuple[int, ...]
    shapes: tuple[tuple[int | str, ...], ...]
    out_spec: pytree.TreeSpec
    call: Callable[..., Any]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether arguments of these sizes are among those that the graph was captured for."""
        sizes: dict[str, int] = {}
        for leaf, shape in zip((leaves[i] for i in self.inputs), self.shapes, strict=True):
            for actual, expected in zip(leaf.shape, shape, strict=True):
                if isinstance(expected, str):
                    expected = sizes.setdefault(expected, actual)
                if actual != expected:
                    return False
        return True

    def keeps_shape(self) -> bool:
        """Whether the only result is shaped like the first input."""
        output = next(n for n in self.graph_module.graph.nodes if n.op == "output")
        results = [n.meta.get("val") for n in output.all_input_nodes]
        if len(results) != 1 or not isinstance(results[0], Tensor):
            return False
        return tuple(_size(s) for s in results[0].shape) == self.shapes[0]

    def __call__(
        self, parameters: Sequence[Tensor], leaves: Sequence[Any], extra: Sequence[Tensor] = ()
    ) -> Any:
        tensors = [leaves[i] for i in self.inputs]
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            for dim, size in enumerate(shape):
                if isinstance(size, str):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        outputs = self.call(*parameters, *tensors, *extra)
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = ""
) -> Template:
    """Export ``module`` as one graph with its parameters as inputs.

    Args:
        module: any module that ``torch.export`` accepts.
        args: example positional arguments. Sizes of 0 and 1 are baked into the graph, so use a
            batch of two and more than one token.
        kwargs: example keyword arguments.
        name: what to call the module in errors.

    Raises:
        CaptureError: the module cannot be exported; the message has torch's reason.
    """
    title = f"{name or 'the module'} ({type(module).__name__})"
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=_all_dynamic(module, args, kwargs),
                strict=False,
            )
    except Exception as error:  # torch.export raises many kinds
        raise CaptureError(
            f"cannot capture {title}: {_first_line(error)}; qatc needs layers that torch.export"
            ' accepts and attention through SDPA (attn_implementation="sdpa")'
        ) from error
    changed = [
        spec.target
        for spec in exported.graph_signature.output_specs
        if spec.kind is not OutputKind.USER_OUTPUT
    ]
    if changed:
        raise CaptureError(
            f"cannot capture {title}: it changes {changed} while it runs; qatc needs layers that"
            " only compute (put batch norms and running statistics in eval mode or skip them)"
        )
    return _as_template(exported)


def _all_dynamic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every size that is not 0 or 1 as a symbol; export itself finds those that are constants."""
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            shapes[leaf] = {d: torch.export.Dim.AUTO for d, n in enumerate(leaf.shape) if n > 1}
    return shapes.dynamic_shapes(module, args, kwargs)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:400]


def _as_template(exported: torch.export.ExportedProgram) -> Template:
    gm = exported.graph_module
    placeholders = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    parameters: list[str] = []
    inputs: list[int] = []
    shapes: list[tuple[int | str, ...]] = []
    position = 0
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            node.meta["parameter"] = spec.target
            parameters.append(spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            _embed_constant(gm, node, exported.constants[str(spec.target)])
        elif isinstance(spec.arg, ConstantArgument):
            gm.graph.erase_node(node)
            position += 1
        else:
            inputs.append(position)
            shapes.append(tuple(_size(size) for size in node.meta["val"].shape))
            position += 1
    gm.graph.lint()
    gm.recompile()
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return Template(gm, tuple(parameters), tuple(inputs), tuple(shapes), out_spec, gm)


def _embed_constant(gm: GraphModule, node: torch.fx.Node, value: Tensor) -> None:
    name = f"constant_{node.name}"
    gm.register_buffer(name, value)
    with gm.graph.inserting_after(node):
        constant = gm.graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


@dataclass
class TemplateStore:
    """The templates of one prepared model, and how new ones are made.

    Args:
        transform: edits, in place, the graph captured for the given module and its variant.
        compile: maps the graph module to what is called; ``None`` calls it as it is.
        compute_dtype: the float dtype that graphs compute in, whatever the parameters' own (fp32
            masters under bf16 compute); ``None`` for the parameters' dtype.
        dry_run: capture what is called, but compute nothing where a module's result has the shape
            of its first input, as that of a decoder layer has.
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
        return [t for key, found in self._templates.items() if key[0] == structure for t in found]

    def find(
        self, owner: TemplateForward, leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> Template:
        """The template that fits a call of ``owner``, captured if there is none yet."""
        key = (owner.structure(), spec, tuple(_leaf_key(leaf, owner.name) for leaf in leaves))
        candidates = self._templates.setdefault(key, [])
        for template in candidates:
            if template.fits(leaves):
                return template
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        template = capture(owner.twin(), args, kwargs, owner.name)
        if self.compute_dtype is not None:
            _cast_parameters(template.graph_module, self.compute_dtype)
        try:
            self.transform(template.graph_module, owner)
        except PassError as error:
            raise PassError(f"{owner.name} ({type(owner.module).__name__}): {error}") from error
        if self.compile is not None:
            template.call = self.compile(template.graph_module)
        candidates.append(template)
        return template


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
    """Read every float parameter through a cast, so that masters of any dtype can be passed."""
    for node in [n for n in gm.graph.nodes if n.op == "placeholder" and "parameter" in n.meta]:
        users = list(node.users)
        if users and node.meta["val"].is_floating_point():
            insert_between(node, users, aten.to.dtype, (dtype,), {})
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
        self.original = module.__dict__.get("forward")
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
        return twin if dtype is None else _cast_module(twin, dtype)

    def parameters(self, template: Template) -> list[Tensor]:
        """The tensors that this module passes for the template's lifted parameters."""
        tensors = []
        for name in template.parameters:
            path, _, leaf = name.rpartition(".")
            tensors.append(getattr(self.module.get_submodule(path), leaf))
        return tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(sorted(kwargs.items()))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.store.compute_dtype is not None:
            leaves = [_cast(leaf, self.store.compute_dtype) for leaf in leaves]
        template = self.store.find(self, leaves, spec)
        if self.store.dry_run and template.keeps_shape():
            return pytree.tree_unflatten([leaves[template.inputs[0]]], template.out_spec)
        parameters = self.parameters(template)
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            leaves = _with_gradient(leaves, template.inputs)
        device = parameters[0].device.type if parameters else "cpu"
        with torch.autocast(device, enabled=False):
            return template(parameters, leaves, self.extra_inputs(template))

    def extra_inputs(self, template: Template) -> list[Tensor]:
        """Tensors for the graph inputs that passes added, in order."""
        return []

    def __deepcopy__(self, memo: dict[int, Any]) -> TemplateForward:
        # The copied module is already in the memo: deepcopy creates it before its attributes.
        module = memo.get(id(self.module), self.module)
        return TemplateForward(module, self.name, self.store, self.skip)

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


_PER_LAYER = ("training", "layer_idx", "layer_id", "layer_index")
"""Attributes that differ from layer to layer without changing what a layer computes."""


def _constants(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes of a module tree: what Python code may branch on."""
    return tuple(
        (path, name, value)
        for path, child in module.named_modules()
        for name, value in sorted(vars(child).items())
        if isinstance(value, (bool, int, float, str)) and name not in _PER_LAYER
    )
