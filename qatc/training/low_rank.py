"""Low-rank updates that are trained in the place of whole weights (LoRA, arXiv 2106.09685).

A weight ``W [N, K]`` of a decoder layer stays as it is, and what the layer rounds is

    W + B A,    B [N, r],  A [r, K],

in W's own dtype. So the update is trained through the rounding, and what is trained is what is
packed: an adapter beside a rounded weight, as peft and torchao have it, would have to be added to
that weight afterwards and rounded again, which undoes much of what it learned.

B starts at 0, and A at random values of variance 1/r. The first step of AdamW moves all of B by the
learning rate ``e``, and so an element of the weight by a sum of r values of A, times ``e``: by
``e`` in the root mean square, which is what it moves by where W itself is trained. So a rate that
is right for whole weights is right here, whatever rank and width; in the usual words it is alpha =
r. That A learns slower than B then, for its values are large, is as LoRA+ has it (arXiv
2402.12354).

Of W there is neither optimizer state nor a gradient that lasts: it is there until those of A and B
are computed from it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatc.data.corpus import derived_seed
from qatc.errors import ConfigError
from qatc.models.preparation import prepared_state

UPDATES = "low_rank"
"""The module of a model that has its updates."""


class LowRank(nn.Module):
    """An update of a weight.

    Args:
        weight: ``[N, K]``.
        rank: r, no more than N or K.
        seed: of A's values at the start.

    Attributes:
        A: ``[r, K]`` fp32.
        B: ``[N, r]`` fp32.
    """

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        random = torch.rand(rank, columns, generator=torch.Generator().manual_seed(seed))
        self.A = nn.Parameter(((2 * random - 1) * math.sqrt(3 / rank)).to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """``weight + B A``, in its dtype; rounded to that, gradients pass straight through."""
        with torch.autocast(weight.device.type, enabled=False):  # not of masters
            return torch.addmm(weight.detach().float(), self.B, self.A).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Updates:
    """The updates that :func:`add_updates` put on a model.

    Attributes:
        model: the model.
        of: every weight with its update.
    """

    model: nn.Module
    of: tuple[tuple[nn.Parameter, LowRank], ...]

    @torch.no_grad()
    def merge(self) -> None:
        """Let the weights be what the layers have rounded, and take the updates away."""
        for weight, update in self.of:
            weight.copy_(update(weight))
        self.remove()

    def remove(self) -> None:
        """Take the updates away; the weights are what they were before."""
        for forward in prepared_state(self.model).forwards:
            forward.updates = {}
        delattr(self.model, UPDATES)


def add_updates(model: nn.Module, rank: int, seed: int) -> Updates:
    """Put an update on every weight of a linear in the decoder layers that requires a gradient.

    They are parameters of the model, in its module ``low_rank``. Graphs stay those that it has.

    Args:
        model: a prepared model.
        rank: of the updates; of a weight with fewer rows or columns, so many.
        seed: with a weight's name it decides how its update starts, on any device.

    Raises:
        ConfigError: there is no such weight.
    """
    found: dict[int, tuple[nn.Parameter, LowRank]] = {}
    named = nn.ModuleDict()
    for forward in prepared_state(model).forwards:
        for path, module in forward.module.named_modules():
            weight = module.weight if isinstance(module, nn.Linear) else None
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                continue
            own = f"{path}.weight" if path else "weight"
            name = f"{forward.name}.{own}" if forward.name else own
            if id(weight) not in found:  # one that is tied has one update
                update = LowRank(weight, rank, derived_seed(seed, zlib.crc32(name.encode())))
                found[id(weight)] = weight, update
                named[name.replace(".", "/")] = update
            forward.updates[own] = found[id(weight)][1]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linears in its layers whose weights could be updated;"
            " choose another --train than lora"
        )
    model.add_module(UPDATES, named)
    return Updates(model, tuple(found.values()))
