"""Memory as context (Titans section 4.1; specification section 9): attention over a segment, what
the memory recalls of the past, and persistent tokens.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.attention.definition import rotary
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.feed_forward import MLP, build_mlp, checked_mlp
from atlas_blocks.blocks.grouped_query import for_every_query, kv_head_count
from atlas_blocks.blocks.memory import AtlasMemoryConfig, FixedMemory, MemoryState
from atlas_blocks.blocks.memory_as_context_op import build_with, memory_as_context, read, written
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.data import numbers
from atlas_blocks.state import State


@dataclass(frozen=True)
class MemoryAsContextConfig(Config):
    """memory: its config; segment: tokens that share one read of the memory; persistent_tokens:
    learned tokens at the front of every segment's context; kv_heads: as in
    SlidingWindowAttentionConfig; mlp, mlp_width: as in AtlasBlockConfig."""

    memory: AtlasMemoryConfig = field(default_factory=AtlasMemoryConfig)
    segment: int = 256
    persistent_tokens: int = 4
    rope_base: float = 10000.0
    mlp_width: int | None = None
    mlp: MLP = "swiglu"
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, AtlasMemoryConfig):
            check.fail("memory", "AtlasMemoryConfig", type(self.memory).__name__)
        check.at_least("segment", self.segment, 1)
        check.at_least("persistent_tokens", self.persistent_tokens, 0)
        check.between("rope_base", self.rope_base, 1.0, 1e12)
        if self.kv_heads is not None:
            check.at_least("kv_heads", self.kv_heads, 1)
        object.__setattr__(self, "mlp", checked_mlp(self.mlp_width, self.mlp))

    def build(self, dim: int, heads: int) -> MemoryAsContext:
        return MemoryAsContext(dim, heads, self)


class ContextState(State):
    """memory: of the layer; read: its weights at the segment's start; keys, values: of the
    segment so far, reads then tokens, [B, 2, segment, G D] of G kv_heads, zero where not yet
    written; position: int64 [B]."""

    EXACT = ("read",)

    memory: MemoryState
    read: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    position: Tensor


class MemoryAsContext(Block):
    """MAC (Titans section 4.1): per segment, read, attend over [persistent; read; segment], write.

        h_j = M(q_j), M the memory before the segment
        a_t = attention of x_t over [persistent; h_{j <= t}; x_{j <= t}]
        x + norm(a) * norm(memory(a)), which writes a; x + MLP(norm x)

    A read h_j is seen from token j on, so that the block is causal. Rotary positions count from
    the segment's start. x [B, T, dim] -> y [B, T, dim]; state ContextState.
    """

    state_type = ContextState

    @takes(MemoryAsContextConfig)
    def __init__(
        self, dim: int, heads: int, config: MemoryAsContextConfig = MemoryAsContextConfig()
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.config = dim, heads, config
        parts = {"dim": dim, "heads": heads, "config": config.to_dict()}
        # Made here: a compiled graph can read them, not write them.
        self.descriptions = tuple(written({**parts, "own_tables": n}) for n in (False, True))
        self.mixer_norm = RMSNorm(dim)
        self.memory = config.memory.build(dim, heads)
        if dim // heads % 2:
            check.fail("heads", f"an even head width for rotary positions, dim = {dim}", heads)
        kv_heads = kv_head_count(config.kv_heads, heads)
        self.width = dim // heads
        self.kv_width = kv_heads * self.width
        self.recall_query = Linear(dim, dim, bias=False)
        tokens = config.persistent_tokens
        self.persistent = nn.Parameter(torch.empty(tokens, dim)) if tokens else None
        self.qkv = Linear(dim, dim + 2 * self.kv_width, bias=False)
        self.attention_out = Linear(dim, dim, bias=False)
        self.attention_norm = RMSNorm(dim)
        self.memory_norm = RMSNorm(dim)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = build_mlp(config.mlp, dim, config.mlp_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=1.0)  # the scale of the normed tokens beside them

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """No persistent tokens were once a parameter without elements."""
        none = state_dict.get(f"{prefix}persistent")
        if self.persistent is None and none is not None and none.numel() == 0:
            del state_dict[f"{prefix}persistent"]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def description(self) -> str:
        """From which the op of a compiled graph builds it again."""
        return self.descriptions[int(self.memory.buckets is not None)]

    def mix(self, x: Tensor, state: ContextState | None) -> tuple[Tensor, ContextState]:
        h = self.mixer_norm(x)
        if state is not None:
            size = (len(x), 2, self.config.segment, self.kv_width)
            check.tensor("state.keys", state.keys, "[B, 2, segment, G D]", size)
            check.tensor("state.values", state.values, "[B, 2, segment, G D]", size)
            check.tensor("state.position", state.position, "[B]", size[:1], (torch.int64,))
            self.memory.check_weights("state.read", state.read, len(x))
        if not torch.compiler.is_compiling():
            mixed, after = self._rows(h, state)
        elif h.shape[1] == 1:
            mixed, after = self.token(h, self.initial_state(h) if state is None else state)
        else:
            before = self.initial_state(h) if state is None else state
            mixed, after = memory_as_context(self, h, before)
        x = x + mixed
        x = x + self.mlp(self.mlp_norm(x))[0]
        return x, after

    def initial_state(self, h: Tensor) -> ContextState:
        """The state before the first token of h [B, T, dim]."""
        _, memory = self.memory(h[:, :0], detach_state=False)
        size = (h.shape[0], 2, self.config.segment, self.kv_width)
        return ContextState(
            memory,
            tuple(w.clone() for w in memory.rule.weights),
            h.new_zeros(size),
            h.new_zeros(size),
            torch.zeros(h.shape[0], dtype=torch.int64),
        )

    def _rows(self, h: Tensor, state: ContextState | None) -> tuple[Tensor, ContextState]:
        if state is None:
            # Without a state made first: a unit of FSDP gets no gradient through one.
            return self.segments(h, None) if h.shape[1] else (h, self.initial_state(h))
        positions = numbers(state.position)
        if len(set(positions)) <= 1:
            return self.segments(h, state)
        if h.shape[1] == 1:
            return self.token(h, state)
        # Rows at different places of their segments run apart.
        rows = [self.segments(h[[i]], state[[i]]) for i in range(len(positions))]
        return torch.cat([y for y, _ in rows]), State.cat([s for _, s in rows])

    def segments(
        self,
        h: Tensor,
        state: Any,
        kept: list[MemoryState] | None = None,
        whole: Callable[..., tuple[Tensor, ContextState]] | None = None,
    ) -> tuple[Tensor, ContextState]:
        """Normed h [B, T, dim] of rows at one position, segment by segment -> y [B, T, dim], state.

        state: ContextState, or None before the first token. kept: gets the memory's state before
        every segment. whole: `piece` of a whole segment.
        """
        outputs = [h[:, :0]]
        position = _position(state)
        for first, span, offset in self.pieces(h.shape[1], position):
            if kept is not None:
                kept.append(state.memory)
            x = h[:, first : first + span]
            if whole is not None and span == self.config.segment:
                y, state = whole(x, state, self.place(position + first))
            else:
                y, state = self.piece(x, state, offset)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def place(self, position: int) -> int | None:
        """Of a segment that begins at this position in its chunk, if there are only a few."""
        segment, chunk = self.config.segment, self.config.memory.chunk_size
        regular = segment % chunk == 0 or chunk % segment == 0
        return position % chunk if regular else None

    def pieces(self, length: int, position: int) -> list[tuple[int, int, int]]:
        """(first token, tokens, place of the first in its segment) of what each segment gets."""
        size, done, found = self.config.segment, 0, []
        while done < length:
            offset = (position + done) % size
            span = min(size - offset, length - done)
            found.append((done, span, offset))
            done += span
        return found

    def piece(
        self, x: Tensor, state: ContextState | None, offset: int, place: int | None = None
    ) -> tuple[Tensor, ContextState]:
        """A piece of one segment: x [B, L, dim], normed, `offset` tokens into it and `place`, where
        that is known, into a chunk."""
        span, past = x.shape[1], 0 if offset == 0 else offset
        start = read = None
        if state is not None:
            start, read = state.memory, state.read
            if offset == 0:  # cloned: the memory keeps its own where a chunk begins here
                read = tuple(w.clone() for w in start.rule.weights)
        q, keys, values, read = self._projected(x, read)
        if state is not None:
            keys = torch.cat([state.keys[:, :, :past].to(keys.dtype), keys], 2)
            values = torch.cat([state.values[:, :, :past].to(values.dtype), values], 2)
        places = torch.arange(past + span, device=x.device)
        a = self._attention(q, keys, values, places[past:], places)
        if place is None:
            m, memory = self.memory(a, start, detach_state=False)
        else:
            m, memory = self.memory(a, start, place=place)
        y = self.attention_norm(a) * self.memory_norm(m)

        rest = (0, 0, 0, self.config.segment - past - span)
        seen = torch.zeros(len(x), dtype=torch.int64) if state is None else state.position
        return y, ContextState(memory, read, F.pad(keys, rest), F.pad(values, rest), seen + span)

    def token(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """`piece` of one token x [B, 1, dim] of rows at any places, which no host reads."""
        offset = (state.position % self.config.segment).to(x.device)[:, None]
        first = (offset == 0)[..., None, None]
        rows = zip(state.memory.rule.weights, state.read, strict=True)
        read = tuple(torch.where(first, now, then) for now, then in rows)
        q, k, v, _ = self._projected(x, read)
        places = torch.arange(self.config.segment, device=x.device)
        ahead = (places - offset)[:, None, :, None]
        here, past = ahead == 0, ahead < 0
        keys = torch.where(here, k, torch.where(past, state.keys.to(k.dtype), 0))
        values = torch.where(here, v, torch.where(past, state.values.to(v.dtype), 0))
        a = self._attention(q, keys, values, offset, places)
        m, memory = self.memory(a, state.memory, detach_state=False)
        y = self.attention_norm(a) * self.memory_norm(m)
        return y, ContextState(memory, read, keys, values, state.position + 1)

    def _projected(
        self, x: Tensor, read: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Queries of x [B, L, dim], keys and values [B, 2, L, G D] of what it reads and of it, and
        the weights read; read: None is M_0."""
        h, fixed = self.memory(self.recall_query(x), FixedMemory(read))
        h = h.to(x.dtype)
        q, k, v = self._split(check.whole("qkv", self.qkv(x), self.dim + 2 * self.kv_width))
        _, hk, hv = self._split(self.qkv(h))
        return q, torch.stack([hk, k], 1), torch.stack([hv, v], 1), fixed.weights

    def _attention(
        self, q: Tensor, keys: Tensor, values: Tensor, at: Tensor, places: Tensor
    ) -> Tensor:
        """Of q [B, L, dim] at [L] or [B, L] over keys [B, 2, n, G D] in these places [n]: a token
        sees every persistent one, and reads and tokens up to its own."""
        seen = places <= at[..., None]
        seen, k = [seen, seen], [self._rotated(k, places) for k in keys.unbind(1)]
        v = list(values.unbind(1))
        if self.persistent is not None:
            tokens = self.persistent.to(q.dtype).expand(len(q), -1, -1)
            _, pk, pv = self._split(self.qkv(tokens))
            always = seen[0].new_ones(*seen[0].shape[:-1], pk.shape[1])
            seen, k, v = [always, *seen], [self._heads(pk), *k], [pv, *v]
        seen = torch.cat(seen, -1)
        a = F.scaled_dot_product_attention(
            self._rotated(q, at),
            for_every_query(torch.cat(k, 2), self.heads, 1),
            for_every_query(self._heads(torch.cat(v, 1)), self.heads, 1),
            attn_mask=seen if at.ndim == 1 else seen[:, None],
        )
        return self.attention_out(a.transpose(1, 2).flatten(-2))

    def _split(self, qkv: Tensor) -> list[Tensor]:
        """Queries [..., dim], keys and values [..., G D]."""
        return list(qkv.split([self.dim, self.kv_width, self.kv_width], -1))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        rows = x.unflatten(-1, (-1, self.width))
        return rotary(rows, places, base=self.config.rope_base).transpose(1, 2)


def _position(state: ContextState | None) -> int:
    """Tokens that the rows of a state have seen, all of them as many."""
    return numbers(state.position[:1])[0] if state is not None and len(state) else 0


def _described(description: str) -> MemoryAsContext:
    """The block whose `description` this is, freshly initialised."""
    parts = read(description)
    block = MemoryAsContext(parts["dim"], parts["heads"], Config.from_dict(parts["config"]))
    if parts["own_tables"]:
        block.memory.use_own_tables(True)
    return block


build_with(_described)
