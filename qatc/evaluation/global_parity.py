"""The global part of the parity gate: whole texts, and how much of a difference ties explain.

Run from end to end, two graphs that compute the same differ: a code that lies on a rounding tie
falls either way with the last bit of a float sum, and moves everything behind it. In a deep model
with few bits that grows until it is as large as what training left of the KL divergence to the
teacher, or larger. It is a property of the trained model, and it is measured on the trained graph
alone: by how much does it move when nothing but the order of its own float sums changes?

Two such neighbours are at hand, the graph with its sums in double precision and, where the recipe
has one, the graph with its integer forward, whose sums are exact. The lowered graph is one more,
and so are its cached forms, whose attention sums in another order. None of them may be further from
the trained graph than its own neighbours are.

Distributions are compared, and the median of several texts counts: one code that fell the other way
early can move a text as far as training itself did, and a bug moves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_map_only

from qatc.evaluation.checks import Check
from qatc.evaluation.traces import interpreted
from qatc.graph.nodes import ATTENTION, LINEAR
from qatc.models.preparation import prepared_state

MARGIN = 2.0
"""How much further than the trained graph's own neighbours a graph may be. In the outputs of
``benchmarks/gate.py`` none that moves by more than 0.0001 nats is further than 1.4 times."""


def kl(one: Tensor, other: Tensor) -> float:
    """KL(one || other) of logits ``[B, T, V]``, in nats: mean over tokens, median over rows."""
    p, q = (x.double().log_softmax(-1) for x in (one, other))
    rows = (p.exp() * (p - q)).sum(-1).mean(-1)
    return max(0.0, float(rows.median())) if bool(rows.isfinite().all()) else math.inf


def score(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of one forward without a cache."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def exact_sums(model: Any) -> Iterator[None]:
    """Let the layers of a prepared, uncompiled model sum in double precision inside the block.

    Only linears and attention are computed so, and their results are rounded back: what differs
    from the same model outside of the block comes from its float sums, and from the rounding ties
    that they decide.
    """

    def run(graph_module: GraphModule, tensors: tuple[Any, ...]) -> Any:
        return _ExactSums(graph_module).run(*tensors)

    with interpreted([prepared_state(model).store], run):
        yield


class _ExactSums(Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in (LINEAR, ATTENTION):
            return super().call_function(target, args, kwargs)
        double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
        return super().call_function(target, double, kwargs).to(args[0].dtype)


class Texts:
    """How far the forms of a model are from its trained graph in float, on the same texts.

    Args:
        ids: int64 ``[B, T]``: the texts.
        least: a KL divergence that is allowed in any case, in nats.
    """

    def __init__(self, ids: Tensor, least: float) -> None:
        self.ids, self._least = ids, least
        self._own = 0.0
        self.checks: list[Check] = []

    @property
    def limit(self) -> float:
        """The KL divergence that rounding ties explain, in nats."""
        return max(self._least, MARGIN * self._own)

    def neighbour(self, what: str, trained: Tensor, other: Tensor) -> None:
        """Report how far a form of the trained graph itself is from it."""
        self._own = max(self._own, self.tell("global", what, trained, other))

    def tell(self, point: str, what: str, wanted: Tensor, got: Tensor) -> float:
        """Report how far something is, which is also returned, and do not judge it."""
        figure = kl(wanted, got)
        self.checks.append(Check(point, f"the KL divergence of {what}", figure))
        return figure

    def judge(self, point: str, what: str, wanted: Tensor, got: Tensor, slack: float = 1.0) -> None:
        """Hold what should be the same against what rounding ties explain, ``slack`` times that."""
        figure, limit = kl(wanted, got), slack * self.limit
        self.checks.append(Check(point, f"the KL divergence of {what}", figure, limit))
