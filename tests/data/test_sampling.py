"""Tokens are true samples of softmax(logits), decided by one uniform number each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatc.data import sampling
from qatc.data.sampling import sample, sequence_random


def cumulative(logits: torch.Tensor) -> np.ndarray:
    """The distribution function of softmax(logits), in fp64."""
    weights = np.exp(logits.double().numpy() - logits.double().max().item())
    return np.cumsum(weights) / weights.sum()


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 1100), rows=st.integers(1, 5), spread=st.sampled_from([0.1, 2.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_inverse_of_the_distribution_function(
    width: int, rows: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * spread).to(dtype)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    found = sample(logits, uniform)
    for row in range(rows):
        edges, token = np.concatenate([[0.0], cumulative(logits[row])]), int(found[row])
        # To the precision of fp32 sums, it is the token whose interval holds the number.
        assert edges[token] - 2e-6 <= uniform[row].item() <= edges[token + 1] + 2e-6


def test_frequencies_are_those_of_softmax() -> None:
    """Chi-square over 200,000 draws; 600 tokens over three blocks, some of them impossible."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, generator=generator)
    logits[100:400] = -torch.inf
    draws = 200_000
    uniform = torch.from_numpy(sequence_random(0, 0).random(draws))
    found = torch.cat([sample(logits.expand(len(u), -1), u) for u in uniform.split(20_000)])
    counts = torch.bincount(found, minlength=600)
    wanted = logits.double().softmax(0) * draws
    assert counts[100:400].sum() == 0
    possible = wanted > 0
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval(number: float) -> None:
    """The first and the last token that are possible, never one that is not."""
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [300, 301, 650]] = torch.tensor([0.5, 3.0, -1.0])
    token = sample(logits, torch.tensor([number], dtype=torch.float64)).item()
    assert token == (650 if number else 300)


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 300, generator=generator)
    uniform = torch.rand(9, dtype=torch.float64, generator=generator)
    whole = sample(logits, uniform)
    monkeypatch.setattr(sampling, "_VALUES", 600)  # two rows at a time
    assert torch.equal(sample(logits, uniform), whole)
    alone = [sample(logits[i : i + 1], uniform[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_said(value: float) -> None:
    logits = torch.zeros(3, 40)
    logits[1, 7] = value
    logits[2] = -torch.inf
    assert sample(logits, torch.full((3,), 0.5, dtype=torch.float64)).tolist() == [20, -1, -1]


def test_logits_are_left_as_they_are() -> None:
    logits = torch.zeros(2, 512)
    sample(logits, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(logits, torch.zeros(2, 512))


def test_random_numbers_depend_on_seed_and_sequence_alone() -> None:
    first = sequence_random(0, 0).random(4)
    assert np.array_equal(first, sequence_random(0, 0).random(4))
    for seed, number in ((1, 0), (0, 1), (2**80, 0)):
        assert not np.isin(sequence_random(seed, number).random(4), first).any()
