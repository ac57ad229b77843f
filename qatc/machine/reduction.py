"""Gradients of several processes on CPUs, added in the order of the processes.

Floating-point sums depend on their order. One process that takes a batch in parts adds up the
gradients of the first part, the second, and so on. gloo's own reduce-scatter adds in an order that
depends on the number of processes; here it is that of one process, for any number of them, so that
they train the same bits. NCCL's, on GPUs, is left as it is: there speed matters, and kernels add in
orders of their own anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class InOrder:
    """A reduce-scatter for ``FSDPModule.set_custom_reduce_scatter``.

    It sends as much as one that adds on the way, and holds the parts of all processes at once.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Give this process the sum of its part.

        Args:
            output_tensor: ``[n]``, the sum.
            input_tensor: ``[processes * n]``, what this process has of the parts of all.
            group: the processes.
            op: to sum.
            async_op: not to wait for it, which is not offered.
        """
        from torch import distributed

        assert op == distributed.ReduceOp.SUM and not async_op
        parts = torch.empty_like(input_tensor)
        distributed.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in others:
            output_tensor.add_(part)
