"""Text in which facts are scattered: any length, never whole in memory.

What is held is the prose itself, once, as tokens; a question of ten million tokens is a list of
stretches of it with the facts between them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import platform
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer

# About ten tokens of GPT-2, the least of a sentence of BABILong's filler.
WORDS = 8
PIECE = 65536


@dataclasses.dataclass(frozen=True, eq=False)
class Prose:
    """Sentences, the first again after the last. name: where they come from, for results."""

    name: str
    sentences: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.sentences:
            check.fail("prose", f"sentences of at least {WORDS} words", "none")

    @staticmethod
    def of(name: str, text: str) -> Prose:
        """The sentences of a text that have at least WORDS words. Raises ValueError where none
        has."""
        found = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", words):
                ends = re.match(r"[A-Z]", sentence) and sentence[-1] in ".!?"
                if ends and len(sentence.split()) >= WORDS:
                    found.append(sentence)
        return Prose(name, tuple(found))

    @staticmethod
    def read(file: Path) -> Prose:
        """That of a file of UTF-8. Raises ValueError where it cannot be read or has none."""
        try:
            return Prose.of(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prose: cannot read {file}: {error}") from error


@functools.cache
def reference() -> Prose:
    """The language reference that Python ships (`pydoc_data.topics`).

    It stands for RULER's essays and BABILong's novels, which no package ships.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    # Neither grammar nor sessions at the prompt.
    text = "\n\n".join(p for p in paragraphs if "::=" not in p and ">>>" not in p)
    version = platform.python_version()
    return Prose.of(f"the language reference of Python {version}, in the place of essays", text)


@functools.cache
def spaced(prose: Prose) -> tuple[str, ...]:
    """The sentences, each after a space."""
    return tuple(f" {sentence}" for sentence in prose.sentences)


class Coded:
    """Prose as tokens: units are its sentences, with numbers that go on after the last."""

    def __init__(self, sentences: Sequence[str], coder: Tokenizer) -> None:
        parts = coder.encode(list(sentences))
        self.tokens = np.concatenate(parts)
        self.ends = np.cumsum([0, *(len(part) for part in parts)])
        self.units = len(parts)

    def at(self, unit: int) -> int:
        """Tokens before a unit, counted from unit 0."""
        cycles, rest = divmod(unit, self.units)
        return cycles * len(self.tokens) + int(self.ends[rest])

    def fitting(self, first: int, tokens: int) -> int:
        """How many units from `first` on have at most so many tokens together."""
        cycles, rest = divmod(self.at(first) + tokens, len(self.tokens))
        inside = int(np.searchsorted(self.ends, rest, side="right")) - 1
        return cycles * self.units + inside - first


@functools.lru_cache(maxsize=8)
def coded(sentences: tuple[str, ...], coder: Tokenizer) -> Coded:
    """The sentences' tokens, kept for the next question."""
    return Coded(sentences, coder)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Tokens first to last, the last left out, of prose that begins again at its end."""

    prose: Coded
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def tokens(self, piece: int) -> Iterator[np.ndarray]:
        size, at = len(self.prose.tokens), self.first
        while at < self.last:
            start = at % size
            end = min(start + piece, size, start + self.last - at)
            yield self.prose.tokens[start:end].astype(np.int64)
            at += end - start


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and what is to follow it.

    parts: the prompt, as tokens int64 [n] and stretches. asked: the question in words. answers:
    what the continuation has to give. continuation: the words that follow the prompt in training.
    """

    parts: tuple[np.ndarray | Stretch, ...]
    asked: str
    answers: tuple[str, ...]
    continuation: str

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return sum(len(part) for part in self.parts)

    def tokens(self, piece: int = PIECE, start: int = 0) -> Iterator[np.ndarray]:
        """The prompt in order from token `start` on, int64 [<= piece] at a time."""
        check.at_least("piece", piece, 1)
        for part in self.parts:
            skipped, start = min(start, len(part)), max(0, start - len(part))
            if isinstance(part, Stretch):
                yield from Stretch(part.prose, part.first + skipped, part.last).tokens(piece)
            else:
                for first in range(skipped, len(part), piece):
                    yield part[first : first + piece]


def words(coder: Tokenizer, text: str) -> np.ndarray:
    """Tokens int64 [n] of a text."""
    return coder.encode([text])[0].astype(np.int64)


def scattered(
    prose: Coded, first: int, count: int, gaps: Sequence[int], facts: Sequence[np.ndarray]
) -> list[np.ndarray | Stretch]:
    """Units first to first + count, with fact i before unit first + gaps[i].

    gaps: sorted, from 0 (before everything) to count (after everything).
    """
    parts: list[np.ndarray | Stretch] = []
    at = 0
    for gap, fact in zip(gaps, facts, strict=True):
        if gap > at:
            parts.append(Stretch(prose, prose.at(first + at), prose.at(first + gap)))
        parts.append(fact)
        at = gap
    if count > at:
        parts.append(Stretch(prose, prose.at(first + at), prose.at(first + count)))
    return parts


def draws_of(*words: object) -> random.Random:
    """Draws that depend on these words alone."""
    return random.Random("/".join(map(str, words)))
