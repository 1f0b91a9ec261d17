"""States after the beginnings of prompts, so that what prompts share is read once.

A beginning is a whole number of pieces, or a whole prompt: a prompt read on from one is cut where
it would have been cut without, and gives the same numbers to the last bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from atlas_blocks.recipes.model import LanguageModelState


@dataclass(frozen=True)
class Prefix:
    """tokens: how many; logits [1, V]: of what comes next."""

    tokens: int
    state: LanguageModelState
    logits: Tensor

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.logits.nbytes


class PrefixCache:
    """Prefixes by what they were read from, the least recently used dropped beyond `limit` bytes.

    0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._found: OrderedDict[bytes, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def longest(self, keys: Sequence[bytes]) -> Prefix | None:
        """The last of these keys' that is here."""
        for key in reversed(keys):
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        return None

    def put(self, key: bytes, prefix: Prefix) -> None:
        if key in self._found or prefix.nbytes > self.limit:
            return
        self._found[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.limit:
            _, dropped = self._found.popitem(last=False)
            self.nbytes -= dropped.nbytes


def keys_of(tokens: Sequence[int], piece: int) -> list[bytes]:
    """A key for the end of every piece of the prompt, each of all that is before it."""
    found, hashed = [], hashlib.sha256()
    array = np.asarray(tokens, np.int64)
    for start in range(0, len(array), piece):
        hashed.update(array[start : start + piece].tobytes())
        found.append(hashed.digest())
    return found
