"""Sampled tokens as text, as they come, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from atlas_blocks.recipes.data import Tokenizer

# What an incomplete character decodes to.
UNKNOWN = "\ufffd"


class Writer:
    """The text of one sequence, token by token.

    stop: strings that end it and are not part of it. What may be the begin of one is held back
    until it is known, and so is a character whose last byte is to come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stop, self.stopped = tuple(stop), False
        self._decode = _Bytes() if tokenizer.json is None else _Pieces(tokenizer)
        self._held = ""

    def write(self, token: int) -> str:
        """What this token adds; nothing once `stopped`."""
        return self._released(self._decode.add(token), last=False)

    def end(self) -> str:
        """What was held back and will not be followed."""
        return self._released(self._decode.rest(), last=True)

    def _released(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        held = max((_overlap(text, s) for s in self.stop), default=0)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Bytes:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """By a tokenizer, of which a token may be part of a character, and one's text depend on the
    token before it: decoded are those that were shown last, and those after them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens).decode(errors="replace")

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith(UNKNOWN):
            return ""
        self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        return text

    def rest(self) -> str:
        text, self._tokens, self._shown = self._new(), [], 0
        return text

    def _new(self) -> str:
        return self._text(self._tokens)[len(self._text(self._tokens[: self._shown])) :]
