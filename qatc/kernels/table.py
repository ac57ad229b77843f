"""The table of kernels that run lowered linears, and the choice of one.

:data:`KERNELS` is the table from which :func:`choose` takes the first entry that applies; every
entry says why it stands where it does, and what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qatc.kernels import integer_linear, native, products, torchao_linear
from qatc.kernels.gpu.products import TRITON_LINEAR, TRITON_LINEARS
from qatc.kernels.site import (
    Kernels,
    Library,
    Phase,
    Site,
    needs_bytes,
    needs_da8w4,
    needs_fused,
    needs_int4pack,
    needs_int_mm,
    needs_integers,
    needs_native,
    needs_native_bytes,
    needs_scaled,
    needs_tinygemm,
    needs_torchao,
    needs_triton,
)
from qatc.numerics import affine, fake_quant, minmax, packing
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class Kernel:
    """One way to compute a lowered linear.

    Attributes:
        name: what a graph and a report call it.
        phases: when it may run.
        reason: why it is preferred to what comes after it in the table.
        obstacle: why it cannot run at a site, or None if it can.
        library: whose it is.
        run: ``(x, packed, scale, bias, site) -> [..., N]``; None for a kernel that has an obstacle
            everywhere, and stands in the table so that a report can say which.
    """

    name: str
    phases: tuple[Phase, ...]
    reason: str
    obstacle: Callable[[Site], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, Site], Tensor] | None
    library: Library = "qatc"


def _run_int_mm(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    codes = packing.unpack(packed, site.weights.bits, site.inputs)
    x_codes, x_scale, zero = affine.quantize_inputs(x.flatten(0, -2), site.activations)
    sums = integer_linear.sums_from_zero(
        lambda rows: integer_linear.int_mm(rows, codes), x_codes, zero
    )
    return _scaled(sums, x, x_scale, scale, bias, site)


def _run_torchao(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    """The sums of :func:`_run_int_mm`, scaled in the same order: the very same bits."""
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), site.activations)
    values = torchao_linear.torchao_mm(x_codes, _unpacked(packed, site), x_scale)
    product = integer_linear.scale_channels(values, scale, bias, x.dtype)
    return product.view(*x.shape[:-1], site.outputs)


def _scaled(
    sums: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    product = integer_linear.scale_sums(sums, x_scale, scale, bias, x.dtype)
    return product.view(*x.shape[:-1], site.outputs)


def _run_native(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    x_codes, x_scale, zero = affine.quantize_inputs(x.flatten(0, -2), site.activations)
    sums = integer_linear.sums_from_zero(
        lambda rows: products.packed_mm(rows, packed, site.weights.bits), x_codes, zero
    )
    return _scaled(sums, x, x_scale, scale, bias, site)


def _run_triton(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    """The bits of :func:`_run_int_mm`; codes and scales of ``x`` are computed by the graph."""
    return run_added(x, packed, scale, bias, None, site.weights, site.activations)


def run_joined(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    weights: QuantSpec,
    activations: QuantSpec,
) -> list[Tensor]:
    """:data:`TRITON` for linears of one input and of weights of one kind, in one launch."""
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), activations)
    products = TRITON_LINEARS(x_codes, x_scale, packed, scale, bias, weights.bits, x.dtype)
    return [product.view(*x.shape[:-1], product.shape[-1]) for product in products]


def run_added(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    weights: QuantSpec,
    activations: QuantSpec,
) -> Tensor:
    """:data:`TRITON` for a linear, plus ``added`` if that is given."""
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), activations)
    rows = None if added is None else added.flatten(0, -2)
    parts = (x_codes, x_scale, packed, scale, bias, weights.bits, x.dtype)
    product: Tensor = TRITON_LINEAR(*parts, rows)
    return product.view(*x.shape[:-1], product.shape[-1])


def _run_fused(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Unpack inside the reduction: every byte of the weight is read once, and nothing is written.

    The codes enter unsigned, and what that adds to the sum is taken off afterwards; all partial
    sums are integers that fp32 holds. Several rows would unpack them anew for each.
    """
    if any(size != 1 for size in x.shape[:-1]):
        return _run_int_mm(x, packed, scale, bias, site)
    x_codes, x_scale, zero = affine.quantize_inputs(x.flatten(0, -2), site.activations)
    pieces = packing.parts(packed, site.weights.bits, site.inputs)
    assert pieces is not None, "checked by the table"
    values = x_codes.float() if zero is None else (x_codes.to(torch.int32) - zero).float()
    cut = values.unsqueeze(-2).chunk(len(pieces), -1)
    products = [piece.float() * part for piece, part in zip(pieces, cut, strict=True)]
    offset = 1 << (site.weights.bits - 1)
    total = sum(products[1:], products[0]).sum(-1) - offset * values.sum(-1, keepdim=True)
    return _scaled(total, x, x_scale, scale, bias, site)


def _run_scaled(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    """The very values of :func:`_run_float`, summed in fp32."""
    values = fake_quant.fake_quantize(x, site.activations).flatten(0, -2)
    product = products.scaled_mm(values, packed, scale, site.weights.bits)
    product = product if bias is None else product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], site.outputs)


def _run_float(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    weight = minmax.dequantize(_unpacked(packed, site), scale, x.dtype)
    return F.linear(fake_quant.fake_quantize(x, site.activations), weight, bias)


def _unpacked(packed: Tensor, site: Site) -> Tensor:
    """All codes ``[N, K]`` in memory, where there is C for it by that."""
    in_c = site.device == "cpu" and site.weights.bits < 8 and native.obstacle() is None
    unpack = products.unpack if in_c else packing.unpack
    return unpack(packed, site.weights.bits, site.inputs)


TRITON = "Triton product"

KERNELS = (
    Kernel(
        TRITON,
        ("prefill", "decode"),
        "codes are unpacked in a GPU's registers, as they are stored, for dp4a at up to 3 rows and"
        " for tensor cores at more: of the weight its packed bytes are read, and no copy is made;"
        " sums of any size are exact, and scaled where they are",
        needs_triton,
        _run_triton,
    ),
    Kernel(
        "int8 product",
        ("decode",),
        "the processor's byte products, in C, on int8 codes as they are stored: at 8 rows of"
        " 4096 x 4096 twice as fast as int_mm, and no slower at a single row",
        needs_native_bytes,
        _run_native,
    ),
    Kernel(
        "int_mm",
        ("prefill", "decode"),
        "int8 codes as they are stored, an exact int32 product in torch's own kernel: on a CPU with"
        " AVX512-VNNI 1.7 times as fast as a bf16 linear at 512 rows of 4096 x 4096",
        needs_bytes,
        _run_int_mm,
        "torch",
    ),
    Kernel(
        "packed product",
        ("prefill", "decode"),
        "packed codes go into the processor's byte products out of registers, in C: at a single row"
        " of 4096 x 4096 and 4 bits 3 times as fast as Inductor's fused unpack, and about as fast"
        " as _weight_int4pack_mm_for_cpu, which rounds its sums to bf16; for more than 16 rows they"
        " are unpacked once, in C, for int_mm or, where that is slow, for the product in blocks",
        needs_native,
        _run_native,
    ),
    Kernel(
        "tinygemm (_weight_int4pack_mm)",
        ("prefill", "decode"),
        "4-bit weights on tensor cores; its choice would be by measurement, which was not run",
        needs_tinygemm,
        None,
        "torch",
    ),
    Kernel(
        "_weight_int4pack_mm_for_cpu",
        ("prefill", "decode"),
        "3 times as fast as the fused unpack at a single row of 4096 x 4096",
        needs_int4pack,
        None,
        "torch",
    ),
    Kernel(
        "fused unpack",
        ("decode",),
        "codes are unpacked in the registers of one fused reduction, so that a quarter of bf16's"
        " bytes are read; unpacking to memory first costs ten times as much at a single row",
        needs_fused,
        _run_fused,
    ),
    Kernel(
        "unpack + int_mm",
        ("prefill", "decode"),
        "codes are unpacked to int8 once for all rows of a prefill, whose product then is int_mm's",
        needs_int_mm,
        _run_int_mm,
    ),
    Kernel(
        "torchao int_scaled_matmul",
        ("prefill", "decode"),
        "torchao's integer product, exact on codes of any rule: int_mm, behind which it stands,"
        " with the sums of the weight computed anew at every call; packed codes are unpacked for"
        " it",
        needs_torchao,
        _run_torchao,
        "torchao",
    ),
    Kernel(
        "torchao da8w4_linear_cpu",
        ("prefill", "decode"),
        "torchao's product of int8 activations and packed int4 weights",
        needs_da8w4,
        None,
        "torchao",
    ),
    Kernel(
        "blocked product",
        ("prefill", "decode"),
        "an exact product of int8 codes, unpacked to memory where they are packed, without torch's:"
        " in C for 16 rows at a time where the processor has byte products or there are no more, or"
        " in fp32 for 1024 columns at a time, summed in integers",
        needs_integers,
        _run_int_mm,
    ),
    Kernel(
        "scaled product",
        ("decode",),
        "the product in fp32 for groups and for inputs in float: a row of the weight at a time is"
        " dequantized into the cache of a core, in C, where a copy of all of it takes 4 to 9 times"
        " as long at a single row of 4096 x 4096 and 4 bits",
        needs_scaled,
        _run_scaled,
    ),
    Kernel(
        "dequantize + linear",
        ("prefill", "decode"),
        "the product in float: what is left where no integer product computes what was trained",
        lambda site: None,
        _run_float,
    ),
)
"""Kernels, the preferred ones first."""


@dataclass(frozen=True)
class Choice:
    """The kernel of a site, and why nothing before it in the table runs there."""

    kernel: Kernel
    passed_over: tuple[tuple[str, str], ...]


def choose(site: Site, phase: Phase, kernels: Kernels = "auto") -> Choice:
    """The first kernel of the table that computes ``site`` exactly in this phase.

    Args:
        site: the linear.
        phase: what it is for.
        kernels: ``auto``: the fastest; ``torchao``: one of torchao's, if any can; ``qatc``: none of
            torchao's.
    """
    passed_over: list[tuple[str, str]] = []
    rest = [kernel for kernel in KERNELS if kernel.library != "torchao"]
    first = [kernel for kernel in KERNELS if kernel.library == "torchao"]
    order = {"auto": KERNELS, "torchao": (*first, *rest), "qatc": tuple(rest)}[kernels]
    for kernel in order:
        obstacle = kernel.obstacle(site)
        if phase not in kernel.phases:
            obstacle = f"it is for {' and '.join(kernel.phases)} only"
        if obstacle is None:
            return Choice(kernel, tuple(passed_over))
        passed_over.append((kernel.name, obstacle))
    raise AssertionError("the last kernel applies everywhere")
