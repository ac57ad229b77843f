"""A causal LM in two parts: what makes hidden states, and what makes logits of those.

Logits come from the model's own code: its forward, with the trunk answering what it is given. A
product with the head's weight would miss what models do besides, such as scaling or capping their
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Tail:
    """A causal LM in two parts: the trunk, up to hidden states, and what makes logits of those.

    Args:
        model: a transformers causal LM.
        autocast: makes a context that both parts run in.
    """

    def __init__(
        self, model: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.model, self.autocast = model, autocast
        self.trunk = model.get_decoder()
        self._forward = model.forward
        self._output: Any = None
        inside = {id(module) for module in self.trunk.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        head = model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
        self.head = head if plain else None
        self._outside = outside

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that make logits, but for the head's; of a sharded model, as they are now."""
        found = [p for module in self._outside for p in module.parameters(recurse=False)]
        taken = None if self.head is None else self.head.weight
        return list({id(p): p for p in found if p is not taken}.values())

    def run(
        self,
        ids: Tensor,
        body: Callable[[Tensor], Any],
        around: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """Call the model, whose hooks run as ever, with ``body`` in the place of its tail.

        Args:
            ids: int64 ``[B, T]``.
            body: maps hidden states ``[B, T, D]`` to what is returned.
            around: a context that the trunk runs in.
        """

        def forward(**call: Any) -> Any:
            with self.autocast(), around or nullcontext():
                output = self.trunk(**call)
            self._output = type(output)
            return body(output.last_hidden_state)

        with _forward_of(self.model, forward):
            return self.model(input_ids=ids, use_cache=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, V]`` of hidden states ``[N, D]``, inside of ``body``."""
        given = self._output(last_hidden_state=hidden[None])
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        with _forward_of(self.trunk, lambda *_, **__: given), self.autocast():
            logits: Tensor = self._forward(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def product(self, total: Tensor | None) -> Iterator[None]:
        """Let the head, where it is a plain product, be one that is fit for many chunks.

        Its weight is cast once, and the weight's gradient is added up in place.

        Args:
            total: where that is added, shaped as the weight; None for a weight that is not trained.
        """
        if self.head is None:
            yield
            return
        weight = self.head.weight.detach()
        device = weight.device.type
        with self.autocast():
            if torch.is_autocast_enabled(device):
                weight = weight.to(torch.get_autocast_dtype(device))

        def forward(x: Tensor) -> Any:
            inputs = x.to(weight.dtype), weight, total
            return _Product.apply(*inputs)  # type: ignore[no-untyped-call]

        with _forward_of(self.head, forward):
            yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another ``forward`` inside the block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Product(torch.autograd.Function):
    """``x @ weight.T``, which adds the gradient of the weight to a total, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.total is not None:
            _add_product(ctx.total, gradient.flatten(0, -2).t(), x.flatten(0, -2))
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; of another dtype in blocks of rows, as the product is a copy."""
    if total.dtype is left.dtype:
        total.addmm_(left, right)
        return
    rows = max(1, 2**22 // total.shape[1])
    for into, part in zip(total.split(rows), left.split(rows), strict=True):
        into += part @ right


@torch.no_grad()
def check(tail: Tail, ids: Tensor) -> str | None:
    """What differs between whole logits and those of two chunks of unequal length, None if nothing.

    Logits of chunks have to be whole ones but for the order in which a product of other sizes adds
    up: within 32 units in the last place of the largest logit in fp32, 2 in half precision.

    Args:
        tail: what is to be used.
        ids: int64 ``[B, T]``, few.
    """
    with tail.autocast():
        whole: Tensor = tail.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    cut, calls = len(whole) // 3, list[None]()
    dtypes: list[torch.dtype] = []
    watching = nullcontext() if tail.head is None else _counted(tail.head, calls)

    def parts(hidden: Tensor) -> Tensor:
        dtypes.append(hidden.dtype)
        flat = hidden.flatten(0, 1)
        with tail.product(None), watching:
            return torch.cat([tail.logits(flat[:cut]), tail.logits(flat[cut:])])

    found = tail.run(ids, parts)
    if found.shape != whole.shape:
        return f"logits of shape {[*found.shape]} for {[*whole.shape]}"
    if tail.head is not None and len(calls) != 2:
        return "its head is called more than once, or not at all"
    unit = max(torch.finfo(dtype).eps for dtype in (*dtypes, whole.dtype))
    allowed = (32 if unit < 1e-5 else 2) * unit * float(whole.abs().max())
    error = float((found.float() - whole.float()).abs().max())
    return None if error <= allowed else f"logits differ by {error:.3g}"


@contextmanager
def _counted(module: nn.Module, calls: list[None]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield
    finally:
        hook.remove()
