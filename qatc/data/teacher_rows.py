"""A row of a recorded teacher: its distributions sampled, packed into bytes, and read as targets.

A row of ``n`` tokens that count is compressed with zlib from

====================  ==========  ==================================================================
``head``              ``[n, K]``  token ids, uint16 or uint32 by the vocabulary, most likely first
``log_head``          ``[n, K]``  their log-probabilities, fp16: a probability p is off by at most
                                  p * abs(log p) / 2048, which is below 2e-4
``draws``             ``[n, R]``  token ids, ascending, each less the one before it
``tail``              ``[n]``     the tail's mass, fp32
``entropy``           ``[n]``     cross-entropy of record and teacher, fp32, in nats
====================  ==========  ==================================================================

one behind the other, each as its bytes of lowest value first, then the next ones. Probabilities are
divided by their sum when read, as rounding moved it from 1.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qatc.data.config import Recording

_VALUES = 2**22
"""Probabilities that are looked at together."""


@dataclass(frozen=True)
class Sampled:
    """Some of a distribution at each of N tokens: exactly, and the rest by draws.

    Attributes:
        head: int64 ``[N, K]``: the most likely tokens.
        log_head: ``[N, K]``: their log-probabilities.
        draws: int64 ``[N, R]``: ascending.
        tail: fp64 ``[N]``: mass of all but the head.
    """

    head: Tensor
    log_head: Tensor
    draws: Tensor
    tail: Tensor

    def weights(self) -> Tensor:
        """fp64 ``[N, K + R]``: what each entry of head and draws weighs; they sum to 1."""
        drawn = (self.tail.double() / self.draws.shape[1])[:, None].expand(self.draws.shape)
        weights = torch.cat([self.log_head.double().exp(), drawn], -1)
        return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Targets:
    """What a student is compared with at each of N tokens.

    Attributes:
        ids: int64 ``[N, E]``: tokens.
        weights: fp32 ``[N, E]``: what they weigh; 0 for all where nothing is recorded, and for a
            draw that is one again of the token before it, which has the weight of both.
        entropy: fp32 ``[N]``: cross-entropy of the target and the teacher, in nats: that of the
            target and a student is larger by an estimate of KL(teacher || student), unbiased too,
            and exactly 0 for the teacher.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor

    @classmethod
    def arbitrary(cls, tokens: int, recording: Recording, vocabulary: int) -> Targets:
        """Some of N tokens, to measure a step with."""
        ids = torch.arange(tokens)[:, None] + torch.arange(recording.top + recording.draws)
        weights = torch.full(ids.shape, 1 / ids.shape[1])
        return cls(ids % vocabulary, weights, torch.zeros(tokens))

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(*(t.to(device) for t in (self.ids, self.weights, self.entropy)))


def sample_distribution(
    log_probabilities: Tensor, recording: Recording, uniform: Tensor
) -> Sampled:
    """Record a distribution over V tokens at each of N.

    Args:
        log_probabilities: ``[N, V]``.
        recording: how many tokens; more than V are V.
        uniform: fp64 ``[N, R]`` in [0, 1), which decides the draws.
    """
    log_head, head = log_probabilities.topk(min(recording.top, log_probabilities.shape[1]), -1)
    ends = log_probabilities.double().exp().scatter_(-1, head, 0).cumsum_(-1)
    tail = ends[:, -1:].clone()
    parts = (torch.arange(uniform.shape[1], device=uniform.device) + uniform) / uniform.shape[1]
    # Below the whole, which a product may be rounded to: what has no mass is never drawn.
    points = torch.minimum(parts * tail, torch.nextafter(tail, torch.zeros_like(tail)))
    draws = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
    return Sampled(head, log_head, draws, tail.squeeze(-1))


def pack_row(logits: Tensor, recording: Recording, uniform: Tensor) -> bytes:
    """One row as it is stored, from the logits ``[n, V]`` of its tokens that count."""
    size = max(1, _VALUES // logits.shape[1])
    parts, entropies = [], []
    for some, numbers in zip(logits.split(size), uniform.split(size), strict=True):
        scores = some.float().log_softmax(-1)
        sampled = sample_distribution(scores, recording, numbers.to(scores.device))
        stored = Sampled(sampled.head, sampled.log_head.half(), sampled.draws, sampled.tail.float())
        weights = stored.weights()
        own = scores.gather(-1, torch.cat([stored.head, stored.draws], -1)).double()
        entropies.append(-(weights * own).where(weights > 0, 0).sum(-1).float().cpu().numpy())
        parts.append(
            [t.cpu().numpy() for t in (stored.head, stored.log_head, stored.draws, stored.tail)]
        )
    head, log_head, draws, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    kind = id_type(logits.shape[1])
    steps = np.diff(draws, axis=1, prepend=0)
    arrays = (
        head.astype(kind),
        log_head,
        steps.astype(kind),
        tail,
        np.concatenate(entropies),
    )
    return zlib.compress(b"".join(map(_planes, arrays)))


def unpack_row(
    packed: bytes, recording: Recording, vocabulary: int
) -> tuple[Sampled, npt.NDArray[np.float32]]:
    """What :func:`pack_row` made of logits ``[n, vocabulary]``, and entropies ``[n]``."""
    plain, ids = zlib.decompress(packed), id_type(vocabulary)
    top, draws = min(recording.top, vocabulary), recording.draws
    size = ids.itemsize
    count = len(plain) // (top * (size + 2) + draws * size + 8)
    shapes = [(count, top), (count, top), (count, draws), (count,), (count,)]
    types = [ids, np.dtype(np.float16), ids, *[np.dtype(np.float32)] * 2]
    arrays, start = [], 0
    for shape, kind in zip(shapes, types, strict=True):
        end = start + int(np.prod(shape)) * kind.itemsize
        planes = np.frombuffer(plain[start:end], np.uint8).reshape(kind.itemsize, -1)
        arrays.append(np.ascontiguousarray(planes.T).view(kind).reshape(shape))
        start = end
    head, log_head, steps, tail, entropy = arrays
    found = (head.astype(np.int64), log_head.copy(), steps.astype(np.int64).cumsum(1), tail.copy())
    return Sampled(*map(torch.from_numpy, found)), entropy


def _planes(array: npt.NDArray[Any]) -> bytes:
    """The lowest bytes of all values, then the next ones: alike, they compress better."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
    return little.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def merged_weights(sampled: Sampled) -> Tensor:
    """fp32 weights, those of a token's draws at the first of them.

    So no token has two, and the order in which a gradient adds them up, which may be another on
    every run, decides nothing.
    """
    weights = sampled.weights()
    top, draws = sampled.head.shape[1], sampled.draws
    begins = torch.ones_like(draws, dtype=torch.bool)
    begins[:, 1:] = draws[:, 1:] != draws[:, :-1]
    starts = begins.flatten().nonzero().squeeze(-1)
    ends = torch.cat([starts[1:], torch.tensor([draws.numel()])])
    times = torch.zeros(draws.numel(), dtype=torch.float64)
    times[starts] = (ends - starts).double()
    weights[:, top:] *= times.view(draws.shape)
    return weights.float()


def id_type(vocabulary: int) -> np.dtype[Any]:
    """Of token ids below ``vocabulary``."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
