"""What runs a lowered linear: a table of kernels, and the op that picks from it.

``torch.ops.qatc.packed_linear`` takes an activation and a weight stored as packed codes, and runs
the kernel whose name it was given, one for prefill and one for decode (a single token of every
row). :data:`KERNELS` is the table from which :func:`choose` takes the first entry that applies;
every entry says why it stands where it does, and what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qatc.kernels import integer_linear, native, products
from qatc.numerics import minmax, packing
from qatc.recipe.spec import QuantSpec, read_spec_arg

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Site:
    """A linear that is to be lowered.

    Attributes:
        weights: bits, range and groups of its weight.
        activations: those of its input; 16 bits for an input that stays in float.
        outputs, inputs: the shape of its weight ``[N, K]``.
        device: ``cpu`` or ``cuda``.
    """

    weights: QuantSpec
    activations: QuantSpec
    outputs: int
    inputs: int
    device: str


@dataclass(frozen=True)
class Kernel:
    """One way to compute a lowered linear.

    Attributes:
        name: what a graph and a report call it.
        phases: when it may run.
        reason: why it is preferred to what comes after it in the table.
        obstacle: why it cannot run at a site, or None if it can.
        run: ``(x, packed, scale, bias, site) -> [..., N]``; None for a kernel that has an obstacle
            everywhere, and stands in the table so that a report can say which.
    """

    name: str
    phases: tuple[Phase, ...]
    reason: str
    obstacle: Callable[[Site], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, Site], Tensor] | None


def _needs_integers(site: Site) -> str | None:
    if not site.activations.quantizes:
        return "its input is not quantized"
    if site.weights.group_size or site.activations.group_size:
        return "groups have several scales in one sum"
    if site.inputs > integer_linear.LARGEST_WIDTH:
        return f"an int32 does not hold the sum of {site.inputs} products"
    return None


def _needs_int8(site: Site) -> str | None:
    bits = site.weights.bits
    return None if bits == 8 else f"{bits} bits are not stored as int8"


def _needs_cpu(site: Site) -> str | None:
    return None if site.device == "cpu" else f"it is C for a CPU, and this is {site.device}"


def _needs_fused(site: Site) -> str | None:
    largest = site.inputs * 2 ** (site.activations.bits - 1) * 2**site.weights.bits
    if len(packing.PLANES[site.weights.bits]) > 1 or site.weights.bits == 8:
        return f"{site.weights.bits} bits are not stored in one plane of nibbles or pairs"
    if site.inputs % (8 // site.weights.bits):
        return f"rows of {site.inputs} codes do not fill their bytes"
    if largest > integer_linear.EXACT_FP32:
        return f"fp32 does not hold the sum of {site.inputs} products exactly"
    return _needs_integers(site)


def _needs_native(site: Site) -> str | None:
    if site.weights.bits == 8:
        return "8 bits are not packed"
    return _needs_cpu(site) or _needs_integers(site) or native.obstacle()


def _needs_native_bytes(site: Site) -> str | None:
    obstacle = _needs_int8(site) or _needs_cpu(site)
    if obstacle is None and site.inputs > native.MAX_WIDTH:
        return f"an int32 does not hold the sum of {site.inputs} products with unsigned codes"
    return obstacle or _needs_integers(site) or native.obstacle(parallel=True)


def _needs_scaled(site: Site) -> str | None:
    obstacle = _needs_cpu(site)
    if obstacle is None and site.inputs > native.MAX_WIDTH:
        return f"a row of {site.inputs} weights in float is too much for a thread's stack"
    return obstacle or native.obstacle(parallel=True)


def _needs_tinygemm(site: Site) -> str | None:
    if site.weights.bits != 4 or site.device != "cuda":
        return f"it is for 4 bits on cuda, and this is {site.weights.bits} on {site.device}"
    if site.activations.quantizes:
        return "it rounds the sums of int8 codes to bf16 before they can be scaled"
    return "its weights have a layout of their own, which was not tried: no GPU was at hand"


def _needs_int4pack(site: Site) -> str | None:
    if site.weights.bits != 4 or site.device != "cpu":
        return f"it is for 4 bits on a CPU, and this is {site.weights.bits} on {site.device}"
    if not site.activations.quantizes:
        return "it takes inputs and scales in bf16 only, and rounds its sums to it"
    return "it rounds the sums of int8 codes to bf16 before they can be scaled"


def _needs_bytes(site: Site) -> str | None:
    return _needs_int8(site) or _needs_int_mm(site)


def _needs_int_mm(site: Site) -> str | None:
    return _needs_integers(site) or integer_linear.obstacle(site.device)


def _run_int_mm(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    codes = packing.unpack(packed, site.weights.bits, site.inputs)
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), site.activations)
    sums = integer_linear.int_mm(x_codes, codes)
    return _scaled(sums, x, x_scale, scale, bias, site)


def _scaled(
    sums: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    product = integer_linear.scale_sums(sums, x_scale, scale, bias, x.dtype)
    return product.view(*x.shape[:-1], site.outputs)


def _run_native(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), site.activations)
    sums = products.packed_mm(x_codes, packed, site.weights.bits)
    return _scaled(sums, x, x_scale, scale, bias, site)


def _run_fused(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Unpack inside the reduction: every byte of the weight is read once, and nothing is written.

    The codes enter unsigned, and what that adds to the sum is taken off afterwards; all partial
    sums are integers that fp32 holds. Several rows would unpack them anew for each.
    """
    if any(size != 1 for size in x.shape[:-1]):
        return _run_int_mm(x, packed, scale, bias, site)
    x_codes, x_scale = minmax.quantize(x.flatten(0, -2), site.activations)
    pieces = packing.parts(packed, site.weights.bits, site.inputs)
    assert pieces is not None, "checked by the table"
    values = x_codes.float()
    cut = values.unsqueeze(-2).chunk(len(pieces), -1)
    products = [piece.float() * part for piece, part in zip(pieces, cut, strict=True)]
    offset = 1 << (site.weights.bits - 1)
    total = sum(products[1:], products[0]).sum(-1) - offset * values.sum(-1, keepdim=True)
    return _scaled(total, x, x_scale, scale, bias, site)


def _run_scaled(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site
) -> Tensor:
    """The very values of :func:`_run_float`, summed in fp32."""
    values = minmax.fake_quantize(x, site.activations).flatten(0, -2)
    product = products.scaled_mm(values, packed, scale, site.weights.bits)
    product = product if bias is None else product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], site.outputs)


def _run_float(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    in_c = site.device == "cpu" and site.weights.bits < 8 and native.obstacle() is None
    unpack = products.unpack if in_c else packing.unpack
    codes = unpack(packed, site.weights.bits, site.inputs)
    weight = minmax.dequantize(codes, scale, x.dtype)
    return F.linear(minmax.fake_quantize(x, site.activations), weight, bias)


KERNELS = (
    Kernel(
        "int8 product",
        ("decode",),
        "the processor's byte products, in C, on int8 codes as they are stored: at 8 rows of"
        " 4096 x 4096 twice as fast as int_mm, and no slower at a single row",
        _needs_native_bytes,
        _run_native,
    ),
    Kernel(
        "int_mm",
        ("prefill", "decode"),
        "int8 codes as they are stored, an exact int32 product in torch's own kernel: on a CPU with"
        " AVX512-VNNI 1.7 times as fast as a bf16 linear at 512 rows of 4096 x 4096",
        _needs_bytes,
        _run_int_mm,
    ),
    Kernel(
        "packed product",
        ("prefill", "decode"),
        "packed codes go into the processor's byte products out of registers, in C: at a single row"
        " of 4096 x 4096 and 4 bits 3 times as fast as Inductor's fused unpack, and about as fast"
        " as _weight_int4pack_mm_for_cpu, which rounds its sums to bf16; for more than 16 rows they"
        " are unpacked once, in C, for int_mm or, where that is slow, for the product in blocks",
        _needs_native,
        _run_native,
    ),
    Kernel(
        "tinygemm (_weight_int4pack_mm)",
        ("prefill", "decode"),
        "4-bit weights on tensor cores; its choice would be by measurement, which was not run",
        _needs_tinygemm,
        None,
    ),
    Kernel(
        "_weight_int4pack_mm_for_cpu",
        ("prefill", "decode"),
        "3 times as fast as the fused unpack at a single row of 4096 x 4096",
        _needs_int4pack,
        None,
    ),
    Kernel(
        "fused unpack",
        ("decode",),
        "codes are unpacked in the registers of one fused reduction, so that a quarter of bf16's"
        " bytes are read; unpacking to memory first costs ten times as much at a single row",
        _needs_fused,
        _run_fused,
    ),
    Kernel(
        "unpack + int_mm",
        ("prefill", "decode"),
        "codes are unpacked to int8 once for all rows of a prefill, whose product then is int_mm's",
        _needs_int_mm,
        _run_int_mm,
    ),
    Kernel(
        "blocked product",
        ("prefill", "decode"),
        "an exact product of int8 codes, unpacked to memory where they are packed, without torch's:"
        " in C for 16 rows at a time where the processor has byte products or there are no more, or"
        " in fp32 for 1024 columns at a time, summed in integers",
        _needs_integers,
        _run_int_mm,
    ),
    Kernel(
        "scaled product",
        ("decode",),
        "the product in fp32 for groups and for inputs in float: a row of the weight at a time is"
        " dequantized into the cache of a core, in C, where a copy of all of it takes 4 to 9 times"
        " as long at a single row of 4096 x 4096 and 4 bits",
        _needs_scaled,
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


def choose(site: Site, phase: Phase) -> Choice:
    """The first kernel of the table that computes ``site`` exactly in this phase."""
    passed_over: list[tuple[str, str]] = []
    for kernel in KERNELS:
        obstacle = kernel.obstacle(site)
        if phase not in kernel.phases:
            obstacle = f"it is for {' and '.join(kernel.phases)} only"
        if obstacle is None:
            return Choice(kernel, tuple(passed_over))
        passed_over.append((kernel.name, obstacle))
    raise AssertionError("the last kernel applies everywhere")


_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int inputs, str x_spec,"
    " str weight_spec, *, str prefill, str decode) -> Tensor"
)


def _packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inputs: int,
    x_spec: str,
    weight_spec: str,
    *,
    prefill: str,
    decode: str,
) -> Tensor:
    weights, activations = read_spec_arg(weight_spec), read_spec_arg(x_spec)
    site = Site(weights, activations, packed.shape[0], inputs, x.device.type)
    kernel = _BY_NAME[decode if x.shape[-2] == 1 else prefill]
    assert kernel.run is not None, f"{kernel.name} has an obstacle everywhere"
    return kernel.run(x, packed, scale, bias, site)


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeImplicitAutograd")


def site_of(node: Node, device: str) -> Site:
    """The site at a ``packed_linear`` node of a graph for ``device``."""
    _, packed, _, _, inputs, x_spec, weight_spec = node.args
    return Site(
        read_spec_arg(str(weight_spec)),
        read_spec_arg(str(x_spec)),
        int(packed.meta["val"].shape[0]),  # type: ignore[union-attr]
        inputs,  # type: ignore[arg-type]
        device,
    )


PACKED_LINEAR = torch.ops.qatc.packed_linear.default
"""``(x [..., K], packed [N, bytes], scale [N, G], bias, K, x_spec, weight_spec, *, prefill,
decode) -> [..., N]``: a linear on a weight that is stored as packed codes."""
