"""Where the keys of a model lie: measured on the float model, written into the prepared one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qatc.errors import CaptureError
from qatc.models.preparation import prepared_state
from qatc.models.regions import find_regions
from qatc.numerics.hadamard import turn
from qatc.numerics.minmax import round_to_bf16
from qatc.passes.quantize_kv import KEY_CENTER


@torch.no_grad()
def center_keys(student: nn.Module, teacher: nn.Module, ids: Tensor, real: Tensor) -> None:
    """Set the centers of a prepared model to the mean of its keys behind the rotary embedding.

    Where its recipe rotates keys, to that of the rotated ones.

    They are bf16 values, which is what a model in bf16 takes off.

    Args:
        student: prepared with ``center_keys``.
        teacher: the same model in full precision, with its own forward.
        ids: int64 ``[B, T]``, some rows of the corpus.
        real: bool ``[B, T]``: tokens that are no padding.

    Raises:
        CaptureError: the teacher's attention is not seen where the student's was captured.
    """
    centers = {
        name: buffer
        for name, buffer in student.named_buffers()
        if name.rpartition(".")[2].startswith(KEY_CENTER)
    }
    means, rotated = _mean_keys(teacher, ids, real), prepared_state(student).recipe.rotate_keys
    for name, center in centers.items():
        path, _, leaf = name.rpartition(".")
        number = int(leaf.removeprefix(KEY_CENTER).lstrip("_") or 0)
        if len(means.get(path, ())) <= number:
            raise CaptureError(
                f"the keys of {path} cannot be centered: its attention calls no"
                ' scaled_dot_product_attention; load the model with attn_implementation="sdpa", or'
                " leave center_keys out of the recipe"
            )
        mean = means[path][number]
        # A model that repeats its keys for all query heads has the same one several times.
        mean = mean.unflatten(0, (len(center), -1))[:, 0]
        mean = turn(mean) if rotated else mean
        center.copy_(round_to_bf16(mean.float().contiguous()).unsqueeze(1))


def _mean_keys(model: nn.Module, ids: Tensor, real: Tensor) -> dict[str, list[Tensor]]:
    """Mean key ``[H, D]`` in fp64 of every attention, by the layer's name."""
    seen = _Keys()
    with seen.of(model), seen:
        for rows, kept in zip(ids.split(4), real.split(4), strict=True):
            seen.real = kept
            model(input_ids=rows, use_cache=False)
    count = real.sum()
    return {name: [total / count for total in totals] for name, totals in seen.sums.items()}


class _Keys(TorchFunctionMode):
    """Adds up the keys that attention is called with, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, list[Tensor]] = {}
        self.real: Tensor
        self._layer, self._number = "", 0

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Know which layer runs."""
        hooks = [
            region.register_forward_pre_hook(partial(self._enter, name))
            for name, region in find_regions(model)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._layer, self._number = name, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            key: Tensor = args[1] if len(args) > 1 else kwargs["key"]
            total = (key.double() * self.real[:, None, :, None]).sum((0, 2))
            totals = self.sums.setdefault(self._layer, [])
            if self._number == len(totals):
                totals.append(torch.zeros_like(total))
            totals[self._number] += total
            self._number += 1
        return func(*args, **kwargs)
