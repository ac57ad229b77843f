"""Steps of the C program by themselves, against the numerics that they are to compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qatc.numerics.hadamard import cosine_transform, turn
from qatc.numerics.minmax import quantize
from qatc.recipe.spec import QuantSpec
from qatc.runtime import program
from qatc.runtime.program import Op, Steps

pytestmark = pytest.mark.skipif(program.obstacle() is not None, reason="no C compiler")

HEAD = 64
"""Bytes before the codes: the scale, the sum of the codes, and nothing."""


@pytest.mark.parametrize("rounding", ["division", "reciprocal"])
@pytest.mark.parametrize("range_", ["restricted", "full", "signed"])
@pytest.mark.parametrize("size", [3.0, 1e-5, 2.0**-23 * 100, 2.0**-118, 2.0**-120, 2.0**-140, 0.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_quantize(seed: int, size: float, range_: Any, rounding: Any) -> None:
    """Also of rows as small as a scale can be, and smaller; the largest of either sign."""
    if range_ == "signed" and rounding == "reciprocal":
        pytest.skip("no recipe has both")
    spec = QuantSpec(8, range=range_, rounding=rounding)
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * size
    x[7] = 4 * size if seed else -4 * size
    kind = 2 if range_ == "signed" else int(rounding == "reciprocal")
    out = torch.full((HEAD + 40 + 512,), 77, dtype=torch.uint8)
    steps = Steps(threads=1)
    steps.emit(
        Op.QUANTIZE, steps.tensor(out), a=steps.tensor(x), cols=40, f0=spec.steps,
        i0=spec.code_min, i1=spec.code_max, kind=kind,
    )  # fmt: skip
    steps.finish()([])
    codes, scale = quantize(x, spec)
    assert torch.equal(out[HEAD : HEAD + 40].view(torch.int8), codes)
    assert out[:4].view(torch.float32).item() == scale.item()
    assert out[4:8].view(torch.int32).item() == int(codes.int().sum())
    assert not out[HEAD + 40 :].any()


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("size", [1, 2, 43, 64, 172, 1536])
def test_hadamard(size: int, rounds: bool) -> None:
    power = size & -size
    x = torch.randn((3, size), generator=torch.Generator().manual_seed(0))
    out = torch.full((3, size), torch.nan)
    steps = Steps(threads=1)
    steps.emit(
        Op.HADAMARD, steps.tensor(out), a=steps.tensor(x),
        b=steps.tensor(cosine_transform(size // power).float()), rows=power, cols=size // power,
        i0=3, rounds=rounds,
    )  # fmt: skip
    steps.finish()([])
    if rounds:
        assert torch.equal(out, out.bfloat16().float())
    tolerance = 2**-8 if rounds else 1e-6
    torch.testing.assert_close(out, turn(x.double()).float(), rtol=tolerance, atol=1e-5)
