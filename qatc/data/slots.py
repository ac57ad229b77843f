"""Slots that decode side by side, and how many of them.

Each slot holds a sequence at its own position. One that ends makes room for the next in the same
step; where there is no next one, the last slot takes its place, and the batch gets smaller. So a
step never computes a row that nobody needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatc.data.chat import ChatFormat, Conversation
from qatc.data.config import CorpusConfig
from qatc.data.corpus import prefix_tokens
from qatc.data.decode import Decoder
from qatc.data.sampling import sample, sequence_random
from qatc.data.shards import Tokens
from qatc.errors import DataError
from qatc.machine.device import available_memory

FIRST_SLOTS = 16
"""Slots that :func:`choose_slots` tries first; it then doubles them."""

WORTH_DOUBLING = 1.1
"""Times as many tokens per second for which twice the slots, and their memory, are taken."""

_LEAST_ROWS = 2
"""A compiled graph serves any number of rows but one."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that generation needs to know.

    Attributes:
        prefix: what every sequence begins with.
        ends: what ends a sequence, by tokenizer, config or generation config.
        ordinary: what the first token is drawn from: no special or added token, and nothing that
            the model has no embedding for.
        closed: what is never drawn: the model has logits for it, and the tokenizer no token.
    """

    prefix: list[int]
    ends: frozenset[int]
    ordinary: list[int]
    closed: list[int]

    @classmethod
    def of(cls, tokenizer: Any, model: Any) -> Vocabulary:
        """Read it off a tokenizer and a transformers model.

        Raises:
            DataError: they do not belong together.
        """
        ends: set[int] = set()
        for source in (tokenizer, model.config, model.generation_config):
            found = getattr(source, "eos_token_id", None)
            ends.update([found] if isinstance(found, int) else found or [])
        special = ends | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        logits = model.get_output_embeddings().weight.shape[0]
        size = min(logits, model.get_input_embeddings().weight.shape[0])
        known = {i for i in tokenizer.get_vocab().values() if i < size}
        ordinary, prefix = sorted(known - special), prefix_tokens(tokenizer)
        if not ordinary or any(token >= size for token in prefix):
            raise DataError(
                f"the tokenizer and the model do not belong together: the model has {size} tokens,"
                f" of which the tokenizer has {len(ordinary)} ordinary ones, and puts {prefix}"
                " before a text; take the tokenizer that the model was trained with"
            )
        closed = [i for i in range(logits) if i not in known]
        return cls(prefix, frozenset(ends), ordinary, closed)


@dataclass(frozen=True)
class Plan:
    """What is drawn for a sequence before it begins.

    Attributes:
        prompt: the tokens that the model does not choose.
        sample_from: position from which on tokens are sampled; those before are the most likely.
        uniform: fp64 ``[L]``, in [0, 1): what decides the token of each position.
        conversation: says how it goes on behind the end of a turn; None where that is the end of
            the sequence.
    """

    prompt: Sequence[int]
    sample_from: int
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    conversation: Conversation | None = None


class Slots:
    """Sequences being decoded.

    Args:
        decoder: its caches are allocated anew.
        vocabulary: of its model.
        count: slots at most.
        length: tokens per sequence at most.
        device: of the model.
    """

    def __init__(
        self, decoder: Decoder, vocabulary: Vocabulary, count: int, length: int, device: Any
    ) -> None:
        self._decoder, self._length, self._device = decoder, length, device
        self._ends = np.array(sorted(vocabulary.ends), np.int64)
        self._closed = torch.tensor(vocabulary.closed, dtype=torch.long, device=device)
        rows = max(count, _LEAST_ROWS)
        decoder.resize(rows)
        self._tokens = np.zeros((rows, length), np.int64)
        self._uniform = np.zeros((rows, length))
        self._position = np.zeros(rows, np.int64)
        self._given = np.zeros(rows, np.int64)
        self._sample_from = np.zeros(rows, np.int64)
        self._owner = np.zeros(rows, np.int64)
        self._conversations: list[Conversation | None] = [None] * rows
        self._count, self.live, self.steps = count, 0, 0

    @property
    def tokens(self) -> int:
        """Tokens of the sequences that are being decoded."""
        return int((self._position[: self.live] + 1).sum())

    def run(
        self,
        plans: Iterable[Plan],
        ended: Callable[[int, Tokens], None],
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Decode a sequence for every plan; ``ended`` gets each with its number, as it ends."""
        waiting = enumerate(plans)
        while self.live < self._count and (following := next(waiting, None)) is not None:
            self._begin(self.live, *following)
            self.live += 1
        while self.live:
            # From the last slot on, so that one that moves has been looked at.
            for slot in reversed(self._step()):
                tokens = self._tokens[slot, : self._position[slot] + 1]
                ended(int(self._owner[slot]), tokens.astype(np.int32))
                following = next(waiting, None)
                if following is not None:
                    self._begin(slot, *following)
                else:
                    self._remove(slot)
            on_step()

    def _begin(self, slot: int, number: int, plan: Plan) -> None:
        self._owner[slot], self._position[slot] = number, 0
        self._give(slot, 0, plan.prompt)
        self._sample_from[slot], self._uniform[slot] = plan.sample_from, plan.uniform
        self._conversations[slot] = plan.conversation

    def _give(self, slot: int, first: int, tokens: Sequence[int]) -> None:
        """Put tokens that the model does not choose into a sequence, from ``first`` on."""
        self._given[slot] = first + len(tokens)
        self._tokens[slot, first : first + len(tokens)] = tokens

    def _goes_on(self, slot: int) -> bool:
        """Whether another turn follows the one that the last token ended; if so, it begins."""
        position, conversation = int(self._position[slot]), self._conversations[slot]
        if conversation is None:
            return False
        behind = conversation.behind(position, int(self._tokens[slot, position]))
        if behind is None or position + len(behind[0]) >= self._length:
            return False
        self._give(slot, position, behind[0])
        self._sample_from[slot] = self._given[slot] + behind[1]
        return True

    def _remove(self, slot: int) -> None:
        """The last sequence moves into this slot."""
        self.live -= 1
        last = self.live
        if slot != last:
            for held in (
                *(self._tokens, self._uniform, self._position),
                *(self._given, self._sample_from, self._owner),
            ):
                held[slot] = held[last]
            self._conversations[slot] = self._conversations[last]
            self._decoder.move(last, slot, int(self._position[slot]))
        self._position[last] = 0

    def _step(self) -> list[int]:
        """Decode a token in every slot, and say where a sequence ended."""
        live, rows = self.live, max(self.live, _LEAST_ROWS)
        row = np.arange(rows)
        position = self._position[:rows]
        following = position + 1
        logits = self._decoder.step(
            torch.from_numpy(self._tokens[row, position]).to(self._device),
            torch.from_numpy(position).to(self._device),
            int(position.max()),
        )
        given = following < self._given[:rows]
        greedy = (following < self._sample_from[:rows]) & ~given
        chosen = choose(logits, self._uniform[row, following], greedy, self._closed)
        chosen = np.where(given, self._tokens[row, following], chosen)[:live]
        self._tokens[row[:live], following[:live]] = chosen
        self._position[:live] += 1
        self.steps += 1
        ended = np.isin(chosen, self._ends) & ~given[:live]
        for slot in ended.nonzero()[0]:
            ended[slot] = not self._goes_on(int(slot))
        ended |= following[:live] == self._length - 1
        return [int(slot) for slot in ended.nonzero()[0]]


def choose(
    logits: Tensor,
    uniform: np.ndarray[Any, np.dtype[np.float64]],
    greedy: np.ndarray[Any, np.dtype[np.bool_]],
    closed: Tensor,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The next token of every row.

    Args:
        logits: ``[B, V]``.
        uniform: ``[B]``, what decides those that are sampled.
        greedy: ``[B]``, where the most likely token is taken.
        closed: int64, tokens that are never taken; their logits are overwritten.

    Raises:
        DataError: the logits of a row are no distribution.
    """
    if len(closed):
        logits.index_fill_(1, closed, -torch.inf)
    chosen = sample(logits, torch.from_numpy(uniform)).numpy()
    if (chosen < 0).any():
        raise DataError(
            "the model answers with NaN or infinite logits, from which no token can be drawn; check"
            " its weights, or try --dtype float32"
        )
    rows = greedy.nonzero()[0]
    if len(rows):
        likely = logits[torch.from_numpy(rows).to(logits.device)].float().argmax(-1)
        chosen[rows] = likely.cpu().numpy()
    return chosen


def choose_slots(decoder: Decoder, most: int, length: int, device: Any) -> int:
    """How many slots decode the most tokens per second, in at most half of the free memory.

    They are doubled as long as that is worth the memory. What is measured is a step in the middle
    of a sequence, with the choice of its tokens. The decoder's caches are left as measured.

    Args:
        decoder: to be measured; its caches are allocated anew.
        most: slots at most.
        length: tokens per sequence at most.
        device: of the model.
    """
    best, best_rate = 1, 0.0
    rows = min(FIRST_SLOTS, most)
    while True:
        decoder.resize(max(rows, _LEAST_ROWS))
        seconds, row_bytes = _measure(decoder, max(rows, _LEAST_ROWS), length, device)
        rate = rows / seconds
        if rate < best_rate * WORTH_DOUBLING:
            break
        best, best_rate = rows, rate
        free = available_memory(device)
        fitting = most if free is None else min(most, free // 2 // row_bytes)
        if fitting <= rows:
            break
        rows = min(2 * rows, fitting)
    return best


def count_slots(decoder: Decoder, config: CorpusConfig, device: Any) -> int:
    """Slots for a new corpus, as many as are asked for or, measured, as are fast.

    A product of matrices may round otherwise with another number of rows, which decides a token now
    and then. So the number is on disk before the first shard is, and is never measured again.
    """
    most = min(config.shard_size, config.sequences)
    if config.batch_size == "auto":
        return choose_slots(decoder, most, config.max_length, device)
    return min(config.batch_size, most)


def measure_rate(decoder: Decoder, rows: int, length: int, device: Any) -> float:
    """Tokens per second of this many slots, in the middle of their sequences."""
    decoder.resize(max(rows, _LEAST_ROWS))
    return rows / _measure(decoder, max(rows, _LEAST_ROWS), length, device)[0]


def _measure(decoder: Decoder, rows: int, length: int, device: Any) -> tuple[float, int]:
    """Seconds of a step, and bytes that a row takes in the caches and for its logits."""
    tokens = torch.zeros(rows, dtype=torch.long, device=device)
    positions = torch.full_like(tokens, length // 2)
    uniform, greedy = np.full(rows, 0.5), np.zeros(rows, np.bool_)
    nothing, seconds = tokens[:0], float("inf")
    width = 0
    for _ in range(3):  # the first allocates, and may compile
        started = time.perf_counter()
        logits = decoder.step(tokens, positions, length // 2)
        choose(logits, uniform, greedy, nothing)
        seconds, width = min(seconds, time.perf_counter() - started), logits.shape[1]
    return seconds, decoder.row_bytes + width * (logits.element_size() + 4)


def plan_text(config: CorpusConfig, vocabulary: Vocabulary, number: int) -> Plan:
    """Of sequence ``number``, which begins with an ordinary token."""
    random = sequence_random(config.seed, number)
    first = vocabulary.ordinary[int(random.random() * len(vocabulary.ordinary))]
    prompt = [*vocabulary.prefix, first]
    greedy = _greedy(config, random)
    sample_from = (
        len(prompt) + {"hybrid": greedy, "sample": 0, "greedy": config.max_length}[config.strategy]
    )
    return Plan(prompt, sample_from, random.random(config.max_length))


def plan_chat(config: CorpusConfig, format: ChatFormat, number: int) -> Plan:
    """Of conversation ``number``, whose first message is sampled from its first token on."""
    random = sequence_random(config.seed, number)
    conversation = Conversation(format, _greedy(config, random), config.turns)
    return Plan(format.opening, 0, random.random(config.max_length), conversation)


def _greedy(config: CorpusConfig, random: np.random.Generator) -> int:
    low, high = config.greedy_tokens
    return low + int(random.random() * (high - low + 1))
