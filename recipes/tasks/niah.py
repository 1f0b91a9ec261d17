"""Needles in a haystack, as RULER's S-NIAH (Hsieh et al. 2024, NVIDIA/RULER, niah.py): a sentence
binds a value to a key, and is asked for at the end.

The sentences are our own, of RULER's structure. The prose is a substitute, see `prose`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import random
import uuid

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.data.sources import needed
from atlas_blocks.recipes.tasks.prose import (
    Prose,
    Question,
    coded,
    reference,
    scattered,
    spaced,
    words,
)

# The haystack of S-NIAH-1, again and again.
REPEATED = (
    "\nThe meadow is wide. The river is clear. The light is warm. We walk on. Out and home again."
)
# 40 depths in percent, from the beginning to the end of the prose.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
NUMBERS = (10**6, 10**7)
# Sentences that prose may begin with, before there is no room for any.
TRIES = 100


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """`keys` needles are hidden, or of one key `values`; all values of one key are asked for.

    length: tokens of the prompt and the answer's room, at most. haystack: "repeat", five short
    sentences again and again, a line each time, needles before lines that are drawn without
    replacement; "prose", needles after the share of the sentences that DEPTHS says, drawn without
    replacement. value: "number" of seven digits, or "uuid". new_tokens: the answer's room. prose:
    None: `reference`.

    Scored by the share of the values that the continuation holds, whatever their case.
    """

    length: int = 1024
    haystack: str = "repeat"
    value: str = "number"
    keys: int = 1
    values: int = 1
    new_tokens: int = 128
    prose: Prose | None = None

    def __post_init__(self) -> None:
        check.choice("haystack", self.haystack, ("repeat", "prose"))
        check.choice("value", self.value, ("number", "uuid"))
        for name in ("keys", "values", "new_tokens"):
            check.at_least(name, getattr(self, name), 1)
        if self.keys * self.values > len(DEPTHS):
            check.fail("keys", f"at most {len(DEPTHS)} needles", self.keys * self.values)
        check.at_least("length", self.length, 1)

    @property
    def chance(self) -> float:
        """Of naming the value unseen; one that names any needle is right in 1 / keys."""
        return 1 / (NUMBERS[1] - NUMBERS[0]) if self.value == "number" else 2.0**-122

    def curriculum(self) -> tuple[NeedleTask, ...]:
        """From 512 to 4,096 tokens, from 1,024 where 512 bytes have no room."""
        short = self.haystack == "repeat" and self.keys * self.values == 1
        lengths = (512, 1024, 2048, 4096) if short else (1024, 2048, 4096)
        return tuple(dataclasses.replace(self, length=n) for n in lengths)

    def question(self, coder: Tokenizer, draws: random.Random) -> Question:
        """See `TextTask`."""
        kind = self.value
        names: list[str] = []
        while len(names) < self.keys:
            name = f"{draws.choice(adjectives())}-{draws.choice(nouns())}"
            names += [name] if name not in names else []
        bound = [(name, self._value(draws)) for name in names for _ in range(self.values)]
        repeat = self.haystack == "repeat"
        gap = "\n" if repeat else " "
        needles = [words(coder, f"{gap}The secret {kind} of {n} is {v}.") for n, v in bound]
        asked = draws.choice(names)
        answers = tuple(v for n, v in bound if n == asked)
        plural = len(answers) > 1
        what = f"secret {kind}s of {asked}" if plural else f"secret {kind} of {asked}"
        question = f"{'What are all' if plural else 'What is'} the {what} in the text above?"
        head = words(
            coder,
            f"Secret {kind}s are hidden in the text below. Remember them: you will be asked "
            f"for them afterwards.{'' if repeat else chr(10)}",
        )
        tail = words(coder, f"\n{question} The {what} {'are' if plural else 'is'}")
        room = self.length - self.new_tokens - len(head) - len(tail) - sum(map(len, needles))
        hay = coded((REPEATED,) if repeat else spaced(self.prose or reference()), coder)
        # Before different lines, or around one sentence at least: another, where it is too long.
        units = len(needles) if repeat else 1
        for _ in range(TRIES):
            first = 0 if repeat else draws.randrange(hay.units)
            count = hay.fitting(first, room) if room > 0 else 0
            if count >= units:
                break
        else:
            least = self.length - room + hay.at(first + units) - hay.at(first)
            wanted = f"at least {least} tokens for needles: {len(needles)}"
            check.fail("length", wanted, self.length)
        draws.shuffle(needles)
        if repeat:
            gaps = draws.sample(range(count), len(needles))
        else:
            gaps = [int(count * (depth / 100)) for depth in draws.sample(DEPTHS, len(needles))]
        middle = scattered(hay, first, count, sorted(gaps), needles)
        return Question((head, *middle, tail), question, answers, f" {', '.join(answers)}.")

    def _value(self, draws: random.Random) -> str:
        if self.value == "number":
            return str(draws.randrange(*NUMBERS))
        return str(uuid.UUID(int=draws.getrandbits(128), version=4))

    def score(self, question: Question, text: str) -> float:
        """See `TextTask`."""
        text = text.lower()
        return sum(a.lower() in text for a in question.answers) / len(question.answers)

    def finished(self, question: Question, text: str) -> bool:
        """See `TextTask`."""
        return self.score(question, text) == 1


@functools.cache
def adjectives() -> tuple[str, ...]:
    """Those of wonderwords, each once. Raises ValueError where it is not installed."""
    return _listed("adjectivelist.txt")


@functools.cache
def nouns() -> tuple[str, ...]:
    """Those of wonderwords, each once. Raises ValueError where it is not installed."""
    return _listed("nounlist.txt")


def _listed(name: str) -> tuple[str, ...]:
    needed("wonderwords", "task", "eval")
    file = importlib.resources.files("wonderwords.assets") / name
    found = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(sorted({word for word in found if word}))
