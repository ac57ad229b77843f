"""A row of a recorded teacher: whom its draws stand for, and what is stored of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.data.config import CorpusConfig, Recording
from qatc.data.teacher_rows import merged_weights, pack_row, sample_distribution, unpack_row
from qatc.errors import ConfigError


def logits(tokens: int = 6, vocabulary: int = 50) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, vocabulary, dtype=torch.float64) * 2


def everywhere(recording: Recording, tokens: int, count: int) -> Tensor:
    """Numbers ``[count, tokens, draws]`` that are as often in each part of [0, 1)."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return grid[:, None, None].expand(count, tokens, recording.draws)


@pytest.mark.parametrize("text", ["1+1", "4+8", "10+3", "50+2", "80+1"])
def test_in_expectation_it_is_the_distribution(text: str) -> None:
    """Over all numbers that may decide the draws, in fp64."""
    recording, scores, count = Recording.parse(text), logits().log_softmax(-1), 1500
    total = torch.zeros_like(scores)
    for uniform in everywhere(recording, len(scores), count):
        found = sample_distribution(scores, recording, uniform)
        weights = found.weights()
        torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.float64))
        total.scatter_add_(-1, torch.cat([found.head, found.draws], -1), weights)
    torch.testing.assert_close(total / count, scores.exp(), rtol=0, atol=2 / count)
    head = scores.exp().topk(min(recording.top, 50)).values.sum(-1)
    torch.testing.assert_close(found.tail, 1 - head, rtol=0, atol=1e-12)


def test_what_has_no_mass_is_not_drawn() -> None:
    scores = logits()
    scores[:, 10:] = -torch.inf
    for number in (0.0, 0.5, 1 - 2**-53):
        uniform = torch.full((6, 32), number, dtype=torch.float64)
        found = sample_distribution(scores.log_softmax(-1), Recording(4, 32), uniform)
        assert int(found.draws.max()) < 10
        assert not (found.draws[:, :, None] == found.head[:, None]).any(), "drawn of the head"


@pytest.mark.parametrize("vocabulary", [50, 70_000])
def test_is_read_as_it_was_written(vocabulary: int) -> None:
    scores, recording = logits(7, vocabulary).float(), Recording(5, 40)
    uniform = torch.rand(7, 40, dtype=torch.float64)
    found, entropy = unpack_row(pack_row(scores, recording, uniform), recording, vocabulary)
    wanted = sample_distribution(scores.log_softmax(-1), recording, uniform)
    assert torch.equal(found.head, wanted.head) and torch.equal(found.draws, wanted.draws)
    torch.testing.assert_close(found.tail.double(), wanted.tail, rtol=1e-7, atol=0)
    p = wanted.log_head.double().exp()
    error = (found.log_head.double().exp() - p).abs()
    assert bool((error <= p * p.log().abs() / 2048 * 1.001).all()) and float(error.max()) < 2e-4
    ids = torch.cat([found.head, found.draws], -1)
    own = -(found.weights() * scores.double().log_softmax(-1).gather(-1, ids)).sum(-1)
    np.testing.assert_allclose(entropy, own.numpy(), rtol=1e-6)


def test_a_token_drawn_again_has_one_entry() -> None:
    recording = Recording(5, 40)
    row = pack_row(logits().float(), recording, torch.rand(6, 40, dtype=torch.float64))
    found, _ = unpack_row(row, recording, 50)
    merged, ids = merged_weights(found).double(), torch.cat([found.head, found.draws], -1)
    wanted, sums = (torch.zeros(6, 50, dtype=torch.float64) for _ in range(2))
    wanted.scatter_add_(-1, ids, found.weights())
    sums.scatter_add_(-1, ids, merged)
    torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=1e-9)
    assert int((merged > 0).sum()) == int((wanted > 0).sum()) < merged.numel()


@pytest.mark.parametrize("text", ["32", "32+0", " 8 "])
def test_the_most_likely_tokens_alone_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is worse.*add draws of the tail, such as"):
        CorpusConfig(record_logits=text)


@pytest.mark.parametrize("text", ["", "0+32", "many", "32+", "-3+4", "8+8+8"])
def test_what_cannot_be_recorded(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 32\+32; got"):
        CorpusConfig(record_logits=text)
