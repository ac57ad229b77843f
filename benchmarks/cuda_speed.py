"""How long products and decode attention take on a GPU, next to what else could compute them.

    python -m benchmarks.cuda_speed            # less than 90 s on an H200
    python -m benchmarks.cuda_speed --tune     # every tile of some candidates, instead

Products of LLaMA-7B's shapes, from int8 codes of the input on: the Triton kernels, what ran before
them (codes unpacked to memory by Inductor and torch's int8 product, or Inductor's fused unpack for
a single row), and ``F.linear`` in bf16. Attention of one query over 4- and 8-bit codes: Triton,
Inductor, and SDPA over a cache in bf16.

A call is timed in a CUDA graph that goes through copies of the weight, or of the cache, which
together do not fit into the GPU's own cache, and launched from Python, with what that takes. Rounds
alternate between the ways; the median is reported. A case that fails is reported with its message.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.cuda_tiles import BATCHES, HEADS, JOINED, SHAPES, SLOTS, tuned
from benchmarks.cuda_timing import HEAD, Way, caches, in_graph, launched, rate, show, weights
from qatc.kernels import cached_attention
from qatc.kernels.gpu import attention, products
from qatc.kernels.integer_linear import EXACT_FP32, int_mm, scale_sums
from qatc.numerics import packing

ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)


def main() -> None:
    """Time what was asked for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="time candidates of tiles")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which tuning ends")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    torch.set_grad_enabled(False)
    end = time.monotonic() + arguments.limit
    if arguments.tune:
        common.save(f"cuda-tiles-{name}", {"rows": list(tuned(end))})
        return
    rows = [*time_joined(), *time_products(), *time_attention()]
    common.save(f"cuda-speed-{name}", {"rows": rows})


# ---------------------------------------------------------------- products


def time_products() -> Iterator[dict[str, Any]]:
    """A row for every shape and number of rows."""
    for outputs, width in SHAPES:
        held = {bits: weights(outputs, width, bits) for bits in (4, 8)}
        count = min(len(copies) for copies in held.values())
        plain = [torch.randn(outputs, width, device="cuda").bfloat16() for _ in range(count)]
        scale = torch.rand(outputs, 1, device="cuda")
        for rows in ROWS:
            codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
            x, x_scale = codes.bfloat16(), torch.rand(rows, 1, device="cuda")
            ways: dict[str, Way] = {"bf16": functools.partial(_plain, x, plain)}
            for bits, copies in held.items():
                product = functools.partial(_new, codes, x_scale, copies, scale, bits)
                ways[f"W{bits}A8 Triton"] = product
                ways[f"W{bits}A8 before"] = functools.partial(
                    _before, codes, x_scale, copies, scale, bits
                )
            times = in_graph(ways, count)
            row: dict[str, Any] = {
                "rows": rows,
                "outputs": outputs,
                "width": width,
                "microseconds": times,
            }
            row["launched"] = {
                title: launched(way, count)
                for title, way in ways.items()
                if isinstance(times[title], float)
            }
            row["GB/s of W4"] = rate(held[4][0].nbytes, times["W4A8 Triton"])
            show(row)
            yield row


def time_joined() -> Iterator[dict[str, Any]]:
    """A row for weights that share an input, in one launch and one after the other."""
    for outputs, width, count in JOINED:
        copies, scale = weights(outputs, width, 4), torch.rand(outputs, 1, device="cuda")
        for rows in (1, 2, 8):
            codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
            x_scale = torch.rand(rows, 1, device="cuda")
            parts = (codes, x_scale, copies, scale, count)
            ways: dict[str, Way] = {
                "one launch": functools.partial(_joined, *parts),
                "each": functools.partial(_each, *parts),
            }
            times = in_graph(ways, len(copies) // count)
            row: dict[str, Any] = {"rows": rows, "outputs": outputs, "width": width}
            row |= {"weights": count, "microseconds": times}
            row["GB/s of W4"] = rate(count * copies[0].nbytes, times["one launch"])
            show(row)
            yield row


def _joined(
    codes: Tensor, x_scale: Tensor, copies: list[Tensor], scale: Tensor, count: int, i: int
) -> Any:
    held = copies[i * count : (i + 1) * count]
    parts = ([scale] * count, [None] * count, 4, torch.bfloat16)
    return products.TRITON_LINEARS(codes, x_scale, held, *parts)


def _each(
    codes: Tensor, x_scale: Tensor, copies: list[Tensor], scale: Tensor, count: int, i: int
) -> Any:
    return [_new(codes, x_scale, copies, scale, 4, i * count + j) for j in range(count)]


def _plain(x: Tensor, copies: Sequence[Tensor], i: int) -> Tensor:
    return F.linear(x, copies[i])


def _new(
    codes: Tensor, x_scale: Tensor, copies: Sequence[Tensor], scale: Tensor, bits: int, i: int
) -> Any:
    return products.TRITON_LINEAR(codes, x_scale, copies[i], scale, None, bits, torch.bfloat16)


def _before(
    codes: Tensor, x_scale: Tensor, copies: Sequence[Tensor], scale: Tensor, bits: int, i: int
) -> Any:
    """The kernels that a compiled graph has without Triton's, one after another."""
    width = codes.shape[1]
    if bits == 4 and codes.shape[0] == 1 and width * 2**7 * 2**4 <= EXACT_FP32:
        return _compiled(_fused)(codes, x_scale, copies[i], scale)
    weight = copies[i] if bits == 8 else _compiled(packing.unpack)(copies[i], bits, width)
    sums = int_mm(codes, weight)
    return _compiled(scale_sums, dynamic=True)(sums, x_scale, scale, None, torch.bfloat16)


def _fused(codes: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    pieces = packing.parts(packed, 4, codes.shape[1])
    assert pieces is not None
    values = codes.float()
    cut = values.unsqueeze(-2).chunk(2, -1)
    total = sum((p.float() * part).sum(-1) for p, part in zip(pieces, cut, strict=True))
    return scale_sums(
        total - 8 * values.sum(-1, keepdim=True), x_scale, scale, None, torch.bfloat16
    )


@functools.cache
def _compiled(function: Any, dynamic: bool = False) -> Any:
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=dynamic)


# ---------------------------------------------------------------- attention


def time_attention() -> Iterator[dict[str, Any]]:
    """A row for every number of heads, slots and rows."""
    for heads, groups in HEADS:
        for slots in SLOTS:
            for batch in BATCHES:
                row: dict[str, Any] = {"heads": heads, "kv_heads": groups}
                row |= {"slots": slots, "batch": batch}
                try:
                    row |= _one_attention(heads, groups, slots, batch)
                except Exception as error:  # reported, and the rest goes on
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                torch.cuda.empty_cache()
                show(row)
                yield row


def _one_attention(heads: int, groups: int, slots: int, batch: int) -> dict[str, Any]:
    query = torch.randn(batch, heads, 1, HEAD, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((batch, 1), slots - 1, device="cuda")
    filled = {bits: caches(batch, groups, slots, bits) for bits in (4, 8)}
    count = min(len(copies) for copies in filled.values())
    shape = (batch, groups, slots, HEAD)
    plain = [torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    visible = torch.ones(batch, 1, 1, slots, dtype=torch.bool, device="cuda")
    factor = HEAD**-0.5

    def sdpa(i: int) -> Tensor:
        key, value = plain[i]
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != groups)

    def triton(bits: int, i: int) -> Any:
        held = filled[bits][i]
        return attention.CODE_ATTENTION(query, *held, positions, None, bits, bits, factor)

    def before(bits: int, i: int) -> Any:
        run = _compiled(cached_attention._attend_to_codes, dynamic=True)
        held = filled[bits][i]
        return run(query, *held, visible, bits=(bits, bits), value_width=HEAD, scale=factor)

    ways: dict[str, Way] = {"SDPA bf16": sdpa, "4 bits before": functools.partial(before, 4)}
    ways |= {f"{bits} bits Triton": functools.partial(triton, bits) for bits in (4, 8)}
    times = in_graph(ways, count)
    each = sum(tensor.nbytes for tensor in filled[4][0])
    return {"microseconds": times, "GB/s of 4 bits": rate(each, times["4 bits Triton"])}


if __name__ == "__main__":
    main()
