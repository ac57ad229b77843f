"""What is drawn for a sequence before it begins: its first tokens, and how many are greedy."""

from __future__ import annotations

import numpy as np

from qatc.data.chat import ChatFormat, Conversation
from qatc.data.config import CorpusConfig
from qatc.data.sampling import sequence_random
from qatc.data.slots import Plan, Vocabulary


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
