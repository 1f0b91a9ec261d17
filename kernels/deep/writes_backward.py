"""The gradients of the writes, of one chunk of every row (see backward.py)."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.gelu import gelu, gelu_bend, gelu_slope
from atlas_blocks.kernels.deep.online import inner
from atlas_blocks.kernels.deep.online_backward import lefts_backward
from atlas_blocks.kernels.deep.rooms import place, project, room, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block


@triton.jit
def _slope(z, u, dp2, dp3, r, KEYS, j, HIDDEN, GATED: tl.constexpr):
    """db."""
    z_ = load_block(z, r, KEYS, j, HIDDEN)
    found = load_block(dp2, r, KEYS, j, HIDDEN) * gelu_slope(z_)
    if GATED:
        found *= load_block(u, r, KEYS, j, HIDDEN)
        found += load_block(dp3, r, KEYS, j, HIDDEN) * gelu(z_)
    return found


@triton.jit
def load_ends(f, last, key, r, SPAN, KEYS):
    """The last rows of F and C, of some keys."""
    write = tl.load(f + key * SPAN * KEYS + (SPAN - 1) * KEYS + r)
    return write, tl.load(last + key * KEYS + r)


@triton.jit
def _left_written(
    x, gw, gs, left, from_, to, write, last, of_write, of_last, r, j, D, HIDDEN,
    KEYS: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The whole gradient of a left factor of W_2 or W_3, and more of those of write and last."""
    some = load_block(left, r, KEYS, j, HIDDEN)
    found = project(x, gw, r, KEYS, j, HIDDEN, D, BD, TILES)
    of_write -= tl.sum(found * some, 1)
    total = load_block(from_, r, KEYS, j, HIDDEN) - write[:, None] * found
    if MOMENTUM:
        found = project(x, gs, r, KEYS, j, HIDDEN, D, BD, TILES)
        of_last += tl.sum(found * some, 1)
        total += last[:, None] * found
    store_block(to, total, r, KEYS, j, HIDDEN)
    return of_write, of_last


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def factors_backward(
    x, rows, f, last, w1, gw1, gw2, gw3, gs1, gs2, gs3, rooms, errors, de,
    de_all, d_write, d_last, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Some keys: dh, dp2, dp3 and de with the writes' part, d write and d last."""
    line, i = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size1, size2 = mine.to(tl.int64), line.to(tl.int64), V * HIDDEN, HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, p2 = two_rooms(rooms, 2, mine, LINES, ROOM)
    p3, dh = two_rooms(rooms, 4, mine, LINES, ROOM)
    dp2, dp3 = two_rooms(rooms, 6, mine, LINES, ROOM)
    dh_all, dp2_all = two_rooms(rooms, 8, mine, LINES, ROOM)
    dp3_all = room(rooms, 10, mine, LINES, ROOM)
    weights = w1 + here * size1
    gw1, gw2, gw3 = gw1 + at * size1, gw2 + at * size2, gw3 + at * size2
    gs1, gs2, gs3 = gs1 + at * size1, gs2 + at * size2, gs3 + at * size2
    v, r = tl.arange(0, BV), i * BK + tl.arange(0, BK)
    write_r, last_r = load_ends(f, last, key, r, SPAN, KEYS)
    of_write = tl.zeros([BK], tl.float32)
    of_last = of_write
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        h_ = load_block(h, r, KEYS, j, HIDDEN)
        error = load_block(errors + key * KEYS * V, r, KEYS, v, V)
        through = dot(error, load_block(gw1, v, V, j, HIDDEN))
        of_write -= tl.sum(through * h_, 1)
        total = load_block(dh, r, KEYS, j, HIDDEN) - write_r[:, None] * through
        if MOMENTUM:
            through = dot(error, load_block(gs1, v, V, j, HIDDEN))
            of_last += tl.sum(through * h_, 1)
            total += last_r[:, None] * through
        store_block(dh_all, total, r, KEYS, j, HIDDEN)
        of_write, of_last = _left_written(
            x + key * KEYS * D, gw2, gs2, p2, dp2, dp2_all, write_r, last_r, of_write, of_last,
            r, j, D, HIDDEN, KEYS, BD, TILES, MOMENTUM,
        )  # fmt: skip
        if GATED:
            of_write, of_last = _left_written(
                x + key * KEYS * D, gw3, gs3, p3, dp3, dp3_all, write_r, last_r, of_write, of_last,
                r, j, D, HIDDEN, KEYS, BD, TILES, MOMENTUM,
            )  # fmt: skip
    tl.debug_barrier()
    found = load_block(de + key * KEYS * V, r, KEYS, v, V)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        h_ = load_block(h, r, KEYS, j, HIDDEN)
        found -= dot(h_ * write_r[:, None], tl.trans(load_block(gw1, v, V, j, HIDDEN)))
        if MOMENTUM:
            found += dot(h_ * last_r[:, None], tl.trans(load_block(gs1, v, V, j, HIDDEN)))
        slope = _slope(z, u, dp2_all, dp3_all, r, KEYS, j, HIDDEN, GATED)
        found += dot(slope, tl.trans(load_block(weights, v, V, j, HIDDEN)))
    store_block(de_all + key * KEYS * V, found, r, KEYS, v, V)
    tl.store(d_write + key * KEYS + r, of_write)
    if MOMENTUM:
        tl.store(d_last + key * KEYS + r, of_last)


@triton.jit
def _product(w, g, row, ROWS, column, COLUMNS):
    """<W, dW'>, of one block."""
    return tl.sum(
        load_block(w, row, ROWS, column, COLUMNS) * load_block(g, row, ROWS, column, COLUMNS)
    )


@triton.jit
def _products(
    w, s, a, gw, gs, da, dc, dth, row, ROWS, column, COLUMNS,
    MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """da, dc and dth with one more block of a weight."""
    da += _product(w, gw, row, ROWS, column, COLUMNS)
    if ANCHOR:
        da -= _product(a, gw, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        dc -= _product(s, gw, row, ROWS, column, COLUMNS)
        dth += _product(s, gs, row, ROWS, column, COLUMNS)
    return da, dc, dth


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW"])
def ends_backward(
    rows, w1, w2, w3, s1, s2, s3, a1, a2, a3, gw1, gw2, gw3, gs1, gs2, gs3, d_ends,
    START, OFFSET, PER_ROW, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip
    """da, dc and dth."""
    line = tl.program_id(0)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    at, key, size1, size2 = line.to(tl.int64), mine.to(tl.int64), V * HIDDEN, HIDDEN * D
    da, dc, dth = 0.0, 0.0, 0.0
    v = tl.arange(0, BV)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        da, dc, dth = _products(
            w1 + here * size1, s1 + here * size1, a1 + line % H * size1, gw1 + at * size1,
            gs1 + at * size1, da, dc, dth, v, V, j, HIDDEN, MOMENTUM, ANCHOR,
        )  # fmt: skip
        for i in tl.range(TILES, disable_licm=True):
            d = i * BD + tl.arange(0, BD)
            da, dc, dth = _products(
                w2 + here * size2, s2 + here * size2, a2 + line % H * size2, gw2 + at * size2,
                gs2 + at * size2, da, dc, dth, j, HIDDEN, d, D, MOMENTUM, ANCHOR,
            )  # fmt: skip
            if GATED:
                da, dc, dth = _products(
                    w3 + here * size2, s3 + here * size2, a3 + line % H * size2, gw3 + at * size2,
                    gs3 + at * size2, da, dc, dth, j, HIDDEN, d, D, MOMENTUM, ANCHOR,
                )  # fmt: skip
    tl.store(d_ends + key * 3, da)
    tl.store(d_ends + key * 3 + 1, dc)
    tl.store(d_ends + key * 3 + 2, dth)


@triton.jit
def _advance(
    gw, gs, ga, rw, rs, ra, gm, gn, dm, ds, a, c, th, last, row, ROWS, column, COLUMNS,
    MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """dW and dS from dW' and dS', and dA with a chunk more; dm, ds: what W and S get at its start.

    gm, gn: the gradients of the state's chunk_start and momentum_start, W and S at the start of an
    unfinished last chunk.
    """
    g = load_block(gw, row, ROWS, column, COLUMNS)
    found = a * g + load_block(rw, row, ROWS, column, COLUMNS) + dm
    if last:
        found += load_block(gm, row, ROWS, column, COLUMNS)
    if ANCHOR:
        more = (1.0 - a) * g + load_block(ra, row, ROWS, column, COLUMNS)
        _add_block(ga, more, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        s = th * load_block(gs, row, ROWS, column, COLUMNS) - c * g
        s += load_block(rs, row, ROWS, column, COLUMNS) + ds
        if last:
            s += load_block(gn, row, ROWS, column, COLUMNS)
        tl.debug_barrier()
        store_block(gs, s, row, ROWS, column, COLUMNS)
    else:
        tl.debug_barrier()
    store_block(gw, found, row, ROWS, column, COLUMNS)


@triton.jit
def _add_block(x, value, row, ROWS, column, COLUMNS):
    found = load_block(x, row, ROWS, column, COLUMNS) + value
    tl.debug_barrier()
    store_block(x, found, row, ROWS, column, COLUMNS)


@triton.jit
def _related(pairs, h, r, j, PARTS, HIDDEN, KEYS: tl.constexpr, BK: tl.constexpr):
    """What kappa adds to dh of one tile of keys; pairs: d kappa."""
    found = tl.zeros([BK, j.shape[0]], tl.float32)
    for n in tl.range(PARTS, disable_licm=True):
        s = n * BK + tl.arange(0, BK)
        found += dot(load_block(pairs, r, KEYS, s, KEYS), load_block(h, s, KEYS, j, HIDDEN))
    return found


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "PARTS"])
def outer_backward(
    rows, ends, w1, rooms, errors, bare, of_read, pairs, slopes,
    gw1, gs1, ga1, gm1, gn1, rw1, rs1, ra1,
    START, OFFSET, PER_ROW, LINES, PARTS, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    L2: tl.constexpr, LIMIT: tl.constexpr, CORRECT: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """Some hidden units: dz and du, and W_1. of_read: the gradient of what M^(0) reads."""
    line, m = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size = mine.to(tl.int64), line.to(tl.int64), V * HIDDEN
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, dz = room(rooms, 2, mine, LINES, ROOM), room(rooms, 5, mine, LINES, ROOM)
    du, dh = room(rooms, 6, mine, LINES, ROOM), room(rooms, 8, mine, LINES, ROOM)
    dp2, dp3 = two_rooms(rooms, 9, mine, LINES, ROOM)
    weights, slopes = w1 + here * size, slopes + key * 6 * KEYS
    v, j = tl.arange(0, BV), m * BH + tl.arange(0, BH)
    dm = tl.zeros([BV, BH], tl.float32)
    for i in tl.range(PARTS, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        error = load_block(errors + key * KEYS * V, r, KEYS, v, V)
        weight = load_block(weights, v, V, j, HIDDEN)
        dm += dot(tl.trans(error), _slope(z, u, dp2, dp3, r, KEYS, j, HIDDEN, GATED))
        b = dot(error, weight)
        found = load_block(dh, r, KEYS, j, HIDDEN)
        if L2:
            error = load_block(of_read + key * KEYS * V, r, KEYS, v, V)
            dm += dot(tl.trans(error), load_block(h, r, KEYS, j, HIDDEN))
            found += dot(error, weight)
        if LIMIT:
            more = tl.load(slopes + KEYS + r)
            found += 2.0 * more[:, None] * load_block(h, r, KEYS, j, HIDDEN)
            error = load_block(bare + key * KEYS * V, r, KEYS, v, V)
            back = dot(error, weight)
            of_2, of_3, more = lefts_backward(
                z, u, back, tl.load(slopes + 2 * KEYS + r), tl.load(slopes + 3 * KEYS + r),
                r, KEYS, j, HIDDEN, GATED,
            )  # fmt: skip
            dm += dot(tl.trans(error), more)
            of_2 *= back
            of_3 *= back
        if CORRECT:
            found += _related(pairs + key * KEYS * KEYS, h, r, j, PARTS, HIDDEN, KEYS, BK)
        z_ = load_block(z, r, KEYS, j, HIDDEN)
        into_z = load_block(dp2, r, KEYS, j, HIDDEN) * b
        if LIMIT:
            into_z += of_2
        if GATED:
            u_ = load_block(u, r, KEYS, j, HIDDEN)
            into_u = into_z * gelu_slope(z_) + found * gelu(z_)
            into_z = into_z * u_ * gelu_bend(z_) + found * u_ * gelu_slope(z_)
            more = load_block(dp3, r, KEYS, j, HIDDEN) * b
            if LIMIT:
                more += of_3
            into_z += more * gelu_slope(z_)
            store_block(du, into_u, r, KEYS, j, HIDDEN)
        else:
            into_z = into_z * gelu_bend(z_) + found * gelu_slope(z_)
        store_block(dz, into_z, r, KEYS, j, HIDDEN)
    ends += key * 3
    _advance(
        gw1 + at * size, gs1 + at * size, ga1 + at * size, rw1 + key * size, rs1 + key * size,
        ra1 + key * size, gm1 + at * size, gn1 + at * size, dm, 0.0, tl.load(ends),
        tl.load(ends + 1), tl.load(ends + 2),
        tl.load(rows + line // H * 2 + 1) == START + OFFSET + 1, v, V, j, HIDDEN, MOMENTUM, ANCHOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def along_backward(
    rows, w1, s1, rooms, of_along, gw1, gs1, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    V: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Some hidden units: what the derivative along S adds to dz, du, dW_1 and dS_1; d(X S2^T) and
    d(X S3^T) in their places."""
    line, m = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size = mine.to(tl.int64), line.to(tl.int64), V * HIDDEN
    ROOM: tl.constexpr = KEYS * HIDDEN
    z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
    h, dz = room(rooms, 2, mine, LINES, ROOM), room(rooms, 5, mine, LINES, ROOM)
    du = room(rooms, 6, mine, LINES, ROOM)
    a2, a3 = two_rooms(rooms, 12, mine, LINES, ROOM)
    v, j = tl.arange(0, BV), m * BH + tl.arange(0, BH)
    dm = tl.zeros([BV, BH], tl.float32)
    ds = tl.zeros([BV, BH], tl.float32)
    for i in tl.range(SPAN // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        g = load_block(of_along + key * SPAN * V, r, SPAN, v, V)
        ds += dot(tl.trans(g), load_block(h, r, KEYS, j, HIDDEN))
        dh = dot(g, load_block(s1 + here * size, v, V, j, HIDDEN))
        back = dot(g, load_block(w1 + here * size, v, V, j, HIDDEN))
        z_, some = load_block(z, r, KEYS, j, HIDDEN), load_block(a2, r, KEYS, j, HIDDEN)
        slope = gelu_slope(z_)
        if GATED:
            u_, more = load_block(u, r, KEYS, j, HIDDEN), load_block(a3, r, KEYS, j, HIDDEN)
            value = gelu(z_)
            dm += dot(tl.trans(g), slope * u_ * some + value * more)
            into_z = dh * slope * u_ + back * (gelu_bend(z_) * u_ * some + slope * more)
            _add_block(du, dh * value + back * slope * some, r, KEYS, j, HIDDEN)
            store_block(a2, back * slope * u_, r, KEYS, j, HIDDEN)
            store_block(a3, back * value, r, KEYS, j, HIDDEN)
        else:
            dm += dot(tl.trans(g), slope * some)
            into_z = dh * slope + back * gelu_bend(z_) * some
            tl.debug_barrier()
            store_block(a2, back * slope, r, KEYS, j, HIDDEN)
        _add_block(dz, into_z, r, KEYS, j, HIDDEN)
    _add_block(gw1 + at * size, dm, v, V, j, HIDDEN)
    _add_block(gs1 + at * size, ds, v, V, j, HIDDEN)


@triton.jit
def _right(
    found, into, w, left, gw, gs, write, last, r, j, d, HIDDEN, D,
    KEYS: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """dx with what some hidden units of W_2 or W_3 add: from the gradient of what the keys make of
    them, and from the writes."""
    found += dot(load_block(into, r, KEYS, j, HIDDEN), load_block(w, j, HIDDEN, d, D))
    some = load_block(left, r, KEYS, j, HIDDEN)
    found -= dot(some * write[:, None], load_block(gw, j, HIDDEN, d, D))
    if MOMENTUM:
        found += dot(some * last[:, None], load_block(gs, j, HIDDEN, d, D))
    return found


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "BLOCKS"])
def key_backward(
    x, rows, f, last, w2, w3, s2, s3, gw2, gw3, gs2, gs3, rooms, features, pairs, slopes,
    dx, dx_all, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    LIMIT: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """One block of D and some keys: dx with the writes' part."""
    line, m, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size = mine.to(tl.int64), line.to(tl.int64), HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    p2, p3 = two_rooms(rooms, 3, mine, LINES, ROOM)
    dz, du = two_rooms(rooms, 5, mine, LINES, ROOM)
    at_2, at_3, keys = w2 + here * size, w3 + here * size, x + key * KEYS * D
    d, r = m * BD + tl.arange(0, BD), i * BK + tl.arange(0, BK)
    write_r, last_r = load_ends(f, last, key, r, SPAN, KEYS)
    found = load_block(dx + key * KEYS * D, r, KEYS, d, D)
    for n in tl.range(BLOCKS, disable_licm=True):
        j = n * BH + tl.arange(0, BH)
        found = _right(
            found, dz, at_2, p2, gw2 + at * size, gs2 + at * size, write_r, last_r, r, j, d,
            HIDDEN, D, KEYS, MOMENTUM,
        )  # fmt: skip
        if GATED:
            found = _right(
                found, du, at_3, p3, gw3 + at * size, gs3 + at * size, write_r, last_r, r, j, d,
                HIDDEN, D, KEYS, MOMENTUM,
            )  # fmt: skip
    if LIMIT:
        more = tl.load(slopes + key * 6 * KEYS + 4 * KEYS + r)
        found += 2.0 * more[:, None] * load_block(keys, r, KEYS, d, D).to(tl.float32)
    if CORRECT:
        for n in tl.range(KEYS // BK, disable_licm=True):
            s = n * BK + tl.arange(0, BK)
            some = load_block(pairs + key * KEYS * KEYS, r, KEYS, s, KEYS)
            some *= inner(features + key * 8 * KEYS, r, s, KEYS)
            found += dot(some, load_block(keys, s, KEYS, d, D))
        if MOMENTUM:
            a2, a3 = two_rooms(rooms, 12, mine, LINES, ROOM)
            for n in tl.range(tl.where(i * BK < SPAN, BLOCKS, 0), disable_licm=True):
                j = n * BH + tl.arange(0, BH)
                weight = load_block(s2 + here * size, j, HIDDEN, d, D)
                found += dot(load_block(a2, r, KEYS, j, HIDDEN), weight)
                if GATED:
                    weight = load_block(s3 + here * size, j, HIDDEN, d, D)
                    found += dot(load_block(a3, r, KEYS, j, HIDDEN), weight)
    store_block(dx_all + key * KEYS * D, found, r, KEYS, d, D)


@triton.jit
def _outer(
    x, left, j, d, D: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """left^T X of the first ROWS keys, one block."""
    found = tl.zeros([j.shape[0], d.shape[0]], tl.float32)
    for n in tl.range(ROWS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        some = load_block(x, r, KEYS, d, D)
        found += dot(tl.trans(load_block(left, r, KEYS, j, HIDDEN)), some)
    return found


@triton.jit
def _inner(
    x, into, along, gw, gs, ga, rw, rs, ra, gm, gn, a, c, th, last, j, d,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """One block of W_2 or W_3; into: dz or du; along: d(X S2^T) or d(X S3^T)."""
    dm, ds = _outer(x, into, j, d, D, HIDDEN, KEYS, KEYS, BK), 0.0
    if CORRECT and MOMENTUM:
        ds = _outer(x, along, j, d, D, HIDDEN, SPAN, KEYS, BK)
    _advance(
        gw, gs, ga, rw, rs, ra, gm, gn, dm, ds, a, c, th, last, j, HIDDEN, d, D, MOMENTUM, ANCHOR
    )  # fmt: skip


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def inner_backward(
    x, rows, ends, rooms, gw2, gw3, gs2, gs3, ga2, ga3, gm2, gm3, gn2, gn3,
    rw2, rw3, rs2, rs3, ra2, ra3,
    START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    CORRECT: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """One block of W_2 and of W_3."""
    line, m, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, _ = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size = mine.to(tl.int64), line.to(tl.int64), HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    dz, du = two_rooms(rooms, 5, mine, LINES, ROOM)
    a2, a3 = dz, du
    if CORRECT and MOMENTUM:
        a2, a3 = two_rooms(rooms, 12, mine, LINES, ROOM)
    last = tl.load(rows + line // H * 2 + 1) == START + OFFSET + 1
    ends += key * 3
    a, c, th = tl.load(ends), tl.load(ends + 1), tl.load(ends + 2)
    j, d = m * BH + tl.arange(0, BH), i * BD + tl.arange(0, BD)
    _inner(
        x + key * KEYS * D, dz, a2, gw2 + at * size, gs2 + at * size, ga2 + at * size,
        rw2 + key * size, rs2 + key * size, ra2 + key * size, gm2 + at * size,
        gn2 + at * size, a, c, th, last, j, d,
        D, HIDDEN, SPAN, KEYS, BK, MOMENTUM, CORRECT, ANCHOR,
    )  # fmt: skip
    if GATED:
        _inner(
            x + key * KEYS * D, du, a3, gw3 + at * size, gs3 + at * size, ga3 + at * size,
            rw3 + key * size, rs3 + key * size, ra3 + key * size, gm3 + at * size,
            gn3 + at * size, a, c, th, last, j, d,
            D, HIDDEN, SPAN, KEYS, BK, MOMENTUM, CORRECT, ANCHOR,
        )  # fmt: skip
