"""The teacher while it is learned from: full precision, with its layers compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qatc.models.preparation import prepare, restore
from qatc.models.regions import is_transformers_model
from qatc.recipe.recipe import Recipe

_UNQUANTIZED = "16-16-16"


@contextmanager
def compiled_layers(teacher: Any, compile: bool) -> Iterator[None]:
    """Inside the block, the layers of a full-precision model run as one compiled graph.

    It is captured as the student's is, and quantizes nothing: in fp32 it gives what the layers give
    to a few last places, in bf16 it rounds less often than they do, which keep every intermediate
    value. A teacher is run in every step, so that compiling it pays from a few dozens of them on.

    Args:
        teacher: a transformers model; any other one is left as it is.
        compile: whether to compile at all.

    Raises:
        CaptureError: a layer cannot be captured.
    """
    if not (compile and is_transformers_model(teacher)):
        yield
        return
    prepare(teacher, Recipe.from_bits(_UNQUANTIZED), compile=True)
    try:
        yield
    finally:
        restore(teacher)
