"""What a long run tells whoever watches it. The command line draws it; the default is silence."""

from __future__ import annotations

from typing import Any


class Observer:
    """Override what you want to see."""

    def stage(self, title: str) -> None:
        """A new stage of the run begins."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def generated(self, sequences: int, total: int, tokens: int) -> None:
        """Sequences and tokens of the corpus so far; tokens include unfinished sequences."""

    def recorded(self, done: int, total: int) -> None:
        """Rows of the corpus whose teacher is recorded so far."""

    def trained(self, metrics: Any, total: int) -> None:
        """One optimizer step (:class:`qatc.training.config.StepMetrics`) of ``total``."""

    def trained_layer(self, metrics: Any, layers: int, steps: int) -> None:
        """One optimizer step (:class:`qatc.training.blockwise.LayerMetrics`) of so many for each
        layer."""

    def evaluated(self, done: int, total: int) -> None:
        """Rows evaluated so far."""

    def lowered(self, done: int, total: int) -> None:
        """Parts of a program lowered for another runtime so far."""
