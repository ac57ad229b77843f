"""The Hadamard transform against matrices in fp64 that are made in another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qatc.graph.compilation import compile_graph, obstacle
from qatc.numerics.hadamard import HADAMARD, turn

SIZES = [1, 2, 3, 12, 43, 64, 88, 172, 1536]


def matrix(size: int) -> Tensor:
    """Signs by parity, cosines by their formula."""
    power = size & -size
    odd = size // power
    rows = torch.arange(size)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(power)] for i in range(power)]
    cosines = [
        [
            math.sqrt((2 if j else 1) / odd) * math.cos(math.pi * (i + 0.5) * j / odd)
            for j in range(odd)
        ]
        for i in range(odd)
    ]
    one, other = (torch.tensor(part, dtype=torch.float64) for part in (signs, cosines))
    high, low = rows // odd, rows % odd
    return one[high][:, high] / math.sqrt(power) * other[low][:, low]


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_rows_times_a_matrix_that_spreads_them(size: int) -> None:
    x = values(2, 3, size)
    wanted = x.double() @ matrix(size)
    torch.testing.assert_close(turn(x).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn(x.double()), wanted, rtol=1e-12, atol=1e-12)
    back = turn(turn(x.double()), inverse=True)
    torch.testing.assert_close(back, x.double(), rtol=1e-12, atol=1e-12)
    outlier = torch.zeros(size)
    outlier[size // 2] = 100
    assert float(turn(outlier).abs().max()) <= 100 * math.sqrt(2 / size) + 1e-4


def test_a_result_is_rounded_once() -> None:
    x = values(5, 96).bfloat16()
    assert torch.equal(turn(x), turn(x.float()).bfloat16())
    assert turn(values(0, 4, 12)).shape == (0, 4, 12)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_is_differentiable_and_sound(inverse: bool) -> None:
    x = values(3, 4, 24).transpose(0, 1).requires_grad_()
    torch.library.opcheck(HADAMARD, (x, inverse))
    double = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: HADAMARD(x, inverse), (double,))


@pytest.mark.skipif(obstacle() is not None, reason="no compiler")
def test_compiled_in_a_graph() -> None:
    def between(x: Tensor) -> Tensor:
        return HADAMARD(x * 2).amax(-1)

    x = values(4, 5, 48)
    torch.testing.assert_close(compile_graph(between)(x), between(x))
