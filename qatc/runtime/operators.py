"""The steps that stand for the operators of a graph, by their names."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from qatc.numerics.hadamard import cosine_transform
from qatc.runtime.program import BINARY, Op, Place
from qatc.runtime.values import (
    Number,
    Parameter,
    Untranslatable,
    Value,
    name_of,
    result_dtype,
    two_dims,
)

if TYPE_CHECKING:
    from qatc.runtime.translation import Translator

Step = Callable[["Translator", Node, Any, Any], Any]
"""Writes the steps of one node, given its arguments and keyword arguments."""


def _unary(function: str) -> Step:
    def emit(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
        value = own.float(args[0])
        return own.unary(function, value, value.view.dtype)

    return emit


def _binary(function: str) -> Step:
    def emit(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
        if all(isinstance(a, (int, float)) for a in args[:2]):
            return getattr(operator, "truediv" if function == "div" else function)(*args[:2])
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode"):
            raise Untranslatable(f"{name_of(node)} with options")
        return own.binary(function, args[0], args[1], result_dtype(*args[:2]))

    return emit


def _cast(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
    dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), None)
    source = args[0]
    if isinstance(source, Number):
        if dtype is None or not dtype.is_floating_point:
            return source
        out = own.new(source.view.shape, torch.float32)
        own.steps.emit(Op.TO_FLOAT, out.place, c=source.place)
        return out
    value = own.float(source)
    if dtype is None or dtype is value.view.dtype:
        return value
    if dtype is torch.float32:
        view = torch.empty_strided(
            value.view.shape, value.view.stride(), dtype=dtype, device="meta"
        )
        return Value(value.start, view)
    return own.unary("copy", value, dtype)


def _cast_like(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
    return _cast(own, node, (args[0], own.float(args[1]).view.dtype), {})


def _power(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    value = own.float(args[0])
    dtype = value.view.dtype
    match args[1]:
        case 2:
            return own.unary("square", value, dtype)
        case 3:
            return own.binary("mul", own.unary("square", value, torch.float32), value, dtype)
        case 0.5:
            return own.unary("sqrt", value, dtype)
        case -0.5:
            return own.unary("rsqrt", value, dtype)
    raise Untranslatable(f"a power of {args[1]}")


def _mean(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    value = own.float(args[0])
    dims = [dim % value.view.dim() for dim in args[1]]
    if dims != [value.view.dim() - 1] or len(args) < 3 or not args[2]:
        raise Untranslatable("a mean over other than the last dimension")
    if not value.view.is_contiguous():
        value = own.dense(value)
    width = value.view.shape[-1]
    out = own.new((*value.view.shape[:-1], 1), value.view.dtype)
    own.steps.emit(
        Op.MEAN, out.place, a=value.start, rows=value.view.numel() // width, cols=width,
        a_row=width, rounds=value.view.dtype is torch.bfloat16,
    )  # fmt: skip
    return out


def _layer_norm(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    x, shape = args[:2]
    options = [None, None, 1e-5]
    options[: len(args) - 2] = args[2:5]
    weight, bias, eps = options
    value = own.dense(x)
    width = value.view.shape[-1]
    if list(shape) != [width]:
        raise Untranslatable("a layer norm over several dimensions")
    out = own.new(value.view.shape, value.view.dtype)
    affine = [None if p is None else own.float(p).start for p in (weight, bias)]
    own.steps.emit(
        Op.LAYER_NORM, out.place, a=value.start, b=affine[0], c=affine[1],
        rows=value.view.numel() // width, cols=width, a_row=width, f0=eps,
        rounds=value.view.dtype is torch.bfloat16,
    )  # fmt: skip
    return out


def _cat(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    parts = [own.float(part) for part in args[0]]
    dim = args[1] if len(args) > 1 else 0
    shape = list(parts[0].view.shape)
    if dim % len(shape) != len(shape) - 1:
        raise Untranslatable("a concatenation of other than the last dimension")
    shape[-1] = sum(part.view.shape[-1] for part in parts)
    out = own.new(shape, parts[0].view.dtype)
    start = 0
    for part in parts:
        into = out.view.narrow(-1, start, part.view.shape[-1])
        rows, cols, (source, to) = two_dims(into.shape, [part.view, into])
        if cols > 1 and to[1] != 1:  # one value of every row
            rows, cols, source, to = cols, 1, (source[1], 0), (to[1], 0)
        for row in range(rows):  # a step writes consecutive values
            place = Place(
                part.start.kind, part.start.offset + 4 * row * source[0], part.start.buffer
            )
            target = Place(
                out.place.kind, 4 * (int(into.storage_offset()) + row * to[0]), out.place.buffer
            )
            own.steps.emit(Op.UNARY, target, kind=0, a=place, rows=1, cols=cols, a_col=source[1])
        start += part.view.shape[-1]
    return out


def _matmul(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    one, other = (own.float(a) for a in args[:2])
    if one.view.dim() < 2 or one.view.shape[-1] != 1 or other.view.shape[-2] != 1:
        raise Untranslatable("a product of two computed matrices")
    return own.binary("mul", one, other, one.view.dtype)


def _gelu(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    value = own.float(args[0])
    form = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
    return own.unary("gelu_tanh" if form == "tanh" else "gelu", value, value.view.dtype)


def _linear(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    return own.linear(*args, **kwargs)


def _embedding(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    table, ids = args[:2]
    if not isinstance(table, Parameter) or not isinstance(ids, Number):
        raise Untranslatable("a lookup of something computed")
    tensor = table.tensor.detach()
    out = own.new((*ids.view.shape, tensor.shape[1]), tensor.dtype)
    own.steps.emit(
        Op.EMBED, out.place, a=own.steps.tensor(tensor), c=ids.place,
        kind=tensor.dtype is torch.bfloat16, cols=tensor.shape[1],
    )  # fmt: skip
    return out


def _packed_embedding(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    ids, packed, scale, width, spec = args
    return own.embed_packed(ids, packed, scale, width, spec, kwargs["dtype"])


def _hadamard(own: Translator, node: Node, args: Any, kwargs: Any) -> Value:
    if len(args) > 1 and args[1]:
        raise Untranslatable("a Hadamard transform backwards")
    value = own.dense(args[0])
    width = value.view.shape[-1]
    power = width & -width
    odd = own.steps.tensor(cosine_transform(width // power).float())
    out = own.new(value.view.shape, value.view.dtype)
    own.steps.emit(
        Op.HADAMARD, out.place, a=value.start, b=odd, rows=power, cols=width // power,
        i0=value.view.numel() // width, rounds=value.view.dtype is torch.bfloat16,
    )  # fmt: skip
    return out


def _size(own: Translator, node: Node, args: Any, kwargs: Any) -> int:
    source = args[0]
    view = source.tensor if isinstance(source, Parameter) else source.view
    return int(view.shape[args[1]])


def _nothing(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
    return args[0]


def _dense(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
    return args[0] if isinstance(args[0], Number) else own.dense(args[0])


def _skipped(own: Translator, node: Node, args: Any, kwargs: Any) -> Any:
    return None


STEPS: dict[str, Step] = {
    "aten.sym_size.int": _size,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.to.device": _cast,
    "aten._to_copy.default": _cast,
    "aten.type_as.default": _cast_like,
    "aten.pow.Tensor_Scalar": _power,
    "aten.mean.dim": _mean,
    "aten.layer_norm.default": _layer_norm,
    "aten.cat.default": _cat,
    "aten.matmul.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.gelu.default": _gelu,
    "aten.linear.default": _linear,
    "aten.embedding.default": _embedding,
    "qatc.packed_embedding.default": _packed_embedding,
    "qatc.hadamard.default": _hadamard,
    "aten.dropout.default": _nothing,
    "aten.clone.default": _dense,
    "aten.contiguous.default": _dense,
    "aten._assert_tensor_metadata.default": _skipped,
    **{
        f"aten.{name}.default": _unary(name)
        for name in ("neg", "silu", "rsqrt", "sqrt", "tanh", "relu", "exp", "sigmoid", "cos", "sin")
    },
    **{f"aten.{name}.{kind}": _binary(name) for name in BINARY for kind in ("Tensor", "Scalar")},
}
"""What writes the steps of an operator, by its name."""
