"""The C library: exact at any size, and absent without harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc import integer, native, packing

built = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")


@built
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 40), outputs=st.integers(1, 9), width=st.integers(1, 200),
    bits=st.integers(2, 7), extreme=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_products_are_exact(
    rows: int, outputs: int, width: int, bits: int, extreme: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (outputs, width), generator=generator, dtype=torch.int8)
    x = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    if extreme:
        codes, x = torch.full_like(codes, low), torch.full_like(x, -128)
    packed = packing.pack(codes, bits)
    assert torch.equal(native.unpack(packed, bits, width), codes)
    wanted = x.double() @ codes.double().t()
    assert torch.equal(integer.packed_mm(x, packed, bits).double(), wanted)
    few = x[: native.MAX_ROWS]
    found = native.packed_product(few, packed, bits)
    assert torch.equal(found.double(), wanted[: native.MAX_ROWS])


def test_without_a_library_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-8, 8, (5, 33), dtype=torch.int8)
    x = torch.full((2, 33), -127, dtype=torch.int8)
    monkeypatch.setattr(native, "library", lambda: None)
    found = integer.packed_mm(x, packing.pack(codes, 4), 4)
    assert torch.equal(found.double(), x.double() @ codes.double().t())


def test_what_stands_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "compiler", lambda: "/usr/bin/cc")
    assert native.obstacle() == "the C compiler here cannot build it"
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert native.obstacle() == "there is no C compiler here"


@built
def test_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)  # not the one kept in memory
    assert native.library() is not None
    (kept,) = (tmp_path / "qatc").iterdir()
    written = kept.stat().st_mtime_ns
    assert native.library() is not None and kept.stat().st_mtime_ns == written
    assert kept.parent.stat().st_mode & 0o077 == 0


@built
def test_a_compiler_that_fails_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert native.library() is None
