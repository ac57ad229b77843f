"""What the graph of a program computes with while it is translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qatc.runtime.program import Place


class Untranslatable(Exception):
    """Why a graph cannot be run as a program; the message is for a report."""


@dataclass(frozen=True)
class Value:
    """A float tensor of a program.

    Attributes:
        place: where the memory of its base begins.
        view: a meta tensor with its shape, strides, offset and the dtype that it is rounded to.
    """

    place: Place
    view: Tensor

    @property
    def start(self) -> Place:
        """Where its first value lies."""
        return Place(
            self.place.kind,
            self.place.offset + 4 * int(self.view.storage_offset()),
            self.place.buffer,
        )


@dataclass(frozen=True)
class Number:
    """An integer that a call brings, the same for all elements: a token or its position."""

    place: Place
    view: Tensor


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model."""

    tensor: Tensor


@dataclass(frozen=True)
class CacheInput:
    """What a layer's graph reads of its cache; :class:`Attention` steps find it in the call."""

    layer: int


def two_dims(
    shape: Sequence[int], views: Sequence[Tensor]
) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows, columns, and the strides of tensors of one shape, with neighbouring sizes merged."""
    merged: list[tuple[int, list[int]]] = []
    for size, *strides in zip(shape, *(view.stride() for view in views), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == [size * stride for stride in strides]:
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        raise Untranslatable(f"an operator over {len(merged)} dimensions")
    none = (1, [0] * len(views))
    rows, cols = ([none, none, *merged])[-2:]
    return rows[0], cols[0], [(rows[1][i], cols[1][i]) for i in range(len(views))]


def aliases(view: Tensor, source: Tensor) -> bool:
    return bool(view.untyped_storage()._cdata == source.untyped_storage()._cdata)


def name_of(node: Node) -> str:
    return str(node.target)


def read(value: Any, env: dict[Node, Any]) -> Any:
    """Arguments with the values of their nodes."""
    return torch.fx.node.map_aggregate(value, lambda n: env[n] if isinstance(n, Node) else n)


def result_dtype(*values: Any) -> torch.dtype:
    """The dtype of an elementwise operator, as torch promotes."""
    examples = [
        value.view if isinstance(value, Value) else value.tensor if isinstance(value, Parameter)
        else value
        for value in values
    ]  # fmt: skip
    metas = [
        torch.empty(e.shape, dtype=e.dtype, device="meta") if isinstance(e, Tensor) else e
        for e in examples
    ]
    dtype = metas[0]
    for other in metas[1:]:
        dtype = torch.result_type(dtype, other) if not isinstance(dtype, torch.dtype) else dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.result_type(dtype, 1)
