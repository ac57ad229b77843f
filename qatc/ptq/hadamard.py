"""Orthogonal matrices that spread a large value over all channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """An orthogonal, symmetric-in-spread matrix of any size, fp64 ``[size, size]``.

    For a power of two it is Sylvester's Hadamard matrix over the root of its size. Else it is the
    Kronecker product of the largest one that divides the size and the orthonormal discrete cosine
    transform (type II) of the odd factor that is left.
    """
    odd = size // (size & -size)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range((size // odd).bit_length() - 1):
        matrix = torch.kron(matrix, pair)
    return torch.kron(matrix, _cosine_transform(odd))


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """:func:`hadamard` with rows of random sign: ``diag(signs) @ hadamard(size)``."""
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * hadamard(size)


def _cosine_transform(size: int) -> Tensor:
    numbers = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (numbers + 0.5).outer(numbers)) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix
