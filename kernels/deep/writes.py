"""The gradient factors of a chunk, and what they write (see forward.py)."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.deep.rooms import place, room, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block


@triton.jit
def _factors(
    w1, z, u, e, p2, p3, j, PARTS,
    V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """p2 and p3 of all keys, of some hidden units."""
    v = tl.arange(0, BV)
    for n in tl.range(PARTS, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        back = dot(load_block(e, r, KEYS, v, V), load_block(w1, v, V, j, HIDDEN))
        z_ = load_block(z, r, KEYS, j, HIDDEN)
        left = back * gelu_slope(z_)
        if GATED:
            store_block(p3, gelu(z_) * back, r, KEYS, j, HIDDEN)
            left *= load_block(u, r, KEYS, j, HIDDEN)
        store_block(p2, left, r, KEYS, j, HIDDEN)


@triton.jit
def _write(
    w, s, anchor, to_w, to_s, left, right, write, last, a, c, th, row, ROWS, column, COLUMNS,
    PARTS, KEYS: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """W' and S' of one weight, one block of it."""
    x = a * load_block(w, row, ROWS, column, COLUMNS)
    if ANCHOR:
        x += (1.0 - a) * load_block(anchor, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        y = load_block(s, row, ROWS, column, COLUMNS)
        x -= c * y
        y *= th
    for n in tl.range(PARTS, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        rights = load_block(right, r, KEYS, column, COLUMNS)
        lefts = load_block(left, r, KEYS, row, ROWS).to(tl.float32)
        x -= dot(tl.trans(lefts * tl.load(write + r)[:, None]), rights)
        if MOMENTUM:
            y += dot(tl.trans(lefts * tl.load(last + r)[:, None]), rights)
    store_block(to_w, x, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        store_block(to_s, y, row, ROWS, column, COLUMNS)


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "TILES", "PARTS"])
def writes_forward(
    x, rows, f, abar, carried, last, thbar, w1, w2, w3, s1, s2, s3, a1, a2, a3,
    end_w1, end_w2, end_w3, end_s1, end_s2, end_s3, rooms, errors,
    START, OFFSET, PER_ROW, LINES, PARTS, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Some hidden units: p2 and p3, and with WALK the weights at the next chunk's start, or at the
    end. PARTS: tiles of keys."""
    line, n, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, here = place(rows, START, OFFSET + n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, size1, size2 = mine.to(tl.int64), V * HIDDEN, HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, p2 = two_rooms(rooms, 2, mine, LINES, ROOM)
    p3, e, keys = room(rooms, 4, mine, LINES, ROOM), errors + key * KEYS * V, x + key * KEYS * D
    v, j = tl.arange(0, BV), m * BH + tl.arange(0, BH)
    at_1 = w1 + here * size1
    _factors(at_1, z, u, e, p2, p3, j, PARTS, V, HIDDEN, KEYS, BK, BV, GATED)
    if WALK:
        tl.debug_barrier()
        head, next, end = line % H, here + H, line.to(tl.int64)
        last_one = tl.load(rows + line // H * 2 + 1) == START + OFFSET + n + 1
        write, last_ = f + (key * SPAN + SPAN - 1) * KEYS, last + key * KEYS
        a, c, th = tl.load(abar + key * SPAN + SPAN - 1), 0.0, 0.0
        if MOMENTUM:
            c, th = tl.load(carried + key * SPAN + SPAN - 1), tl.load(thbar + key)
        to_w, to_s = w1 + next * size1, s1 + next * size1
        if last_one:
            to_w, to_s = end_w1 + end * size1, end_s1 + end * size1
        _write(
            at_1, s1 + here * size1, a1 + head * size1, to_w, to_s, e, h, write, last_, a, c, th,
            v, V, j, HIDDEN, PARTS, KEYS, BK, MOMENTUM, ANCHOR,
        )  # fmt: skip
        for i in tl.range(TILES, disable_licm=True):
            d = i * BD + tl.arange(0, BD)
            to_w, to_s = w2 + next * size2, s2 + next * size2
            if last_one:
                to_w, to_s = end_w2 + end * size2, end_s2 + end * size2
            _write(
                w2 + here * size2, s2 + here * size2, a2 + head * size2, to_w, to_s, p2, keys,
                write, last_, a, c, th, j, HIDDEN, d, D, PARTS, KEYS, BK, MOMENTUM, ANCHOR,
            )  # fmt: skip
            if GATED:
                to_w, to_s = w3 + next * size2, s3 + next * size2
                if last_one:
                    to_w, to_s = end_w3 + end * size2, end_s3 + end * size2
                _write(
                    w3 + here * size2, s3 + here * size2, a3 + head * size2, to_w, to_s, p3, keys,
                    write, last_, a, c, th, j, HIDDEN, d, D, PARTS, KEYS, BK, MOMENTUM, ANCHOR,
                )  # fmt: skip
