"""What the memory at a chunk's start makes of its keys (see forward.py).

How many tiles a loop has is no constant where it would be unrolled, which takes registers.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.deep.online import features_of
from atlas_blocks.kernels.deep.rooms import place, project, room, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block


@triton.jit
def _hidden(
    x, target, w1, w2, w3, z, u, h, e, r,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """z, u, h and e at M^(0)."""
    v = tl.arange(0, BV)
    error = -load_block(target, r, KEYS, v, V).to(tl.float32)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        z_ = project(x, w2, r, KEYS, j, HIDDEN, D, BD, TILES)
        store_block(z, z_, r, KEYS, j, HIDDEN)
        some = gelu(z_)
        if GATED:
            u_ = project(x, w3, r, KEYS, j, HIDDEN, D, BD, TILES)
            store_block(u, u_, r, KEYS, j, HIDDEN)
            some *= u_
        store_block(h, some, r, KEYS, j, HIDDEN)
        if L2:
            error += dot(some, tl.trans(load_block(w1, v, V, j, HIDDEN)))
    store_block(e, error, r, KEYS, v, V)


@triton.jit
def _read_along(
    x, w1, s1, s2, s3, z, u, h, a2, a3, along, r,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr,
    KEYS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The derivative along S of what M^(0) reads; with KEEP a2 = X S2^T and a3 = X S3^T are
    stored."""
    v = tl.arange(0, BV)
    found = tl.zeros([r.shape[0], BV], tl.float32)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        some = project(x, s2, r, KEYS, j, HIDDEN, D, BD, TILES)
        if KEEP:
            store_block(a2, some, r, KEYS, j, HIDDEN)
        z_ = load_block(z, r, KEYS, j, HIDDEN)
        some *= gelu_slope(z_)
        if GATED:
            more = project(x, s3, r, KEYS, j, HIDDEN, D, BD, TILES)
            if KEEP:
                store_block(a3, more, r, KEYS, j, HIDDEN)
            some = some * load_block(u, r, KEYS, j, HIDDEN) + more * gelu(z_)
        found += dot(some, tl.trans(load_block(w1, v, V, j, HIDDEN)))
        some = load_block(h, r, KEYS, j, HIDDEN)
        found += dot(some, tl.trans(load_block(s1, v, V, j, HIDDEN)))
    store_block(along, found, r, SPAN, v, V)


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "TILES"])
def keys_forward(
    x, target, rows, w1, w2, w3, s1, s2, s3, rooms, bare, along, features,
    START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    L2: tl.constexpr, LIMIT: tl.constexpr, CORRECT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Some keys: z, u, h and the errors at M^(0); with LIMIT their features; with CORRECT what is
    read along S."""
    line, n, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, here = place(rows, START, OFFSET + n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, size1, size2 = mine.to(tl.int64), V * HIDDEN, HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, e, keys = room(rooms, 2, mine, LINES, ROOM), bare + key * KEYS * V, x + key * KEYS * D
    at_1, r = w1 + here * size1, i * BK + tl.arange(0, BK)
    _hidden(
        keys, target + key * KEYS * V, at_1, w2 + here * size2, w3 + here * size2, z, u, h, e, r,
        D, V, HIDDEN, KEYS, BD, BV, BH, TILES, BLOCKS, L2, GATED,
    )  # fmt: skip
    if LIMIT:
        tl.debug_barrier()
        features_of(
            keys, e, at_1, z, u, features + key * 8 * KEYS, r,
            D, V, HIDDEN, KEYS, BD, BV, BH, TILES, BLOCKS, GATED,
        )  # fmt: skip
    if CORRECT and MOMENTUM and i * BK < SPAN:
        a2, a3 = z, u
        if KEEP:
            a2, a3 = two_rooms(rooms, 12, mine, LINES, ROOM)
        _read_along(
            keys, at_1, s1 + here * size1, s2 + here * size2, s3 + here * size2, z, u, h, a2, a3,
            along + key * SPAN * V, r,
            D, V, HIDDEN, SPAN, KEYS, BD, BV, BH, TILES, BLOCKS, GATED, KEEP,
        )  # fmt: skip
