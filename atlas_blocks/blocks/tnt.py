"""TNT (Li et al. 2025, arXiv 2511.07343): one global memory of large chunks and, beside it, local
memories of small chunks that begin anew at every span of the text.

B batch, T tokens, H heads, D head width, N spans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.conv import ConvState
from atlas_blocks.blocks.memory import AtlasMemory, AtlasMemoryConfig, MemoryState
from atlas_blocks.blocks.rows_alike import rows_alike
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.data import numbers
from atlas_blocks.omega.op import omega_rule
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, initial_state
from atlas_blocks.state import State

# sum k v^T of the span so far: linear attention.
SUM = Rule(memory="matrix", objective="dot", update="gd", window=1)


def _global() -> AtlasMemoryConfig:
    """Titans' memory, in chunks of the paper's size."""
    return _local().replace(chunk_size=2048)


def _local() -> AtlasMemoryConfig:
    return AtlasMemoryConfig(update="gd", window=1, feature_map="identity", chunk_size=16)


@dataclass(frozen=True)
class TNTConfig(Config):
    """memory: of the global one; local: those of the local ones; span: tokens after which these
    begin anew; project_queries: whether a local memory is read with its queries projected on the
    keys of the span so far (the paper's Q-K projection).

    The paper's second stage is training with smaller local chunks: no parameter depends on
    `chunk_size` or on `span`, so that a checkpoint loads into a config that has others.
    Raises ValueError naming the bad field.
    """

    memory: AtlasMemoryConfig = field(default_factory=_global)
    local: tuple[AtlasMemoryConfig, ...] = field(default_factory=lambda: (_local(),))
    span: int = 2048
    project_queries: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.memory, AtlasMemoryConfig):
            check.fail("memory", "AtlasMemoryConfig", type(self.memory).__name__)
        if not isinstance(self.local, tuple) or not self.local:
            check.fail("local", "a tuple of AtlasMemoryConfig, at least one", repr(self.local))
        for i, local in enumerate(self.local):
            if not isinstance(local, AtlasMemoryConfig):
                check.fail(f"local.{i}", "AtlasMemoryConfig", type(local).__name__)
        check.at_least("span", self.span, 1)
        check.boolean("project_queries", self.project_queries)

    def build(self, dim: int, heads: int) -> TNT:
        return TNT(dim, heads, self)


class LocalState(State):
    """conv, rule: as in MemoryState; keys: of `projected`."""

    conv: ConvState
    rule: OmegaState
    keys: OmegaState


class LocalMemory(AtlasMemory):
    """An AtlasMemory that is read with its queries projected on the keys that it has been given.

    x [B, T, dim] -> y [B, T, dim]; state LocalState.
    """

    state_type = LocalState

    def mix(  # type: ignore[override]
        self, x: Tensor, state: LocalState | None, documents: Documents | None = None
    ) -> tuple[Tensor, LocalState]:
        if state is None and documents is None and x.shape[1] == 0:
            return self.out(self.gate(x)), self.initial_state(x)
        conv, rule, keys = (None, None, None)
        if state is not None:
            conv, rule, keys = state.conv, state.rule, state.keys
        q, k, v, conv = self.project(x, conv, documents)
        q, keys = projected(q, k, keys, documents)
        y, rule = self.write(x, q, k, v, rule, documents)
        return self.answer(x, y), LocalState(conv, rule, keys)

    mix_packed = mix

    def initial_state(self, x: Tensor) -> LocalState:  # type: ignore[override]
        """The state before the first token of x [B, T, dim]."""
        memory = super().initial_state(x)
        none = x.new_zeros(len(x), 0, self.heads, self.width)
        keys = initial_state(none, none, [_no_keys(none)], SUM, momentum=False)
        return LocalState(memory.conv, memory.rule, keys)


def _no_keys(k: Tensor) -> Tensor:
    """The sum over none, for k [B, T, H, D]: [H, D, D]."""
    heads, width = k.shape[2:]
    dtype = torch.promote_types(k.dtype, torch.float32)
    return k.new_zeros(heads, width, width, dtype=dtype)


def projected(
    q: Tensor, k: Tensor, state: OmegaState | None, documents: Documents | None = None
) -> tuple[Tensor, OmegaState]:
    """q~_t = (sum_{s <= t} k_s k_s^T / |k_s|^2) q_t (TNT's Q-K projection).

    q, k: [B, T, H, D], as `omega_rule` takes them; a key of zeros counts for nothing. Returns q~
    and the sum's state. It is linear attention, of which the rule is a general form: chunks in
    parallel, streamed and packed as the rule is.
    """
    square = k.square().sum(-1, keepdim=True)
    none = _no_keys(k)
    one = k.new_ones(k.shape[:3], dtype=none.dtype)
    return omega_rule(
        q,
        k,
        k / torch.where(square == 0, 1, square),
        alpha=one,
        eta=one,
        theta=None,
        gamma=one[..., None],
        weights=[none],
        rule=SUM,
        state=state,
        cu_seqlens=documents and documents.cu_seqlens,
    )


class TNTState(State):
    """memory: the global one's; local: those of the spans that the local ones are in."""

    memory: MemoryState
    local: tuple[MemoryState | LocalState, ...]


class TNT(Block):
    """y_t = V_t(q_t) + sum_i W^i_t(q~_t), V the global memory, W^i local ones (TNT, section 4).

    Every memory is a whole layer, with projections, gates and an output of its own. The local ones
    read every `span` tokens as a document of their own, convolution included, so that all spans of
    a text run as one batch. V_t is the memory that the rule has at t, where the paper reads the one
    at its chunk's start.

    A token that is decoded inside of a chunk does the chunk's tokens again where the rule rewinds
    (`Rule.rewinds`: deep memories under gradient descent): what one costs grows with the global
    chunk_size. A graph is compiled for lengths of whole spans, one for those with a rest, one for
    those below a span, and one for a token. It breaks at packed documents, and at more than one
    token where a state goes in.
    x [B, T, dim] -> y [B, T, dim]; state TNTState of a size that does not depend on T.
    """

    state_type = TNTState

    @takes(TNTConfig)
    def __init__(self, dim: int, heads: int, config: TNTConfig = TNTConfig()) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.memory = config.memory.build(dim, heads)
        kind = LocalMemory if config.project_queries else AtlasMemory
        self.local = nn.ModuleList(kind(dim, heads, local) for local in config.local)

    def mix(self, x: Tensor, state: TNTState | None) -> tuple[Tensor, TNTState]:
        if state is None:
            return self.at_place(x, None, 0)
        if len(state.local) != len(self.local):
            count = f"{len(self.local)} states, as the config has local memories"
            check.fail("state.local", count, len(state.local))
        kind = LocalState if self.config.project_queries else MemoryState
        for i, local in enumerate(state.local):
            if not isinstance(local, kind):
                check.fail(f"state.local[{i}]", kind.__name__, type(local).__name__)
        going_on: Any = self.going_on
        if torch.compiler.is_compiling():
            if x.shape[1] == 1:
                return self.at_place(x, self.begun_anew(x, state), 0)
            if torch.compiler.is_exporting():
                check.fail("x", "one token where TNT is exported with a state", x.shape[1])
            going_on = torch.compiler.disable(going_on)
        return going_on(x, state)

    def going_on(self, x: Tensor, state: TNTState) -> tuple[Tensor, TNTState]:
        """Rows that are at one place of their spans run together."""
        read = self._read("state.memory", state.memory, len(x))
        # As many of the span that the last token read is in.
        places = [(n - 1) % self.config.span + 1 if n else 0 for n in read]
        for i, local in enumerate(state.local):
            name = f"state.local[{i}]"
            if (found := self._read(name, local, len(x))) != places:
                wanted = f"{places}, as spans of {self.config.span} tokens have it after {read}"
                check.fail(f"{name}.rule.position", wanted, found)
        return rows_alike(self.at_place, x, state, places)

    def _read(self, name: str, state: MemoryState | LocalState, batch: int) -> list[int]:
        """How many tokens the memory of every row has read."""
        position = state.rule.position
        check.tensor(f"{name}.rule.position", position, "[B]", (batch,), (torch.int64,))
        return numbers(position)

    def at_place(self, x: Tensor, state: TNTState | None, place: int) -> tuple[Tensor, TNTState]:
        """x [B, T, dim] of rows of which `place` tokens of a span have been read."""
        y, memory = self.memory(x, state and state.memory, detach_state=False)
        ends = []
        for i, local in enumerate(self.local):
            read, end = self.in_spans(local, x, state and state.local[i], place)
            y = y + read
            ends.append(end)
        return y, TNTState(memory, tuple(ends))

    def in_spans(self, local: nn.Module, x: Tensor, state: Any, place: int) -> tuple[Tensor, Any]:
        """A local memory over the rest of a span, over whole ones, and over one that is begun."""
        length, span = x.shape[1], self.config.span
        begun = 0 if state is None else min(length, span - place)
        whole = (length - begun) // span
        stop = begun + whole * span
        reads = []
        if begun or length == 0:
            y, state = local(x[:, :begun], state, detach_state=False)
            reads.append(y)
        if whole:
            # All of them are one batch.
            rows = x[:, begun:stop].reshape(-1, span, self.dim)
            y, ends = local(rows, detach_state=False)
            reads.append(y.reshape(-1, whole * span, self.dim))
            state = ends[torch.arange(1, len(x) + 1) * whole - 1]
        if stop < length:
            y, state = local(x[:, stop:], detach_state=False)
            reads.append(y)
        return torch.cat(reads, 1), state

    def begun_anew(self, x: Tensor, state: TNTState) -> TNTState:
        """The state with local memories at their start in rows whose span is over, which no host
        reads; x [B, T, dim]."""
        position = state.local[0].rule.position
        rows = torch.arange(len(x), device=position.device)
        chosen = torch.where(position < self.config.span, rows, rows + len(x))
        local: Any = self.local
        fresh = (memory.initial_state(x) for memory in local)
        both = zip(state.local, fresh, strict=True)
        return state.replace(local=tuple(State.cat(pair)[chosen] for pair in both))
