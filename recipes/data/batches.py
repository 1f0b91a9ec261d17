"""Batches of packed documents, in an order that a seed and the number of the step give.

Every token of a document but its first is predicted. An epoch is all documents in an order of its
own, their predictions one after the other, cut into crops of equal length; a batch is B crops in
one row, where pieces of different documents do not see each other.

B crops of a batch, L length of a crop, T = B L, N pieces of documents in a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.data.shards import Split

# Seeds of one run draw apart what is drawn for different ends.
DOCUMENTS, CROPS = 0, 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """tokens, targets: int64 [B, L], or [1, T] with cu_seqlens int64 [N + 1] of packed pieces.

    before: for every piece the crop [N] of the batch before, in the same place, whose document it
    goes on with, or -1. last: the last piece of every crop [B]. Both None where nothing goes on.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None
    before: Tensor | None = None
    last: Tensor | None = None

    @staticmethod
    def of(rows: Tensor) -> Batch:
        """Rows [B, L + 1], each a text by itself."""
        return Batch(rows[:, :-1], rows[:, 1:])

    def to(self, device: torch.device) -> Batch:
        """The tokens there; bounds and numbers of pieces are read on the host."""
        tokens, targets = self.tokens.to(device), self.targets.to(device)
        return dataclasses.replace(self, tokens=tokens, targets=targets)


@dataclasses.dataclass(frozen=True)
class Packed:
    """`packed(step)`: the micro-batches of a step, `accumulate` of them.

    carry: crop b of a step goes on where crop b of the step before ended, so that a state can be
    handed on; otherwise crops come in an order drawn anew in every epoch.
    """

    split: Split
    batch: int
    length: int
    accumulate: int = 1
    seed: int = 0
    carry: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate"):
            check.at_least(name, getattr(self, name), 1)
        least = self.length * (self.lanes if self.carry else 1)
        if self.split.predictions < least:
            wanted = f"documents with at least {least:,} predictions"
            check.fail("data", wanted, self.split.predictions)

    @functools.cached_property
    def _each(self) -> np.ndarray:
        return np.maximum(self.split.lengths - 1, 0)

    @property
    def lanes(self) -> int:
        """Crops of a step."""
        return self.batch * self.accumulate

    @property
    def crops(self) -> int:
        """Of an epoch; what is left at its end is less than one."""
        return self.split.predictions // self.length

    @property
    def steps(self) -> int:
        """Whole steps that the crops of an epoch make."""
        return self.crops // self.lanes

    def __call__(self, step: int, some: range | None = None) -> list[Batch]:
        """some: numbers of the crops of every micro-batch that are wanted, all if None."""
        some = range(self.batch) if some is None else some
        return [
            self._batch([self._place(step, first + crop) for crop in some])
            for first in range(0, self.lanes, self.batch)
        ]

    def _place(self, step: int, lane: int) -> tuple[int, int, bool]:
        """Epoch and number of a crop, and whether the lane's crop before is the one before it."""
        if self.carry:
            epoch, turn = divmod(step, self.steps)
            return epoch, lane * self.steps + turn, turn > 0
        epoch, number = divmod(step * self.lanes + lane, self.crops)
        return epoch, int(self._epoch(epoch).crops[number]), False

    def _batch(self, places: list[tuple[int, int, bool]]) -> Batch:
        inputs, targets, bounds = [], [], [0]
        before, last = [], []
        for lane, (epoch, crop, follows) in enumerate(places):
            for document, start, stop in self._pieces(epoch, crop):
                tokens = self.split.read(document, start, stop + 1)
                inputs.append(tokens[:-1])
                targets.append(tokens[1:])
                bounds.append(bounds[-1] + stop - start)
                # Only the first piece of a crop starts inside of its document.
                before.append(lane if follows and start else -1)
            last.append(len(before) - 1)
        tokens, following = (
            torch.from_numpy(np.concatenate(parts, dtype=np.int64))[None]
            for parts in (inputs, targets)
        )
        whole = Batch(tokens, following, torch.tensor(bounds))
        if not self.carry:
            return whole
        return dataclasses.replace(whole, before=torch.tensor(before), last=torch.tensor(last))

    def _pieces(self, epoch: int, crop: int) -> list[tuple[int, int, int]]:
        """Document, and from which to which of its predictions, of every piece of a crop."""
        at, stop, found = crop * self.length, (crop + 1) * self.length, []
        documents, ends, _ = self._epoch(epoch)
        index = int(np.searchsorted(ends, at, side="right"))
        while at < stop:
            document, end = int(documents[index]), int(ends[index])
            start, until = end - int(self._each[document]), min(stop, end)
            if at < until:
                found.append((document, at - start, until - start))
                at = until
            index += 1
        return found

    def _epoch(self, number: int) -> _Epoch:
        """Drawn once: a step is of one epoch, or of one and the next."""
        if number not in self._epochs:
            for old in [n for n in self._epochs if abs(n - number) > 1]:
                del self._epochs[old]
            documents = self._order(number, DOCUMENTS, len(self._each))
            ends = np.cumsum(self._each[documents])
            crops = self._order(number, CROPS, 0 if self.carry else self.crops)
            self._epochs[number] = _Epoch(documents, ends, crops)
        return self._epochs[number]

    @functools.cached_property
    def _epochs(self) -> dict[int, _Epoch]:
        return {}

    def _order(self, epoch: int, what: int, count: int) -> np.ndarray:
        return np.random.default_rng((self.seed % 2**64, epoch, what)).permutation(count)


class _Epoch(NamedTuple):
    """The order of the documents, where the predictions of each end, and the order of crops."""

    documents: np.ndarray
    ends: np.ndarray
    crops: np.ndarray
