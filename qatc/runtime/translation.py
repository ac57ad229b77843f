"""From graphs to the steps of a decoding program, node by node.

A :class:`Translator` takes the graph of a model, or of a layer inside it, for a batch of one row
and one new token, and writes a step of :mod:`qatc.runtime.program` for every operator. It knows
operators and shapes, and no module by its name. What it has no step for raises
:class:`Untranslatable`, and the graphs run as they are.

Every operator keeps its own rounding: a result is rounded to bf16 where the graph's is, and is
computed in fp32 before that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qatc.graph.nodes import spec_of
from qatc.kernels import native, packed_linear
from qatc.kernels.cached_attention import quantized_attention
from qatc.numerics import packing
from qatc.numerics.learned import factor
from qatc.recipe.spec import QuantSpec, read_spec_arg
from qatc.runtime.operators import STEPS
from qatc.runtime.program import BINARY, PADDING, UNARY, Op, Place, Steps, per_call
from qatc.runtime.values import (
    CacheInput,
    Number,
    Parameter,
    Untranslatable,
    Value,
    aliases,
    name_of,
    read,
    two_dims,
)


@dataclass
class Translator:
    """Writes the steps of graphs.

    Args:
        steps: where to.
        region: writes the steps of a graph inside the graph, given what its node reads; see
            :data:`REGION`.
    """

    steps: Steps
    region: Callable[[Node, list[Any]], Value] | None = None
    _codes: dict[Any, Place] = field(default_factory=dict)
    _floats: dict[int, Value] = field(default_factory=dict)

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
        """Write the steps of a graph.

        Args:
            gm: its module.
            inputs: a value for every placeholder.

        Returns:
            Its results.
        """
        env: dict[Node, Any] = {}
        given = iter(inputs)
        self._codes, self._floats = {}, {}
        for node in gm.graph.nodes:
            if node in env:
                continue
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                held = operator.attrgetter(node.target)(gm)
                env[node] = Parameter(held) if isinstance(held, Tensor) else held
            elif node.op == "output":
                return list(read(node.args[0], env))
            elif node.op == "call_function" and node.target is packed_linear.PACKED_LINEAR:
                self._products(gm.graph, node, env)
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            else:
                raise Untranslatable(f"{node.op} {node.target}")
        raise AssertionError("a graph ends with its output")

    def _call(self, node: Node, env: dict[Node, Any]) -> Any:
        args, kwargs = read(node.args, env), read(node.kwargs, env)
        name = name_of(node)
        if name == "qatc.decoder_region.default":
            assert self.region is not None
            return self.region(node, list(args[0]))
        if node.target is quantized_attention:
            return self._attention(node, args, env)
        if node.target in _ON_SIZES:
            return node.target(*args)
        if name in STEPS:
            return STEPS[name](self, node, args, kwargs)
        if name.startswith("aten.") or node.target is operator.getitem:
            return self._view(node, args, kwargs)
        raise Untranslatable(f"no step for {name}")

    # ------------------------------------------------------------ values

    def new(self, shape: Sequence[int], dtype: torch.dtype, shared: bool = False) -> Value:
        """A value that the next step writes."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise Untranslatable(f"a value of {dtype}")
        view = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return Value(self.steps.buffer(max(4, 4 * view.numel()), shared), view)

    def float(self, value: Any) -> Value:
        """A value as floats that a step can read."""
        if isinstance(value, Value):
            return value
        if isinstance(value, Parameter):
            tensor = value.tensor.detach()
            if id(value.tensor) not in self._floats:
                out = self.new(tensor.shape, tensor.dtype)
                self.steps.emit(
                    Op.LOAD, out.place, a=self.steps.tensor(tensor.contiguous()),
                    cols=tensor.numel(), kind=tensor.dtype is torch.bfloat16,
                )  # fmt: skip
                self._floats[id(value.tensor)] = out
            return self._floats[id(value.tensor)]
        if isinstance(value, (int, float)):
            held = torch.tensor([float(value)])
            out = self.new((), torch.float32)
            self.steps.emit(Op.LOAD, out.place, a=self.steps.tensor(held), cols=1)
            return out
        raise Untranslatable(f"a {type(value).__name__} where a float tensor was expected")

    def dense(self, value: Any) -> Value:
        """A value in consecutive memory."""
        value = self.float(value)
        return value if value.view.is_contiguous() else self.unary("copy", value, value.view.dtype)

    def unary(self, function: str, value: Any, dtype: torch.dtype) -> Value:
        """``function`` of every element."""
        value = self.float(value)
        out = self.new(value.view.shape, dtype)
        rows, cols, (strides,) = two_dims(value.view.shape, [value.view])
        self.steps.emit(
            Op.UNARY, out.place, kind=UNARY.index(function), a=value.start, rows=rows, cols=cols,
            a_row=strides[0], a_col=strides[1], rounds=dtype is torch.bfloat16,
        )  # fmt: skip
        return out

    def binary(self, function: str, one: Any, other: Any, dtype: torch.dtype) -> Value:
        """``function`` of two values, broadcast to one shape."""
        pair = [self.float(value) for value in (one, other)]
        shape = torch.broadcast_shapes(*(value.view.shape for value in pair))
        out = self.new(shape, dtype)
        views = [value.view.expand(shape) for value in pair]
        rows, cols, (a, b) = two_dims(shape, views)
        self.steps.emit(
            Op.BINARY, out.place, kind=BINARY.index(function), a=pair[0].start, b=pair[1].start,
            rows=rows, cols=cols, a_row=a[0], a_col=a[1], b_row=b[0], b_col=b[1],
            rounds=dtype is torch.bfloat16,
        )  # fmt: skip
        return out

    def _view(self, node: Node, args: Any, kwargs: Any) -> Any:
        """An operator that computes nothing: the same memory, seen in another way."""
        sources = [a for a in args if isinstance(a, (Value, Number, Parameter))]
        if len(sources) != 1 or sources[0] is not args[0]:
            if not sources and node.target in (operator.getitem,):
                return args[0][args[1]]
            raise Untranslatable(f"no step for {name_of(node)}")
        source = args[0]
        if isinstance(source, Parameter):
            source = self.float(source)
        target: Any = node.target
        seen = target(source.view, *args[1:], **kwargs)
        if isinstance(seen, (tuple, list)):
            made = [self._seen(node, source, view) for view in seen]
            return made
        return self._seen(node, source, seen)

    def _seen(self, node: Node, source: Any, view: Any) -> Any:
        if not isinstance(view, Tensor):  # a size
            return view
        if not aliases(view, source.view) or view.dtype is not source.view.dtype:
            if isinstance(source, Value) and name_of(node) == "aten.reshape.default":
                dense = self.unary("copy", source, source.view.dtype)
                return Value(dense.place, torch.empty(view.shape, dtype=view.dtype, device="meta"))
            raise Untranslatable(f"no step for {name_of(node)}")
        return type(source)(source.place, view)

    # ------------------------------------------------------------ products

    def _products(self, graph: Graph, node: Node, env: dict[Node, Any]) -> None:
        """All linears on the input of ``node`` together: one quantization, no barrier between."""
        for other in list(graph.nodes):
            ready = all(n in env for n in other.all_input_nodes)
            if (
                other.target is packed_linear.PACKED_LINEAR
                and other.args[0] is node.args[0]
                and ready
            ):
                args = read(other.args, env)
                env[other] = self._product(other, *args)

    def _product(
        self, node: Node, x: Any, packed: Parameter, scale: Parameter, bias: Any, inputs: int,
        x_spec: str, weight_spec: str,
    ) -> Value:  # fmt: skip
        site = packed_linear.site_of(node, "cpu")
        weight_bits = site.weights.bits
        if not site.activations.quantizes:
            raise Untranslatable("linears whose inputs are not quantized")
        if site.activations.affine:
            raise Untranslatable("inputs with a zero point")
        if site.weights.group_size:
            raise Untranslatable("weights with several scales in a row")
        if inputs > native.MAX_WIDTH:
            raise Untranslatable(f"an int32 does not hold the sum of {inputs} products")
        x = self.dense(x)
        added = None if bias is None else self.float(bias)
        codes = self._quantized(x, site.activations)
        outputs = site.outputs
        out = self.new((*x.view.shape[:-1], outputs), x.view.dtype, shared=True)
        self.steps.emit(
            Op.PRODUCT, out.place, a=codes, b=self.steps.tensor(packed.tensor),
            c=self.steps.tensor(scale.tensor), d=None if added is None else added.start,
            kind=weight_bits, rows=outputs, cols=inputs,
            i0=packing.packed_width(inputs, weight_bits), rounds=x.view.dtype is torch.bfloat16,
        )  # fmt: skip
        return out

    def _quantized(self, x: Value, spec: QuantSpec) -> Place:
        key = (x.place, x.view.storage_offset(), spec)
        if key not in self._codes:
            width = x.view.numel()
            codes = self.steps.buffer(64 + width + PADDING)
            self.steps.emit(
                Op.QUANTIZE, codes, a=x.start, cols=width, f0=spec.steps, i0=spec.code_min,
                i1=spec.code_max, kind=spec.rounding == "reciprocal",
            )  # fmt: skip
            self._codes[key] = codes
        return self._codes[key]

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Value:
        """A linear in float."""
        if not isinstance(weight, Parameter) or weight.tensor.dtype is torch.float16:
            raise Untranslatable("a linear whose weight is no parameter of float32 or bfloat16")
        x = self.dense(x)
        added = None if bias is None else self.float(bias)
        tensor = weight.tensor.detach()
        outputs, inputs = tensor.shape
        out = self.new((*x.view.shape[:-1], outputs), x.view.dtype, shared=True)
        self.steps.emit(
            Op.LINEAR, out.place, a=x.start, b=self.steps.tensor(tensor),
            d=None if added is None else added.start, kind=tensor.dtype is torch.bfloat16,
            rows=outputs, cols=inputs, rounds=x.view.dtype is torch.bfloat16,
        )  # fmt: skip
        return out

    # ------------------------------------------------------------ attention

    def _attention(self, node: Node, args: Sequence[Any], env: dict[Node, Any]) -> Value:
        if len(args) > 8 and args[8] is not None:
            raise Untranslatable("attention with a mask")
        query, key, value = (self.dense(a) for a in args[:3])
        cache = args[3]
        assert isinstance(cache, CacheInput)
        spec, value_spec = spec_of(node), spec_of(node, "value_spec")
        _, heads, _, width = query.view.shape
        kv_heads, value_width = key.view.shape[1], value.view.shape[3]
        scale: Any = node.kwargs["scale"]
        first = CALL_HEAD + CALL_LAYER * cache.layer
        # Addresses in the place of strides: a step has no more fields for addresses.
        key_factor, value_factor = (
            self._factor(node.kwargs.get(name), env).encode() if spec.learned else 0
            for name in ("key_gain", "value_gain")
        )
        partial = self.steps.buffer(4 * self.steps.threads * heads * (value_width + 2), shared=True)
        self.steps.emit(
            Op.ATTEND, partial, a=query.start, b=key.start, c=value.start,
            d=per_call(first + 4), kind=spec.bits, rows=heads, cols=width, i0=first, i1=kv_heads,
            i2=value_width, f0=width**-0.5 if scale is None else scale, i3=value_spec.bits,
            b_row=KV_RANGES.index(spec.range), a_row=key_factor, a_col=value_factor,
        )  # fmt: skip
        out = self.new((1, heads, 1, value_width), query.view.dtype)
        self.steps.emit(
            Op.MERGE, out.place, a=partial, rows=heads, cols=value_width,
            rounds=query.view.dtype is torch.bfloat16,
        )  # fmt: skip
        return out

    def _factor(self, gain: Any, env: dict[Node, Any]) -> Place:
        """Where the factors ``[G]`` of learned scales are."""
        held = env[gain]
        assert isinstance(held, Parameter)
        return self.steps.tensor(factor(held.tensor.detach()).flatten())

    def embed_packed(
        self, ids: Any, packed: Any, scale: Any, width: int, spec: str, dtype: Any
    ) -> Value:
        """A row of a table of packed codes."""
        if not isinstance(ids, Number):
            raise Untranslatable("a lookup of something computed")
        bits = read_spec_arg(spec).bits
        out = self.new((*ids.view.shape, width), dtype)
        self.steps.emit(
            Op.EMBED_PACKED, out.place, a=self.steps.tensor(packed.tensor),
            b=self.steps.tensor(scale.tensor), c=ids.place, kind=bits, cols=width,
            i0=packed.tensor.shape[1], i1=scale.tensor.shape[1], rounds=dtype is torch.bfloat16,
        )  # fmt: skip
        return out


CALL_HEAD, CALL_LAYER = 3, 5
"""Pointers of a call: token, position, result; then for each layer its cache's four tensors, and
three int64: slots held, the first one seen, and slots that there is room for."""


KV_RANGES = ("restricted", "full", "signed", "asymmetric")
"""Ranges of keys and values by the numbers that csrc/attention_steps.h knows them by."""

_ON_SIZES = (operator.add, operator.sub, operator.mul, operator.floordiv)
