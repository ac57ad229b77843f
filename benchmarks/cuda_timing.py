"""What the benchmarks of a GPU share: timing, and weights and caches that its own cache lacks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatc.numerics import packing

HEAD = 128
"""Values of a key and of a value."""

COLD = 160 * 2**20
"""Bytes of the copies together: three times what the caches of an H200 hold."""

ROUNDS, LEAST_MS = 5, 3.0

Way = Callable[[int], Any]
"""Runs on the copy of that number."""


def in_graph(ways: dict[str, Way], copies: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Microseconds of a call of each way, or why there are none."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    found: dict[str, Any] = {}
    for title, way in ways.items():
        try:
            graphs[title] = _captured(way, copies)
        except Exception as error:  # reported, and the rest goes on
            found[title] = f"{type(error).__name__}: {str(error)[:200]}"
    times: dict[str, list[float]] = {title: [] for title in graphs}
    for _ in range(rounds):
        for title, (graph, repeats) in graphs.items():
            times[title].append(_ms(graph.replay, repeats) * 1000 / copies)
    return found | {title: round(statistics.median(each), 2) for title, each in times.items()}


def _captured(way: Way, copies: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of a call for each copy, and how often to replay it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            way(0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            way(copy)
    graph.replay()
    return graph, max(1, int(LEAST_MS / max(_ms(graph.replay, 1), 0.01)))


def launched(way: Way, copies: int) -> float:
    """Microseconds of a call from Python, whichever of launching and computing takes longer."""
    torch.cuda.synchronize()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < 0.01:
        way(calls % copies)
        calls += 1
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) * 1e6 / calls, 1)


def _ms(run: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def weights(outputs: int, width: int, bits: int) -> list[Tensor]:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (outputs, width), dtype=torch.int8, device="cuda")
    packed = packing.pack(codes, bits)
    return [packed.clone() for _ in range(-(-COLD // packed.nbytes))]


def caches(batch: int, groups: int, slots: int, bits: int) -> list[list[Tensor]]:
    """Codes and scales of keys, and of values, a few times."""
    width = HEAD * bits // 8
    kind = torch.int8 if bits == 8 else torch.uint8
    count = max(1, min(64, COLD // (2 * batch * groups * slots * (width + 4))))
    shape = (batch, groups, slots)
    return [
        [
            tensor
            for _ in range(2)
            for tensor in (
                torch.randint(0, 100, (*shape, width), dtype=kind, device="cuda"),
                torch.rand(*shape, 1, device="cuda") / 100,
            )
        ]
        for _ in range(count)
    ]


def rate(size: int, microseconds: Any) -> float | None:
    return round(size / microseconds / 1000) if isinstance(microseconds, float) else None


def show(row: dict[str, Any]) -> None:
    print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
