"""MAD's six tasks (Poli et al. 2024, mad-lab: mad/data/instances.py), by its rules.

The models that MAD trains on them: 128 wide, two blocks of the mixer and a SwiGLU; `TRAINING` says
how. `settings()` is what it varies of the task, and TRAINING["fewer"] of the training: a score is
the mean over all of them. Metric: `macro_accuracy`, the mean over classes.

With `training` the targets of the recall tasks are all tokens, each the next one's; without, those
that are asked for.

B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.tasks.base import IGNORE

# Sequences to train on, of memorization, and fewer as one more difficulty of all other tasks;
# sequences to test, epochs, and the grid of which the best counts.
TRAINING = {
    "train": 12_800,
    "memorization": 256,
    "fewer": (6_400, 3_200, 1_600, 800),
    "test": 1_280,
    "batch": 128,
    "epochs": 200,
    "lr": (1e-4, 5e-4, 1e-3),
    "weight_decay": (0.0, 0.1),
}
# The fixed map of MADMemorization.
MAP_SEED = 12345
Row = tuple[list[int], list[int]]
Task = TypeVar("Task", bound="MADRecall | MADFuzzy | MADCopy | MADCompression | MADMemorization")


def _rows(batch: int, draw: Callable[[], Row]) -> tuple[Tensor, Tensor]:
    rows = [draw() for _ in range(batch)]
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


def _varied(task: Task, **values: Sequence[float]) -> tuple[Task, ...]:
    """The task, then with each of these values of one field at a time."""
    return (
        task,
        *(dataclasses.replace(task, **{name: v}) for name, each in values.items() for v in each),
    )


class _Draws:
    """Single numbers of a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def below(self, top: int) -> int:
        return int(torch.randint(top, (), generator=self.generator))

    def unit(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def permuted(self, top: int, count: int) -> tuple[int, ...]:
        return tuple(torch.randperm(top, generator=self.generator)[:count].tolist())


@dataclasses.dataclass(frozen=True)
class MADRecall:
    """In-context recall: [key value] again and again; a key has one value in a sequence, drawn when
    it first comes, and is asked for whenever it comes again. The last pair is a repeat.

    Keys are the first half of what is no noise, values the second. noise: the share of pairs, but
    one, in the place of which two of the last `noise_vocab` tokens stand. Samples have length - 1
    tokens: the last value is a target alone.
    """

    length: int = 128
    vocab_size: int = 16
    noise: float = 0.0
    noise_vocab: int = 0
    training: bool = False
    macro: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.length % 2 or self.length < 4:
            check.fail("length", "an even number >= 4", self.length)
        check.at_least("noise_vocab", self.noise_vocab, 0)
        check.at_least("vocab_size", self.vocab_size, self.noise_vocab + 2)
        check.between("noise", self.noise, 0, 1)
        if self.noise and not self.noise_vocab:
            check.fail("noise_vocab", "at least 1 where there is noise", 0)

    @property
    def _meant(self) -> int:
        return self.vocab_size - self.noise_vocab

    @property
    def chance(self) -> float:
        """Of any value."""
        return 1 / (self._meant - self._meant // 2)

    def curriculum(self) -> tuple[MADRecall, ...]:
        """From 32 tokens to all."""
        lengths = sorted({*(n for n in (32, 64, 128, 256, 512) if n < self.length), self.length})
        return tuple(dataclasses.replace(self, length=n) for n in lengths)

    def settings(self) -> tuple[MADRecall, ...]:
        """The difficulties of MAD, this one first, one thing changed at a time."""
        vocab = (48, 80, 144) if self.noise else (32, 64, 128)
        noise = (0.4, 0.6, 0.8) if self.noise else ()
        return _varied(self, vocab_size=vocab, length=(256, 512, 1024), noise=noise)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T - 1]; a target stands where its key does."""
        draws = _Draws(generator)
        return _rows(batch, lambda: self._row(draws))

    def _row(self, draws: _Draws) -> Row:
        half, pairs = self._meant // 2, self.length // 2
        tokens: list[int] = []
        targets: list[int] = []
        values: dict[int, int] = {}
        spared = draws.below(pairs - 1)
        for place in range(pairs - 1):
            if place != spared and self.noise and draws.unit() < self.noise:
                tokens += [self._meant + draws.below(self.noise_vocab) for _ in range(2)]
                targets += [IGNORE, IGNORE]
                continue
            key = draws.below(half)
            known = key in values
            value = values.setdefault(key, half + draws.below(self._meant - half))
            tokens += [key, value]
            targets += [IGNORE, value if known else IGNORE]
        key = list(values)[draws.below(len(values))]
        tokens += [key, values[key]]
        targets += [IGNORE, values[key]]
        return tokens[:-1], (tokens if self.training else targets)[1:]


@dataclasses.dataclass(frozen=True)
class MADFuzzy:
    """Fuzzy in-context recall: keys and values of one to three tokens, none twice within one.

    Keys in a test always have `key_tokens`, in training one to as many. The last pair is a repeat
    of one whose place is drawn evenly; what is left over stands before the first pair, as the pad
    token V - 1. Every token of a value is asked for, in pairs that came before.

    In MAD's own code the pair that comes last may have had no place before; here it always has.
    """

    length: int = 128
    vocab_size: int = 16
    key_tokens: int = 3
    value_tokens: int = 3
    training: bool = False
    macro: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check.at_least("key_tokens", self.key_tokens, 1)
        check.at_least("value_tokens", self.value_tokens, 1)
        check.at_least("length", self.length, 2 * (self.key_tokens + self.value_tokens) + 1)
        longest = max(self.key_tokens, self.value_tokens)
        check.at_least("vocab_size", self.vocab_size, 2 * longest + 1)

    @property
    def chance(self) -> float:
        """Of any token of values."""
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def curriculum(self) -> tuple[MADFuzzy, ...]:
        """From keys and values of one token to all."""
        longest = max(self.key_tokens, self.value_tokens)
        return tuple(
            dataclasses.replace(
                self, key_tokens=min(n, self.key_tokens), value_tokens=min(n, self.value_tokens)
            )
            for n in range(1, longest + 1)
        )

    def settings(self) -> tuple[MADFuzzy, ...]:
        """The difficulties of MAD, this one first, one thing changed at a time."""
        return _varied(self, vocab_size=(32, 64, 128), length=(256, 512, 1024))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; a target stands before its token."""
        draws = _Draws(generator)
        return _rows(batch, lambda: self._row(draws))

    def _row(self, draws: _Draws) -> Row:
        half = (self.vocab_size - 1) // 2
        tokens: list[int] = []
        targets: list[int] = []
        values: dict[tuple[int, ...], tuple[int, ...]] = {}

        def write(key: tuple[int, ...], known: bool) -> None:
            tokens.extend((*key, *values[key]))
            asked = values[key] if known else [IGNORE] * len(values[key])
            targets.extend((*([IGNORE] * len(key)), *asked))

        def pair() -> tuple[tuple[int, ...], tuple[int, ...]]:
            size = 1 + draws.below(self.key_tokens) if self.training else self.key_tokens
            count = 1 + draws.below(self.value_tokens)
            value = draws.permuted(self.vocab_size - 1 - half, count)
            return draws.permuted(half, size), tuple(half + v for v in value)

        # The pair that comes last, and the place from which on it comes first.
        probe, longest = pair(), self.key_tokens + self.value_tokens
        room = self.length - len(probe[0]) - len(probe[1]) - longest
        place = draws.below(max(1, room - longest + 1))
        while len(tokens) < room:
            key, value = pair()
            if probe[0] not in values and (len(tokens) >= place or key == probe[0]):
                key, value = probe
            known = key in values
            values.setdefault(key, value)
            write(key, known)
        write(probe[0], True)
        pad = self.length + 1 - len(tokens)
        tokens = [self.vocab_size - 1] * pad + tokens
        targets = [IGNORE] * pad + targets
        return tokens[:-1], (tokens if self.training else targets)[1:]


@dataclasses.dataclass(frozen=True)
class MADCopy:
    """Selective copying: `count` tokens with blanks (V - 2) before any of them, the copy token
    V - 1, then `count` blanks, in whose place the tokens are due in their order.

    Each blank goes before a token that is drawn evenly, so that the last stands before the copy
    token.
    """

    length: int = 256
    vocab_size: int = 16
    count: int = 16
    macro: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check.at_least("count", self.count, 1)
        check.at_least("length", self.length, 2 * self.count + 1)
        check.at_least("vocab_size", self.vocab_size, 3)

    @property
    def chance(self) -> float:
        """Of any token that may be copied."""
        return 1 / (self.vocab_size - 2)

    def curriculum(self) -> tuple[MADCopy, ...]:
        """From one token to copy to all, twice as many each time."""
        counts = sorted({*(2**i for i in range(12) if 2**i < self.count), self.count})
        return tuple(dataclasses.replace(self, count=n) for n in counts)

    def settings(self) -> tuple[MADCopy, ...]:
        """The difficulties of MAD, this one first, one thing changed at a time."""
        return _varied(self, vocab_size=(32, 64, 128), length=(512, 1024), count=(32, 64, 96))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; the targets stand at the last blanks."""
        n, blank = self.count, self.vocab_size - 2
        copied = torch.randint(blank, (batch, n), generator=generator)
        blanks = self.length - 2 * n - 1
        before = torch.randint(n, (batch, blanks), generator=generator)
        # Token i stands after the blanks that go before it and before those ahead of it.
        places = torch.arange(n) + (before[:, :, None] <= torch.arange(n)).sum(1)
        tokens = torch.full((batch, self.length), blank)
        tokens.scatter_(1, places, copied)
        tokens[:, n + blanks] = self.vocab_size - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, n + blanks + 1 :] = copied
        return tokens, targets


@dataclasses.dataclass(frozen=True)
class MADCompression:
    """Compression: random tokens and V - 1 at the end; from the last position's vector all of them
    are to be told.

    In MAD a small MLP reads that vector and the place that is asked for: this is no task for a
    language model, and `decoder` says so.
    """

    length: int = 32
    vocab_size: int = 16
    macro: ClassVar[bool] = True
    decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check.at_least("length", self.length, 2)
        check.at_least("vocab_size", self.vocab_size, 2)

    @property
    def chance(self) -> float:
        """Of any token, but for the last, which is known."""
        return (1 + (self.length - 1) / (self.vocab_size - 1)) / self.length

    def curriculum(self) -> tuple[MADCompression, ...]:
        """From 4 tokens to all, twice as many each time."""
        lengths = sorted({*(2**i for i in range(2, 20) if 2**i < self.length), self.length})
        return tuple(dataclasses.replace(self, length=n) for n in lengths)

    def settings(self) -> tuple[MADCompression, ...]:
        """The difficulties of MAD, this one first, one thing changed at a time."""
        return _varied(self, vocab_size=(32, 64, 128), length=(64, 128, 256))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens, int64 [B, T], and as targets the same: all from the vector at the last place."""
        tokens = torch.randint(self.vocab_size - 1, (batch, self.length), generator=generator)
        tokens[:, -1] = self.vocab_size - 1
        return tokens, tokens.clone()


@dataclasses.dataclass(frozen=True)
class MADMemorization:
    """Memorisation: [key, V - 1] again and again; the key's value, which no sequence shows, is due
    at V - 1. It is the same in all sequences, and learnt in training alone.

    Keys are the first half of what is not V - 1, values are of the second, and each key has its
    own.
    """

    length: int = 32
    vocab_size: int = 256
    macro: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.length % 2 or self.length < 2:
            check.fail("length", "an even number >= 2", self.length)
        check.at_least("vocab_size", self.vocab_size, 3)

    @property
    def _half(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def chance(self) -> float:
        """Of any value that a key has."""
        return 1 / self._half

    def curriculum(self) -> tuple[MADMemorization, ...]:
        """One length: what is to be learnt is the map."""
        return (self,)

    def settings(self) -> tuple[MADMemorization, ...]:
        """The difficulties of MAD, this one first."""
        return _varied(self, vocab_size=(512, 1024, 2048, 4096, 8192))

    def values(self) -> Tensor:
        """The value of every key, int64 [keys]."""
        fixed = torch.Generator().manual_seed(MAP_SEED)
        other = self.vocab_size - 1 - self._half
        return self._half + torch.randperm(other, generator=fixed)[: self._half]

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; the targets stand at V - 1."""
        keys = torch.randint(self._half, (batch, self.length // 2), generator=generator)
        tokens = torch.full((batch, self.length), self.vocab_size - 1)
        targets = torch.full_like(tokens, IGNORE)
        tokens[:, ::2] = keys
        targets[:, 1::2] = self.values()[keys]
        return tokens, targets
