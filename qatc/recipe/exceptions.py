"""What of a layer is not as a recipe says of all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qatc.recipe.weight_bits import WeightBits


@dataclass(frozen=True)
class Exceptions:
    """What a recipe says of single parameters of a module, by names relative to it.

    Attributes:
        skip: names of those that stay in full precision; where passes take them, patterns.
        bits: names and bits of the weights that have others than most.
        rotated: names of the weights whose linears read a rotated input.
    """

    skip: tuple[str, ...] = ()
    bits: WeightBits = ()
    rotated: tuple[str, ...] = ()

    def renamed(self, names: Iterable[tuple[str, str]], known: frozenset[str]) -> Exceptions:
        """The same of parameters that have moved.

        Args:
            names: what each is called now, and what it was called when this was written.
            known: what there was then; all else stays in full precision.
        """
        names, bits = [*names], dict(self.bits)
        return Exceptions(
            tuple(now for now, first in names if first in self.skip or first not in known),
            tuple((now, bits[first]) for now, first in names if first in bits),
            tuple(now for now, first in names if first in self.rotated),
        )


NONE = Exceptions()
