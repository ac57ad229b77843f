"""Conversations that a model writes with itself, by the chat template of its tokenizer.

A chat model needs no seed but its template (MAGPIE, arXiv 2406.08464): behind all that the template
puts before a user's message, it writes such a message; behind what the template puts before an
answer, it answers. Then comes the next message, and so on.

What the template puts between turns is found by rendering a conversation of known messages. A turn
ends with the first special or added token behind it, as no other token is sure to come out of the
model as it stands in the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from qatc.data.shards import Marks
from qatc.errors import ConfigError

_MESSAGE, _ANSWER, _NEXT = "first-message", "first-answer", "second-message"


@dataclass(frozen=True)
class Turn:
    """How a turn ends.

    Attributes:
        end: the token that ends it.
        behind: what the template puts behind that, up to where the next turn begins.
    """

    end: int
    behind: tuple[int, ...]


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template puts around messages and answers, as token ids.

    Attributes:
        opening: what stands before the first message.
        message, answer: how a user's message and an answer end.
    """

    opening: tuple[int, ...]
    message: Turn
    answer: Turn

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> Self:
        """Find it in the chat template of a tokenizer.

        Args:
            tokenizer: of the model.
            name: of the model, for messages.

        Raises:
            ConfigError: there is no template, or it does not say where turns begin and end.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{name} has no chat template, by which it could write conversations; take a chat"
                " model, or another --strategy, such as hybrid"
            )
        user, assistant = ({"role": role} for role in ("user", "assistant"))
        messages = [
            *(user | {"content": _MESSAGE}, assistant | {"content": _ANSWER}),
            user | {"content": _NEXT},
        ]
        asked = _render(tokenizer, name, messages[:1])
        opening, header = _around(asked, name, _MESSAGE)
        _, answered, following, _ = _around(_render(tokenizer, name, messages), name, *_ALL)
        if answered.startswith(header):  # a template without a generation prompt
            header = answered
        found = tuple(_encode(tokenizer, opening))
        if not found:
            raise _unclear(name, "puts nothing before a user's message, to let the model begin one")
        return cls(
            found,
            _turn(tokenizer, name, header, "a user's message"),
            _turn(tokenizer, name, following, "an answer"),
        )

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Read it back from plain data, as :func:`dataclasses.asdict` writes it."""
        turns = (plain["message"], plain["answer"])
        return cls(
            tuple(plain["opening"]), *(Turn(turn["end"], tuple(turn["behind"])) for turn in turns)
        )

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return frozenset((self.message.end, self.answer.end))

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens that the template puts into a conversation."""
        return (*self.opening, *self.ends, *self.message.behind, *self.answer.behind)

    def require_length(self, length: int, name: str) -> None:
        """Raise ``ConfigError`` if a conversation of this many tokens has no room for an answer."""
        own = len(self.opening) + 1 + len(self.message.behind)
        if length < own + 2:  # a token of a message, and one of an answer
            raise ConfigError(
                f"the chat template of {name} takes {own} tokens of a conversation before an answer"
                f" begins, which leaves no room for one in {length}; raise --max-length"
            )


class Conversation:
    """A conversation that is being written: whose turn it is, and where answers stand.

    Args:
        format: the template.
        greedy: how many tokens at the start of an answer are the most likely ones.
        turns: answers at most; None for as many as fit.
    """

    def __init__(self, format: ChatFormat, greedy: int, turns: int | None) -> None:
        self._format, self._greedy, self._left = format, greedy, turns
        self._answering = False
        self._answers: list[slice] = []

    def behind(self, position: int, token: int) -> tuple[tuple[int, ...], int] | None:
        """How it goes on where the model has drawn a token that ends a turn.

        Whatever ends a message leads on to an answer. An answer leads on to the next message only
        where it ends as the template has it.

        Args:
            position: of the token.
            token: what was drawn.

        Returns:
            The tokens that stand from ``position`` on, and the number of tokens behind them that
            are not sampled; None where the conversation is over.
        """
        turn = self._format.answer if self._answering else self._format.message
        given = (turn.end, *turn.behind)
        first = position + len(given)
        if not self._answering:
            self._answering = True
            self._answers.append(slice(first, None))
            return given, self._greedy
        self._answering = False
        self._answers[-1] = slice(self._answers[-1].start, position + 1)
        if token != turn.end or len(self._answers) == self._left:
            return None
        return given, 0

    def answers(self, length: int) -> Marks:
        """Which of its first ``length`` tokens are part of an answer."""
        marks = np.zeros(length, np.bool_)
        for answer in self._answers:
            marks[answer] = True
        return marks


_ALL = (_MESSAGE, _ANSWER, _NEXT)


def _render(tokenizer: Any, name: str, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        raise _unclear(name, f"refuses a conversation ({error})") from error
    return text


def _around(text: str, name: str, *messages: str) -> list[str]:
    """What stands before, between and behind the messages."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message)
        if not found:
            raise _unclear(name, "leaves out a message, so that its place is not known")
        parts.append(before)
    return [*parts, text]


def _turn(tokenizer: Any, name: str, text: str, what: str) -> Turn:
    """A turn behind which the template puts ``text``."""
    ids = _encode(tokenizer, text)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for place, token in enumerate(ids):
        if token in special:
            return Turn(token, tuple(ids[place + 1 :]))
    raise _unclear(name, f"ends {what} with {text!r}, which is no token of its own")


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _unclear(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"the chat template of {name} {why}: no conversations can be written by it; take another"
        " --strategy, such as hybrid"
    )
