"""Memory Caching (Behrouz et al. 2026, arXiv 2602.24281): what a memory was at the end of every
segment is kept, and read beside what it is now.

B batch, T tokens, L tokens of a segment, N segments that are kept, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.memory import AtlasMemoryConfig, MemoryState
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.blocks.rows_alike import rows_alike
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.data import numbers, there
from atlas_blocks.omega.state import OmegaState, state_dtype
from atlas_blocks.state import State


def _memory() -> AtlasMemoryConfig:
    """Titans' memory."""
    return AtlasMemoryConfig(update="gd", window=1, feature_map="identity")


@dataclass(frozen=True)
class MemoryCachingConfig(Config):
    """memory: its config; segment: tokens after which the memory is kept; reset: whether it begins
    every segment anew (the paper's independent compressors), a document by itself, instead of
    going on from the end of the one before (its checkpoints); top_k: how many kept memories a
    token reads, those of the highest gates (sparse selective caching; None: all).

    Raises ValueError naming the bad field.
    """

    memory: AtlasMemoryConfig = field(default_factory=_memory)
    segment: int = 256
    reset: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, AtlasMemoryConfig):
            check.fail("memory", "AtlasMemoryConfig", type(self.memory).__name__)
        check.at_least("segment", self.segment, 1)
        check.boolean("reset", self.reset)
        if self.top_k is not None:
            check.at_least("top_k", self.top_k, 1)

    def build(self, dim: int, heads: int) -> MemoryCaching:
        return MemoryCaching(dim, heads, self)


class CachingState(State):
    """memory: of the layer; weights: the memory at every segment's end, [B, N, H, dout, din] each,
    and means [B, N, dim] of the segments' inputs, the oldest first, in front of them zeros in rows
    that have fewer; total [B, dim]: the sum of the inputs of the segment that is begun; position,
    segment: int64 [B], tokens read, and the config's segment, without which neither N nor total
    can be read."""

    EXACT = ("weights", "means", "total")

    memory: MemoryState
    weights: tuple[Tensor, ...]
    means: Tensor
    total: Tensor
    position: Tensor
    segment: Tensor

    @classmethod
    def aligned(cls, states: Sequence[CachingState]) -> Sequence[CachingState]:
        """Zeros in front up to the largest N; positions brought to one device."""
        most = max(s.means.shape[1] for s in states)
        device = states[0].position.device

        def longer(t: Tensor) -> Tensor:
            none = t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])
            return torch.cat([none, t], 1)

        return [
            s.replace(
                weights=tuple(map(longer, s.weights)),
                means=longer(s.means),
                position=s.position.to(device),
                segment=s.segment.to(device),
            )
            for s in states
        ]

    def newest(self, count: int) -> CachingState:
        """With no more than this many of the memories that it holds, the last."""
        first = self.means.shape[1] - count
        if first == 0:
            return self
        weights = tuple(w[:, first:].clone() for w in self.weights)
        return self.replace(weights=weights, means=self.means[:, first:].clone())


class MemoryCaching(Block):
    """y_t = g^(s) M_t(q_t) + sum_{i < s} g^(i) M^(i)(q_t), gated residual memory of segment s.

        g = softmax over i <= s of <u_t, m^(i)>,  u_t = W_u x_t
        M^(i): the memory at the end of segment i;  m^(i): the mean of the segment's inputs
        m^(s): of segment s, which t is in, the mean of its inputs up to t

    The sum takes the place of M_t(q_t) in AtlasMemory. The gates are not those of a head: all
    heads share them. With `top_k` a gate is 0 where it is not among the largest of the kept, and
    the others make up 1; what the rest would answer is computed all the same.

    With `reset` all whole segments of a call run as one batch, and a graph is compiled for whole
    segments, one for those with a rest, and one for less than a segment. Without, they run one
    after the other: a graph is compiled for each length, with a node for every segment. It breaks
    where a state goes in, and at packed documents; torch.export is refused a state.
    x [B, T, dim] -> y [B, T, dim]; state CachingState, which grows by a memory every `segment`
    tokens.
    """

    state_type = CachingState

    @takes(MemoryCachingConfig)
    def __init__(
        self, dim: int, heads: int, config: MemoryCachingConfig = MemoryCachingConfig()
    ) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.memory = config.memory.build(dim, heads)
        self.router = Linear(dim, dim, bias=False)  # W_u

    def mix(self, x: Tensor, state: CachingState | None) -> tuple[Tensor, CachingState]:
        if 0 in x.shape[:2]:
            if state is not None and not torch.compiler.is_compiling():
                self.check_state(x, state)
            y, memory = self.memory(x, state and state.memory, detach_state=False)
            return y, self.initial_state(memory, x) if state is None else state
        if state is None:
            return self.segments(x, None, 0)
        going_on: Any = self.going_on
        if torch.compiler.is_exporting():
            check.fail(
                "state", "none where MemoryCaching is exported: it is read on the host", "one"
            )
        if torch.compiler.is_compiling():
            going_on = torch.compiler.disable(going_on)
        return going_on(x, state)

    def initial_state(self, memory: MemoryState, x: Tensor) -> CachingState:
        """Before the first token of x [B, T, dim], of whose memory this is a state."""
        dtype = state_dtype(x)
        return CachingState(
            memory,
            tuple(w.new_zeros(len(x), 0, *w.shape[1:]) for w in memory.rule.weights),
            x.new_zeros(len(x), 0, self.dim, dtype=dtype),
            x.new_zeros(len(x), self.dim, dtype=dtype),
            torch.zeros(len(x), dtype=torch.int64),
            torch.full((len(x),), self.config.segment),
        )

    def check_state(self, x: Tensor, state: CachingState) -> None:
        """Raise ValueError where it is not one of this config's for x [B, T, dim]."""
        batch, c = len(x), self.config
        inner = state.memory.rule.position
        counts = (
            ("position", state.position),
            ("segment", state.segment),
            ("memory.rule.position", inner),
        )
        for name, t in counts:
            check.tensor(f"state.{name}", t, "[B]", (batch,), (torch.int64,))
        found = numbers(state.segment)
        if there(state.segment) and any(n != c.segment for n in found):
            check.fail("state.segment", f"{c.segment}, that of the config, in every row", found)
        positions = numbers(state.position)
        # With `reset` a memory knows the tokens of its own segment alone.
        read = [(n - 1) % c.segment + 1 if n and c.reset else n for n in positions]
        if there(inner) and there(state.position) and (found := numbers(inner)) != read:
            wanted = f"{read}, as reset={c.reset} has it after {positions} tokens"
            check.fail("state.memory.rule.position", wanted, found)
        check.tensor("state.means", state.means, "[B, N, dim]", (batch, None, self.dim))
        check.tensor("state.total", state.total, "[B, dim]", (batch, self.dim))
        kept, needed = state.means.shape[1], max(positions, default=0) // c.segment
        if kept < needed:
            wanted = f"at least {needed} segments of {c.segment} tokens"
            check.fail("state.means", wanted, kept)
        self.memory.check_weights("state.weights", state.weights, batch, kept)

    def going_on(self, x: Tensor, state: CachingState) -> tuple[Tensor, CachingState]:
        """Rows that have read as many tokens run together."""
        self.check_state(x, state)
        return rows_alike(self.segments, x, state, numbers(state.position))

    def segments(
        self, x: Tensor, state: CachingState | None, position: int
    ) -> tuple[Tensor, CachingState]:
        """x [B, T, dim] of rows that have read `position` tokens, segment by segment; with `reset`
        whole segments are one piece."""
        length, segment = x.shape[1], self.config.segment
        place = position % segment
        begun = min(length, segment - place) if place else 0
        whole = (length - begun) // segment
        spans = [whole * segment] if self.config.reset else whole * [segment]
        if state is not None:
            state = state.newest(position // segment)
        outputs, first = [], 0
        for span in (begun, *spans, length - begun - whole * segment):
            if span:
                y, state = self.piece(x[:, first : first + span], state, place)
                outputs.append(y)
                first, place = first + span, 0
        assert state is not None
        return torch.cat(outputs, 1), state

    def piece(
        self, x: Tensor, state: CachingState | None, place: int
    ) -> tuple[Tensor, CachingState]:
        """x [B, T, dim] of one segment from its token `place` on, or with `reset` of whole ones."""
        (batch, length), segment = x.shape[:2], self.config.segment
        count = (place + length + segment - 1) // segment
        past = 0 if state is None else state.means.shape[1]
        sums = self.running_sums(x, state, place, count)
        places = torch.arange(place, place + length, device=x.device)
        running = sums.flatten(1, 2)[:, place : place + length]
        own = running / (places % segment + 1)[:, None]
        means = sums[:, :, -1] / segment  # [B, count, dim]
        if state is not None:
            means = torch.cat([state.means, means], 1)
        readable = past + count - 1
        gates = self.gates(x, means[:, :readable], own, past + places // segment)

        def parts(rule: OmegaState) -> list[Tensor]:
            # Those of the segments of x, [B, count, H, dout, din], after those that were kept.
            new = [w.unflatten(0, (batch, -1)) for w in rule.weights]
            if state is None:
                return new
            return [torch.cat(both, 1) for both in zip(state.weights, new, strict=True)]

        def read(q: Tensor, y: Tensor, rule: OmegaState) -> Tensor:
            """g^(s) M_t(q_t) + sum_{i < s} g^(i) M^(i)(q_t)."""
            if readable == 0:
                return y
            rows = (batch, length, *y.shape[2:])
            # Nothing is copied for a token of what was kept before it.
            if state is not None and readable == past:
                weights = state.weights
            else:
                weights = tuple(w[:, :readable] for w in parts(rule))
            kept = self.memory.read_fixed(q.reshape(batch, length, *q.shape[2:]), weights)
            g = gates.to(y.dtype)[..., None, None]
            before = (g[:, :, :-1] * kept.transpose(1, 2)).sum(2)
            return (g[:, :, -1] * y.reshape(rows) + before).reshape(y.shape)

        if self.config.reset and place == 0:
            y, ends = self.memory(x.reshape(batch * count, -1, self.dim), read=read)
            y, memory = y.reshape(x.shape), ends[torch.arange(1, batch + 1) * count - 1]
        else:
            y, ends = self.memory(x, state and state.memory, read=read)
            memory = ends
        total = torch.where(places[-1] % segment == segment - 1, 0, running[:, -1])
        seen = torch.zeros(batch, dtype=torch.int64) if state is None else state.position
        counts = seen + length, torch.full((batch,), segment)
        finished = past + (place + length) // segment
        if state is not None and finished == past:
            return y, CachingState(memory, state.weights, state.means, total, *counts)
        weights = tuple(w[:, :finished].clone() for w in parts(ends.rule))
        return y, CachingState(memory, weights, means[:, :finished].clone(), total, *counts)

    def running_sums(self, x: Tensor, state: CachingState | None, place: int, count: int) -> Tensor:
        """Of the inputs of every segment, up to each of its tokens: [B, count, L, dim]; x begins at
        token `place` of the first."""
        segment = self.config.segment
        rest = count * segment - place - x.shape[1]
        rows = F.pad(x.to(state_dtype(x)), (0, 0, place, rest)).unflatten(1, (count, segment))
        sums = rows.cumsum(2)
        return sums if state is None or place == 0 else sums + state.total[:, None, None]

    def gates(self, x: Tensor, kept: Tensor, own: Tensor, before: Tensor) -> Tensor:
        """g [B, T, N + 1] of the means of kept segments [B, N, dim], of which tokens [T] have so
        many before them, and last that of each token's own [B, T, dim]."""
        dtype = torch.promote_types(own.dtype, kept.dtype)
        u, kept = self.router(x).to(dtype), kept.to(dtype)
        with no_autocast(x):
            scores = u @ kept.mT
            hidden = torch.arange(kept.shape[1], device=x.device) >= before[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
            k = self.config.top_k
            if k is not None and kept.shape[1] > k:
                best = scores.topk(k, -1)
                scores = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
            own_scores = (u * own).sum(-1, keepdim=True)
            return torch.cat([scores, own_scores], -1).softmax(-1)
