"""Capture a module as one graph whose parameters are inputs.

``capture`` exports a module with ``torch.export`` and lifts its parameters to graph *inputs*; a
``Template`` is the captured graph, and can tell whether a call fits it. Which template a layer
calls is decided in :mod:`qatc.graph.templates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qatc.errors import CaptureError
from qatc.graph.probes import Probe, is_watched

LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_id")
"""Attributes that number a layer. Most layers read them for a KV cache alone, and may share a graph
whatever their number; a :class:`Template` knows which were read while it was captured."""

Number = tuple[str, str]
"""Path of a submodule and name of its attribute."""


@dataclass
class Template:
    """A captured graph, and how to call it.

    Attributes:
        graph_module: takes the tensors of ``parameters`` and then those of ``inputs``.
        parameters: names of the lifted parameters and buffers, relative to the module.
        inputs: which leaves of the flattened ``(args, kwargs)`` are graph inputs.
        shapes: for every graph input, its sizes: a number, or the name of a symbol.
        ranges: smallest and largest size of the symbols that the graph holds for in part only.
        out_spec: how the flat outputs make up the module's result.
        numbers: the layer numbers that were read while capturing.
        read: which leaves that are no graph inputs were read while capturing.
        call: ``graph_module``, or its compiled form.
    """

    graph_module: GraphModule
    parameters: tuple[str, ...]
    inputs: tuple[int, ...]
    shapes: tuple[tuple[int | str, ...], ...]
    ranges: dict[str, tuple[float, float]]
    out_spec: pytree.TreeSpec
    numbers: dict[Number, Any]
    read: tuple[int, ...]
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
        return all(low <= sizes[name] <= high for name, (low, high) in self.ranges.items())

    def computes_like(self, other: Template) -> bool:
        """Whether the two graphs are the same, constants included."""
        mine, others = self.graph_module.state_dict(), other.graph_module.state_dict()
        return (
            self.graph_module.code == other.graph_module.code
            and (self.parameters, self.inputs, self.shapes, self.ranges)
            == (other.parameters, other.inputs, other.shapes, other.ranges)
            and all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
        )

    def find_parameters(self) -> None:
        """Read the parameters off the graph again, whose passes may have replaced some."""
        nodes = (n for n in self.graph_module.graph.nodes if n.op == "placeholder")
        self.parameters = tuple(n.meta["parameter"] for n in nodes if "parameter" in n.meta)

    def empty_result(self, leaves: Sequence[Any]) -> Tensor | None:
        """A tensor shaped like the result of a call, computed from nothing.

        Returns:
            The first input where the result is shaped like it, as that of a decoder layer is, and
            else zeros; None unless the result is one tensor whose sizes are numbers or sizes of
            the inputs.
        """
        output = next(n for n in self.graph_module.graph.nodes if n.op == "output")
        results: Any = output.args[0]
        value = results[0].meta.get("val") if isinstance(results[0], Node) else None
        if len(results) != 1 or not isinstance(value, Tensor):
            return None
        shape, tensors = [_size(s) for s in value.shape], [leaves[i] for i in self.inputs]
        if tuple(shape) == self.shapes[0]:
            first: Tensor = tensors[0]
            return first
        known: dict[int | str, int] = {}
        for tensor, names in zip(tensors, self.shapes, strict=True):
            known |= dict(zip(names, tensor.shape, strict=True))
        sizes = [size if isinstance(size, int) else known.get(size) for size in shape]
        if None in sizes:
            return None
        return torch.zeros(sizes, dtype=value.dtype, device=tensors[0].device)  # type: ignore[arg-type]

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
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    numbers = _watch_numbers(module)
    read: set[int] = set()
    while True:
        probes = {i for i, leaf in enumerate(leaves) if is_watched(leaf)} - read
        touched: set[int] = set()
        given = [Probe(i, touched) if i in probes else leaf for i, leaf in enumerate(leaves)]
        numbers.clear()
        try:
            exported = _export(module, given, inputs, spec)
        except Exception as error:  # torch.export raises many kinds
            if not probes:
                raise CaptureError(
                    f"cannot capture {title}: {_first_line(error)}; qatc needs layers that"
                    ' torch.export accepts and attention through SDPA (attn_implementation="sdpa")'
                ) from error
            touched = touched or probes
        if not touched:
            break
        read |= touched
        _refuse_objects(leaves, read, name)
    outputs = exported.graph_signature.output_specs
    assert all(spec.kind is OutputKind.USER_OUTPUT for spec in outputs), "the graph is functional"
    return _as_template(exported, inputs, numbers, tuple(sorted(read)))


def _export(
    module: nn.Module, leaves: Sequence[Any], inputs: tuple[int, ...], spec: pytree.TreeSpec
) -> torch.export.ExportedProgram:
    # Fake tensors remember what an operator gives only to be asked again for the same sizes, and
    # every export has symbols of its own: the memory costs a third of the time and never answers.
    with torch.no_grad(), dynamo_config.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(
            _Flat(module, leaves, inputs, spec),
            tuple(leaves[i] for i in inputs),
            dynamic_shapes={"tensors": tuple(_all_dynamic(leaves[i]) for i in inputs)},
            strict=False,
        )


def _refuse_objects(leaves: Sequence[Any], read: Collection[int], name: str) -> None:
    for leaf in (leaves[i] for i in sorted(read)):
        if not isinstance(leaf, (int, float, str)):
            hint = "; generate with use_cache=False" if "Cache" in type(leaf).__name__ else ""
            raise CaptureError(
                f"{name} was called with a {type(leaf).__name__}, which a captured graph cannot"
                f" take{hint}"
            )


class _Flat(nn.Module):
    """Calls a module with its tensors alone; all other arguments are constants.

    ``torch.export`` matches dynamic shapes to keyword arguments by their order, which fails where
    some of them go to ``**kwargs``.
    """

    def __init__(
        self, module: nn.Module, leaves: Sequence[Any], inputs: Sequence[int], spec: Any
    ) -> None:
        super().__init__()
        self.module = module
        self._call = (tuple(leaves), tuple(inputs), spec)

    def forward(self, *tensors: Tensor) -> Any:
        constants, inputs, spec = self._call
        leaves = list(constants)
        for position, tensor in zip(inputs, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return self.module(*args, **kwargs)


def _all_dynamic(tensor: Tensor) -> dict[int, Any]:
    """Every size that is not 0 or 1 as a symbol; export itself finds those that are constants."""
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(tensor.shape) if size > 1}


def _watch_numbers(module: nn.Module) -> dict[Number, Any]:
    """Note, from now on, which layer numbers the Python code of ``module`` reads."""
    read: dict[Number, Any] = {}
    for path, child in module.named_modules():
        names = [name for name in LAYER_NUMBERS if name in vars(child)]
        if names:
            kind = type(child)
            noting = {name: _noting((path, name), read) for name in names}
            child.__class__ = type(kind.__name__, (kind,), noting)
    return read


def _noting(number: Number, read: dict[Number, Any]) -> property:
    """A property that stands before an instance's attribute and notes that it was read."""

    def get(module: nn.Module) -> Any:
        read[number] = vars(module)[number[1]]
        return read[number]

    return property(get)


def serves(numbers: Sequence[dict[Number, Any]], module: nn.Module) -> bool:
    """Whether the layer numbers of ``module`` are among those that were read while capturing."""
    return any(
        all(_read_number(module, number) == value for number, value in read.items())
        for read in numbers
    )


def _read_number(module: nn.Module, number: Number) -> Any:
    path, name = number
    return vars(module.get_submodule(path)).get(name)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:400]


def _as_template(
    exported: torch.export.ExportedProgram,
    inputs: tuple[int, ...],
    numbers: dict[Number, Any],
    read: tuple[int, ...],
) -> Template:
    # There is an input spec for every placeholder, in the graph's order: parameters and buffers (by
    # their names in _Flat, below "module."), constants, which become attributes of the graph, and
    # the tensors of ``inputs``. Of these, ``shapes`` has the sizes, which are integers or symbols
    # of export: hidden states [B, T, 32] are ("s0", "s1", 32).
    gm = exported.graph_module
    placeholders = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    parameters: list[str] = []
    shapes: list[tuple[int | str, ...]] = []
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            name = spec.target.removeprefix("module.")
            node.meta["parameter"] = name
            parameters.append(name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            _embed_constant(gm, node, exported.constants[str(spec.target)])
        else:
            shapes.append(tuple(_size(size) for size in node.meta["val"].shape))
    gm.graph.lint()
    gm.recompile()
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return Template(
        gm,
        parameters=tuple(parameters),
        inputs=inputs,
        shapes=tuple(shapes),
        ranges=_ranges(exported, {size for shape in shapes for size in shape}),
        out_spec=out_spec,
        numbers=numbers,
        read=read,
        call=gm,
    )


def _ranges(
    exported: torch.export.ExportedProgram, sizes: Collection[int | str]
) -> dict[str, tuple[float, float]]:
    """The ranges that export found for the symbols in ``sizes``, where they exclude anything.

    Export takes every symbol to be at least 2, which says nothing about 0 and 1.
    """
    found: dict[str, tuple[float, float]] = {}
    for symbol, range_ in exported.range_constraints.items():
        low = int(range_.lower) if range_.lower > 2 else 0
        high = int(range_.upper) if range_.upper < 2**62 else math.inf
        if str(symbol) in sizes and (low, high) != (0, math.inf):
            found[str(symbol)] = (low, high)
    return found


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
