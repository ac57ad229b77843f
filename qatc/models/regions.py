"""Which parts of a model are captured: found by structure, not by a list of class names."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from qatc.errors import CaptureError
from qatc.graph.constants import plain_class


def find_regions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules to capture, with their full names.

    For a Hugging Face model these are its decoder layers: the children of the outermost
    ``ModuleList`` that holds most of the parameters. Any other module is one region, named "".

    Raises:
        CaptureError: a Hugging Face model has no such list.
    """
    if not is_transformers_model(model):
        return [("", model)]
    lists = _outermost_lists(model)
    if not lists:
        raise CaptureError(
            f"{type(model).__name__} has no list of layers; qatc captures causal LMs whose decoder"
            " layers are held in a ModuleList"
        )
    name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{i}", layer) for i, layer in enumerate(layers)]


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a Hugging Face model; transformers is not imported to find out."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules of a model that ``fully_shard`` was called on."""
    return [m for m in model.modules() if type(m) is not plain_class(type(m))]


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((name, module))
    return lists
