"""AdamW on plain tensors: moments in fp32 or 8 bits, parameters in fp32 or bf16.

What does not fit is rounded *stochastically*: up or down with the probabilities that make the mean
exact, so that updates far below half a unit of bf16 are not lost, but taken now and then. Chance is
a hash of step, parameter and the element's index in the whole parameter: neither the number of
processes that share a parameter by rows nor an interruption changes a bit.

Moments in 8 bits (after Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861) have one fp32 scale for a block of at most 256 neighbours in one row, so that a shard of
rows has whole blocks. A code is the 127th part of a square root (first moment, with a sign) or the
255th part of a fourth root (second moment): many levels where most values are, near zero.

The functions take one row of ``elements`` a block, and scalars as tensors without dimensions, so
that a compiled one serves every step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
EPSILON = 1e-8
LONGEST_BLOCK, SHORTEST_BLOCK = 256, 32

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Scalars:
    """What one update of a parameter has besides tensors: 0-dimensional ones, on the CPU.

    Attributes:
        rate: learning rate, fp64.
        first, second: the corrections ``1 - beta**step`` of both moments, fp64.
        low, high: two 32-bit words of chance, int64, see :func:`words`.
    """

    rate: Tensor
    first: Tensor
    second: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, rate: float, step: int, name: str, seed: int = 0) -> Scalars:
        """Those of a step, from 1, of the parameter of this name."""
        moments = (1 - beta**step for beta in BETAS)
        floats = (torch.tensor(value, dtype=torch.float64) for value in (rate, *moments))
        return cls(*floats, *map(torch.tensor, words(step, name, seed)))


def words(step: int, name: str, seed: int) -> tuple[int, int]:
    """Two 32-bit words that decide how a step rounds a parameter."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_bits(index: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """32 random bits for each index, int64; no product leaves 63 bits, so that none overflows."""
    bits = (index + low) & _WORD
    bits = ((bits ^ (bits >> 16)) * 0x2C1B3C6D) & _WORD
    bits = bits ^ high
    bits = ((bits ^ (bits >> 12)) * 0x297A2D39) & _WORD
    return bits ^ (bits >> 15)


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 rounded up or down to bf16, by the lower 16 of some random bits; its mean is ``x``.

    Infinities and what is no number stay.
    """
    raised = (x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)) & -0x10000
    return raised.view(torch.float32).where(x.isfinite(), x).to(torch.bfloat16)


def encode(x: Tensor, bits: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales fp32 ``[N, 1]`` of a moment fp32 ``[N, block]``; its mean is ``x``.

    Args:
        x: the moment.
        bits: random, of which the lower 16 decide.
        signed: whether it is the first moment. The second, which is divided by, is rounded up where
            it would be 0.
    """
    size = x.abs()
    scale = size.amax(-1, keepdim=True)
    share = size / scale.where(scale > 0, 1)
    levels = 127 if signed else 255
    below = ((share.sqrt() if signed else share.sqrt().sqrt()) * levels).floor()
    below = below.clamp(max=levels - 1)
    low, high = (_power((below + i) / levels, signed) for i in (0, 1))
    chance = ((bits & 0xFFFF) + 0.5) / 65536
    code = below + ((share - low) / (high - low) > chance)
    if signed:
        return (x.sign() * code + 128).to(torch.uint8), scale
    return code.clamp(min=1).where(x > 0, 0).to(torch.uint8), scale


def decode(code: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The moment fp32 ``[N, block]`` of codes and scales."""
    if signed:
        share = (code.float() - 128) / 127
        return share * share.abs() * scale
    return _power(code.float() / 255, signed) * scale


def _power(root: Tensor, signed: bool) -> Tensor:
    square = root * root
    return square if signed else square * square


def update_float(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    factor: Tensor,
    start: Tensor,
    *scalars: Tensor,
) -> None:
    """One step, in place, with moments in fp32.

    Args:
        parameter, gradient: ``[elements]`` of any float dtype.
        mean, square: the moments, fp32 ``[elements]``.
        factor: of the gradient, fp32 scalar.
        start: index of the first element in the whole parameter, int64 scalar.
        scalars: those of :class:`Scalars`, in order.
    """
    *rates, low, high = scalars
    found = _moments(gradient.float() * factor, mean, square)
    bits = _bits(parameter, start, low, high)
    for into, value in zip((mean, square), found, strict=True):
        into.copy_(value)
    _move(parameter, *found, bits, *rates)


def update_coded(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    mean_scale: Tensor,
    square_scale: Tensor,
    factor: Tensor,
    start: Tensor,
    *scalars: Tensor,
) -> None:
    """One step, in place, with moments in 8 bits.

    Args:
        parameter, gradient: ``[N, block]`` of any float dtype.
        mean, square: codes of the moments, uint8 ``[N, block]``.
        mean_scale, square_scale: fp32 ``[N, 1]``.
        factor, start, scalars: as of :func:`update_float`.
    """
    *rates, low, high = scalars
    before = decode(mean, mean_scale, True), decode(square, square_scale, False)
    found = _moments(gradient.float() * factor, *before)
    bits = _bits(parameter, start, low, high)
    other = _bits(parameter, start, high, low)
    codes = encode(found[0], other, True), encode(found[1], other >> 16, False)
    for into, value in zip((mean, mean_scale, square, square_scale), sum(codes, ()), strict=True):
        into.copy_(value)
    _move(parameter, *found, bits, *rates)


def _moments(gradient: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    first, second = BETAS
    return (
        mean + (1 - first) * (gradient - mean),
        second * square + (1 - second) * gradient * gradient,
    )


def _bits(parameter: Tensor, start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    count = parameter.numel()
    index = torch.arange(count, device=parameter.device).view(parameter.shape) + start
    return random_bits(index, low, high)


def _move(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    bits: Tensor,
    rate: Tensor,
    first: Tensor,
    second: Tensor,
) -> None:
    moved = parameter.float() - (rate / first) * mean / ((square / second).sqrt() + EPSILON)
    if parameter.dtype is torch.bfloat16:
        parameter.copy_(round_to_bfloat16(moved, bits))
    else:
        parameter.copy_(moved)


def block_of(shape: torch.Size) -> int | None:
    """Elements that share a scale in the moments of a parameter; None for moments in fp32.

    A block divides the rows of the whole parameter, so that rows can be shared out anyhow. Small
    parameters, and those whose rows have no such block, have moments in fp32.
    """
    if len(shape) < 2 or shape.numel() < 4096:
        return None
    row = shape.numel() // shape[0]
    fits = (n for n in range(min(LONGEST_BLOCK, row), SHORTEST_BLOCK - 1, -1) if row % n == 0)
    return next(fits, None)
