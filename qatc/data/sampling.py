"""Draw tokens from a distribution given by logits, with random numbers that the caller brings.

A token is the point where the cumulative distribution passes a uniform number. The vocabulary is
read in blocks: their sums say in which one that point lies, and only that one is summed token by
token. So nothing of the size of the logits is drawn, sorted or kept, and one number decides one
token, whatever stands beside it in the batch.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256
_VALUES = 2**20
"""Logits that are looked at together: in fp32 they stay in the processor's caches."""


def sequence_random(seed: int, number: int) -> np.random.Generator:
    """The random numbers of sequence ``number``: they depend on nothing else but the seed."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest)))


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row from softmax(logits).

    Sums are in fp32 within a block and in fp64 beyond, so that probabilities are right to 1e-6 of
    themselves. A token whose logit is -inf is never drawn.

    Args:
        logits: ``[B, V]``, any float dtype.
        uniform: fp64 ``[B]`` on the CPU, in [0, 1).

    Returns:
        int64 ``[B]`` on the CPU; -1 where the logits are no distribution (NaN, or all -inf).
    """
    rows = max(1, _VALUES // logits.shape[1])
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    return torch.cat([_sample(part, numbers) for part, numbers in parts])


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    missing = -logits.shape[1] % _BLOCK
    padded = F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    weights = padded.float()  # a copy if it is none yet
    largest = weights.amax(1, keepdim=True)
    weights = (weights - largest).exp_().unflatten(1, (-1, _BLOCK))
    ends = weights.sum(2).cpu().double().cumsum(1)
    total = ends[:, -1:]
    target = _below(uniform.unsqueeze(1) * total, total)
    block = (ends <= target).sum(1, keepdim=True).clamp(max=ends.shape[1] - 1)
    starts = F.pad(ends, (1, 0))
    size = ends.gather(1, block) - starts.gather(1, block)
    share = (target - starts.gather(1, block)) / size
    everyone = torch.arange(len(logits), device=logits.device)
    chosen = weights[everyone, block.squeeze(1).to(logits.device)].cpu().double().cumsum(1)
    inner = _below(share * chosen[:, -1:], chosen[:, -1:])
    token = block.squeeze(1) * _BLOCK + (chosen <= inner).sum(1)
    return torch.where(total.squeeze(1).isfinite(), token, -1)


def _below(values: Tensor, limit: Tensor) -> Tensor:
    """At most the number before ``limit``, which a product may be rounded to."""
    return torch.minimum(values, torch.nextafter(limit, torch.zeros_like(limit)))
