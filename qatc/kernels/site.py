"""A linear that is to be lowered, and what can stand in the way of a kernel there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatc.kernels import integer_linear, native, torchao_linear
from qatc.kernels.gpu import launch, products
from qatc.numerics import packing
from qatc.recipe.spec import QuantSpec

Library = Literal["qatc", "torch", "torchao"]
"""Whose kernel it is."""

Kernels = Literal["auto", "torchao", "qatc"]
"""Which kernels are preferred: the fastest, torchao's where one can run, or none of torchao's."""

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


def needs_integers(site: Site) -> str | None:
    if not site.activations.quantizes:
        return "its input is not quantized"
    if site.weights.group_size or site.activations.group_size:
        return "groups have several scales in one sum"
    if site.inputs > integer_linear.largest_width(site.activations):
        return f"an int32 does not hold the sum of {site.inputs} products"
    return None


def needs_int8(site: Site) -> str | None:
    bits = site.weights.bits
    return None if bits == 8 else f"{bits} bits are not stored as int8"


def needs_cpu(site: Site) -> str | None:
    return None if site.device == "cpu" else f"it is C for a CPU, and this is {site.device}"


def needs_no_zero(site: Site) -> str | None:
    return "its inputs have a zero point" if site.activations.affine else None


def needs_triton(site: Site) -> str | None:
    obstacle = launch.obstacle(site.device) or needs_integers(site) or needs_no_zero(site)
    return obstacle or products.width_obstacle(site.inputs, site.weights.bits)


def needs_fused(site: Site) -> str | None:
    of_input = 2 ** (site.activations.bits - (0 if site.activations.affine else 1))
    largest = site.inputs * of_input * 2**site.weights.bits
    if len(packing.PLANES[site.weights.bits]) > 1 or site.weights.bits == 8:
        return f"{site.weights.bits} bits are not stored in one plane of nibbles or pairs"
    if site.inputs % (8 // site.weights.bits):
        return f"rows of {site.inputs} codes do not fill their bytes"
    if largest > integer_linear.EXACT_FP32:
        return f"fp32 does not hold the sum of {site.inputs} products exactly"
    return needs_integers(site)


def needs_native(site: Site) -> str | None:
    if site.weights.bits == 8:
        return "8 bits are not packed"
    return needs_cpu(site) or needs_integers(site) or native.obstacle()


def needs_native_bytes(site: Site) -> str | None:
    obstacle = needs_int8(site) or needs_cpu(site)
    if obstacle is None and site.inputs > native.MAX_WIDTH:
        return f"an int32 does not hold the sum of {site.inputs} products with unsigned codes"
    return obstacle or needs_integers(site) or native.obstacle(parallel=True)


def needs_scaled(site: Site) -> str | None:
    obstacle = needs_cpu(site)
    if obstacle is None and site.inputs > native.MAX_WIDTH:
        return f"a row of {site.inputs} weights in float is too much for a thread's stack"
    return obstacle or native.obstacle(parallel=True)


def needs_tinygemm(site: Site) -> str | None:
    if site.weights.bits != 4 or site.device != "cuda":
        return f"it is for 4 bits on cuda, and this is {site.weights.bits} on {site.device}"
    if site.activations.quantizes:
        return "it rounds the sums of int8 codes to bf16 before they can be scaled"
    return "its weights have a layout of their own, which was not tried: no GPU was at hand"


def needs_int4pack(site: Site) -> str | None:
    if site.weights.bits != 4 or site.device != "cpu":
        return f"it is for 4 bits on a CPU, and this is {site.weights.bits} on {site.device}"
    if not site.activations.quantizes:
        return "it rounds its sums to bf16, or is a loop over scalars for inputs in fp32"
    return "it rounds the sums of int8 codes to bf16 before they can be scaled"


def needs_torchao(site: Site) -> str | None:
    if site.inputs < 2 or site.inputs > torchao_linear.LARGEST_WIDTH:
        return f"it does not take rows of {site.inputs} codes"
    obstacle = needs_integers(site) or needs_no_zero(site)
    return obstacle or torchao_linear.obstacle(site.device)


def needs_da8w4(site: Site) -> str | None:
    if site.weights.bits != 4 or site.device != "cpu":
        return f"it is for 4 bits on a CPU, and this is {site.weights.bits} on {site.device}"
    if not site.activations.quantizes:
        return "its input is not quantized"
    return torchao_linear.da8w4_obstacle()


def needs_bytes(site: Site) -> str | None:
    return needs_int8(site) or needs_int_mm(site)


def needs_int_mm(site: Site) -> str | None:
    return needs_integers(site) or integer_linear.obstacle(site.device)
