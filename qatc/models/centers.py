"""Where the keys of a model lie: measured on the float model, written into the prepared one."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatc.errors import CaptureError
from qatc.models.attention import AttentionCalls, AttentionMap
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
    totals: dict[str, list[Tensor]] = {}
    for rows, kept in zip(ids.split(4), real.split(4), strict=True):
        for name, sums in _summed_keys(model, rows, kept).items():
            before = totals.get(name, [torch.zeros_like(each) for each in sums])
            totals[name] = [a + b for a, b in zip(before, sums, strict=True)]
    return {name: [total / real.sum() for total in sums] for name, sums in totals.items()}


def _summed_keys(model: nn.Module, ids: Tensor, real: Tensor) -> dict[str, list[Tensor]]:
    """Sums ``[H, D]`` in fp64 of the keys of the real tokens, by the layer's name."""
    sums: dict[str, list[Tensor]] = {}
    running = [""]

    def enter(name: str, *_: Any) -> None:
        running[:] = [name]

    def add(call: AttentionMap) -> None:
        total = (call.key.double() * real[:, None, :, None]).sum((0, 2))
        sums.setdefault(running[0], []).append(total)

    with ExitStack() as watching:
        for name, region in find_regions(model):
            watching.callback(region.register_forward_pre_hook(partial(enter, name)).remove)
        watching.enter_context(AttentionCalls(add))
        model(input_ids=ids, use_cache=False)
    return sums
