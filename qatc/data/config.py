"""How a corpus is to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from qatc.errors import ConfigError

Strategy = Literal["hybrid", "sample", "greedy", "chat"]

CHAT: Strategy = "chat"
"""The strategy of a corpus of conversations."""


OnProgress = Callable[[int, int], None]
"""Called with the number of sequences and of tokens written or generated so far."""


@dataclass(frozen=True)
class CorpusConfig:
    """How a corpus is generated.

    Args:
        sequences: how many sequences.
        max_length: tokens per sequence at most, the beginning-of-sequence token included.
        strategy: ``hybrid`` (greedy start, then sampling), ``sample``, ``greedy``, or ``chat``:
            conversations by the chat template, see :mod:`qatc.data.chat`.
        greedy_tokens: least and greatest number of greedy tokens of ``hybrid``, drawn for each
            sequence; of ``chat``, at the start of its answers.
        seed: of everything that is drawn, any number from 0.
        batch_size: sequences decoded side by side; ``"auto"`` for as many as are fast here and fit
            into half of the free memory. The manifest says how many they were (``slots``).
        shard_size: sequences per shard, the unit of resuming.
        turns: answers in a conversation at most; ``None``: as many as fit into ``max_length``.

    Raises:
        ConfigError: a value is out of range.
    """

    sequences: int = 4096
    max_length: int = 256
    strategy: Strategy = "hybrid"
    greedy_tokens: tuple[int, int] = (3, 5)
    seed: int = 0
    batch_size: int | Literal["auto"] = "auto"
    shard_size: int = 1024
    turns: int | None = None

    def __post_init__(self) -> None:
        for name in ("sequences", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, or auto; got {self.batch_size}")
        if self.max_length < 4:
            raise ConfigError(f"max_length must be at least 4; got {self.max_length}")
        if self.strategy not in get_args(Strategy):
            raise ConfigError(
                f"strategy must be one of {', '.join(get_args(Strategy))}; got {self.strategy!r}"
            )
        low, high = self.greedy_tokens
        if not 0 <= low <= high:
            raise ConfigError(f"greedy_tokens must be a range such as 3 to 5; got {low} to {high}")
        if self.turns is not None and self.turns < 1:
            raise ConfigError(f"turns must be at least 1; got {self.turns}")
        if self.turns is not None and self.strategy != CHAT:
            raise ConfigError(
                f"turns are those of conversations, and the strategy is {self.strategy}; leave"
                " --turns out, or add --strategy chat"
            )

    @property
    def shards(self) -> int:
        """How many shards the corpus has."""
        return -(-self.sequences // self.shard_size)

    def shard_sequences(self, shard: int) -> int:
        """How many sequences this shard has."""
        return min(self.shard_size, self.sequences - shard * self.shard_size)
