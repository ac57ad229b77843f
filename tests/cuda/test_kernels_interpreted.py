"""The Triton kernels on a CPU, by Triton's interpreter, against integers and fp64.

Run as a program, with ``TRITON_INTERPRET=1``, it computes all cases and prints how far each is off.
The interpreter must be chosen before Triton is imported, and so the tests read what it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from qatc.kernels.gpu import launch
from qatc.recipe.spec import QuantSpec, spec_arg

PRODUCTS = [
    *((bits, rows, 37, 96, "float32") for bits in (4, 8) for rows in (1, 2, 3, 4, 15, 16, 17)),
    *((bits, rows, 5, 4160, "float32") for bits in (4, 8) for rows in (1, 17)),  # a tail of 64
    *((bits, rows, 9, 96, "float32") for bits in (2, 3, 5, 6, 7) for rows in (2, 16)),
    *((bits, rows, 33, 40, "float16") for bits in (4, 8) for rows in (1, 4)),
    (4, 70, 130, 48, "float32"),
    (8, 260, 129, 36, "float32"),
]
"""Bits, rows, outputs, width and dtype. Not bf16, which the interpreter cuts off, unrounded."""

JOINED = [
    (4, 1, (37, 5, 9), 96),
    (8, 3, (4, 66), 96),
    (4, 17, (40, 1, 33), 96),
    (3, 2, (9, 4), 96),
    (8, 20, (70, 5, 5), 48),
]
"""Bits, rows, outputs of each weight, and width."""

ATTENTIONS: list[Any] = [
    # bits of K and V, query heads and K/V heads, widths of K and V, slots, last slots, mask
    (4, 4, 2, 2, 64, 64, 200, (150, 199), False),
    (4, 8, 8, 2, 64, 64, 70, (0, 69), True),
    (8, 4, 6, 2, 80, 48, 130, (129, 3), True),
    (8, 8, 8, 1, 96, 96, 1100, (1099,), False),
    (4, 4, 5, 1, 6, 10, 33, (20, 32), False),
    # and on tensor cores
    (4, 4, 8, 2, 64, 64, 130, (100, 129), False, True),
    (8, 4, 6, 2, 80, 48, 70, (69, 3), True, True),
    (8, 8, 20, 1, 32, 96, 130, (129,), False, True),
]


def product_case(bits: int, rows: int, outputs: int, width: int, dtype: str) -> bool:
    """Whether the kernel has the bits of the sums as fp64 has them, scaled in order."""
    from qatc.kernels.gpu.products import triton_linear
    from qatc.numerics.packing import pack

    half, kind = 1 << (bits - 1), getattr(torch, dtype)
    x = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    codes = torch.randint(-half, half, (outputs, width), dtype=torch.int8)
    x[0], codes[0] = -128, -half  # the largest sum of all
    x_scale, scale = torch.rand(rows, 1), torch.rand(outputs, 1) - 0.5
    for bias in (None, torch.randn(outputs).to(kind)):
        got = triton_linear(x, x_scale, pack(codes, bits), scale, bias, bits, kind)
        wanted = (x.double() @ codes.double().T).float() * x_scale * scale.T
        wanted = (wanted if bias is None else wanted + bias.float()).to(kind)
        if got.dtype is not kind or not torch.equal(got, wanted):
            return False
    return True


def joined_case(bits: int, rows: int, outputs: tuple[int, ...], width: int) -> bool:
    """Whether one launch gives each weight's own products, with biases and without."""
    from qatc.kernels.gpu.products import triton_linears
    from qatc.numerics.packing import pack

    half = 1 << (bits - 1)
    x, x_scale = torch.randint(-128, 128, (rows, width), dtype=torch.int8), torch.rand(rows, 1)
    codes = [torch.randint(-half, half, (n, width), dtype=torch.int8) for n in outputs]
    packed, scale = [pack(one, bits) for one in codes], [torch.rand(n, 1) - 0.5 for n in outputs]
    same = []
    for bias in ([None] * len(outputs), [torch.randn(n) for n in outputs]):
        got = triton_linears(x, x_scale, packed, scale, bias, bits, torch.float32)
        for product, one, steps, more in zip(got, codes, scale, bias, strict=True):
            wanted = (x.double() @ one.double().T).float() * x_scale * steps.T
            same.append(torch.equal(product, wanted if more is None else wanted + more))
    return all(same)


ADDED = [(1, "float16"), (2, "float32"), (17, "float16"), (65, "float32")]
"""Rows and dtype."""

WRITES = [
    # keys, values, K/V heads, widths, dtype
    (QuantSpec(4), QuantSpec(4), 2, 64, 64, "float32"),
    (QuantSpec(8), QuantSpec(4), 3, 80, 48, "float32"),
    (QuantSpec(8, range="full"), QuantSpec(4, range="full"), 1, 6, 10, "float16"),
]


def added_case(rows: int, dtype: str) -> bool:
    """Whether a product that something is added to has two roundings to its dtype."""
    from qatc.kernels.gpu.products import triton_linear
    from qatc.numerics.packing import pack

    kind = getattr(torch, dtype)
    x, x_scale = torch.randint(-128, 128, (rows, 96), dtype=torch.int8), torch.rand(rows, 1)
    codes, scale = torch.randint(-8, 8, (37, 96), dtype=torch.int8), torch.rand(37, 1) / 64
    bias, added = torch.randn(37).to(kind), torch.randn(rows, 37).to(kind)
    parts = (x, x_scale, pack(codes, 4), scale, bias, 4, kind)
    return torch.equal(triton_linear(*parts, added), triton_linear(*parts) + added)


def write_case(
    keys: QuantSpec, values: QuantSpec, groups: int, width: int, deep: int, dtype: str
) -> bool:
    """Whether the kernel writes the bits that graphs do, into their slots and no others."""
    from qatc.kernels.cached_attention import _write, cache_shapes
    from qatc.kernels.gpu.attention import store_codes

    batch, slots = 4, 9
    key, value = (torch.randn(batch, groups, 1, n) for n in (width, deep))
    key *= torch.randn(batch, groups, 1, 1).exp()
    key[0] = 0
    key[1] = 1e-38 if dtype == "float32" else 60000
    value[1, 0, 0] = torch.arange(deep).clamp(max=7)  # half of them ties of 3.5 steps to 7
    value[1, 0, 0, :2] = torch.tensor([7, 3.5])
    value[2, 0, 0, 3], value[3, 0, 0, 1] = float("nan"), float("inf")
    key, value = key.to(getattr(torch, dtype)), value.to(getattr(torch, dtype))
    caches = [
        torch.ones(batch, groups, slots + 2, size).to(kind)[:, :, :slots]
        for spec, n in ((keys, width), (values, deep))
        for size, kind in cache_shapes(spec, n)
    ]
    wanted = [cache.clone() for cache in caches]
    positions = torch.tensor([[4], [0], [8], [2]])
    parts: Any = (key, value, *caches, positions, spec_arg(keys), spec_arg(values))
    store_codes(*parts)
    _write(key, keys, None, wanted[0], wanted[1], positions)
    _write(value, values, None, wanted[2], wanted[3], positions)
    same = [torch.equal(caches[i].nan_to_num(-1), wanted[i].nan_to_num(-1)) for i in (1, 3)]
    for i in (0, 2):  # codes of what is infinite or no number mean nothing
        real = wanted[i + 1].isfinite()
        same.append(torch.equal(torch.where(real, caches[i], 0), torch.where(real, wanted[i], 0)))
    return all(same)


def attention_case(
    key_bits: int, value_bits: int, heads: int, groups: int, width: int, deep: int, slots: int,
    last: tuple[int, ...], masked: bool, tiles: bool = False,
) -> float:  # fmt: skip
    """The largest difference from fp64, of values about 1."""
    from qatc.kernels.gpu.attention import choose_split, code_attention
    from qatc.numerics.packing import pack

    batch, shared, capacity = len(last), heads // groups, slots + 5
    views: Any = []
    values: list[Any] = []
    for bits, size in ((key_bits, width), (value_bits, deep)):
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (batch, groups, capacity, size), dtype=torch.int8)
        scale = torch.rand(batch, groups, capacity, 1) * 2 / half
        values.append((codes * scale.double())[:, :, :slots].repeat_interleave(shared, 1))
        for row, position in enumerate(last):  # what lies behind the last slot is not read
            scale[row, :, position + 1 :] = float("nan")
            values[-1][row, :, position + 1 :] = 0
        views += [pack(codes, bits)[:, :, :slots], scale[:, :, :slots]]
    query, positions = torch.randn(batch, heads, 1, width), torch.tensor(last).unsqueeze(1)
    split = None
    if tiles:
        query, split = query.bfloat16().float(), choose_split(slots, shared, deep, tiles)
    mask = torch.rand(batch, 1, 1, slots) < 0.7 if masked else None
    factor = 2 * width**-0.5
    got = code_attention(*(query, *views, positions, mask, key_bits, value_bits, factor, split))
    every = torch.arange(slots)
    seen = every <= positions
    if mask is not None:
        seen = (seen & mask[:, 0, 0]) | (every == positions)
    scores = (query.double() @ values[0].mT).squeeze(2) * factor
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    return float((got - weights.unsqueeze(2) @ values[1]).abs().max())


def main() -> None:
    """Compute all cases and print them."""
    torch.manual_seed(0)
    print(json.dumps([
        [product_case(*case) for case in PRODUCTS], [attention_case(*case) for case in ATTENTIONS],
        [joined_case(*case) for case in JOINED], [write_case(*case) for case in WRITES],
        [added_case(*case) for case in ADDED],
    ]))  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Any:
    if not launch.has_triton():
        pytest.skip("triton is not installed: make test-cuda installs it")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this Triton, older than 3.7, needs NumPy before 2.4")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_are_exact(found: Any, case: Any) -> None:
    assert found[0][PRODUCTS.index(case)]


@pytest.mark.parametrize("case", JOINED, ids=str)
def test_products_in_one_launch_are_those_of_each(found: Any, case: Any) -> None:
    assert found[2][JOINED.index(case)]


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_what_is_added_to_a_product_is_added_behind_its_rounding(found: Any, case: Any) -> None:
    assert found[4][ADDED.index(case)]


@pytest.mark.parametrize("case", WRITES, ids=str)
def test_a_token_is_written_as_graphs_write_it(found: Any, case: Any) -> None:
    assert found[3][WRITES.index(case)]


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(found: Any, case: Any) -> None:
    assert found[1][ATTENTIONS.index(case)] < 1e-5


if __name__ == "__main__":
    main()
