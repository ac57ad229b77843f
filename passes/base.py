"""What a pass is, and the runner.

A pass is a frozen dataclass: its options are its fields, and calling it with a ``GraphModule``
edits the graph and returns torch's own ``PassResult``. It therefore runs in torch's ``PassManager``
and in any other runner that knows that protocol.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from qatc.errors import PassError

_RECORDS = "qatc_passes"


@dataclass(frozen=True)
class Edits:
    """What one run of a pass did: places that matched, and how many of them it edited."""

    matched: int
    edited: int


@dataclass(frozen=True)
class PassRecord:
    """One line of the pass report."""

    name: str
    options: dict[str, Any]
    matched: int
    edited: int


@dataclass(frozen=True)
class GraphPass(ABC):
    """Base of all passes: subclasses write :meth:`edit`, callers call the pass.

    Class attributes:
        requires: passes that must stand before this one in a pipeline.
        may_match_nothing: whether a graph without anything to match is fine.
    """

    requires: ClassVar[tuple[type[GraphPass], ...]] = ()
    may_match_nothing: ClassVar[bool] = False

    @abstractmethod
    def edit(self, gm: GraphModule) -> Edits:
        """Edit ``gm.graph`` in place; the caller cleans up, checks and recompiles."""

    def __call__(self, gm: GraphModule) -> PassResult:
        """Run the pass on ``gm``, in place.

        Raises:
            PassError: nothing in the graph matched, or what matched cannot be treated.
        """
        edits = self.edit(gm)
        if edits.matched == 0 and not self.may_match_nothing:
            raise PassError(
                f"{type(self).__name__} found nothing to work on in {type(gm).__name__}:"
                f" {self.nothing_matched()}"
            )
        if edits.edited:
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        record = PassRecord(
            type(self).__name__, dataclasses.asdict(self), edits.matched, edits.edited
        )
        gm.meta.setdefault(_RECORDS, []).append(record)
        return PassResult(gm, bool(edits.edited))

    def nothing_matched(self) -> str:
        """Why nothing may have matched and what to try; part of an error message."""
        return "the graph has no node of the kind that this pass treats"


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; callable like a pass.

    Raises:
        PassError: on construction, if a pass stands before one that it requires; every violation
            is listed.
    """

    passes: tuple[Callable[[GraphModule], PassResult | None], ...]

    def __post_init__(self) -> None:
        violations = []
        for position, current in enumerate(self.passes):
            before = tuple(type(p) for p in self.passes[:position])
            violations += [
                f"{type(current).__name__} needs {needed.__name__} before it"
                for needed in getattr(current, "requires", ())
                if needed not in before
            ]
        if violations:
            raise PassError("; ".join(violations))

    def __call__(self, gm: GraphModule) -> PassResult:
        """Run every pass in order."""
        modified = False
        for graph_pass in self.passes:
            result = graph_pass(gm)
            if result is not None:
                gm, modified = result.graph_module, modified or result.modified
        return PassResult(gm, modified)


def pass_records(gm: GraphModule) -> tuple[PassRecord, ...]:
    """The passes that ran on ``gm``, in order, with their options and edit counts."""
    return tuple(gm.meta.get(_RECORDS, ()))
