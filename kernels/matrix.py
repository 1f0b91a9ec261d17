"""The matrix memory with U = identity: the walk over the chunks, and the reads (section 6).

    L = K M^(0)^T - V  ("l2"),  -V  ("dot")      over the chunk's own keys and the halo's
    L = X e,  e = abar' K W^T - carried' K S^T - V      for online errors ("l2"; online.py has X)
    y = abar Q W^T - carried Q S^T - (F o Q K^T) L
    W' = a W - c S - (write o L)^T K         S' = th S + (last o L)^T K

abar' and carried' are those of the token before; of the halo 1 and 0. W and S are [V, D], their
rows independent of one another. Only the walk over the chunks' ends is
sequential: one program per row, head and block of V, with W and S in registers where D fits, else
streamed through their saved copies. Everything else is one program per chunk.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels.coefficients import Coefficients, Spans
from atlas_blocks.kernels.online import corrected
from atlas_blocks.kernels.tiles import (
    ALL_REGISTERS,
    Layout,
    ceil_div,
    chip,
    chunk_tokens,
    dot,
    launch,
    load_block,
    load_tile,
    padded,
    store_block,
    store_tile,
)


@triton.jit
def before(x, t, FIRST: tl.constexpr):
    """Entry t - 1 in the place of entry t, FIRST in the first."""
    return tl.load(x + t - 1, mask=t > 0, other=FIRST)


@triton.jit
def _walk_forward(
    k, target, w_start, s_start, slots, rows, solved,
    write_own, write_halo, last_own, last_halo, abar, carried, thbar,
    starts_w, starts_s, w_end, s_end,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    d = tl.arange(0, BD)
    r, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    size = V * D
    mine = tl.program_id(0).to(tl.int64) * size
    first_slot, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    shift = (row + 1) * HISTORY
    w = load_block(w_start + mine, v, V, d, D).to(tl.float32)
    if TILES == 1:
        if MOMENTUM:
            s = load_block(s_start + mine, v, V, d, D).to(tl.float32)
    else:
        for j in tl.range(TILES, disable_licm=True):
            to = (first_slot * H + head).to(tl.int64) * size
            x = load_block(w_start + mine, v, V, d + j * BD, D)
            store_block(starts_w + to, x, v, V, d + j * BD, D)
            if MOMENTUM:
                x = load_block(s_start + mine, v, V, d + j * BD, D)
                store_block(starts_s + to, x, v, V, d + j * BD, D)
    for n in tl.range(count, disable_licm=True):
        slot = first_slot + n
        _, first, low, high, token, _ = chunk_tokens(slots, slot, SPAN, CHUNK)
        here = (slot * H + head).to(tl.int64)
        seen = (token < high) & (r < CHUNK)
        write = tl.load(write_own + here * SPAN + r)
        if MOMENTUM:
            last = tl.load(last_own + here * SPAN + r)
            c = tl.load(carried + here * SPAN + SPAN - 1)
            th = tl.load(thbar + here)
        a = tl.load(abar + here * SPAN + SPAN - 1)
        e = -load_tile(target, first + shift, r, seen, head, H, v, V).to(tl.float32)
        if CORRECT:
            faded = before(abar + here * SPAN, r, 1.0)
            if MOMENTUM:
                fallen = before(carried + here * SPAN, r, 0.0)
        e_h = tl.zeros([HALO if HALO else 1, BV], tl.float32)
        if HALO:
            past = first - HALO + i
            near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
            write_h = tl.load(write_halo + here * HALO + i)
            if MOMENTUM:
                last_h = tl.load(last_halo + here * HALO + i)
            e_h = -load_tile(target, first + shift - HALO, i, near, head, H, v, V).to(tl.float32)
        if TILES == 1:
            store_block(starts_w + here * size, w, v, V, d, D)
            x = load_tile(k, first + shift, r, seen, head, H, d, D)
            if CORRECT:
                e += faded[:, None] * dot(x, tl.trans(w))
                if MOMENTUM:
                    e -= fallen[:, None] * dot(x, tl.trans(s))
            elif L2:
                e += dot(x, tl.trans(w))
            if L2 and HALO:
                x_h = load_tile(k, first + shift - HALO, i, near, head, H, d, D)
                e_h += dot(x_h, tl.trans(w))
            if CORRECT:
                e, e_h = corrected(e, e_h, solved, here, r, i, SPAN, HALO)
            w = a * w
            if MOMENTUM:
                store_block(starts_s + here * size, s, v, V, d, D)
                w -= c * s
                s = th * s + dot(tl.trans(e * last[:, None]), x)
            w -= dot(tl.trans(e * write[:, None]), x)
            if HALO:
                x_h = load_tile(k, first + shift - HALO, i, near, head, H, d, D)
                w -= dot(tl.trans(e_h * write_h[:, None]), x_h)
                if MOMENTUM:
                    s += dot(tl.trans(e_h * last_h[:, None]), x_h)
        else:
            # What the last chunk stored is what this one loads.
            tl.debug_barrier()
            if L2:
                for j in tl.range(TILES, disable_licm=True):
                    m = load_block(starts_w + here * size, v, V, d + j * BD, D)
                    x = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
                    if CORRECT:
                        e += faded[:, None] * dot(x, tl.trans(m))
                        if MOMENTUM:
                            m = load_block(starts_s + here * size, v, V, d + j * BD, D)
                            e -= fallen[:, None] * dot(x, tl.trans(m))
                    else:
                        e += dot(x, tl.trans(m))
                if HALO:
                    for j in tl.range(TILES, disable_licm=True):
                        m = load_block(starts_w + here * size, v, V, d + j * BD, D)
                        x = load_tile(k, first + shift - HALO, i, near, head, H, d + j * BD, D)
                        e_h += dot(x, tl.trans(m))
                if CORRECT:
                    e, e_h = corrected(e, e_h, solved, here, r, i, SPAN, HALO)
            for j in tl.range(TILES, disable_licm=True):
                w = a * load_block(starts_w + here * size, v, V, d + j * BD, D)
                x = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
                w -= dot(tl.trans(e * write[:, None]), x)
                if MOMENTUM:
                    s = load_block(starts_s + here * size, v, V, d + j * BD, D)
                    w -= c * s
                    s = th * s + dot(tl.trans(e * last[:, None]), x)
                if HALO:
                    x = load_tile(k, first + shift - HALO, i, near, head, H, d + j * BD, D)
                    w -= dot(tl.trans(e_h * write_h[:, None]), x)
                    if MOMENTUM:
                        s += dot(tl.trans(e_h * last_h[:, None]), x)
                if n + 1 < count:
                    store_block(starts_w + (here + H) * size, w, v, V, d + j * BD, D)
                else:
                    store_block(w_end + mine, w, v, V, d + j * BD, D)
                if MOMENTUM:
                    if n + 1 < count:
                        store_block(starts_s + (here + H) * size, s, v, V, d + j * BD, D)
                    else:
                        store_block(s_end + mine, s, v, V, d + j * BD, D)
    if TILES == 1:
        store_block(w_end + mine, w, v, V, d, D)
        if MOMENTUM:
            store_block(s_end + mine, s, v, V, d, D)


@triton.jit
def left_and_dots(
    q, k, target, solved, abar, carried, starts_w, starts_s,
    slot, head, row, first, low, high, token, mine, v, H, D, V, HISTORY,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """L [keys, BV] and Q K^T, for the chunk's own keys and the halo's (1 wide without one)."""
    d, r = tl.arange(0, BD), tl.arange(0, SPAN)
    i = tl.arange(0, HALO if HALO else 1)
    size = V * D
    here = (slot * H + head).to(tl.int64)
    shift = (row + 1) * HISTORY
    seen = (token < high) & (r < CHUNK)
    e = -load_tile(target, first + shift, r, seen, head, H, v, V).to(tl.float32)
    dots = tl.zeros([SPAN, SPAN], tl.float32)
    past = first - HALO + i
    near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
    e_h = -load_tile(target, first + shift - HALO, i, near, head, H, v, V).to(tl.float32)
    dots_h = tl.zeros([SPAN, HALO if HALO else 1], tl.float32)
    if CORRECT:
        faded = before(abar + here * SPAN, r, 1.0)[:, None]
    for j in tl.range(TILES, disable_licm=True):
        if L2:
            w = load_block(starts_w + here * size, v, V, d + j * BD, D).to(tl.float32)
        x = load_tile(q, first, r, mine, head, H, d + j * BD, D)
        z = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
        dots += dot(x, tl.trans(z))
        if CORRECT:
            e += faded * dot(z, tl.trans(w))
        elif L2:
            e += dot(z, tl.trans(w))
        if HALO:
            z = load_tile(k, first + shift - HALO, i, near, head, H, d + j * BD, D)
            dots_h += dot(x, tl.trans(z))
            if L2:
                e_h += dot(z, tl.trans(w))
    if CORRECT:
        if MOMENTUM:
            fallen = before(carried + here * SPAN, r, 0.0)[:, None]
            for j in tl.range(TILES, disable_licm=True):
                w = load_block(starts_s + here * size, v, V, d + j * BD, D)
                z = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
                e -= fallen * dot(z, tl.trans(w))
        e, e_h = corrected(e, e_h, solved, here, r, i, SPAN, HALO)
    return e, dots, e_h, dots_h


@triton.jit
def _read_forward(
    q, k, target, slots, solved, own, halo, abar, carried, starts_w, starts_s, y,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    d = tl.arange(0, BD)
    r, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    here = (slot * H + head).to(tl.int64)
    size = V * D
    read = tl.zeros([SPAN, BV], tl.float32)
    for j in tl.range(TILES, disable_licm=True):
        x = load_tile(q, first, r, mine, head, H, d + j * BD, D)
        w = load_block(starts_w + here * size, v, V, d + j * BD, D)
        read += dot(x, tl.trans(w))
    read = tl.load(abar + here * SPAN + r)[:, None] * read
    if MOMENTUM:
        c = tl.load(carried + here * SPAN + r)[:, None]
        for j in tl.range(TILES, disable_licm=True):
            x = load_tile(q, first, r, mine, head, H, d + j * BD, D)
            s = load_block(starts_s + here * size, v, V, d + j * BD, D)
            read -= c * dot(x, tl.trans(s))
    e, dots, e_h, dots_h = left_and_dots(
        q, k, target, solved, abar, carried, starts_w, starts_s,
        slot, head, row, first, low, high, token, mine, v, H, D, V, HISTORY,
        CHUNK, WINDOW, SPAN, HALO, BD, TILES, L2, MOMENTUM, CORRECT,
    )  # fmt: skip
    f = load_block(own + here * SPAN * SPAN, r, SPAN, r, SPAN)
    read -= dot(dots * f, e)
    if HALO:
        f = load_block(halo + here * SPAN * HALO, r, SPAN, i, HALO)
        read -= dot(dots_h * f, e_h)
    store_tile(y, read, first, r, mine, head, H, v, V)


@dataclass(frozen=True)
class Tiles:
    """How a kernel's D and V are cut."""

    d: int
    v: int
    count: int  # of D
    value_count: int
    crowded: bool  # registers are to be had for fewer programs at once

    @staticmethod
    def of(d: int, v: int, widest_d: int, widest_v: int) -> Tiles:
        # On Blackwell tiles of 16 spill.
        smallest = 32 if chip() >= 100 else 16
        block_d = min(widest_d, max(smallest, padded(d)))
        block_v = min(widest_v, max(smallest, padded(v)))
        crowded = d % 16 > 0 or (chip() >= 100 and not 16 < d <= 128)
        return Tiles(block_d, block_v, ceil_div(d, block_d), ceil_div(v, block_v), crowded)

    def settings(self, warps: int = 8, crowded: bool = False) -> dict[str, int]:
        found = {
            "BD": self.d, "BV": self.v, "TILES": self.count, "num_warps": warps, "num_stages": 1,
        }  # fmt: skip
        return found | ALL_REGISTERS if self.crowded or crowded else found


# The sizes below are the largest for which `aot` finds no register spilled. Before Hopper the
# operands of a product are in registers; a width that is not a multiple of 16 needs an address for
# every element.


def walk_tiles(d: int, v: int, resident: int, streamed: int) -> Tiles:
    """resident: the widest D whose W and S stay in registers; wider ones come in blocks."""
    if d % 16:
        streamed = 16
    return Tiles.of(d, v, resident if padded(d) <= resident else streamed, 16)


def walk_forward_tiles(d: int, v: int) -> Tiles:
    return walk_tiles(d, v, resident=128 if chip() >= 90 else 64, streamed=32)


def read_tiles(d: int, v: int, wide: bool) -> Tiles:
    """wide: as `is_wide` has it."""
    if chip() >= 90:
        return Tiles.of(d, v, 32 if wide else 64, 64)
    return Tiles.of(d, v, 16 if wide else 32, 16)


def is_wide(spans: Spans, solved: Tensor | None) -> bool:
    """Whether blocks of an inverse come in as well, and of many keys."""
    return solved is not None and spans.halo > 32


def state_warps(dtype: torch.dtype, solved: Tensor | None = None) -> int:
    return 4 if chip() >= 100 and dtype != torch.float32 and solved is None else 8


def forward(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    found: Coefficients,
    solved: Tensor | None,
    w: Tensor,
    s: Tensor | None,
    at: Layout,
    spans: Spans,
    *,
    l2: bool,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """q [B, T, H, D]; k, target [B, HIST + T, H, D | V], of packed documents [1, R HIST + T, ...];
    solved: from `online.solve`, for online errors; w and s, at the first chunk's start
    [R, H, V, D]; full: whether every slot has a chunk. Returns y [B, T, H, V], W and S at the end,
    and at the chunks' starts [slots, H, V, D]."""
    heads, d = q.shape[-2:]
    v = target.shape[-1]
    y = q.new_empty(*q.shape[:-1], v)
    # Zero where there is no chunk.
    new = torch.empty if full else torch.zeros
    starts_w = new(at.count, heads, v, d, dtype=w.dtype, device=w.device)
    w_end = torch.empty_like(w)
    starts_s = s_end = None
    if s is not None:
        starts_s, s_end = new(*starts_w.shape, dtype=w.dtype, device=w.device), torch.empty_like(s)
    shape = (heads, d, v, spans.history)
    kinds = {"L2": l2, "MOMENTUM": s is not None, "CORRECT": solved is not None}
    t, warps = walk_forward_tiles(d, v), state_warps(q.dtype, solved)
    if solved is not None and not spans.halo and d > 64:
        warps = 4
    launch(
        _walk_forward, (at.batch * heads, t.value_count),
        k, target, w, s, at.slots, at.rows, solved,
        found.write_own, found.write_halo, found.last_own, found.last_halo,
        found.abar, found.carried, found.thbar, starts_w, starts_s, w_end, s_end, *shape,
        **chunk_settings(spans), **kinds, **t.settings(warps, chip() < 90),
    )  # fmt: skip
    t = read_tiles(d, v, is_wide(spans, solved))
    launch(
        _read_forward, (at.count * heads, t.value_count),
        q, k, target, at.slots, solved, found.own, found.halo, found.abar, found.carried,
        starts_w, starts_s, y, *shape,
        **chunk_settings(spans), **kinds, **t.settings(state_warps(q.dtype), solved is not None),
    )  # fmt: skip
    return y, w_end, s_end, starts_w, starts_s


def chunk_settings(spans: Spans) -> dict[str, Any]:
    """The compile-time settings of every kernel here that follow from the chunk."""
    return {
        "CHUNK": spans.chunk, "WINDOW": spans.window, "SPAN": spans.span, "HALO": spans.halo,
    }  # fmt: skip
