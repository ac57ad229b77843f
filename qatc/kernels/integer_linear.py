"""Linear layers on integers: int8 codes, an exact int32 product, one scaling.

``torch.ops.qatc.integer_linear`` computes what fake-quantized input, fake-quantized weight and
linear compute together, with one difference: its sum is exact, and so it is what integer kernels
compute at run time, code for code. A float product of the same values is off by its own rounding,
which is enough to flip one in some ten thousand codes of the next layer.

The product itself is ``torch.ops.qatc.int_mm``. It is opaque to Inductor, which in torch 2.13
compiles ``torch._int_mm`` to wrong results where an operand has a single row.

On a CPU ``torch._int_mm`` is oneDNN's product where the processor has AVX512-VNNI, and a loop over
scalars everywhere else, many times as slow as a product in fp32. oneDNN's own is exact with VNNI
only; told to use older instructions (``ONEDNN_MAX_CPU_ISA=AVX2``) it adds pairs of products in 16
bits, which saturate. So its use depends on both, see :func:`obstacle`. Where it is not used, the
product is computed in C, some rows at a time, or in fp32, some columns at a time, both exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatc.kernels import native
from qatc.machine import cpu
from qatc.numerics import affine, learned, minmax
from qatc.recipe.spec import QuantSpec, read_spec_arg

LARGEST_WIDTH = (2**31 - 1) // (128 * 128)
"""An int32 holds the sum of this many products of int8 codes, whatever they are."""

LARGEST_AFFINE_WIDTH = (2**31 - 1) // (255 * 128)
"""The same of codes less their zero point, which may be as far as 255 from 0."""


def largest_width(activations: QuantSpec) -> int:
    """Inputs of the widest linear whose sums an int32 holds."""
    return LARGEST_AFFINE_WIDTH if activations.affine else LARGEST_WIDTH


EXACT_FP32 = 2**24
"""fp32 holds every integer up to here, so that a float sum of integers below it is exact."""

_FLOAT_WIDTH = EXACT_FP32 // (128 * 128)
"""The largest sums of this many products of int8 codes are integers that fp32 holds."""

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define("int_mm(Tensor a, Tensor b) -> Tensor")
_LIBRARY.define(
    "integer_linear(Tensor x, Tensor weight, Tensor? bias, str x_spec, str weight_spec, *,"
    " Tensor? start=None, Tensor? gain=None) -> Tensor"
)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] == 1 or 0 in (a.shape[0], b.shape[0], a.shape[1]):
        # torch._int_mm misreads the strides of an operand with a single column.
        return (a.int().unsqueeze(1) * b.int()).sum(-1, dtype=torch.int32)
    if obstacle("cpu") is None:
        return torch._int_mm(a.contiguous(), b.contiguous().t())
    # Without instructions for it C is three times as slow as fp32 for many rows (measured, AVX2).
    suits_c = a.shape[0] <= native.MAX_ROWS or cpu.has_byte_products()
    if suits_c and a.shape[1] <= native.MAX_WIDTH and native.obstacle(parallel=True) is None:
        b = b.contiguous()
        return torch.cat([native.packed_product(part, b, 8) for part in a.split(native.MAX_ROWS)])
    return _float_mm(a, b)


def _float_mm(a: Tensor, b: Tensor) -> Tensor:
    """A product in fp32, exact since it is summed in integers before fp32 would round.

    Codes are exact in bf16 too, which torch may multiply in if it is told to.
    """
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for left, right in zip(a.split(_FLOAT_WIDTH, 1), b.split(_FLOAT_WIDTH, 1), strict=True):
        total += (left.float() @ right.float().t()).int()
    return total


def _int_mm_cuda(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS wants more than 16 rows and multiples of 8 elsewhere; zeros fill what is missing."""
    rows, width, outputs = a.shape[0], a.shape[1], b.shape[0]
    more_rows, more_width, more_outputs = max(0, 17 - rows), -width % 8, -outputs % 8
    if more_rows or more_width:
        a = torch.nn.functional.pad(a, (0, more_width, 0, more_rows))
    if more_outputs or more_width:
        b = torch.nn.functional.pad(b, (0, more_width, 0, more_outputs))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:rows, :outputs].contiguous()


def _int_mm_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


_LIBRARY.impl("int_mm", _int_mm, "CPU")
_LIBRARY.impl("int_mm", _int_mm_cuda, "CUDA")
torch.library.register_fake("qatc::int_mm", _int_mm_shape, lib=_LIBRARY)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of integer codes, exactly.

    Args:
        a: int8 ``[M, K]``, any M and K up to :data:`LARGEST_WIDTH`.
        b: int8 ``[N, K]``.

    Returns:
        int32 ``[M, N]``.
    """
    result: Tensor = torch.ops.qatc.int_mm(a, b)
    return result


class _IntegerLinear(torch.autograd.Function):
    """Backward is that of a linear over the dequantized values: rounding passes gradients on.

    A weight with a scale of its own, ``[N, 1]``, passes them on as :mod:`qatc.numerics.learned`
    says, to that scale as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        specs: tuple[QuantSpec, QuantSpec],
        own_scale: Tensor | None,
    ) -> Tensor:
        x_codes, x_scale, zero = affine.quantize_inputs(x.flatten(0, -2), specs[0])
        if own_scale is None:
            codes, scale = minmax.quantize(weight, specs[1], snap=True)
        else:
            codes, scale = minmax.quantize_by(weight, own_scale, specs[1]), own_scale
        own = None if own_scale is None else weight
        ctx.save_for_backward(x_codes, x_scale, zero, codes, scale, own)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.spec = specs[1]
        sums = sums_from_zero(lambda rows: int_mm(rows, codes), x_codes, zero)
        product = scale_sums(sums, x_scale, scale, bias, x.dtype)
        return product.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, zero, codes, scale, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        rows = gradient.flatten(0, -2)
        needs = ctx.needs_input_grad
        for_x = for_weight = for_bias = for_scale = None
        if needs[0]:
            for_x = rows @ minmax.dequantize(codes, scale, gradient.dtype)
            for_x = for_x.to(x_dtype).unflatten(0, gradient.shape[:-1])
        if needs[1] or needs[4]:
            values = affine.dequantize(x_codes, x_scale, zero, gradient.dtype)
            for_weight = (rows.t() @ values).to(weight_dtype)
        if weight is not None and for_weight is not None:
            for_weight, for_scale = learned.gradients(for_weight, weight, codes, scale, ctx.spec)
        if needs[2]:
            for_bias = rows.sum(0).to(bias_dtype)
        return for_x, for_weight, for_bias, None, for_scale


def sums_from_zero(
    product: Callable[[Tensor], Tensor], codes: Tensor, zero: Tensor | None
) -> Tensor:
    """The sums of codes less their zero points: those of the codes, less what zero points add.

    That is as many times the sum of a row of the weight, which the same product gives for a row of
    ones, so that packed codes are nowhere unpacked for it.

    Args:
        product: of codes ``[M, K]`` with the weight: exact, ``[M, N]``.
        codes: int8 ``[M, K]``.
        zero: int32 ``[M, 1]``, or None for 0.

    Returns:
        Integers ``[M, N]``.
    """
    if zero is None:
        return product(codes)
    sums = product(torch.cat([codes, torch.ones_like(codes[:1])])).to(torch.int32)
    return sums[:-1] - zero * sums[-1:]


def scale_sums(
    sums: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Exact integer sums, scaled in fp32 and rounded once to ``dtype``.

    Args:
        sums: int32 or integers in fp32 ``[M, N]``.
        x_scale: fp32 ``[M, 1]``.
        scale: fp32 ``[N, 1]``.
        bias: ``[N]``, added in fp32, or None.
        dtype: of the result ``[M, N]``.
    """
    return scale_channels(sums.float() * x_scale, scale, bias, dtype)


def scale_channels(
    values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rest of :func:`scale_sums`, of sums ``[M, N]`` in fp32 that their rows have scaled."""
    values = values * scale.t()
    if bias is not None:
        values = values + bias.float()
    return values.to(dtype)


def _integer_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_spec: str,
    weight_spec: str,
    *,
    start: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    specs = (read_spec_arg(x_spec), read_spec_arg(weight_spec))
    scale = None
    if start is not None and gain is not None:
        scale = learned.learned_scale(start, gain, specs[1], snap=True)
    result: Tensor = _IntegerLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, specs, scale
    )
    return result


_LIBRARY.impl("integer_linear", _integer_linear, "CompositeImplicitAutograd")

INTEGER_LINEAR = torch.ops.qatc.integer_linear.default
"""``(x [..., K], weight [N, K], bias, x_spec, weight_spec, *, start, gain) -> [..., N]``,
differentiable in x, weight, bias and gain; one scale per row of x and per row of weight, which is
MinMax's or, with ``start`` and ``gain`` ``[N, 1]``, a learned one."""


def obstacle(device: str) -> str | None:
    """Why ``torch._int_mm`` is not used on this type of device, or None if it is."""
    if device != "cpu":
        return None
    if "avx512_vnni" not in cpu.features():
        return "torch multiplies int8 in a loop over scalars on a CPU without avx512_vnni"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "torch multiplies int8 in a loop over scalars without oneDNN"
    if not _is_exact():
        return "oneDNN's int8 product saturates here, as ONEDNN_MAX_CPU_ISA below VNNI makes it"
    return None


@functools.cache
def _is_exact() -> bool:
    """Whether torch's product of extreme codes is the right one, for one row and for several.

    It takes no longer than a small product does, and is asked once in a process.
    """
    extremes = torch.tensor([-128, -127, 127], dtype=torch.int8)
    a = extremes.repeat(6).unsqueeze(1).expand(-1, 256).contiguous()
    b = torch.cat([a, a.roll(1, 0).where(torch.arange(256) % 2 == 0, a)])
    wanted = (a.double() @ b.double().t()).int()
    return all(
        torch.equal(torch._int_mm(a[:rows].contiguous(), b.t()), wanted[:rows])
        for rows in (1, len(a))
    )


def is_fast(device: torch.device) -> bool:
    """Whether integer products are at least as fast as float ones on this device.

    A CPU needs AVX512-VNNI, without which torch has no int8 product worth the name (measured, see
    ``benchmarks/``), a GPU int8 tensor cores, which compute capability 8.0 and later have.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and obstacle("cpu") is None
