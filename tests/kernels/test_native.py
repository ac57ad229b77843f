"""The C library: exact at any size, and absent without harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc.kernels import native, products
from qatc.machine.toolchain import compilers
from qatc.numerics import packing

built = pytest.mark.skipif(not compilers(), reason="no C compiler")


@built
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 40), outputs=st.integers(1, 9), width=st.integers(1, 200),
    bits=st.integers(2, 8), extreme=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_products_are_exact(
    rows: int, outputs: int, width: int, bits: int, extreme: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (outputs, width), generator=generator, dtype=torch.int8)
    x = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    if extreme:
        codes, x = torch.full_like(codes, high if seed % 2 else low), torch.full_like(x, -128)
    packed = packing.pack(codes, bits)
    if bits < 8:
        assert torch.equal(native.unpack(packed, bits, width), codes)
    wanted = x.double() @ codes.double().t()
    assert torch.equal(products.packed_mm(x, packed, bits).double(), wanted)
    few = x[: native.MAX_ROWS]
    found = native.packed_product(few, packed, bits)
    assert torch.equal(found.double(), wanted[: native.MAX_ROWS])


@built
@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 20), outputs=st.integers(1, 9), groups=st.integers(1, 5),
    group=st.integers(1, 70), bits=st.integers(2, 8), seed=st.integers(0, 999),
)  # fmt: skip
def test_scaled_products(
    rows: int, outputs: int, groups: int, group: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, half = groups * group, 1 << (bits - 1)
    codes = torch.randint(-half, half, (outputs, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, groups, generator=generator).bfloat16().float()
    weight = (codes.double().unflatten(1, (groups, group)) * scale.double().unsqueeze(-1)).flatten(
        1
    )
    packed = packing.pack(codes, bits)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        values = weight if dtype is torch.float32 else weight.float().bfloat16().double()
        magnitude = x.double().abs() @ values.abs().t()
        got = products.scaled_mm(x, packed, scale.to(dtype).float(), bits).double()
        wanted = x.double() @ values.t()
        assert ((got - wanted).abs() <= 3e-7 * (width**0.5) * magnitude.clamp(min=1e-3)).all()


@built
def test_the_largest_sum_of_bytes_is_exact() -> None:
    codes, x = (torch.full((1, native.MAX_WIDTH), v, dtype=torch.int8) for v in (127, -128))
    for own in (codes, -codes - 1):
        for other in (x, -x - 1):
            wanted = int(own[0, 0]) * int(other[0, 0]) * native.MAX_WIDTH
            assert native.packed_product(other, own, 8).item() == wanted


@pytest.mark.parametrize("name", ["packed_mm", "scaled_mm", "unpack"])
def test_the_ops_are_what_their_schemas_say(name: str) -> None:
    packed, x = packing.pack(torch.randint(-4, 4, (5, 24), dtype=torch.int8), 3), torch.ones(2, 24)
    arguments = {
        "packed_mm": (x.to(torch.int8), packed, 3),
        "scaled_mm": (x, packed, torch.ones(5, 3), 3),
        "unpack": (packed, 3, 24),
    }[name]
    torch.library.opcheck(getattr(torch.ops.qatc, name).default, arguments)


def test_without_a_library_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-8, 8, (5, 33), dtype=torch.int8)
    x = torch.full((2, 33), -127, dtype=torch.int8)
    monkeypatch.setattr(native, "library", lambda: None)
    packed, wanted = packing.pack(codes, 4), x.double() @ codes.double().t()
    assert torch.equal(products.packed_mm(x, packed, 4).double(), wanted)
    scale = torch.full((5, 3), 0.5)
    assert torch.equal(products.scaled_mm(x.float(), packed, scale, 4).double(), wanted / 2)
    assert torch.equal(products.unpack(packed, 4, 33), codes)


def test_what_stands_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "compilers", lambda: ["/usr/bin/cc"])
    assert native.obstacle() == "the C compiler here cannot build it"
    monkeypatch.setattr(native.PACKED, "failure", "cc: no such thing")
    assert native.obstacle() == "the C compiler here cannot build it (cc: no such thing)"
    monkeypatch.setattr(native, "compilers", list)
    assert native.obstacle() == "there is no C compiler here"


@built
def test_nothing_is_left_to_the_compiler(tmp_path: Path) -> None:
    """Built so that what C leaves undefined, as shifts of negative numbers, ends the process."""
    checks = "-fsanitize=undefined -fsanitize-undefined-trap-on-error"
    program = (
        "import torch\nfrom qatc.kernels import native\nfrom qatc.numerics import packing\n"
        "if native.library() is None:\n    raise SystemExit(77)\n"
        "for bits in range(2, 9):\n"
        "    for width in (1, 13, 64):\n"
        "        for value in (-128, 127):\n"
        "            x = torch.full((2, width), value, dtype=torch.int8)\n"
        "            low = -(1 << (bits - 1))\n"
        "            codes = torch.full((3, width), low, dtype=torch.int8)\n"
        "            packed = packing.pack(codes, bits)\n"
        "            found = native.packed_product(x, packed, bits)\n"
        "            assert (found == value * low * width).all()\n"
        "            native.scaled_product(x.float(), packed, torch.ones(3, 1), bits)\n"
        "            if bits < 8:\n"
        "                assert torch.equal(native.unpack(packed, bits, width), codes)\n"
    )
    environment = os.environ | {
        "CC": " ".join((*compilers()[0], checks)),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    if done.returncode == 77:
        pytest.skip("the C compiler has no such checks")
    assert done.returncode == 0
