"""Two models on the same items: how many answers change, and whether that can be chance.

The standard error of an accuracy says how far another sample of questions might move it. Two models
that answered the same questions share that error, so that their difference is known far better:
what counts are the answers that only one of them has right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qatc.errors import ConfigError


@dataclass(frozen=True)
class Pairing:
    """Right and wrong answers of a model beside those of its teacher.

    Attributes:
        items: questions that both answered.
        lost: what only the teacher has right.
        gained: what only the model has right.
    """

    items: int
    lost: int
    gained: int

    @property
    def p(self) -> float:
        """Two-sided p value of McNemar's exact test, see :func:`mcnemar`."""
        return mcnemar(self.lost, self.gained)

    def __add__(self, other: Pairing) -> Pairing:
        return Pairing(self.items + other.items, self.lost + other.lost, self.gained + other.gained)


def pair(model: Sequence[float], teacher: Sequence[float]) -> Pairing:
    """Compare scores of the same items in the same order, 1 for a right answer and 0 for none.

    Raises:
        ConfigError: they are not of equally many items.
    """
    if len(model) != len(teacher):
        raise ConfigError(
            f"only answers to the same items can be compared; got {len(model)} and {len(teacher)}"
        )
    both = list(zip(model, teacher, strict=True))
    return Pairing(len(both), both.count((0, 1)), both.count((1, 0)))


def mcnemar(lost: int, gained: int) -> float:
    """How often chance alone makes the flips at least this uneven, if either way is as likely.

    Twice the binomial tail ``P(X <= min(lost, gained))`` of ``lost + gained`` fair draws, at most 1
    (McNemar, 1947, in its exact form). Integers of any size make the sum exact.
    """
    flips = lost + gained
    term = tail = 1
    for k in range(1, min(lost, gained) + 1):
        term = term * (flips - k + 1) // k
        tail += term
    p: float = 2 * tail / 2**flips
    return min(1.0, p)
