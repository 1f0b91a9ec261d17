"""The gradients of the writes, of one chunk of every row (see backward.py)."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.deep.discount import (
    gradient_of_strengths,
    hidden_discounted,
    inputs_discounted,
    strength_gradient,
    units_discounted,
)
from atlas_blocks.kernels.deep.forward import project, room, two_rooms
from atlas_blocks.kernels.deep.gelu import gelu, gelu_bend, gelu_slope
from atlas_blocks.kernels.deep.reads_backward import place
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
    x, rows, tokens, write, last, m1, w1, gw1, gw2, gw3, gs1, gs2, gs3, rooms, errors, de,
    de_all, d_write, d_last, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    BEGUN: tl.constexpr,
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
    if BEGUN and _begun(tokens, mine // H, START + OFFSET, SPAN):
        weights = m1 + at * size1
    gw1, gw2, gw3 = gw1 + at * size1, gw2 + at * size2, gw3 + at * size2
    gs1, gs2, gs3 = gs1 + at * size1, gs2 + at * size2, gs3 + at * size2
    v, r = tl.arange(0, BV), i * BK + tl.arange(0, BK)
    write_r, last_r = tl.load(write + key * KEYS + r), tl.load(last + key * KEYS + r)
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
def _begun(tokens, place, n, SPAN):
    """Whether an earlier call began the chunk: then M^(0) is not the W it starts with here."""
    return (n == 0) & (tl.load(tokens + place * SPAN) < 0)


@triton.jit
def _product(w, g, row, ROWS, column, COLUMNS):
    """<W, dW'>, of one block."""
    return tl.sum(
        load_block(w, row, ROWS, column, COLUMNS) * load_block(g, row, ROWS, column, COLUMNS)
    )


@triton.jit
def _products(
    w, s, gw, gs, da, dc, dth, row, ROWS, column, COLUMNS, MOMENTUM: tl.constexpr
):  # fmt: skip
    """da, dc and dth with one more block of a weight."""
    da += _product(w, gw, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        dc -= _product(s, gw, row, ROWS, column, COLUMNS)
        dth += _product(s, gs, row, ROWS, column, COLUMNS)
    return da, dc, dth


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW"])
def ends_backward(
    rows, tokens, w1, w2, w3, s1, s2, s3, gw1, gw2, gw3, gs1, gs2, gs3, d_ends, alpha,
    window, thbar, df, d_carried, d_write, slopes, START, OFFSET, PER_ROW, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    DISCOUNT: tl.constexpr,
):  # fmt: skip
    """da, dc and dth, and the gradient of the write strengths where they are discounted."""
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
            w1 + here * size1, s1 + here * size1, gw1 + at * size1, gs1 + at * size1,
            da, dc, dth, v, V, j, HIDDEN, MOMENTUM,
        )  # fmt: skip
        for i in tl.range(TILES, disable_licm=True):
            d = i * BD + tl.arange(0, BD)
            da, dc, dth = _products(
                w2 + here * size2, s2 + here * size2, gw2 + at * size2, gs2 + at * size2,
                da, dc, dth, j, HIDDEN, d, D, MOMENTUM,
            )  # fmt: skip
            if GATED:
                da, dc, dth = _products(
                    w3 + here * size2, s3 + here * size2, gw3 + at * size2, gs3 + at * size2,
                    da, dc, dth, j, HIDDEN, d, D, MOMENTUM,
                )  # fmt: skip
    tl.store(d_ends + key * 3, da)
    tl.store(d_ends + key * 3 + 1, dc)
    tl.store(d_ends + key * 3 + 2, dth)
    if DISCOUNT:
        strength_gradient(
            df + key * SPAN * KEYS, d_write + key * KEYS, d_carried + key * SPAN, dc,
            window + key * SPAN * KEYS, thbar + key * SPAN, alpha, tokens + mine // H * SPAN,
            slopes + key * 6 * KEYS, line % H, H, SPAN, KEYS, BK, MOMENTUM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "TILES"])
def discount_backward(
    x, rows, tokens, key_tokens, filled, eta, theta, gamma, mass, scales, strengths,
    rooms, errors, features, grams, squares, slopes, de_all, d_eta, d_theta, d_mass, d_scale,
    START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    WINDOW: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """The write strengths, see discount.py. The first of slopes: the factor of W_1 W_1^T."""
    line = tl.program_id(0)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, spot = mine.to(tl.int64), mine // H
    z, u = two_rooms(rooms, 0, mine, LINES, KEYS * HIDDEN)
    before, into_gram = gradient_of_strengths(
        x + key * KEYS * D, errors + key * KEYS * V, z, u, features + key * 13 * KEYS,
        squares + key * 2 * SPAN * SPAN, slopes + key * 6 * KEYS, grams + key * V * V,
        de_all + key * KEYS * V, tokens + spot * SPAN, key_tokens + spot * KEYS,
        tl.load(filled + spot), eta, theta, gamma, mass, strengths, tl.load(scales + here),
        tl.load(d_scale + line), d_eta, d_theta, d_mass, line % H, H,
        D, V, HIDDEN, WINDOW, SPAN, HALO, KEYS, BK, BD, BV, BH, TILES, BLOCKS, GATED, MOMENTUM,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(d_scale + line, before)
    tl.store(slopes + key * 6 * KEYS, into_gram)


@triton.jit
def _advance(
    gw, gs, rw, rs, gm, start, dm, a, c, th, begun, last, row, ROWS, column, COLUMNS,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """dW and dS from dW' and dS', with dM^(0): W's own, unless an earlier call began the chunk.

    gm: the gradient of the state's chunk_start, M^(0) of an unfinished last chunk.
    """
    if last:
        dm += load_block(gm, row, ROWS, column, COLUMNS)
    g = load_block(gw, row, ROWS, column, COLUMNS)
    found = a * g + load_block(rw, row, ROWS, column, COLUMNS)
    if begun:
        store_block(start, dm, row, ROWS, column, COLUMNS)
    else:
        found += dm
    if MOMENTUM:
        s = th * load_block(gs, row, ROWS, column, COLUMNS) - c * g
        s += load_block(rs, row, ROWS, column, COLUMNS)
        tl.debug_barrier()
        store_block(gs, s, row, ROWS, column, COLUMNS)
    else:
        tl.debug_barrier()
    store_block(gw, found, row, ROWS, column, COLUMNS)


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def outer_backward(
    rows, tokens, ends, m1, w1, rooms, errors, features, grams, squares, slopes, de_all,
    gw1, gs1, gm1, dm1, rw1, rs1, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    L2: tl.constexpr, BEGUN: tl.constexpr, DISCOUNT: tl.constexpr,
):  # fmt: skip
    """Some hidden units: dz and du, and W_1."""
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
    at_slopes, at_squares = slopes + key * 6 * KEYS, squares + key * 2 * SPAN * SPAN
    begun, weights = _begun(tokens, mine // H, START + OFFSET, SPAN), w1 + here * size
    if BEGUN and begun:
        weights = m1 + at * size
    v, j = tl.arange(0, BV), m * BH + tl.arange(0, BH)
    dm = tl.zeros([BV, BH], tl.float32)
    for i in tl.range(KEYS // BK, disable_licm=True):
        r = i * BK + tl.arange(0, BK)
        error = load_block(errors + key * KEYS * V, r, KEYS, v, V)
        weight = load_block(weights, v, V, j, HIDDEN)
        dm += dot(tl.trans(error), _slope(z, u, dp2, dp3, r, KEYS, j, HIDDEN, GATED))
        b = dot(error, weight)
        found = load_block(dh, r, KEYS, j, HIDDEN)
        if L2:
            error = load_block(de_all + key * KEYS * V, r, KEYS, v, V)
            dm += dot(tl.trans(error), load_block(h, r, KEYS, j, HIDDEN))
            found += dot(error, weight)
        if DISCOUNT:
            found += hidden_discounted(h, at_squares, at_slopes, i, j, HIDDEN, SPAN, KEYS, BK)
        z_ = load_block(z, r, KEYS, j, HIDDEN)
        into_z = load_block(dp2, r, KEYS, j, HIDDEN) * b
        if GATED:
            u_ = load_block(u, r, KEYS, j, HIDDEN)
            into_u = into_z * gelu_slope(z_) + found * gelu(z_)
            into_z = into_z * u_ * gelu_bend(z_) + found * u_ * gelu_slope(z_)
            into_z += load_block(dp3, r, KEYS, j, HIDDEN) * b * gelu_slope(z_)
            if DISCOUNT:
                more_z, more_u = units_discounted(
                    z_, u_, features + key * 13 * KEYS, at_slopes, r, j, KEYS
                )
                into_z += more_z
                into_u += more_u
            store_block(du, into_u, r, KEYS, j, HIDDEN)
        else:
            into_z = into_z * gelu_bend(z_) + found * gelu_slope(z_)
        store_block(dz, into_z, r, KEYS, j, HIDDEN)
    if DISCOUNT:
        gram = load_block(grams + key * V * V, v, V, v, V)
        dm += tl.load(at_slopes) * dot(gram, load_block(weights, v, V, j, HIDDEN))
    ends += key * 3
    _advance(
        gw1 + at * size, gs1 + at * size, rw1 + key * size, rs1 + key * size, gm1 + at * size,
        dm1 + at * size, dm, tl.load(ends), tl.load(ends + 1), tl.load(ends + 2), begun,
        tl.load(rows + line // H * 2 + 1) == START + OFFSET + 1, v, V, j, HIDDEN, MOMENTUM,
    )  # fmt: skip


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


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def key_backward(
    x, rows, tokens, write, last, m2, m3, w2, w3, gw2, gw3, gs2, gs3, rooms, squares, slopes,
    dx, dx_all, START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
    BEGUN: tl.constexpr, DISCOUNT: tl.constexpr,
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
    at_2, at_3 = w2 + here * size, w3 + here * size
    if BEGUN and _begun(tokens, mine // H, START + OFFSET, SPAN):
        at_2, at_3 = m2 + at * size, m3 + at * size
    d, r = m * BD + tl.arange(0, BD), i * BK + tl.arange(0, BK)
    write_r, last_r = tl.load(write + key * KEYS + r), tl.load(last + key * KEYS + r)
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
    if DISCOUNT:
        found += inputs_discounted(
            x + key * KEYS * D, squares + key * 2 * SPAN * SPAN, slopes + key * 6 * KEYS, i, d, D,
            SPAN, KEYS, BK,
        )  # fmt: skip
    store_block(dx_all + key * KEYS * D, found, r, KEYS, d, D)


@triton.jit
def _inner(
    x, into, gw, gs, rw, rs, gm, start, a, c, th, begun, last, j, d,
    D: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """One block of W_2 or W_3; into: dz or du."""
    dm = tl.zeros([BH, BD], tl.float32)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        some = load_block(x, r, KEYS, d, D)
        dm += dot(tl.trans(load_block(into, r, KEYS, j, HIDDEN)), some)
    _advance(
        gw, gs, rw, rs, gm, start, dm, a, c, th, begun, last, j, HIDDEN, d, D, MOMENTUM
    )  # fmt: skip


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def inner_backward(
    x, rows, tokens, ends, rooms, gw2, gw3, gs2, gs3, gm2, gm3, dm2, dm3, rw2, rw3, rs2, rs3,
    START, OFFSET, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """One block of W_2 and of W_3."""
    line, m, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    there, mine, _ = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, at, size = mine.to(tl.int64), line.to(tl.int64), HIDDEN * D
    ROOM: tl.constexpr = KEYS * HIDDEN
    dz, du = two_rooms(rooms, 5, mine, LINES, ROOM)
    begun = _begun(tokens, mine // H, START + OFFSET, SPAN)
    last = tl.load(rows + line // H * 2 + 1) == START + OFFSET + 1
    ends += key * 3
    a, c, th = tl.load(ends), tl.load(ends + 1), tl.load(ends + 2)
    j, d = m * BH + tl.arange(0, BH), i * BD + tl.arange(0, BD)
    _inner(
        x + key * KEYS * D, dz, gw2 + at * size, gs2 + at * size, rw2 + key * size,
        rs2 + key * size, gm2 + at * size, dm2 + at * size, a, c, th, begun, last, j, d,
        D, HIDDEN, KEYS, BK, BD, BH, MOMENTUM,
    )  # fmt: skip
    if GATED:
        _inner(
            x + key * KEYS * D, du, gw3 + at * size, gs3 + at * size, rw3 + key * size,
            rs3 + key * size, gm3 + at * size, dm3 + at * size, a, c, th, begun, last, j, d,
            D, HIDDEN, KEYS, BK, BD, BH, MOMENTUM,
        )  # fmt: skip
