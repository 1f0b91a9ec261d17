"""Multi-query associative recall as in zoology (Arora et al. 2023, zoology/data/multiquery_ar.py).

B batch, T tokens, P pairs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.tasks.base import FILLER, IGNORE


@dataclasses.dataclass(frozen=True)
class MQARTask:
    """P pairs first, then each key once more at one of every second place, most of them early.

    Keys are 1 to V/2 - 1, values V/2 to V - 1, both without repeats in a sample. The places are
    drawn without replacement, place i of 1, 2, ... in proportion to i^(power - 1). The target
    stands where the key is asked for. random_filler: what is no pair and no query is any token;
    else it is 0. Scored by `accuracy`, over all targets at once.

    Raises ValueError unless 4 P <= length < V, length and V are even, and V / 2 > P.
    """

    length: int = 256
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01
    random_filler: bool = True

    def __post_init__(self) -> None:
        check.at_least("pairs", self.pairs, 1)
        check.at_least("length", self.length, 4 * self.pairs)
        check.at_least("vocab_size", self.vocab_size, self.length + 1)
        for name in ("length", "vocab_size"):
            if getattr(self, name) % 2:
                check.fail(name, "an even number", getattr(self, name))
        if not 0 < self.power <= 1:
            check.fail("power", "a number in (0, 1]", self.power)

    @property
    def chance(self) -> float:
        """One of the values that were shown."""
        return 1 / self.pairs

    def curriculum(self) -> tuple[MQARTask, ...]:
        """The lengths and pairs that zoology trains on, short to long, below the vocabulary."""
        return self._of((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))

    def tests(self) -> tuple[MQARTask, ...]:
        """Those that it tests, below the vocabulary."""
        return self._of((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))

    def _of(self, *sizes: tuple[int, int]) -> tuple[MQARTask, ...]:
        fitting = [(n, p) for n, p in sizes if n < self.vocab_size]
        return tuple(dataclasses.replace(self, length=n, pairs=p) for n, p in fitting) or (self,)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets, int64 [B, T]; a target is IGNORE except where a key is asked for."""
        p, half = self.pairs, self.vocab_size // 2
        keys = 1 + _permuted(batch, half - 1, generator)[:, :p]
        values = half + _permuted(batch, half, generator)[:, :p]
        space = (self.length - 2 * p) // 2
        # float64: the weights of late places are far below those of the first.
        places = torch.arange(1, space + 1, dtype=torch.float64)
        weights = places ** (self.power - 1)
        # Waiting times of rate w end in the order of draws in proportion to w.
        waits = -torch.rand(batch, space, generator=generator, dtype=torch.float64).log() / weights
        chosen = 2 * p + 2 * waits.topk(p, largest=False).indices
        tokens = torch.full((batch, self.length), FILLER)
        targets = torch.full((batch, self.length), IGNORE)
        tokens[:, : 2 * p] = torch.stack([keys, values], -1).flatten(1)
        tokens.scatter_(1, chosen, keys)
        targets.scatter_(1, chosen, values)
        if self.random_filler:
            other = torch.randint(self.vocab_size, tokens.shape, generator=generator)
            tokens = torch.where(tokens == FILLER, other, tokens)
        return tokens, targets


def _permuted(rows: int, top: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, top, generator=generator).argsort(-1)
