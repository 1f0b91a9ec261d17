"""The gradients of the reads, all chunks of a group at once (see backward.py)."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.deep.reads import hidden_of, read_hidden, weighed_scores
from atlas_blocks.kernels.deep.rooms import place, project, room, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES"])
def scores_backward(
    q, x, dy, f, abar, carried, rows, w2, w3, s2, s3, a2, a3, rooms, errors, scores, spread, de, df,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """F o Q, z_t and u_t again; F o G, de, and the part of dF that comes from W_1."""
    line, n = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, size = mine.to(tl.int64), HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    h, p2 = two_rooms(rooms, 2, mine, LINES, ROOM)
    p3 = room(rooms, 4, mine, LINES, ROOM)
    z_t, u_t = two_rooms(rooms, 8, mine, LINES, ROOM)
    at_q, at_dy, e = q + key * SPAN * D, dy + key * SPAN * V, errors + key * KEYS * V
    square = key * SPAN * KEYS
    weighed_scores(
        at_q, x + key * KEYS * D, f + square, scores + square, D, SPAN, KEYS, BK, BD, TILES
    )
    tl.debug_barrier()
    read_hidden(
        at_q, w2 + here * size, w3 + here * size, s2 + here * size, s3 + here * size,
        a2 + line % H * size, a3 + line % H * size, p2, p3, scores + square, abar + key * SPAN,
        carried + key * SPAN, z_t, u_t,
        D, HIDDEN, SPAN, KEYS, BK, BD, BH, TILES, BLOCKS, GATED, MOMENTUM, ANCHOR,
    )  # fmt: skip
    tl.debug_barrier()
    t, v = tl.arange(0, SPAN), tl.arange(0, BV)
    for i in tl.range(KEYS // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        inner = tl.zeros([SPAN, BK], tl.float32)
        for m in tl.range(BLOCKS, disable_licm=True):
            j = m * BH + tl.arange(0, BH)
            h_t = hidden_of(z_t, u_t, t, SPAN, j, HIDDEN, GATED)
            inner += dot(h_t, tl.trans(load_block(h, r, KEYS, j, HIDDEN)))
        weight = load_block(f + square, t, SPAN, r, KEYS)
        found = -dot(tl.trans(inner * weight), load_block(at_dy, t, SPAN, v, V))
        store_block(de + key * KEYS * V, found, r, KEYS, v, V)
        outer = project(at_dy, e, t, SPAN, r, KEYS, V, BV, 1)
        store_block(df + square, -inner * outer, t, SPAN, r, KEYS)
        store_block(spread + square, weight * outer, t, SPAN, r, KEYS)


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES"])
def read_backward(
    dy, abar, carried, rows, w1, s1, a1, rooms, spread, d_abar, d_carried, rw1, rs1, ra1,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """Some hidden units of the reads of W_1: dz_t, du_t and dh, and what they add to dW_1, dS_1.

    Sums over the hidden units are left to the caller: d abar, d carried [BLOCKS + TILES, lines, L].
    """
    line, n, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, here = place(rows, START, n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, size = mine.to(tl.int64), V * HIDDEN
    part = (m * LINES + mine).to(tl.int64) * SPAN
    ROOM: tl.constexpr = KEYS * HIDDEN
    h, dh = room(rooms, 2, mine, LINES, ROOM), room(rooms, 5, mine, LINES, ROOM)
    z_t, u_t = two_rooms(rooms, 8, mine, LINES, ROOM)
    dz_t, du_t = two_rooms(rooms, 10, mine, LINES, ROOM)
    t, v, j = tl.arange(0, SPAN), tl.arange(0, BV), m * BH + tl.arange(0, BH)
    at_dy = dy + key * SPAN * V
    h_t = hidden_of(z_t, u_t, t, SPAN, j, HIDDEN, GATED)
    keep = tl.load(abar + key * SPAN + t)[:, None]
    found = load_block(at_dy, t, SPAN, v, V).to(tl.float32) * keep
    store_block(rw1 + key * size, dot(tl.trans(found), h_t), v, V, j, HIDDEN)
    if MOMENTUM:
        keep = tl.load(carried + key * SPAN + t)[:, None]
        found = load_block(at_dy, t, SPAN, v, V).to(tl.float32) * keep
        store_block(rs1 + key * size, -dot(tl.trans(found), h_t), v, V, j, HIDDEN)
    if ANCHOR:
        less = 1.0 - tl.load(abar + key * SPAN + t)[:, None]
        found = load_block(at_dy, t, SPAN, v, V).to(tl.float32) * less
        store_block(ra1 + key * size, dot(tl.trans(found), h_t), v, V, j, HIDDEN)
    tl.debug_barrier()
    h_t = hidden_of(z_t, u_t, t, SPAN, j, HIDDEN, GATED)
    g = load_block(at_dy, t, SPAN, v, V).to(tl.float32)
    back = dot(g, load_block(w1 + here * size, v, V, j, HIDDEN))
    found = tl.load(abar + key * SPAN + t)[:, None] * back
    if ANCHOR:
        other = dot(g, load_block(a1 + line % H * size, v, V, j, HIDDEN))
        found += (1.0 - tl.load(abar + key * SPAN + t))[:, None] * other
        back -= other
    tl.store(d_abar + part + t, tl.sum(back * h_t, 1))
    if MOMENTUM:
        back = dot(g, load_block(s1 + here * size, v, V, j, HIDDEN))
        tl.store(d_carried + part + t, -tl.sum(back * h_t, 1))
        found -= tl.load(carried + key * SPAN + t)[:, None] * back
    for i in tl.range(KEYS // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        outer = load_block(spread + key * SPAN * KEYS, t, SPAN, r, KEYS)
        found -= dot(outer, load_block(h, r, KEYS, j, HIDDEN))
        store_block(dh, -dot(tl.trans(outer), h_t), r, KEYS, j, HIDDEN)
    z = load_block(z_t, t, SPAN, j, HIDDEN)
    if GATED:
        store_block(du_t, found * gelu(z), t, SPAN, j, HIDDEN)
        found *= load_block(u_t, t, SPAN, j, HIDDEN)
    store_block(dz_t, found * gelu_slope(z), t, SPAN, j, HIDDEN)


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES"])
def left_backward(
    q, x, f, rows, rooms, scores, spread, df,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Some keys of the reads of W_2 and W_3: dp2 and dp3, F o P in place of F o G, all of dF."""
    line, n = tl.program_id(0), tl.program_id(1)
    there, mine, _ = place(rows, START, n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key = mine.to(tl.int64)
    square = key * SPAN * KEYS
    ROOM: tl.constexpr = KEYS * HIDDEN
    p2, p3 = two_rooms(rooms, 3, mine, LINES, ROOM)
    dp2, dp3 = two_rooms(rooms, 6, mine, LINES, ROOM)
    dz_t, du_t = two_rooms(rooms, 10, mine, LINES, ROOM)
    t, r = tl.arange(0, SPAN), tl.program_id(2) * BK + tl.arange(0, BK)
    inner = tl.zeros([SPAN, BK], tl.float32)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        score = load_block(scores + square, t, SPAN, r, KEYS)
        g = load_block(dz_t, t, SPAN, j, HIDDEN)
        inner += dot(g, tl.trans(load_block(p2, r, KEYS, j, HIDDEN)))
        store_block(dp2, -dot(tl.trans(score), g), r, KEYS, j, HIDDEN)
        if GATED:
            g = load_block(du_t, t, SPAN, j, HIDDEN)
            inner += dot(g, tl.trans(load_block(p3, r, KEYS, j, HIDDEN)))
            store_block(dp3, -dot(tl.trans(score), g), r, KEYS, j, HIDDEN)
    weight = load_block(f + square, t, SPAN, r, KEYS)
    store_block(spread + square, weight * inner, t, SPAN, r, KEYS)
    inner *= project(q + key * SPAN * D, x + key * KEYS * D, t, SPAN, r, KEYS, D, BD, TILES)
    inner = load_block(df + square, t, SPAN, r, KEYS) - inner
    tl.debug_barrier()
    store_block(df + square, inner, t, SPAN, r, KEYS)


@triton.jit
def _through(
    g, w, s, a, abar, carried, q, rw, rs, ra, t, d, into_w, into_s, into_a,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, BH: tl.constexpr,
    BLOCKS: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """One block of D of a read of W_2 or W_3, g its gradient: g W, g S and g A more, and what it
    adds to the gradients of W, S and A."""
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        some = load_block(g, t, SPAN, j, HIDDEN)
        x = load_block(q, t, SPAN, d, D)
        into_w += dot(some, load_block(w, j, HIDDEN, d, D))
        found = dot(tl.trans(some * tl.load(abar + t)[:, None]), x)
        store_block(rw, found, j, HIDDEN, d, D)
        if MOMENTUM:
            into_s += dot(some, load_block(s, j, HIDDEN, d, D))
            found = -dot(tl.trans(some * tl.load(carried + t)[:, None]), x)
            store_block(rs, found, j, HIDDEN, d, D)
        if ANCHOR:
            into_a += dot(some, load_block(a, j, HIDDEN, d, D))
            found = dot(tl.trans(some * (1.0 - tl.load(abar + t))[:, None]), x)
            store_block(ra, found, j, HIDDEN, d, D)
    return into_w, into_s, into_a


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES"])
def query_backward(
    q, x, abar, carried, rows, w2, w3, s2, s3, a2, a3, rooms, spread, dq, dx, d_abar, d_carried,
    rw2, rw3, rs2, rs3, ra2, ra3, START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """One block of D of the reads of W_2 and W_3: dq, dx, and what they add to dW, dS and dA."""
    line, n, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, here = place(rows, START, n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, head, size = mine.to(tl.int64), line % H, HIDDEN * D
    part = ((BLOCKS + m) * LINES + mine).to(tl.int64) * SPAN
    ROOM: tl.constexpr = KEYS * HIDDEN
    dz_t, du_t = two_rooms(rooms, 10, mine, LINES, ROOM)
    at_q = q + key * SPAN * D
    abar += key * SPAN
    carried += key * SPAN
    t, d = tl.arange(0, SPAN), m * BD + tl.arange(0, BD)
    into_w = tl.zeros([SPAN, BD], tl.float32)
    into_s, into_a = into_w, into_w
    into_w, into_s, into_a = _through(
        dz_t, w2 + here * size, s2 + here * size, a2 + head * size, abar, carried, at_q,
        rw2 + key * size, rs2 + key * size, ra2 + key * size, t, d, into_w, into_s, into_a,
        D, HIDDEN, SPAN, BH, BLOCKS, MOMENTUM, ANCHOR,
    )  # fmt: skip
    if GATED:
        into_w, into_s, into_a = _through(
            du_t, w3 + here * size, s3 + here * size, a3 + head * size, abar, carried, at_q,
            rw3 + key * size, rs3 + key * size, ra3 + key * size, t, d, into_w, into_s, into_a,
            D, HIDDEN, SPAN, BH, BLOCKS, MOMENTUM, ANCHOR,
        )  # fmt: skip
    some = load_block(at_q, t, SPAN, d, D).to(tl.float32)
    found = tl.load(abar + t)[:, None] * into_w
    if ANCHOR:
        found += (1.0 - tl.load(abar + t))[:, None] * into_a
        into_w -= into_a
    tl.store(d_abar + part + t, tl.sum(into_w * some, 1))
    if MOMENTUM:
        tl.store(d_carried + part + t, -tl.sum(into_s * some, 1))
        found -= tl.load(carried + t)[:, None] * into_s
    for i in tl.range(KEYS // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        inner = load_block(spread + key * SPAN * KEYS, t, SPAN, r, KEYS)
        found -= dot(inner, load_block(x + key * KEYS * D, r, KEYS, d, D))
        store_block(dx + key * KEYS * D, -dot(tl.trans(inner), some), r, KEYS, d, D)
    store_block(dq + key * SPAN * D, found, t, SPAN, d, D)
