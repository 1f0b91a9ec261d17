"""The gradients of matrix.py, whose names these are, from the memory at every chunk's start.

    dL = -(F o Q K^T)^T dy - write o (K dW'^T) + last o (K dS'^T)
    dW = a dW' + (abar o dy)^T Q + dL^T K        dS = th dS' - c dW' - (carried o dy)^T Q

For online errors de = X^T dL, dW gets (abar' o de)^T K in the place of dL^T K, dS in addition
-(carried' o de)^T K, and the rest of it is the system's (online.py).

Sequential is only the walk back over dW and dS; what needs them at one chunk follows all at once.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels import coefficients, online
from atlas_blocks.kernels.coefficients import Coefficients, Spans
from atlas_blocks.kernels.fold import fold
from atlas_blocks.kernels.matrix import (
    Tiles,
    before,
    chunk_settings,
    is_wide,
    left_and_dots,
    read_tiles,
    state_warps,
    walk_tiles,
)
from atlas_blocks.kernels.online import corrected_backward, solved_block
from atlas_blocks.kernels.tiles import (
    Layout,
    chip,
    chunk_tokens,
    dot,
    launch,
    load_block,
    load_tile,
    store_block,
    store_tile,
)


@triton.jit
def _left_backward(
    q, k, target, dy, slots, solved, own, halo, abar, carried, starts_w, starts_s,
    e_own, e_halo, dl_own, dl_halo,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """L again, and the part of its gradient that comes from the reads: -(F o Q K^T)^T dy."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    r, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    here = (slot * H + head).to(tl.int64)
    e, dots, e_h, dots_h = left_and_dots(
        q, k, target, solved, abar, carried, starts_w, starts_s,
        slot, head, row, first, low, high, token, mine, v, H, D, V, HISTORY,
        CHUNK, WINDOW, SPAN, HALO, BD, TILES, L2, MOMENTUM, CORRECT,
    )  # fmt: skip
    g = load_tile(dy, first, r, mine, head, H, v, V)
    f = load_block(own + here * SPAN * SPAN, r, SPAN, r, SPAN)
    store_block(e_own + here * SPAN * V, e, r, SPAN, v, V)
    dl = -dot(tl.trans(dots * f), g)
    store_block(dl_own + here * SPAN * V, dl, r, SPAN, v, V)
    if HALO:
        f = load_block(halo + here * SPAN * HALO, r, SPAN, i, HALO)
        store_block(e_halo + here * HALO * V, e_h, i, HALO, v, V)
        dl = -dot(tl.trans(dots_h * f), g)
        store_block(dl_halo + here * HALO * V, dl, i, HALO, v, V)


@triton.jit
def _walk_backward(
    q, k, dy, slots, rows, solved,
    write_own, write_halo, last_own, last_halo, abar, carried, thbar,
    dl_own, dl_halo, dw_end, ds_end, dw_last, ds_last, ends_w, ends_s, dw_start, ds_start,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The gradients of W and S at every chunk's end, from the last chunk to the first.

    dl comes in with the reads' part and leaves complete: of the bare errors where they are
    corrected. LAST: the last chunk's start has gradients of its own, dw_last and ds_last.
    """
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    d = tl.arange(0, BD)
    r, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    size = V * D
    mine = tl.program_id(0).to(tl.int64) * size
    first_slot, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    shift = (row + 1) * HISTORY
    w = load_block(dw_end + mine, v, V, d, D)
    if MOMENTUM:
        s = load_block(ds_end + mine, v, V, d, D)
    if TILES > 1:
        to = ((first_slot + count - 1) * H + head).to(tl.int64) * size
        for j in tl.range(TILES, disable_licm=True):
            x = load_block(dw_end + mine, v, V, d + j * BD, D)
            store_block(ends_w + to, x, v, V, d + j * BD, D)
            if MOMENTUM:
                x = load_block(ds_end + mine, v, V, d + j * BD, D)
                store_block(ends_s + to, x, v, V, d + j * BD, D)
    for back in tl.range(count, disable_licm=True):
        slot = first_slot + count - 1 - back
        _, first, low, high, token, out = chunk_tokens(slots, slot, SPAN, CHUNK)
        here = (slot * H + head).to(tl.int64)
        seen = (token < high) & (r < CHUNK)
        write = tl.load(write_own + here * SPAN + r)
        a = tl.load(abar + here * SPAN + SPAN - 1)
        if MOMENTUM:
            last = tl.load(last_own + here * SPAN + r)
            c = tl.load(carried + here * SPAN + SPAN - 1)
            th = tl.load(thbar + here)
        g = load_tile(dy, first, r, out, head, H, v, V).to(tl.float32)
        g_w = g * tl.load(abar + here * SPAN + r)[:, None]
        if MOMENTUM:
            g_s = g * tl.load(carried + here * SPAN + r)[:, None]
        dl = load_block(dl_own + here * SPAN * V, r, SPAN, v, V).to(tl.float32)
        dl_h = tl.zeros([HALO if HALO else 1, BV], tl.float32)
        if HALO:
            past = first - HALO + i
            near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
            write_h = tl.load(write_halo + here * HALO + i)
            if MOMENTUM:
                last_h = tl.load(last_halo + here * HALO + i)
            dl_h = load_block(dl_halo + here * HALO * V, i, HALO, v, V).to(tl.float32)
        if TILES > 1:
            tl.debug_barrier()
        for j in tl.range(TILES, disable_licm=True):
            if TILES > 1:
                w = load_block(ends_w + here * size, v, V, d + j * BD, D)
            x = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
            dl -= write[:, None] * dot(x, tl.trans(w))
            if MOMENTUM:
                if TILES > 1:
                    s = load_block(ends_s + here * size, v, V, d + j * BD, D)
                dl += last[:, None] * dot(x, tl.trans(s))
            if HALO:
                x = load_tile(k, first + shift - HALO, i, near, head, H, d + j * BD, D)
                dl_h -= write_h[:, None] * dot(x, tl.trans(w))
                if MOMENTUM:
                    dl_h += last_h[:, None] * dot(x, tl.trans(s))
        if CORRECT:
            dl, dl_h = corrected_backward(dl, dl_h, solved, here, r, i, SPAN, HALO)
        store_block(dl_own + here * SPAN * V, dl, r, SPAN, v, V)
        if HALO:
            store_block(dl_halo + here * HALO * V, dl_h, i, HALO, v, V)
        if CORRECT:
            if MOMENTUM:
                dl_s = dl * before(carried + here * SPAN, r, 0.0)[:, None]
            dl *= before(abar + here * SPAN, r, 1.0)[:, None]
        for j in tl.range(TILES, disable_licm=True):
            if TILES > 1:
                w = load_block(ends_w + here * size, v, V, d + j * BD, D)
                if MOMENTUM:
                    s = load_block(ends_s + here * size, v, V, d + j * BD, D)
            else:
                store_block(ends_w + here * size, w, v, V, d, D)
                if MOMENTUM:
                    store_block(ends_s + here * size, s, v, V, d, D)
            x = load_tile(q, first, r, out, head, H, d + j * BD, D)
            if MOMENTUM:
                s = th * s - c * w - dot(tl.trans(g_s), x)
            w = a * w + dot(tl.trans(g_w), x)
            if L2:
                x = load_tile(k, first + shift, r, seen, head, H, d + j * BD, D)
                w += dot(tl.trans(dl), x)
                if CORRECT and MOMENTUM:
                    s -= dot(tl.trans(dl_s), x)
                if HALO:
                    x = load_tile(k, first + shift - HALO, i, near, head, H, d + j * BD, D)
                    w += dot(tl.trans(dl_h), x)
            if LAST and back == 0:
                w += load_block(dw_last + mine, v, V, d + j * BD, D)
                if MOMENTUM:
                    s += load_block(ds_last + mine, v, V, d + j * BD, D)
            if back == count - 1:
                store_block(dw_start + mine, w, v, V, d + j * BD, D)
                if MOMENTUM:
                    store_block(ds_start + mine, s, v, V, d + j * BD, D)
            elif TILES > 1:
                store_block(ends_w + (here - H) * size, w, v, V, d + j * BD, D)
                if MOMENTUM:
                    store_block(ends_s + (here - H) * size, s, v, V, d + j * BD, D)


@triton.jit
def _gradients(
    q, k, dy, slots, own, halo, abar, carried, write_own, write_halo, last_own, last_halo,
    starts_w, starts_s, ends_w, ends_s, e_own, e_halo, dl_own, dl_halo, slope,
    dq, dk, dk_halo,
    d_own, d_halo, d_abar, d_carried, d_write_own, d_write_halo, d_last_own, d_last_halo, d_thbar,
    d_faded, d_fallen,
    SLOTS, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, VALUE_TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, the keys and the coefficients, for one block of D.

    Sums over D of the coefficients' gradients are left to the caller: [TILES, slots, H, ...]. To
    those of F, which are one, the system's are there already. d_faded and d_fallen are those of
    abar and carried one token earlier.
    """
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    part = tl.program_id(1)
    d = part * BD + tl.arange(0, BD)
    r, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    here = (slot * H + head).to(tl.int64)
    there = (part * SLOTS * H).to(tl.int64) + here
    size = V * D
    shift = (row + 1) * HISTORY
    seen = (token < high) & (r < CHUNK)

    past = first - HALO + i
    near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
    end = r == SPAN - 1
    x = load_tile(q, first, r, mine, head, H, d, D)
    z = load_tile(k, first + shift, r, seen, head, H, d, D)

    # One thing after the other: all the sums at once would not fit the registers.
    spread = tl.zeros([SPAN, SPAN], tl.float32)  # dy L^T
    for n in tl.range(VALUE_TILES, disable_licm=True):
        v = n * BV + tl.arange(0, BV)
        g = load_tile(dy, first, r, mine, head, H, v, V)
        e = load_block(e_own + here * SPAN * V, r, SPAN, v, V)
        spread += dot(g, tl.trans(e))
    f = load_block(own + here * SPAN * SPAN, r, SPAN, r, SPAN).to(tl.float32)
    d_dots = -f * spread
    found = dot(d_dots, z)
    left = dot(tl.trans(d_dots), x)
    if part == 0:
        dots = tl.zeros([SPAN, SPAN], tl.float32)
        for j in tl.range(TILES, disable_licm=True):
            x_j = load_tile(q, first, r, mine, head, H, j * BD + tl.arange(0, BD), D)
            z_j = load_tile(k, first + shift, r, seen, head, H, j * BD + tl.arange(0, BD), D)
            dots += dot(x_j, tl.trans(z_j))
        f = -dots * spread
        if CORRECT:
            f += load_block(d_own + here * SPAN * SPAN, r, SPAN, r, SPAN)
        store_block(d_own + here * SPAN * SPAN, f, r, SPAN, r, SPAN)
    if HALO:
        z_h = load_tile(k, first + shift - HALO, i, near, head, H, d, D)
        spread = tl.zeros([SPAN, HALO], tl.float32)
        for n in tl.range(VALUE_TILES, disable_licm=True):
            v = n * BV + tl.arange(0, BV)
            g = load_tile(dy, first, r, mine, head, H, v, V)
            e = load_block(e_halo + here * HALO * V, i, HALO, v, V)
            spread += dot(g, tl.trans(e))
        f = load_block(halo + here * SPAN * HALO, r, SPAN, i, HALO).to(tl.float32)
        d_dots = -f * spread
        found += dot(d_dots, z_h)
        left_h = dot(tl.trans(d_dots), x)
        if part == 0:
            dots = tl.zeros([SPAN, HALO], tl.float32)
            for j in tl.range(TILES, disable_licm=True):
                x_j = load_tile(q, first, r, mine, head, H, j * BD + tl.arange(0, BD), D)
                z_j = load_tile(
                    k, first + shift - HALO, i, near, head, H, j * BD + tl.arange(0, BD), D
                )
                dots += dot(x_j, tl.trans(z_j))
            f = -dots * spread
            if CORRECT:
                f += load_block(d_halo + here * SPAN * HALO, r, SPAN, i, HALO)
            store_block(d_halo + here * SPAN * HALO, f, r, SPAN, i, HALO)

    # The queries: dq = abar o dy W - carried o dy S + d_dots K.
    read = tl.zeros([SPAN, BD], tl.float32)
    a = 0.0
    for n in tl.range(VALUE_TILES, disable_licm=True):
        v = n * BV + tl.arange(0, BV)
        g = load_tile(dy, first, r, mine, head, H, v, V)
        w = load_block(starts_w + here * size, v, V, d, D)
        a += tl.sum(w * load_block(ends_w + here * size, v, V, d, D))
        read += dot(g, w)
    found += tl.load(abar + here * SPAN + r)[:, None] * read
    tl.store(d_abar + there * SPAN + r, tl.sum(read * x, 1) + tl.where(end, a, 0.0))
    if MOMENTUM:
        read = tl.zeros([SPAN, BD], tl.float32)
        c, th = 0.0, 0.0
        for n in tl.range(VALUE_TILES, disable_licm=True):
            v = n * BV + tl.arange(0, BV)
            g = load_tile(dy, first, r, mine, head, H, v, V)
            s = load_block(starts_s + here * size, v, V, d, D)
            c += tl.sum(s * load_block(ends_w + here * size, v, V, d, D))
            th += tl.sum(s * load_block(ends_s + here * size, v, V, d, D))
            read += dot(g, s)
        found -= tl.load(carried + here * SPAN + r)[:, None] * read
        tl.store(d_carried + there * SPAN + r, -tl.sum(read * x, 1) - tl.where(end, c, 0.0))
        tl.store(d_thbar + there, th)
    store_tile(dq, found, first, r, mine, head, H, d, D)

    # The keys: dk = dL M^(0) - write o L dW' + last o L dS' + d_dots^T Q; the halo's likewise.
    wrote = tl.zeros([SPAN, BD], tl.float32)
    for n in tl.range(VALUE_TILES, disable_licm=True):
        v = n * BV + tl.arange(0, BV)
        e = load_block(e_own + here * SPAN * V, r, SPAN, v, V)
        wrote += dot(e, load_block(ends_w + here * size, v, V, d, D))
    left -= tl.load(write_own + here * SPAN + r)[:, None] * wrote
    tl.store(d_write_own + there * SPAN + r, -tl.sum(wrote * z, 1))
    if MOMENTUM:
        wrote = tl.zeros([SPAN, BD], tl.float32)
        for n in tl.range(VALUE_TILES, disable_licm=True):
            v = n * BV + tl.arange(0, BV)
            e = load_block(e_own + here * SPAN * V, r, SPAN, v, V)
            wrote += dot(e, load_block(ends_s + here * size, v, V, d, D))
        left += tl.load(last_own + here * SPAN + r)[:, None] * wrote
        tl.store(d_last_own + there * SPAN + r, tl.sum(wrote * z, 1))
    if L2:
        wrote = tl.zeros([SPAN, BD], tl.float32)
        for n in tl.range(VALUE_TILES, disable_licm=True):
            v = n * BV + tl.arange(0, BV)
            w = load_block(starts_w + here * size, v, V, d, D)
            wrote += dot(load_block(dl_own + here * SPAN * V, r, SPAN, v, V), w)
        if CORRECT:
            tl.store(d_faded + there * SPAN + r, tl.sum(wrote * z, 1))
            wrote *= before(abar + here * SPAN, r, 1.0)[:, None]
        left += wrote
    if CORRECT:
        if MOMENTUM:
            wrote = tl.zeros([SPAN, BD], tl.float32)
            for n in tl.range(VALUE_TILES, disable_licm=True):
                v = n * BV + tl.arange(0, BV)
                s = load_block(starts_s + here * size, v, V, d, D)
                wrote += dot(load_block(dl_own + here * SPAN * V, r, SPAN, v, V), s)
            tl.store(d_fallen + there * SPAN + r, -tl.sum(wrote * z, 1))
            left -= before(carried + here * SPAN, r, 0.0)[:, None] * wrote
        KEYS: tl.constexpr = SPAN + HALO
        left += dot(tl.load(solved_block(slope, here, HALO + r, HALO + r, KEYS)), z)
        if HALO:
            f = tl.load(solved_block(slope, here, HALO + r, i, KEYS))
            left += dot(f, z_h)
            left_h += dot(tl.trans(f), z)
            left_h += dot(tl.load(solved_block(slope, here, i, i, KEYS)), z_h)
    store_tile(dk, left, first + shift, r, seen, head, H, d, D)
    if HALO:
        wrote = tl.zeros([HALO, BD], tl.float32)
        for n in tl.range(VALUE_TILES, disable_licm=True):
            v = n * BV + tl.arange(0, BV)
            e = load_block(e_halo + here * HALO * V, i, HALO, v, V)
            wrote += dot(e, load_block(ends_w + here * size, v, V, d, D))
        left_h -= tl.load(write_halo + here * HALO + i)[:, None] * wrote
        tl.store(d_write_halo + there * HALO + i, -tl.sum(wrote * z_h, 1))
        if MOMENTUM:
            wrote = tl.zeros([HALO, BD], tl.float32)
            for n in tl.range(VALUE_TILES, disable_licm=True):
                v = n * BV + tl.arange(0, BV)
                e = load_block(e_halo + here * HALO * V, i, HALO, v, V)
                wrote += dot(e, load_block(ends_s + here * size, v, V, d, D))
            left_h += tl.load(last_halo + here * HALO + i)[:, None] * wrote
            tl.store(d_last_halo + there * HALO + i, tl.sum(wrote * z_h, 1))
        if L2:
            for n in tl.range(VALUE_TILES, disable_licm=True):
                v = n * BV + tl.arange(0, BV)
                w = load_block(starts_w + here * size, v, V, d, D)
                dl = load_block(dl_halo + here * HALO * V, i, HALO, v, V)
                left_h += dot(dl, w)
        store_block(dk_halo + here * HALO * D, left_h, i, HALO, d, D)


def walk_backward_tiles(d: int, v: int) -> Tiles:
    if chip() >= 90:
        return walk_tiles(d, v, resident=64, streamed=64)
    return walk_tiles(d, v, resident=32, streamed=16)


def gradient_tiles(d: int, v: int, spans: Spans, wide: bool) -> Tiles:
    if chip() < 90 or d % 16:
        return Tiles.of(d, v, 16 if spans.halo or d % 16 else 32, 32)
    return Tiles.of(d, v, 32 if wide else 64, 32)


class Gradients(NamedTuple):
    """What `backward` finds."""

    q: Tensor
    k: Tensor
    target: Tensor
    coefficients: Coefficients
    pend: Tensor | None
    w: Tensor  # at the first chunk's start
    s: Tensor | None


def backward(
    dy: Tensor,
    dw: Tensor,
    ds: Tensor | None,
    last: tuple[Tensor, Tensor | None] | None,
    q: Tensor,
    k: Tensor,
    target: Tensor,
    pend: Tensor | None,
    found: Coefficients,
    solved: Tensor | None,
    starts_w: Tensor,
    starts_s: Tensor | None,
    at: Layout,
    spans: Spans,
    *,
    l2: bool,
) -> Gradients:
    """From the gradients of y, of W and S at the end, and of them at the last chunk's start (last,
    if it has any); pend: as the system was made of."""
    heads, d = q.shape[-2:]
    v = target.shape[-1]
    shape = (heads, d, v, spans.history)
    slots = (at.count, heads)
    e_own = q.new_empty(*slots, spans.span, v, dtype=torch.float32)
    e_halo = q.new_empty(*slots, spans.halo, v, dtype=torch.float32)
    dl_own, dl_halo = torch.empty_like(e_own), torch.empty_like(e_halo)
    settings = chunk_settings(spans)
    kinds = {"L2": l2, "MOMENTUM": ds is not None, "CORRECT": solved is not None}
    wide = is_wide(spans, solved)
    t = read_tiles(d, v, wide)
    launch(
        _left_backward, (at.count * heads, t.value_count),
        q, k, target, dy, at.slots, solved, found.own, found.halo, found.abar, found.carried,
        starts_w, starts_s, e_own, e_halo, dl_own, dl_halo, *shape,
        **settings, **kinds, **t.settings(state_warps(q.dtype)),
    )  # fmt: skip
    t, warps = walk_backward_tiles(d, v), state_warps(q.dtype, solved)
    ends_w, dw_start = torch.empty_like(starts_w), torch.empty_like(dw)
    ends_s = ds_start = None
    if starts_s is not None and ds is not None:
        ends_s, ds_start = torch.empty_like(starts_s), torch.empty_like(ds)
    launch(
        _walk_backward, (at.batch * heads, t.value_count),
        q, k, dy, at.slots, at.rows, solved,
        found.write_own, found.write_halo, found.last_own, found.last_halo,
        found.abar, found.carried, found.thbar,
        dl_own, dl_halo, dw, ds, *(last or (None, None)), ends_w, ends_s, dw_start, ds_start,
        *shape, **settings, **kinds, **t.settings(warps, solved is not None), LAST=last is not None,
    )  # fmt: skip
    t = gradient_tiles(d, v, spans, wide)
    gradient = coefficients.empty(at, heads, spans, parts=t.count)
    system = slope = faded = fallen = None
    if solved is not None:
        errors = (e_own, e_halo, dl_own, dl_halo)
        system = online.backward(k, pend, found, errors, gradient, at, spans)
        slope = system.slope
        faded, fallen = torch.empty_like(gradient.abar), torch.empty_like(gradient.abar)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dk_halo = q.new_empty(*slots, spans.halo, d, dtype=torch.float32)
    launch(
        _gradients, (at.count * heads, t.count),
        q, k, dy, at.slots, found.own, found.halo, found.abar, found.carried,
        found.write_own, found.write_halo, found.last_own, found.last_halo,
        starts_w, starts_s, ends_w, ends_s, e_own, e_halo, dl_own, dl_halo, slope,
        dq, dk, dk_halo, *gradient, faded, fallen, at.count, *shape,
        **settings, **kinds, **t.settings(), VALUE_TILES=t.value_count,
    )  # fmt: skip
    dv = torch.empty_like(target)
    fold(dl_own, dl_halo, dv, at, spans, sign=-1.0)
    if spans.halo or spans.history:
        fold(dk, dk_halo, dk, at, spans, stream=True)
    gradient, d_pend = coefficients.summed(gradient), None
    if system is not None:
        assert faded is not None
        assert fallen is not None
        gradient.abar[..., :-1] += faded.sum(0)[..., 1:]
        if ds is not None:
            gradient.carried[..., :-1] += fallen.sum(0)[..., 1:]
        if pend is not None:
            d_pend = torch.empty_like(pend)
            assert system.pend_own is not None
            assert system.pend_halo is not None
            fold(system.pend_own, system.pend_halo, d_pend, at, spans)
    return Gradients(dq, dk, dv, gradient, d_pend, dw_start, ds_start)
