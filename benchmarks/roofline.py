"""What a GPU can do at most: tokens per second by its memory and its tensor cores.

    python -m benchmarks.roofline

Nothing is run. A decoding step reads every weight once and the KV cache of every sequence, and
multiplies each weight by each sequence: its time is at least the larger of the two, bytes by the
memory's bandwidth and operations by the peak of the tensor cores. A prefill is bound by the
second. The peaks are those of the vendor's data sheets, without sparsity. The result is
``results/roofline.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks import common
from benchmarks.estimate import LLAMA, MODELS

CONTEXT = 512
"""Tokens that are behind each sequence."""

BATCHES = (1, 8, 64)
BITS = ((4, 8, 4), (8, 8, 8), (4, 16, 16), (16, 16, 16))
"""Of weights, activations, K and V."""


@dataclass(frozen=True)
class Gpu:
    """The peaks of a GPU.

    Attributes:
        bandwidth: of its memory, bytes per second.
        int8: operations per second of its tensor cores on int8, sums in int32.
        bf16: operations per second of its tensor cores on bf16.
    """

    bandwidth: float
    int8: float
    bf16: float


GPUS = {
    "A100 80 GB": Gpu(2.04e12, 624e12, 312e12),
    "RTX 4090": Gpu(1.01e12, 661e12, 165e12),
    "H100 SXM": Gpu(3.35e12, 1979e12, 989e12),
    "H200": Gpu(4.8e12, 1979e12, 989e12),
}
"""From NVIDIA's data sheets, dense."""


def main() -> None:
    """Reckon and write the result."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = [
        {
            "model": model,
            "gpu": gpu,
            "bits": "-".join(map(str, bits)),
            "decoding_tokens_per_second": {
                str(batch): round(batch / seconds(model, gpu, bits, batch, 1)) for batch in BATCHES
            },
            "prefill_tokens_per_second": round(2048 / seconds(model, gpu, bits, 1, 2048)),
        }
        for model in MODELS
        for gpu in GPUS
        for bits in BITS
    ]
    for row in rows:
        print(row)
    common.save("roofline", {"context": CONTEXT, "rows": rows})


def seconds(model: str, gpu: str, bits: tuple[int, int, int], batch: int, new: int) -> float:
    """The least time of one forward pass with ``new`` tokens in each of ``batch`` sequences.

    Each of the three, linears of the layers, attention and head, takes as long as the slower of
    memory and arithmetic; nothing overlaps.
    """
    from transformers import LlamaConfig

    from qatc.estimate import shape_of

    shape: Any = shape_of(LlamaConfig(**(LLAMA | MODELS[model])), model)  # type: ignore[arg-type]
    peaks = GPUS[gpu]
    weights, activations, kv = bits
    peak = peaks.int8 if activations == 8 else peaks.bf16
    linears = max(
        shape.linear * weights / 8 / peaks.bandwidth, 2 * shape.linear * batch * new / peak
    )
    per_token = 2 * shape.layers * shape.kv_heads * (shape.head_size * kv / 8 + 4 * (kv < 16))
    attended = CONTEXT if new == 1 else new / 2
    products = 4 * shape.layers * shape.heads * shape.head_size * attended
    attention = max(
        batch * per_token * attended / peaks.bandwidth, batch * new * products / peaks.bf16
    )
    vectors = batch  # the head is needed behind the last token only
    head = max(2 * shape.head / peaks.bandwidth, 2 * shape.head * vectors / peaks.bf16)
    return float(linears + attention + head)


if __name__ == "__main__":
    main()
