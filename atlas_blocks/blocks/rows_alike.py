"""Rows of a batch that have read as many tokens run as one batch, the others apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from atlas_blocks.state import State

S = TypeVar("S", bound=State)


def rows_alike(
    run: Callable[[Tensor, S, int], tuple[Tensor, S]], x: Tensor, state: S, places: Sequence[int]
) -> tuple[Tensor, S]:
    """`run(x, state, place)` for the rows of every place; places: of all rows of x [B, T, dim]."""
    rows_at: dict[int, list[int]] = defaultdict(list)
    for row, place in enumerate(places):
        rows_at[place].append(row)
    if len(rows_at) <= 1:
        return run(x, state, places[0] if places else 0)
    found = [run(x[rows], state[rows], place) for place, rows in rows_at.items()]
    rows = [row for group in rows_at.values() for row in group]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return torch.cat([y for y, _ in found])[order], State.cat([s for _, s in found])[order]
