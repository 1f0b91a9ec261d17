"""Sliding-window attention as a block (rotary positions, optional sink tokens), and its state.

B batch, T tokens, H heads, G <= H heads of keys and values, D head width, P sink tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.attention.definition import (
    BACKENDS,
    choose_backend,
    rotary,
    sliding_window_attention,
)
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.grouped_query import for_every_query, kv_head_count
from atlas_blocks.blocks.norm import rms_norm
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.documents.definition import document_of, with_past
from atlas_blocks.state import State


@dataclasses.dataclass(frozen=True)
class SlidingWindowAttentionConfig(Config):
    """What defines the attention.

    window: keys that a query sees, its own included; None: all before it (a Transformer).
    sink_tokens: learned keys and values that every query sees (Titans' persistent tokens).
    backend: "auto" or one of atlas_blocks.functional.attention.BACKENDS.
    rope_base: base of the rotary frequencies.
    qk_norm: RMS-normalise each head's queries and keys, with a learned scale.
    kv_heads: heads of keys and values, each for heads / kv_heads heads of queries (grouped-query
    attention, Ainslie et al. 2023); None: as many as of queries.
    """

    window: int | None = 512
    sink_tokens: int = 0
    backend: str = "auto"
    rope_base: float = 10000.0
    qk_norm: bool = True
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check.at_least("window", self.window, 1)
        check.at_least("sink_tokens", self.sink_tokens, 0)
        check.choice("backend", self.backend, ("auto", *BACKENDS))
        check.between("rope_base", self.rope_base, 1.0, 1e12)
        check.boolean("qk_norm", self.qk_norm)
        if self.kv_heads is not None:
            check.at_least("kv_heads", self.kv_heads, 1)

    def build(self, dim: int, heads: int) -> SlidingWindowAttention:
        """The block. Raises ValueError where `heads` does not divide `dim` into even widths, or
        kv_heads does not divide `heads`."""
        return SlidingWindowAttention(dim, heads, self)


class AttentionState(State):
    """The keys and values that later tokens will see.

    keys, values: [B, window - 1, G, D], the newest last and zeros where nothing has been seen
    yet, so that the size never changes; with window=None [B, tokens so far, G, D]. They have the
    dtype they were computed in. Keys are stored rotated by their absolute position.
    position: int64 [B] on the CPU, tokens seen; rows may differ.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    @classmethod
    def aligned(cls, states: Sequence[AttentionState]) -> list[AttentionState]:
        """Caches of unequal length (window=None) padded on the left, where nothing is seen."""
        longest = max(s.keys.shape[1] for s in states)

        def padded(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, 0, longest - t.shape[1], 0))

        return [AttentionState(padded(s.keys), padded(s.values), s.position) for s in states]


class SlidingWindowAttention(Block):
    """Causal multi-head attention over the last `window` tokens.

    y, state = block(x, state): x and y [B, T, dim], AttentionState. Under autocast y, the keys
    and the values have autocast's dtype. Packed documents take one call; without a window, where a
    state is as long as the longest document, one for each length.
    """

    state_type = AttentionState

    @takes(SlidingWindowAttentionConfig)
    def __init__(
        self,
        dim: int,
        heads: int,
        config: SlidingWindowAttentionConfig = SlidingWindowAttentionConfig(),
    ) -> None:
        """Raises ValueError as `SlidingWindowAttentionConfig.build`."""
        super().__init__()
        check.at_least("heads", heads, 1)
        check.at_least("dim", dim, 1)
        if dim % (2 * heads):
            check.fail("dim", f"a multiple of 2 * heads = {2 * heads}", dim)
        kv_heads = kv_head_count(config.kv_heads, heads)
        self.dim, self.heads, self.kv_heads, self.config = dim, heads, kv_heads, config
        self.width = width = dim // heads
        sinks = config.sink_tokens
        self.qkv = Linear(dim, (heads + 2 * kv_heads) * width, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.q_scale = nn.Parameter(torch.empty(width)) if config.qk_norm else None
        self.k_scale = nn.Parameter(torch.empty(width)) if config.qk_norm else None
        self.sink_k = nn.Parameter(torch.empty(kv_heads, sinks, width)) if sinks else None
        self.sink_v = nn.Parameter(torch.empty(kv_heads, sinks, width)) if sinks else None
        self.reset_parameters()

    def tensor_plan(self) -> dict[str, tuple[int, int]] | None:
        """Heads never meet but in `out`; None where several share their keys and values."""
        if self.kv_heads != self.heads:
            return None
        plan = {"qkv.weight": (0, 3), "out.weight": (1, 1)}
        return plan | {n: (0, 1) for n in ("sink_k", "sink_v") if getattr(self, n) is not None}

    def take_heads(self, rank: int, ranks: int) -> None:
        self.heads //= ranks
        self.kv_heads //= ranks

    def reset_parameters(self) -> None:
        """Fill the parameters that this module itself holds."""
        for scale in (self.q_scale, self.k_scale):
            if scale is not None:
                nn.init.ones_(scale)
        for sink in (self.sink_k, self.sink_v):
            if sink is not None:
                nn.init.normal_(sink, std=0.02)

    def mix(
        self, x: Tensor, state: AttentionState | None, documents: Documents | None = None
    ) -> tuple[Tensor, AttentionState]:
        """x [B, T, dim] -> y [B, T, dim], state after token T. Raises ValueError: see Block."""
        (q, k, v), options, position = self._inputs(x, state, documents)
        y = sliding_window_attention(q, *self._shared(k, v), **options, backend=self.config.backend)
        bounds = None
        if documents is not None:
            cached = 0 if state is None else state.keys.shape[1]
            own = torch.arange(x.shape[1], device=x.device) + (documents.of + 1) * cached
            y = y.index_select(1, own) if cached else y
            bounds = _stretched(documents.bounds, cached)
        return self.out(y.flatten(2)), self._remember(k, v, position, bounds)

    def mix_packed(
        self, x: Tensor, state: AttentionState | None, documents: Documents
    ) -> tuple[Tensor, AttentionState]:
        """One call where there is a window, else those of `Block.mix_packed`."""
        if self.config.window is None:
            return super().mix_packed(x, state, documents)
        return self.mix(x, state, documents)

    def backend_for(self, x: Tensor, state: AttentionState | None = None) -> tuple[str, str]:
        """Which attention backend a call with these arguments takes, and why.

        Raises ValueError where the configured backend cannot serve them.
        """
        check.tensor("x", x, "[B, T, dim]", (None, None, self.dim))
        (q, k, v), options, _ = self._inputs(x, state)
        return choose_backend(q, *self._shared(k, v), **options, backend=self.config.backend)

    def _shared(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return for_every_query(k, self.heads, 2), for_every_query(v, self.heads, 2)

    def _inputs(
        self, x: Tensor, state: AttentionState | None, documents: Documents | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], Tensor]:
        """q [B, T, H, D], cache + own k and v [B, S, G, D]; options; tokens seen after the call."""
        (B, T, _), H, G, width = x.shape, self.heads, self.kv_heads, self.width
        qkv = check.whole("qkv", self.qkv(x), (H + 2 * G) * width)
        q, k, v = qkv.unflatten(2, (-1, width)).split([H, G, G], 2)
        if self.q_scale is not None and self.k_scale is not None:
            q, k = rms_norm(q, self.q_scale), rms_norm(k, self.k_scale)
        options: dict[str, Any] = {"window": self.config.window}
        if self.sink_k is not None and self.sink_v is not None:
            sinks = (for_every_query(t.to(q.dtype), H, 0) for t in (self.sink_k, self.sink_v))
            options |= {"sink_q": q, **dict(zip(("sink_k", "sink_v"), sinks, strict=True))}
        if documents is not None:
            return self._packed_inputs(q, k, v, state, documents, options)
        steps = torch.arange(T, device=x.device)
        if state is None:
            q, k = (rotary(t, steps, self.config.rope_base) for t in (q, k))
            return (q, k, v), options, torch.full((B,), T)
        self._check_state(state, B)
        # Angles are exact at any position (float64), so keys can be rotated once, when computed,
        # and rows of one batch may stand at different positions.
        positions = state.position.to(x.device)[:, None] + steps
        q, k = (rotary(t, positions, self.config.rope_base) for t in (q, k))
        options["valid"] = state.position.clamp(max=state.keys.shape[1])
        k = torch.cat([state.keys.to(k.dtype), k], dim=1)
        v = torch.cat([state.values.to(v.dtype), v], dim=1)
        return (q, k, v), options, state.position + T

    def _packed_inputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AttentionState | None,
        documents: Documents,
        options: dict[str, Any],
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], Tensor]:
        """`_inputs` of one sequence, each document's cache before its tokens: cached keys have
        queries of their own, which nobody reads."""
        d, device, position = documents, q.device, torch.zeros(documents.count, dtype=torch.int64)
        keys = values = k.new_zeros(d.count, 0, *k.shape[2:])
        if state is not None:
            self._check_state(state, d.count)
            keys, values, position = state.keys, state.values, state.position

        def after(cache: Tensor, t: Tensor) -> Tensor:
            return with_past(cache, t, d.bounds, d.of)

        seen, no_queries = position.to(device), q.new_zeros(*keys.shape[:2], *q.shape[2:])
        steps = torch.arange(q.shape[1], device=device) - d.bounds[d.of] + seen[d.of]
        if "sink_q" in options:
            options["sink_q"] = after(no_queries, q)
        q, k = (rotary(t, steps, self.config.rope_base) for t in (q, k))
        q, k, v = after(no_queries, q), after(keys, k), after(values, v)
        # A document's first key: the oldest in its cache; to a query before that its own.
        size, bounds = keys.shape[1], _stretched(d.bounds, keys.shape[1])
        first = bounds[:-1] + size - seen.clamp(max=size)
        first = first[document_of(bounds, q.shape[1])]
        options["first"] = first.minimum(torch.arange(q.shape[1], device=device))
        return (q, k, v), options, position + d.cu_seqlens.diff().to(position.device)

    def _remember(
        self, k: Tensor, v: Tensor, position: Tensor, bounds: Tensor | None
    ) -> AttentionState:
        """The last window - 1 of k, v [B, S, G, D], or of each document with these bounds."""
        S = k.shape[1]
        size = S if self.config.window is None else self.config.window - 1
        if bounds is not None:
            start, stop = bounds[:-1, None], bounds[1:, None]
            last = stop - size + torch.arange(size, device=k.device)
            there = (last >= start)[..., None, None]
            k, v = (torch.where(there, t[0, last.clamp(min=0)], 0.0) for t in (k, v))
            return AttentionState(k, v, position)
        if size > S:
            k, v = (F.pad(t, (0, 0, 0, 0, size - S, 0)) for t in (k, v))
        else:
            # Cloned: a slice would keep the whole call's keys alive, or the projection.
            k, v = k[:, S - size :].clone(), v[:, S - size :].clone()
        return AttentionState(k, v, position)

    def _check_state(self, state: AttentionState, B: int) -> None:
        if not isinstance(state, AttentionState):
            check.fail("state", "an AttentionState", type(state).__name__)
        window = self.config.window
        size = None if window is None else window - 1
        sizes = (B, size, self.kv_heads, self.width)
        check.tensor("state.keys", state.keys, "[B, window - 1, G, D]", sizes)
        check.tensor("state.values", state.values, "[B, window - 1, G, D]", sizes)
        check.tensor("state.position", state.position, "[B]", (B,), (torch.int64,))


def _stretched(bounds: Tensor, n: int) -> Tensor:
    """The bounds where n more tokens stand before each document."""
    return bounds + n * torch.arange(bounds.shape[0], device=bounds.device)
