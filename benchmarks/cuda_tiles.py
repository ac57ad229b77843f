"""Candidates of tiles, timed by ``python -m benchmarks.cuda_speed --tune``."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_timing import HEAD, Way, caches, in_graph, show, weights
from qatc.kernels.gpu import attention, products
from qatc.kernels.gpu.attention import Split
from qatc.kernels.gpu.products import Tile

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Outputs and width: LLaMA-7B's."""

JOINED = ((4096, 4096, 3), (11008, 4096, 2))
"""Outputs, width and weights of one launch: queries, keys and values, and gate and up."""

HEADS = ((32, 32), (32, 8))
"""Query heads and those of keys and values."""

SLOTS = (512, 4096, 32768)
BATCHES = (1, 8)


def candidates(rows: int, width: int) -> list[Tile]:
    """Tiles to time; the first is the present choice for 4 bits and many outputs."""
    if rows <= products.MOST_GEMV_ROWS:
        steps = [step for step in (128, 256, 512, 1024) if step * 4 <= width]
        found = [Tile(0, n, step, 4) for step in steps for n in (2, 4, 8) if n * step <= 4096]
        found += [Tile(0, n, 256, 2) for n in (1, 4, 8)] + [Tile(0, 16, 256, 4)]
        return [*found, Tile(0, 2, 512, 2), Tile(0, 4, 512, 8), Tile(0, 16, 128, 8)]
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    found = [
        Tile(tall, n, step, warps, stages)
        for n, warps in ((16, 2), (32, 2), (32, 4), (64, 4))
        for step, stages in ((64, 4), (128, 3), (128, 5), (256, 3))
    ]
    if rows > 32:
        found = [Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 4, 3)]
        found += [Tile(64, 128, 128, 4, 3), Tile(64, 32, 128, 4, 4), Tile(64, 128, 64, 8, 4)]
    if rows > 64:
        found += [Tile(128, 128, 64, 8, 3), Tile(128, 128, 128, 8, 3), Tile(128, 64, 64, 4, 4)]
        found += [Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3)]
    return found


def tuned(end: float) -> Iterator[dict[str, Any]]:
    """Candidates, the fastest first, for every case that there is time for."""
    for rows in (1, 2, 16):
        for outputs, width, count in JOINED:
            for bits in (4, 8):
                if time.monotonic() < end:
                    yield _tuned_product(rows, outputs, width, bits, count)
    for slots, batch, (heads, groups) in (
        (slots, batch, own) for own in HEADS for slots in SLOTS for batch in BATCHES
    ):
        if time.monotonic() < end:
            yield from _tuned_attention(heads, groups, slots, batch)
            torch.cuda.empty_cache()
    for rows in (1, 2, 4, 16, 32, 64, 128, 512, 2048):
        for outputs, width in SHAPES:
            for bits in (4, 8):
                if time.monotonic() < end:
                    yield _tuned_product(rows, outputs, width, bits)


def _tuned_product(
    rows: int, outputs: int, width: int, bits: int, count: int = 1
) -> dict[str, Any]:
    copies = weights(outputs, width, bits)
    codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
    x_scale, scale = torch.rand(rows, 1, device="cuda"), torch.rand(outputs, 1, device="cuda")
    now = products.choose_tile(rows, outputs * count, width, bits)

    def run(tile: Tile, i: int) -> list[Tensor]:
        held = [copies[(i * count + j) % len(copies)] for j in range(count)]
        parts = (codes, x_scale, held, [scale] * count, [None] * count, bits, torch.bfloat16)
        return products.triton_linears(*parts, tile=tile)

    tiles = dict.fromkeys((now, *candidates(rows, width)))
    ways: dict[str, Way] = {str(tile): functools.partial(run, tile) for tile in tiles}
    case = {"rows": rows, "outputs": outputs, "weights": count, "width": width, "bits": bits}
    return _ranked(case, str(now), in_graph(ways, -(-len(copies) // count), rounds=3))


def _tuned_attention(heads: int, groups: int, slots: int, batch: int) -> Iterator[dict[str, Any]]:
    query = torch.randn(batch, heads, 1, HEAD, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((batch, 1), slots - 1, device="cuda")
    shared = heads // groups
    tiled = attention.takes_tiles(query.dtype, shared, (HEAD // 2, HEAD // 2))
    now = attention.choose_split(slots, shared, HEAD, tiled)
    works = ((1, 16, 4), (1, 32, 4), (1, 16, 2), (1, 64, 8))
    if heads > groups:
        works = ((2, 16, 4), (4, 8, 4), (4, 16, 8), (2, 32, 8))
    lengths = (64, 128, 256, 512, 1024)
    splits = [Split(n, s, h, w) for n in lengths for h, s, w in works]
    tiles = ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
    splits += [Split(n, s, 16, w, tiles=True) for n in lengths for s, w in tiles if s <= n]
    for bits in (4, 8):
        copies = caches(batch, groups, slots, bits)

        def run(split: Split, i: int) -> Tensor:
            held: Any = copies[i]  # noqa: B023
            parts = (positions, None, bits, bits, HEAD**-0.5, split)  # noqa: B023
            return attention.code_attention(*(query, *held, *parts))

        used = [s for s in splits if s.slots <= slots and slots // s.slots <= 512]
        ways: dict[str, Way] = {
            str(split): functools.partial(run, split) for split in dict.fromkeys((now, *used))
        }
        case = {"heads": heads, "kv_heads": groups, "slots": slots, "batch": batch, "bits": bits}
        yield _ranked(case, str(now), in_graph(ways, len(copies), rounds=3))


def _ranked(case: dict[str, Any], now: str, times: dict[str, Any]) -> dict[str, Any]:
    timed = sorted((t, title) for title, t in times.items() if isinstance(t, float))
    failed = {title: why for title, why in times.items() if not isinstance(why, float)}
    best = [{"microseconds": t, "tile": title} for t, title in timed[:4]]
    row = {**case, "now": times[now], "tile": now, "best": best, "failed": failed}
    show(row)
    return row
