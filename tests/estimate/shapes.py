"""Shapes for the tests of estimates."""

from __future__ import annotations

from qatc.estimate import Shape


def llama_7b() -> Shape:
    """LLaMA-7B, written down without building it."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    return Shape(
        name="7B", layers=32, hidden=4096, inner=11008, ups=2, heads=32, kv_heads=32,
        head_size=128, vocabulary=32000, linear=32 * layer, active=32 * layer, small=65 * 4096,
        embedding=32000 * 4096, head=32000 * 4096, largest=4096 * 11008, stored=2,
        edges=32 * (4 * 2 * 4096 + 3 * (4096 + 11008)),
    )  # fmt: skip
