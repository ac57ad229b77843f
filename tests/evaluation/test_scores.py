"""Flipped answers, and McNemar's exact p."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc.errors import ConfigError
from qatc.evaluation.scores import Pairing, mcnemar, pair

COUNTS = st.integers(0, 300)


def test_counts() -> None:
    found = pair([1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 0, 1])
    assert found == Pairing(items=6, lost=2, gained=1)
    assert pair([1.0, 0.0], [0.0, 0.0]) + found == Pairing(8, 2, 2)
    with pytest.raises(ConfigError, match="the same items can be compared; got 2 and 3"):
        pair([1, 0], [1, 0, 1])


@given(COUNTS, COUNTS)
def test_p_is_the_share_of_outcomes_at_least_as_uneven(lost: int, gained: int) -> None:
    """Summed in float64 over all outcomes by logarithms of factorials, not over one tail."""
    n = lost + gained
    uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained)]
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in uneven]
    expected = math.fsum(math.exp(log - n * math.log(2)) for log in logs)
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_known_values() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 9) == 22 / 1024
    assert 0 <= mcnemar(7_000, 9_000) < 1e-50
