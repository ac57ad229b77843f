"""What this machine's processor can do."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets that the operating system lists, e.g. ``avx512_vnni``.

    Where it lists none, as outside Linux, the name of the architecture alone.
    """
    lines = _INFO.read_text(encoding="utf-8").splitlines() if _INFO.exists() else []
    listed = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, "").partition(":")[2].split()) | {platform.machine()}


def has_byte_products() -> bool:
    """Whether it has dot products of bytes, to which a C compiler turns loops."""
    return bool(features() & {"avx512_vnni", "avx_vnni", "asimddp"})


def multiplies_bf16() -> bool:
    """Whether it has dot products of bf16."""
    return bool(features() & {"avx512_bf16", "amx_bf16"})
