"""The sequences of a call, rows of the batch or packed documents, in groups that run as one batch.

B batch, T tokens, N chunks that a row touches at most (or all documents together).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from atlas_blocks.data import numbers
from atlas_blocks.documents.definition import document_bounds
from atlas_blocks.omega.arguments import Arguments, first_state
from atlas_blocks.omega.state import OmegaState

STREAMS = ("q", "k", "v", "alpha", "eta", "theta", "gamma")


def chunk_count(length: int, chunk: int, begun: bool, documents: int = 1) -> int:
    """The most chunks that `length` tokens touch; `begun` where they may start inside one."""
    return (length + documents * (chunk - 1) * (2 if begun else 1)) // chunk


@dataclass(frozen=True)
class Group:
    """Sequences of one position and, where they are documents, of one length."""

    position: int
    rows: list[int]  # of the batch, or numbers of documents
    slots: list[int]  # where each one's chunks begin among the call's [B N]
    tokens: list[slice]  # each one's among the call's [B T]; none where the batch is the group

    def places(self, like: Tensor) -> Tensor:
        """`slots` on the device of `like`."""
        return torch.tensor(self.slots, device=like.device)


@dataclass(frozen=True)
class Groups:
    """All of a call's, and what goes to each of them."""

    groups: list[Group]
    order: Tensor | None  # the tokens of one group after the other; None: as they lie

    @staticmethod
    def of(a: Arguments) -> Groups:
        """Reads positions and bounds on the host. Raises ValueError for bounds that do not fit."""
        (batch, length), chunk = a.q.shape[:2], a.rule.chunk_size
        begun = a.state is not None
        positions = numbers(a.state.position) if a.state is not None else a.sequences * [0]
        if a.cu_seqlens is None:
            chunks = chunk_count(length, chunk, begun)
            bounds, slots = (
                [i * length for i in range(batch + 1)],
                [i * chunks for i in range(batch)],
            )
            keys: list[tuple[int, ...]] = [(p,) for p in positions]
        else:
            bounds = document_bounds(a.cu_seqlens, length)
            lengths = [stop - start for start, stop in pairwise(bounds)]
            keys = list(zip(positions, lengths, strict=True))
            used = (-(-(a.rule.place(p) + n) // chunk) for p, n in keys)
            slots = [0, *accumulate(used)]
        found = defaultdict(list)
        for row, key in enumerate(keys):
            found[key].append(row)
        if a.cu_seqlens is None and len(found) < 2:
            return Groups([Group(key[0], rows, slots, []) for key, rows in found.items()], None)
        groups = [
            Group(key[0], rows, [slots[i] for i in rows],
                  [slice(bounds[i], bounds[i + 1]) for i in rows])
            for key, rows in found.items()
        ]  # fmt: skip
        order = None
        if len(groups) > 1:
            tokens = torch.arange(batch * length)
            order = torch.cat([tokens[s] for g in groups for s in g.tokens]).to(a.q.device)
        return Groups(groups, order)

    def streams(self, t: Tensor) -> list[Tensor]:
        """[B, T, ...] -> every group's [rows, L, ...]."""
        if not self.groups or not self.groups[0].tokens:
            return [t]
        flat = t.flatten(0, 1)
        flat = flat if self.order is None else flat.index_select(0, self.order)
        shapes = [(len(g.rows), g.tokens[0].stop - g.tokens[0].start) for g in self.groups]
        parts = zip(flat.split([rows * n for rows, n in shapes]), shapes, strict=True)
        return [x.unflatten(0, shape) for x, shape in parts]

    def joined(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Every group's [rows, L, ...] -> [B, T, ...], the shape of `like`."""
        if self.order is None:
            return parts[0].reshape(like.shape)
        flat = torch.cat([x.flatten(0, 1) for x in parts])
        return flat.index_select(0, self.order.argsort()).view(like.shape)

    def states(self, state: OmegaState) -> list[OmegaState]:
        """Of every group's rows."""
        return [state] if len(self.groups) == 1 else [state[g.rows] for g in self.groups]

    def state(self, states: list[OmegaState]) -> OmegaState:
        """The state whose `states` these are."""
        if len(states) == 1:
            return states[0]
        order = [row for g in self.groups for row in g.rows]
        return OmegaState.cat(states)[sorted(range(len(order)), key=order.__getitem__)]

    def arguments(self, a: Arguments) -> list[Arguments]:
        """Those of every group, which have a state and no cu_seqlens."""
        a = a._replace(state=first_state(a) if a.state is None else a.state)
        assert a.state is not None
        columns = {n: self.streams(t) for n in STREAMS if (t := getattr(a, n)) is not None}
        return [
            a._replace(
                **{n: parts[i] for n, parts in columns.items()}, state=state, cu_seqlens=None
            )
            for i, state in enumerate(self.states(a.state))
        ]
