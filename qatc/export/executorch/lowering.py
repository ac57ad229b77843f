"""From a model to a ``.pte``: exported, products handed to XNNPACK, the rest to kernels of C."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from qatc.errors import ConfigError
from qatc.export.executorch.modules import Step
from qatc.export.executorch.shortcuts import shortcuts, watched
from qatc.export.programs import capture, capture_errors
from qatc.progress import Observer


def require_executorch() -> None:
    """Raise ``ConfigError`` where the package is missing."""
    try:
        import executorch.exir  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the format executorch needs the package executorch ({error}); pip install executorch"
        ) from error


def export_step(step: Step, chunk: int) -> ExportedProgram:
    """A step as a program of torch, for up to ``chunk`` tokens at once.

    Raises:
        CaptureError: torch cannot export the model.
    """
    # Registers the operators of quantized embeddings.
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401

    tokens = Dim("tokens", max=chunk)
    example = (torch.zeros((1, 3), dtype=torch.long), torch.arange(3))
    shapes = ({1: tokens}, {0: tokens})
    return capture(step, example, shapes)


def lower(exported: ExportedProgram, constants: dict[str, Any], observer: Observer) -> bytes:
    """The content of a ``.pte``.

    Args:
        exported: the program.
        constants: methods without arguments, by name, and what they give.
        observer: is told of the parts that XNNPACK takes.

    Raises:
        CaptureError: ExecuTorch cannot lower the program.
    """
    # Registers the kernels of quantized embeddings.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )

    # Two operators are of this backend, none of the set that is checked for.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    failure = "ExecuTorch cannot lower the model:"
    with capture_errors(failure, "run it by qatc.load"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations; and caches begin empty
        with shortcuts(), watched(XnnpackBackend, observer):
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=[XnnpackPartitioner()],
                compile_config=config,
                constant_methods=constants,
            )
            content: bytes = edge.to_executorch(ExecutorchBackendConfig()).buffer
    return content
