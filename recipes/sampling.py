"""How the next token of a sequence is chosen, and when the sequence ends.

What a row gets depends on its own logits and settings alone, never on the rows beside it.

B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_blocks import check

# Temperatures below this take the likeliest, where dividing by them would be no number.
LEAST = 1e-5
# Why a sequence ended, in the words of OpenAI's API.
STOP, LENGTH = "stop", "length"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of one sequence.

    temperature: 0 takes the likeliest. top_p: the smallest set of tokens whose probabilities reach
    it is kept, and at least one. repetition_penalty: logits of tokens that were there before are
    divided by it where positive, else multiplied (Keskar et al. 2019). stop_ids: tokens that end
    the sequence, the last of it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check.at_least("max_new_tokens", self.max_new_tokens, 0)
        check.between("temperature", self.temperature, 0, 100)
        check.between("top_p", self.top_p, 0, 1)
        check.between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check.at_least("seed", self.seed, 0)
        for token in self.stop_ids:
            check.at_least("stop_ids", token, 0)


class Continuation:
    """One sequence that is being continued: its draws, what was there before, how far it is."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | Tensor, vocab_size: int) -> None:
        self.sampling, self.count = sampling, 0
        self._draws = random.Random(sampling.seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.as_tensor(prompt, dtype=torch.int64, device="cpu")] = True

    def draw(self) -> float:
        """The next number in [0, 1) of the seed's: one a token, so that the same seed gives the
        same text whatever else is sampled."""
        return self._draws.random()

    def take(self, token: int) -> str | None:
        """Go on with this token; why it was the last one, or None."""
        self.count += 1
        if self.seen is not None:
            self.seen[token] = True
        if token in self.sampling.stop_ids:
            return STOP
        return LENGTH if self.count >= self.sampling.max_new_tokens else None


def choose(logits: Tensor, rows: Sequence[Continuation]) -> list[int]:
    """The next token of every row; logits [B, V]. The rows have still to `take` it."""
    logits = _penalised(logits.float(), rows)
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature >= LEAST]
    # Sorting is most of the work, and is for those that need it.
    for narrowed in (False, True):
        group = [i for i in drawn if (rows[i].sampling.top_p < 1) == narrowed]
        if group:
            found = _drawn(logits[group], [rows[i] for i in group], narrowed)
            tokens[group] = found
    return tokens.tolist()


def _penalised(logits: Tensor, rows: Sequence[Continuation]) -> Tensor:
    group = [i for i, row in enumerate(rows) if row.seen is not None]
    if not group:
        return logits
    seen = torch.stack([s for row in rows if (s := row.seen) is not None]).to(logits.device)
    penalty = _column([rows[i].sampling.repetition_penalty for i in group], logits)
    part = logits[group]
    part = torch.where(seen, torch.where(part > 0, part / penalty, part * penalty), part)
    return logits.index_copy(0, torch.tensor(group, device=logits.device), part)


def _drawn(logits: Tensor, rows: Sequence[Continuation], narrowed: bool) -> Tensor:
    """By the inverse of the distribution, at a number of each row's own."""
    temperature = _column([row.sampling.temperature for row in rows], logits)
    # float64: a sum over a large vocabulary, whose end must not be missed.
    weights, order = torch.softmax(logits / temperature, -1).double(), None
    if narrowed:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        top_p = _column([row.sampling.top_p for row in rows], weights)
        # Kept while the likelier tokens have not reached top_p yet.
        kept = weights.cumsum(-1) - weights < top_p
        kept[:, 0] = True
        weights = weights * kept
    reached = weights.cumsum(-1)
    aim = _column([row.draw() for row in rows], weights) * reached[:, -1:]
    # Never past the last one that has a weight, whatever was rounded.
    last = (reached < reached[:, -1:]).sum(-1)
    found = torch.minimum((reached <= aim).sum(-1), last)
    return found if order is None else order.gather(-1, found[:, None]).squeeze(-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
