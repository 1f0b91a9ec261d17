"""Synthetic tasks that isolate one ability.

B batch, T tokens, P pairs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from atlas_blocks import check

IGNORE = -100
FILLER = 0


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


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of asked keys answered right. logits [B, T, V], targets [B, T]."""
    asked = targets != IGNORE
    return float((logits.argmax(-1) == targets)[asked].float().mean())
