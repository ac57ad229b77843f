"""Tokens to text as they come: whole characters, the space before the first word, stop strings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


class Detokenizer:
    """The text of tokens behind a prompt, piece by piece.

    A tokenizer may drop the space in front of the first word that it decodes, and a character may
    take several tokens. So new tokens are decoded behind those before them, whose text is then cut
    off, and handed over once they are whole characters. Only the tokens of the last piece are
    decoded again each time, so that a long text costs no more per token than a short one.

    Args:
        tokenizer: of the model; special tokens are left out of the text.
        prompt: the tokens in front of the first new one.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._start, self._known = 0, len(self._tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """Take in tokens; return the text that has become whole with them."""
        self._tokens += tokens
        new = self._new()
        if not new or new.endswith("\ufffd"):  # nothing, or the first bytes of a character
            return ""
        # A window that begins inside a character would be decoded as another one.
        if "\ufffd" not in self._decode(self._tokens[self._known :]):
            self._start = self._known
        self._known = len(self._tokens)
        return new

    def flush(self) -> str:
        """The rest, for there are no more tokens to make it whole."""
        new = self._new()
        self._known = len(self._tokens)
        return new

    def _new(self) -> str:
        known, whole = (
            self._decode(self._tokens[self._start : end])
            for end in (self._known, len(self._tokens))
        )
        return whole[len(os.path.commonprefix([known, whole])) :]

    def _decode(self, tokens: list[int]) -> str:
        # Cleaning up would join words and punctuation that the model wrote apart.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TextStream:
    """What is written, up to the first stop string.

    Args:
        detokenizer: makes the text.
        stop: strings that end the text and are not part of it.
        show: gets the text as it comes, but for what may yet turn out to be a stop string.
        strip: drop white space in front of the text.

    Attributes:
        text: what was shown, or would have been.
        stopped: whether a stop string has come.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
        *,
        strip: bool = False,
    ) -> None:
        self.text, self.stopped = "", False
        self._detokenizer, self._stop, self._show = detokenizer, tuple(stop), show
        self._strip, self._held = strip, ""

    def push(self, tokens: Sequence[int]) -> None:
        """Take in tokens."""
        self._take(self._detokenizer.push(tokens))

    def end(self) -> None:
        """Show what was held back."""
        self._take(self._detokenizer.flush())
        if not self.stopped:
            self._give(self._held)
        self._held = ""

    def _take(self, new: str) -> None:
        if self.stopped:
            return
        self._held += new
        found = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        self.stopped = bool(found)
        safe = min(found) if found else len(self._held) - self._doubtful()
        self._give(self._held[:safe])
        self._held = self._held[safe:]

    def _doubtful(self) -> int:
        """How many of the last characters may be the first ones of a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0

    def _give(self, text: str) -> None:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        self.text += text
        if text and self._show is not None:
            self._show(text)
