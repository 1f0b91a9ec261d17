"""Small tasks that isolate one ability: recall, overwriting, parity.

B batch, T tokens, P pairs.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.tasks.base import FILLER, IGNORE


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """Associative recall: P key-value pairs shown once, each key asked for once later.

    Token 0 is filler, 1..keys are keys, the next `keys` tokens are values. The pairs fill the
    start of the sequence; the queries stand at random places after it.
    """

    length: int = 128
    pairs: int = 8
    keys: int = 32

    def __post_init__(self) -> None:
        check.at_least("pairs", self.pairs, 1)
        check.at_least("keys", self.keys, self.pairs)
        check.at_least("length", self.length, 3 * self.pairs)

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.keys

    @property
    def chance(self) -> float:
        """Of naming a value that was shown: that of the key, or another's that is the same."""
        return 1 / self.pairs + (1 - 1 / self.pairs) / self.keys

    def curriculum(self) -> tuple[RecallTask, ...]:
        """From one pair to all, twice as many each time."""
        pairs = [1]
        while 2 * pairs[-1] < self.pairs:
            pairs.append(2 * pairs[-1])
        return tuple(dataclasses.replace(self, pairs=p) for p in sorted({*pairs, self.pairs}))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; a target is IGNORE except where a key is asked for."""

        def draw(rows: int, columns: int, top: int) -> Tensor:
            # The first columns of a random permutation of `top`, one per row.
            return torch.rand(rows, top, generator=generator).argsort(-1)[:, :columns]

        p = self.pairs
        keys = 1 + draw(batch, p, self.keys)
        values = 1 + self.keys + torch.randint(self.keys, (batch, p), generator=generator)
        places = 2 * p + draw(batch, p, self.length - 2 * p)
        tokens = torch.full((batch, self.length), FILLER)
        targets = torch.full((batch, self.length), IGNORE)
        tokens[:, : 2 * p] = torch.stack([keys, values], -1).flatten(1)
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return tokens, targets


@dataclasses.dataclass(frozen=True)
class OverwriteTask:
    """Associative recall with overwriting: W writes to few keys, then P keys asked for.

    A key's last value counts, and the earlier ones, which lie under the very same key, do not:
    it takes a memory that replaces, or one that tells the newest of equal keys apart. Token 0 is
    filler, 1..keys are keys, the next `values` tokens are values; [key value] W times, then the
    queries. Every query asks for a key that was written.
    """

    writes: int = 24
    queries: int = 16
    keys: int = 4
    values: int = 16

    def __post_init__(self) -> None:
        for name in ("writes", "queries", "keys"):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("values", self.values, 2)

    @property
    def length(self) -> int:
        return 2 * self.writes + self.queries

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    @property
    def chance(self) -> float:
        """Of any value."""
        return 1 / self.values

    def with_length(self, length: int) -> OverwriteTask:
        """As many writes as have room beside the queries. Raises ValueError unless they fill it."""
        writes = (length - self.queries) // 2
        if writes < 1 or 2 * writes + self.queries != length:
            check.fail(
                "length", f"{self.queries} queries and twice as many tokens as writes", length
            )
        return dataclasses.replace(self, writes=writes)

    def curriculum(self) -> tuple[OverwriteTask, ...]:
        """From one write of each key to all, twice as many each time."""
        writes = [min(self.keys, self.writes)]
        while 2 * writes[-1] < self.writes:
            writes.append(2 * writes[-1])
        return tuple(dataclasses.replace(self, writes=n) for n in sorted({*writes, self.writes}))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; a target is IGNORE except where a key is asked for."""
        keys = torch.randint(self.keys, (batch, self.writes), generator=generator)
        values = torch.randint(self.values, (batch, self.writes), generator=generator)
        # A query repeats the key of some write; the answer is that key's newest value.
        chosen = torch.randint(self.writes, (batch, self.queries), generator=generator)
        asked = keys.gather(1, chosen)
        same = asked[:, :, None] == keys[:, None, :]
        newest = torch.where(same, torch.arange(self.writes), -1).amax(-1)
        answers = values.gather(1, newest)
        pairs = torch.stack([1 + keys, 1 + self.keys + values], -1).flatten(1)
        tokens = torch.cat([pairs, 1 + asked], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 2 * self.writes :] = 1 + self.keys + answers
        return tokens, targets


@dataclasses.dataclass(frozen=True)
class ParityTask:
    """The parity of all bits so far, at every token: a state that every 1 turns over.

    Token 2 begins the sequence, 0 and 1 are bits and, as targets, parities.
    """

    length: int = 48

    def __post_init__(self) -> None:
        check.at_least("length", self.length, 2)

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        """Of either bit."""
        return 0.5

    def curriculum(self) -> tuple[ParityTask, ...]:
        """From 6 tokens to all, twice as many each time."""
        lengths = [min(6, self.length)]
        while 2 * lengths[-1] < self.length:
            lengths.append(2 * lengths[-1])
        return tuple(dataclasses.replace(self, length=n) for n in sorted({*lengths, self.length}))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; the first token has no target."""
        bits = torch.randint(2, (batch, self.length - 1), generator=generator)
        tokens, targets = F.pad(bits, (1, 0), value=2), F.pad(bits.cumsum(1) % 2, (1, 0))
        targets[:, 0] = IGNORE
        return tokens, targets
