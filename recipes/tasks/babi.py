"""Facts scattered through prose, as in BABILong's qa1 to qa5 (Kuratov et al. 2024)."""

from __future__ import annotations

import dataclasses
import random

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.tasks import world
from atlas_blocks.recipes.tasks.prose import (
    Prose,
    Question,
    Stretch,
    coded,
    reference,
    scattered,
    spaced,
    words,
)

# Facts are at most one in so many tokens.
SHARE = 8
TRIES = 1000
KINDS = {
    1: "where a person is",
    2: "where a thing is",
    3: "where a thing was before",
    4: "which room lies in a direction",
    5: "who gave what to whom",
}
# qa5 asks, each as often, for one of 3 things, of 4 people, and of the 3 others than the giver;
# where a question names one of the six rooms, five are left.
CHANCES = {1: 1 / 6, 2: 1 / 6, 3: 1 / 5, 4: 1 / 5, 5: (1 / 3 + 1 / 4 + 1 / 3) / 3}


@dataclasses.dataclass(frozen=True)
class BabiTask:
    """Question `number`, from 1 to 5, about facts of a small `world` between sentences of prose.

    Facts keep their order and stand before sentences that are drawn evenly, between the shares
    `start` and `end` of them. Stories with more facts than length // 8 are drawn again. The
    last sentence of the prose is cut, so that a prompt and the answer's room have `length` tokens,
    no more and no fewer. prose: None: `reference`.

    Scored by BABILong's rule: of the task's labels, those of the question left out, the first
    sentence of the continuation holds the answer and no other.
    """

    length: int = 1024
    number: int = 1
    new_tokens: int = 32
    start: float = 0.0
    end: float = 1.0
    prose: Prose | None = None

    def __post_init__(self) -> None:
        if self.number not in KINDS:
            check.fail("number", "a question from 1 to 5", self.number)
        check.at_least("length", self.length, 1)
        check.at_least("new_tokens", self.new_tokens, 1)
        if not 0 <= self.start <= self.end <= 1:
            check.fail("start", "0 <= start <= end <= 1", f"{self.start} and end = {self.end}")

    @property
    def labels(self) -> tuple[str, ...]:
        """What an answer may be."""
        return (*world.GIVERS, *world.THINGS) if self.number == 5 else world.ROOMS

    @property
    def chance(self) -> float:
        """Of a guess that knows what kind of answer is due, and no fact."""
        return CHANCES[self.number]

    def curriculum(self) -> tuple[BabiTask, ...]:
        """From 1,024 to 4,096 tokens: 512 bytes have room for the shortest stories alone."""
        return tuple(dataclasses.replace(self, length=n) for n in (1024, 2048, 4096))

    def question(self, coder: Tokenizer, draws: random.Random) -> Question:
        """See `TextTask`."""
        head = words(
            coder,
            f"Facts about {KINDS[self.number]} are hidden in the text below. Answer the question "
            "at its end with one word.\n",
        )
        for _ in range(TRIES):
            found = world.asked(self.number, draws)
            facts = [words(coder, f" {fact}") for fact in found.facts]
            tail = words(coder, f"\n{found.question} Answer:")
            room = self.length - self.new_tokens - len(head) - len(tail) - sum(map(len, facts))
            if room >= 0 and len(facts) <= self.length // SHARE:
                break
        else:
            check.fail("length", f"room for a story of question {self.number}", self.length)
        hay = coded(spaced(self.prose or reference()), coder)
        first = draws.randrange(hay.units)
        count = hay.fitting(first, room)
        end = hay.at(first + count)
        cut = Stretch(hay, end, hay.at(first) + room)
        # Before each sentence, or after the last; the cut one is a sentence.
        places = count + (len(cut) > 0)
        low, high = round(self.start * places), round(self.end * places)
        gaps = sorted(draws.randint(low, high) for _ in facts)
        inside = sum(gap <= count for gap in gaps)
        middle = scattered(hay, first, count, gaps[:inside], facts[:inside])
        last = [cut] if len(cut) else []
        parts = (head, *middle, *last, *facts[inside:], tail)
        return Question(parts, found.question, (found.answer,), f" {found.answer}.")

    def score(self, question: Question, text: str) -> float:
        """See `TextTask`."""
        sentence, asked = text.lower().split(".")[0], question.asked.lower()
        named = {w for w in map(str.lower, self.labels) if w in sentence and w not in asked}
        return float(named == {question.answers[0].lower()})

    def finished(self, question: Question, text: str) -> bool:
        """See `TextTask`."""
        return "." in text
