"""The reads of a group's chunks, all at once (see forward.py)."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.gelu import gelu
from atlas_blocks.kernels.deep.rooms import project, room, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block


@triton.jit
def weighed_scores(
    q, x, f, scores,
    D: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """F o Q X^T."""
    t = tl.arange(0, SPAN)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        found = project(q, x, t, SPAN, r, KEYS, D, BD, TILES)
        found *= load_block(f, t, SPAN, r, KEYS)
        store_block(scores, found, t, SPAN, r, KEYS)


@triton.jit
def _read_one(
    q, w, s, a, left, scores, abar, carried, t, j,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """W_t q_t of W_2 or W_3, some hidden units."""
    found = tl.load(abar + t)[:, None] * project(q, w, t, SPAN, j, HIDDEN, D, BD, TILES)
    if MOMENTUM:
        found -= tl.load(carried + t)[:, None] * project(q, s, t, SPAN, j, HIDDEN, D, BD, TILES)
    if ANCHOR:
        less = 1.0 - tl.load(abar + t)
        found += less[:, None] * project(q, a, t, SPAN, j, HIDDEN, D, BD, TILES)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        found -= dot(load_block(scores, t, SPAN, r, KEYS), load_block(left, r, KEYS, j, HIDDEN))
    return found


@triton.jit
def read_hidden(
    q, w2, w3, s2, s3, a2, a3, p2, p3, scores, abar, carried, z, u,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """z_t = W2_t q_t and u_t = W3_t q_t."""
    t = tl.arange(0, SPAN)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        found = _read_one(
            q, w2, s2, a2, p2, scores, abar, carried, t, j, D, HIDDEN, SPAN, KEYS, BK, BD, TILES,
            MOMENTUM, ANCHOR,
        )  # fmt: skip
        store_block(z, found, t, SPAN, j, HIDDEN)
        if GATED:
            found = _read_one(
                q, w3, s3, a3, p3, scores, abar, carried, t, j, D, HIDDEN, SPAN, KEYS, BK, BD,
                TILES, MOMENTUM, ANCHOR,
            )  # fmt: skip
            store_block(u, found, t, SPAN, j, HIDDEN)


@triton.jit
def hidden_of(z, u, r, ROWS, j, HIDDEN, GATED: tl.constexpr):
    """h from z and u."""
    h = gelu(load_block(z, r, ROWS, j, HIDDEN))
    if GATED:
        h *= load_block(u, r, ROWS, j, HIDDEN)
    return h


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES"])
def read_forward(
    q, x, f, abar, carried, rows, w1, w2, w3, s1, s2, s3, a1, a2, a3, rooms, errors, scores, y,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """y_t = M_t(q_t) without the residual, for the chunks of a group all at once."""
    mine = tl.program_id(0)
    place, head = mine // H, mine % H
    row, n = place // GROUP, START + place % GROUP
    if n >= tl.load(rows + row * 2 + 1):
        return
    here, key = ((row * PER_ROW + n) * H + head).to(tl.int64), mine.to(tl.int64)
    size1, size2 = V * HIDDEN, HIDDEN * D
    at_q, at_x, e = q + key * SPAN * D, x + key * KEYS * D, errors + key * KEYS * V
    # The keys' z and u, which room 0 and 1 hold, are not needed any more.
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, p2 = two_rooms(rooms, 2, mine, LINES, ROOM)
    p3 = room(rooms, 4, mine, LINES, ROOM)
    scores += key * SPAN * KEYS
    f += key * SPAN * KEYS
    abar += key * SPAN
    carried += key * SPAN
    weighed_scores(at_q, at_x, f, scores, D, SPAN, KEYS, BK, BD, TILES)
    tl.debug_barrier()
    read_hidden(
        at_q, w2 + here * size2, w3 + here * size2, s2 + here * size2, s3 + here * size2,
        a2 + head * size2, a3 + head * size2, p2, p3, scores, abar, carried, z, u,
        D, HIDDEN, SPAN, KEYS, BK, BD, BH, TILES, BLOCKS, GATED, MOMENTUM, ANCHOR,
    )  # fmt: skip
    tl.debug_barrier()
    t, v = tl.arange(0, SPAN), tl.arange(0, BV)
    found = tl.zeros([SPAN, BV], tl.float32)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        h_t = hidden_of(z, u, t, SPAN, j, HIDDEN, GATED)
        w = load_block(w1 + here * size1, v, V, j, HIDDEN)
        found += dot(h_t * tl.load(abar + t)[:, None], tl.trans(w))
        if MOMENTUM:
            s = load_block(s1 + here * size1, v, V, j, HIDDEN)
            found -= dot(h_t * tl.load(carried + t)[:, None], tl.trans(s))
        if ANCHOR:
            w = load_block(a1 + head * size1, v, V, j, HIDDEN)
            found += dot(h_t * (1.0 - tl.load(abar + t))[:, None], tl.trans(w))
    for i in tl.range(KEYS // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        inner = tl.zeros([SPAN, BK], tl.float32)
        for m in tl.range(BLOCKS, disable_licm=True):
            j = m * BH + tl.arange(0, BH)
            h_t = hidden_of(z, u, t, SPAN, j, HIDDEN, GATED)
            inner += dot(h_t, tl.trans(load_block(h, r, KEYS, j, HIDDEN)))
        inner *= load_block(f, t, SPAN, r, KEYS)
        found -= dot(inner, load_block(e, r, KEYS, v, V))
    store_block(y + key * SPAN * V, found, t, SPAN, v, V)
