"""How a corpus is to be written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, get_args

from qatc.errors import ConfigError

Strategy = Literal["hybrid", "sample", "greedy", "chat"]

CHAT: Strategy = "chat"
"""The strategy of a corpus of conversations."""


OnProgress = Callable[[int, int], None]
"""Called with the number of sequences and of tokens written or generated so far."""


RECORDING = "32+32"
"""What is recorded of the teacher where that is not said."""


@dataclass(frozen=True)
class Recording:
    """How much of the teacher's distribution is recorded at each token.

    Attributes:
        top: how many of the most likely tokens, with their probabilities.
        draws: how many are drawn of all others.
    """

    top: int
    draws: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read it as it is written: ``32+32``.

        Raises:
            ConfigError: it is no such sum, or has no draws.
        """
        match = re.fullmatch(r"\s*(\d+)\s*(?:\+\s*(\d+)\s*)?", text)
        if match is None or not int(match[1]):
            raise ConfigError(
                f"what is recorded of the teacher is written as the number of most likely tokens"
                f" and that of draws of the others, such as {RECORDING}; got {text!r}"
            )
        if not int(match[2] or 0):
            raise ConfigError(
                f"{text!r} records the {match[1]} most likely tokens alone: a distribution without"
                " its tail is another one, and what is trained on it is worse, measured with every"
                f" seed; add draws of the tail, such as {match[1]}+{match[1]}"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.top}+{self.draws}"


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
        record_logits: what is recorded of the teacher's distribution, as :meth:`Recording.parse`
            reads it, see :mod:`qatc.data.teacher_logits`; ``None`` for nothing. It leaves the
            sequences as they are.

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
    record_logits: str | None = None

    def __post_init__(self) -> None:
        if self.record_logits is not None:
            Recording.parse(self.record_logits)
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
