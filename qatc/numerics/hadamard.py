"""Orthogonal matrices that spread a large value over all channels, and how rows are turned by them.

``torch.ops.qatc.hadamard`` is what the passes insert. It is opaque to Inductor: two products with
small constant matrices, which nothing around them could be fused with.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of any size whose entries are alike in magnitude, fp64 ``[size, size]``.

    For a power of two it is Sylvester's Hadamard matrix over the root of its size. Else it is the
    Kronecker product of the largest one that divides the size and the orthonormal discrete cosine
    transform (type II) of the odd factor that is left.
    """
    power = size & -size
    return torch.kron(_sylvester(power), cosine_transform(size // power))


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """:func:`hadamard` with rows of random sign: ``diag(signs) @ hadamard(size)``."""
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * hadamard(size)


def cosine_transform(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II), fp64 ``[size, size]``."""
    numbers = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (numbers + 0.5).outer(numbers)) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def turn(x: Tensor, *, inverse: bool = False) -> Tensor:
    """``x @ hadamard(K)``, or with ``inverse`` ``x @ hadamard(K).T``, which undoes it.

    The matrix is a Kronecker product of two of about the root of K, so that a row, seen as a matrix
    ``[a, b]``, is multiplied by one on either side: K (a + b) products in the place of K^2.

    Args:
        x: float ``[..., K]``; computed in fp32, or fp64 if it is that, and rounded once.
        inverse: turn back.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    left, right = _factors(x.shape[-1], dtype, x.device)
    if inverse:
        left, right = left.t(), right.t()
    values = x.to(dtype).unflatten(-1, (len(left), len(right)))
    turned: Tensor = (left.t() @ (values @ right)).flatten(-2)
    return turned.to(x.dtype).contiguous()


@functools.lru_cache(maxsize=64)
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices ``[a, a]`` and ``[b, b]`` whose Kronecker product is :func:`hadamard`."""
    power = size & -size
    left = min(power, 1 << round(math.log2(size) / 2))
    right = torch.kron(_sylvester(power // left), cosine_transform(size // power))
    return _sylvester(left).to(device, dtype), right.to(device, dtype)


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(matrix, pair)
    return matrix


_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor x, bool inverse=False) -> Tensor")
_LIBRARY.impl(
    "hadamard", lambda x, inverse=False: turn(x, inverse=inverse), "CompositeExplicitAutograd"
)
torch.library.register_fake(
    "qatc::hadamard", lambda x, inverse=False: x.new_empty(x.shape), lib=_LIBRARY
)

HADAMARD = torch.ops.qatc.hadamard.default
"""``(x [..., K], inverse=False) -> x-like``: :func:`turn` as an op, differentiable in x."""


def _note(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return HADAMARD(gradient, not ctx.inverse), None


torch.library.register_autograd("qatc::hadamard", _backward, setup_context=_note, lib=_LIBRARY)
