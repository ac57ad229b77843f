"""What lowered graphs compute, in operators of torch alone: the same numbers, without qatc.

The kernels of :mod:`qatc.kernels` are chosen for the machine that they run on, and some are C. A
graph that is stored goes to other machines, where none of them is: each operator of qatc gives way
to what it stands for. Integer products stay exact there. Their codes are multiplied in fp32, some
columns at a time where a sum could grow beyond the integers that fp32 holds; ``torch._int_mm``
saturates on some processors, is a loop over scalars on others, and is compiled to wrong results for
a single row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter

from qatc.errors import ConfigError
from qatc.kernels.cached_attention import cached_attention
from qatc.kernels.integer_linear import EXACT_FP32, scale_sums, sums_from_zero
from qatc.kernels.packed_embedding import PACKED_EMBEDDING, packed_embedding
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.kernels.row_attention import attend
from qatc.kernels.site import Site, needs_integers
from qatc.numerics import affine, minmax, packing
from qatc.numerics.fake_quant import FAKE_QUANTIZE
from qatc.recipe.spec import QuantSpec, read_spec_arg


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inputs: int,
    x_spec: str,
    weight_spec: str,
    *,
    to_compile: bool = False,
    **kernels: str,
) -> Tensor:
    """``torch.ops.qatc.packed_linear``, whatever kernels it names; see there.

    ``to_compile`` spells it as Inductor makes it fast, and not as it is fast uncompiled.
    """
    activations, weights = read_spec_arg(x_spec), read_spec_arg(weight_spec)
    site = Site(weights, activations, packed.shape[0], inputs, x.device.type)
    if needs_integers(site) is not None:
        codes = packing.unpack(packed, weights.bits, inputs)
        return F.linear(fake_quantize(x, x_spec), minmax.dequantize(codes, scale, x.dtype), bias)
    x_codes, x_scale, zero = affine.quantize_inputs(x.flatten(0, -2), activations)

    def sums_of(codes: Tensor) -> Tensor:
        return _product(codes, packed, activations, weights, to_compile=to_compile)

    sums = sums_from_zero(sums_of, x_codes, zero)
    product = scale_sums(sums, x_scale, scale, bias, x.dtype)
    return product.view(*x.shape[:-1], site.outputs)


def _product(
    a: Tensor, packed: Tensor, activations: QuantSpec, weights: QuantSpec, *, to_compile: bool
) -> Tensor:
    """``a @ codes.T`` of int8 codes ``[M, K]`` and packed ones, exactly: integers ``[M, N]``."""
    width, fused = a.shape[1], to_compile and a.shape[0] == 1
    if fused and width <= EXACT_FP32 // (-activations.code_min * 2**weights.bits):
        parts = packing.parts(packed, weights.bits, width)
        if parts is not None:
            return _sum_of_parts(a, parts, weights.bits)
    within = torch.int32 if to_compile else torch.uint8
    codes = packing.unpack(packed, weights.bits, width, within=within)
    multiply = _multiply_and_sum if fused else _multiply
    most = EXACT_FP32 // (activations.code_min * weights.code_min)
    if width <= most:
        return multiply(a, codes)
    total = a.new_zeros((a.shape[0], codes.shape[0]), dtype=torch.int32)
    for left, right in zip(a.split(most, 1), codes.split(most, 1), strict=True):
        total = total + multiply(left, right).to(torch.int32)
    return total


def _sum_of_parts(a: Tensor, parts: list[Tensor], bits: int) -> Tensor:
    """The product of a single row with unsigned codes, less what that adds to the sum.

    Inductor makes one loop over the packed bytes of it.
    """
    cut = a.float().unsqueeze(1).chunk(len(parts), -1)
    products = [part * piece for part, piece in zip(parts, cut, strict=True)]
    offset = 1 << (bits - 1)
    return sum(products[1:], products[0]).sum(-1) - offset * a.float().sum(-1, keepdim=True)


def _multiply_and_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a.float().unsqueeze(1) * b.float()).sum(-1)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().t()


def fake_quantize(x: Tensor, spec: str, **options: Any) -> Tensor:
    """``torch.ops.qatc.fake_quantize`` of what is not learned; see there."""
    read = read_spec_arg(spec)
    if read.asymmetric or any(
        value is not None and value is not False for value in options.values()
    ):
        result: Tensor = FAKE_QUANTIZE(x, spec, **options)
        return result
    if read.affine:
        return affine.dequantize(*affine.quantize(x, read), x.dtype)
    return minmax.dequantize(*minmax.quantize(x, read), x.dtype) if read.quantizes else x


_PLAIN: dict[Any, Callable[..., Any]] = {
    PACKED_EMBEDDING: packed_embedding,
    FAKE_QUANTIZE: fake_quantize,
    cached_attention: attend,  # for one query as for many
}


class PlainInterpreter(Interpreter):
    """Runs a lowered layer's graph in operators of torch alone, to be captured once more."""

    def __init__(self, graph_module: GraphModule, *, to_compile: bool) -> None:
        super().__init__(graph_module)
        self._plain = _PLAIN | {PACKED_LINEAR: partial(linear, to_compile=to_compile)}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self._plain.get(target, target), args, kwargs)


def use_torch_alone(exported: ExportedProgram) -> None:
    """Replace what is left of qatc's operators in a program, in place.

    Where in which file each node was made is dropped too: it is of this machine, and larger than
    the graph.

    Raises:
        ConfigError: torch has no counterpart of one.
    """
    for node in exported.graph.nodes:
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(name, None)
        if node.target is torch.ops.qatc.materialize.default:
            node.target = torch.ops.aten.clone.default
    exported.graph_module.recompile()
    left = sorted({str(n.target) for n in exported.graph.nodes if is_of_qatc(n.target)})
    if left:
        raise ConfigError(
            f"torch alone cannot run {', '.join(left)}, which this model was trained with; run it"
            " by qatc.load"
        )


def is_of_qatc(target: Any) -> bool:
    """Whether a node's target is an operator of qatc."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "qatc"
