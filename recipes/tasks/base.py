"""What all tasks have in common, and what their scores are made of.

A task is a frozen dataclass whose field `length` may be changed alone. There are two kinds:

* of tokens (`TokenTask`): it draws tokens and targets, and a model that was trained on it answers;
* of text (`TextTask`): it asks questions about a text of any length, for any tokenizer.

Both have `chance`, the share that the best guess gets right without the memory that is asked for,
and `curriculum`, the same task from easy to hard.

B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.tasks.prose import Question

IGNORE = -100
FILLER = 0
T = TypeVar("T")


@runtime_checkable
class TokenTask(Protocol):
    """A task over a vocabulary of its own, scored at the positions that have a target."""

    @property
    def length(self) -> int:
        """Tokens of a sample; of some tasks one less, where the last is a target alone."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens are below it."""
        ...

    @property
    def chance(self) -> float:
        """The share that the best guess gets right, from 0 to 1."""
        ...

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; a target is IGNORE where nothing is asked."""
        ...


@runtime_checkable
class TextTask(Protocol):
    """A task in text, answered by a continuation that the model writes."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the room for the answer, at most."""
        ...

    @property
    def new_tokens(self) -> int:
        """Tokens of that room."""
        ...

    @property
    def chance(self) -> float:
        """The share that the best guess gets right, from 0 to 1."""
        ...

    def question(self, coder: Tokenizer, draws: random.Random) -> Question:
        """A text with what is asked about it. Raises ValueError where `length` has no room."""
        ...

    def score(self, question: Question, text: str) -> float:
        """The share, from 0 to 1, of the answers that a continuation gives."""
        ...

    def finished(self, question: Question, text: str) -> bool:
        """Whether nothing that follows the continuation so far changes its score."""
        ...


@runtime_checkable
class _Sized(Protocol):
    """A task whose length follows from its other settings."""

    def with_length(self, length: int) -> Any: ...


def resized(task: T, **settings: Any) -> T:
    """A copy of a task with other settings. Raises ValueError for a name that it has not, and for a
    value of another type than the present one's."""
    if "length" in settings and isinstance(task, _Sized):
        task = task.with_length(settings.pop("length"))
    fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}  # type: ignore[arg-type]
    for name, value in settings.items():
        check.choice("setting", name, fields)
        kind = type(fields[name])
        kinds = (float, int) if kind is float else (kind,)
        if fields[name] is not None and type(value) not in kinds:
            check.fail(name, kind.__name__, repr(value))
    return dataclasses.replace(task, **settings)  # type: ignore[type-var]


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of targets answered right. logits [B, T, V], targets [B, T]."""
    asked = targets != IGNORE
    return float((logits.argmax(-1) == targets)[asked].float().mean())


def macro_accuracy(answers: Tensor, targets: Tensor) -> float:
    """The mean over classes of the share of each that is answered right, as MAD scores.

    answers, targets: int64 [B, T]. A class counts where it is among the targets or the answers, as
    in torchmetrics' MulticlassAccuracy(average="macro"). nan where nothing is asked.
    """
    asked = targets != IGNORE
    right, given = targets[asked], answers[asked]
    shares = [
        float((given[right == c] == c).float().mean()) if bool((right == c).any()) else 0.0
        for c in torch.cat([right, given]).unique()
    ]
    return sum(shares) / len(shares) if shares else math.nan


def training_rows(
    task: TextTask, coder: Tokenizer, batch: int, draws: random.Random
) -> tuple[Tensor, Tensor]:
    """tokens and targets, int64 [B, T], to train a model on a task in text.

    A row is a prompt and its answer; the targets are the answer's tokens, IGNORE elsewhere. Shorter
    rows are filled up at their end. T: of the longest.
    """
    check.at_least("batch", batch, 1)
    rows: list[tuple[Tensor, int]] = []
    for _ in range(batch):
        asked = task.question(coder, draws)
        prompt = [torch.from_numpy(piece) for piece in asked.tokens()]
        answer = torch.from_numpy(coder.encode([asked.continuation])[0].astype("int64"))
        rows.append((torch.cat([*prompt, answer]), len(asked)))
    longest = max(len(row) for row, _ in rows) - 1
    tokens = torch.full((batch, longest), FILLER)
    targets = torch.full((batch, longest), IGNORE)
    for number, (row, first) in enumerate(rows):
        tokens[number, : len(row) - 1] = row[:-1]
        targets[number, first - 1 : len(row) - 1] = row[first:]
    return tokens, targets


def wilson(right: float, asked: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval, at 95 %, for a share of `right` among `asked` (E. B. Wilson 1927).

    asked: > 0, not necessarily whole. Raises ValueError unless 0 <= right <= asked.
    """
    if not 0 <= right <= asked or asked <= 0:
        check.fail("right", f"a number from 0 to asked = {asked} > 0", right)
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + (z / asked) ** 2 / 4)
    # At the ends rounding would step over them.
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if right == 0 else low), (1.0 if right == asked else high)


def effective(rights: Sequence[float], asked: Sequence[int]) -> float:
    """How many independent answers are worth those of samples whose answers go together.

    rights, asked: of every sample, the right answers and all. The variance of the share over the
    samples says it (the design effect, L. Kish 1965), never fewer than samples and never more than
    answers; where every answer is right, or none, there is no variance, and samples count.
    """
    samples, total = len(asked), sum(asked)
    share = sum(rights) / total
    off = [r - share * a for r, a in zip(rights, asked, strict=True)]
    if samples < 2 or not 0 < share < 1 or not any(off):
        return float(samples)
    variance = samples / (samples - 1) * sum(x * x for x in off) / total**2
    return min(float(total), max(float(samples), share * (1 - share) / variance))
