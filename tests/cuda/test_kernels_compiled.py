"""The Triton kernels as machine code for GPUs that are not here."""

from __future__ import annotations

import re

import pytest

from benchmarks.cuda_kernels import CAPABILITIES, Case, Compiled, cases, compile_case
from qatc.kernels.gpu import launch

pytestmark = [
    pytest.mark.skipif(
        not launch.has_triton(), reason="triton is not installed: make test-cuda installs it"
    ),
    pytest.mark.parametrize("capability", CAPABILITIES),
]

PRODUCTS = [case for case in cases() if case.module == "product_kernels"]


def compiled(case: Case, capability: int) -> Compiled:
    return compile_case(case.name, capability)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_nothing_is_spilled_or_approximate(case: Case, capability: int) -> None:
    got = compiled(case, capability)
    assert got.spilled == 0 and got.registers <= 192
    assert got.shared <= 99 * 1024  # all that GPUs of capability 8.6 and 8.9 have for a program
    assert not re.search(r"div\.(full|approx)|rcp\.approx", got.ptx)
    assert ".ftz" not in got.ptx or case.module != "product_kernels"


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_products_are_those_of_bytes_and_scaled_in_order(case: Case, capability: int) -> None:
    got = compiled(case, capability)
    if case.kernel == "gemv":
        assert re.search(r"dp4a\.[su]32\.s32", got.ptx) and got.instructions["IDP"] >= 16
    else:
        on_hopper = capability >= 90 and case.constants["BLOCK_M"] >= 64
        unit = "wgmma.mma_async.sync.aligned" if on_hopper else "mma.sync.aligned"
        assert re.search(rf"{re.escape(unit)}\S*\.s32\.s8\.s8", got.ptx), got.ptx
    assert "cvt.rn.bf16" in got.ptx
    # GPUs without a sum of two bf16 numbers have it as a * 1 + b, of the same bits.
    assert not got.instructions.get("FFMA") and not re.search(r"fma\.(?!rn\.bf16)", got.ptx)
    assert "mul.rn.f32" in got.ptx and "add.rn.f32" in got.ptx


@pytest.mark.parametrize(
    "case", [case for case in cases() if "tiles" in case.kernel], ids=lambda case: case.name
)
def test_heads_that_share_keys_are_multiplied_by_tensor_cores(case: Case, capability: int) -> None:
    got = compiled(case, capability)
    assert re.search(r"mma\.sync\.aligned\S*\.f32\.bf16\.bf16\.f32", got.ptx)
    assert got.instructions["HMMA"] >= 64


@pytest.mark.parametrize("bits", (4, 8))
def test_bytes_of_the_weight_come_sixteen_at_a_time(bits: int, capability: int) -> None:
    """A thread's load is one of a whole line where the sizes allow it."""
    names = {case.name: case for case in PRODUCTS}
    for more in ("", ", 3 weights"):
        got = compiled(names[f"W{bits}A8 gemv, 1 row{more}"], capability)
        assert got.ptx.count("ld.global.v4.b32") >= 4
        got = compiled(names[f"W{bits}A8 gemm, 16 rows{more}"], capability)
        assert re.search(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10", got.ptx)
