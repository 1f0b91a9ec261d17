"""Deep memories with U = identity, forward: the walk over the chunks, and the reads.

    z = X W2^T   u = X W3^T   h = gelu(z)  or  gelu(z) o u
    e = h W1^T - v ("l2"),  -v ("dot")      b = e W1
    factors (L, R):  W1 (e, h)   W2 (p2, x), p2 = gelu'(z) o b [o u]   W3 (p3, x), p3 = gelu(z) o b
    W' = a W - c S - (write o L)^T R        S' = th S + (last o L)^T R
    reads:  W_t x_t = abar W x - carried S x - sum_i F[t, i] (R_i . x_t) L_i, of W2 and W3, then W1

A program has one head of one row. It goes over tiles of keys, of hidden units and of D, and from
one stage to the next through memory of its own (`Rooms`): no stage holds more than a few tiles.
Chunks are taken a few at a time (`GROUP`), so that this memory stays small.

keys: a chunk's own tokens and then those of the halo, KEYS in all. Tensors named here are cut by
`cutter.cut`: [slots, H, SPAN or KEYS, ...].
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels.coefficients import Coefficients
from atlas_blocks.kernels.deep.call import GROUP, Call, Group, Rooms, groups, joined, three
from atlas_blocks.kernels.deep.cutter import cut, put
from atlas_blocks.kernels.deep.discount import bound_of, strengths_of, tangents
from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.tiles import (
    Layout,
    chip,
    dot,
    launch,
    load_block,
    store_block,
)


@triton.jit
def project(
    x, w, r, ROWS, j, HIDDEN, D, BD: tl.constexpr, TILES
):  # fmt: skip
    """x W^T for some rows of x [ROWS, D] and some hidden units of W [HIDDEN, D]."""
    found = tl.zeros([r.shape[0], j.shape[0]], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        d = i * BD + tl.arange(0, BD)
        found += dot(load_block(x, r, ROWS, d, D), tl.trans(load_block(w, j, HIDDEN, d, D)))
    return found


@triton.jit
def room(rooms, index: tl.constexpr, line, LINES, size: tl.constexpr):
    """The memory of one name, of one program."""
    return rooms + (index * LINES + line).to(tl.int64) * size


@triton.jit
def two_rooms(rooms, index: tl.constexpr, line, LINES, size: tl.constexpr):
    """Those of one name and of the next."""
    return room(rooms, index, line, LINES, size), room(rooms, index + 1, line, LINES, size)


@triton.jit
def keys_hidden(
    x, target, w1, w2, w3, z, u, e,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """z, u and e of all keys."""
    v = tl.arange(0, BV)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        error = -load_block(target, r, KEYS, v, V).to(tl.float32)
        for m in tl.range(BLOCKS, disable_licm=True):
            j = m * BH + tl.arange(0, BH)
            z_ = project(x, w2, r, KEYS, j, HIDDEN, D, BD, TILES)
            store_block(z, z_, r, KEYS, j, HIDDEN)
            h = gelu(z_)
            if GATED:
                u_ = project(x, w3, r, KEYS, j, HIDDEN, D, BD, TILES)
                store_block(u, u_, r, KEYS, j, HIDDEN)
                h *= u_
            if L2:
                error += dot(h, tl.trans(load_block(w1, v, V, j, HIDDEN)))
        store_block(e, error, r, KEYS, v, V)


@triton.jit
def factors(
    w1, z, u, e, h, p2, p3,
    V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """h, p2 and p3 of all keys."""
    v = tl.arange(0, BV)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        for m in tl.range(BLOCKS, disable_licm=True):
            j = m * BH + tl.arange(0, BH)
            back = dot(load_block(e, r, KEYS, v, V), load_block(w1, v, V, j, HIDDEN))
            z_ = load_block(z, r, KEYS, j, HIDDEN)
            h_, left = gelu(z_), back * gelu_slope(z_)
            if GATED:
                u_ = load_block(u, r, KEYS, j, HIDDEN)
                store_block(p3, h_ * back, r, KEYS, j, HIDDEN)
                h_, left = h_ * u_, left * u_
            store_block(h, h_, r, KEYS, j, HIDDEN)
            store_block(p2, left, r, KEYS, j, HIDDEN)


@triton.jit
def _write(
    w, s, to_w, to_s, left, right, write, last, a, c, th, row, ROWS, column, COLUMNS,
    KEYS: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """W' and S' of one weight, one block of it."""
    x = a * load_block(w, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        y = load_block(s, row, ROWS, column, COLUMNS)
        x -= c * y
        y *= th
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        rights = load_block(right, r, KEYS, column, COLUMNS)
        lefts = load_block(left, r, KEYS, row, ROWS).to(tl.float32)
        x -= dot(tl.trans(lefts * tl.load(write + r)[:, None]), rights)
        if MOMENTUM:
            y += dot(tl.trans(lefts * tl.load(last + r)[:, None]), rights)
    store_block(to_w, x, row, ROWS, column, COLUMNS)
    if MOMENTUM:
        store_block(to_s, y, row, ROWS, column, COLUMNS)


@triton.jit(do_not_specialize=["START", "PER_ROW", "LINES", "TILES"])
def _walk_forward(
    x, target, tokens, key_tokens, filled, rows, alpha, eta, theta, gamma, mass,
    window, thbar, write, last, ends, m1, m2, m3, w1, w2, w3, s1, s2, s3,
    end_w1, end_w2, end_w3, end_s1, end_s2, end_s3,
    rooms, errors, features, grams, strengths, scales, end_scale,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, BEGUN: tl.constexpr, DISCOUNT: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """A group's chunks one after the other, from START on: the key factors, the strengths and, with
    WALK, the weights after each. Without it every chunk's weights are there, and has its program.

    w, s: at the chunks' starts, [B, PER_ROW, H, ...]; ends: a, c, th of a chunk.
    """
    program = tl.program_id(0)
    if WALK:
        row, head, at = program // H, program % H, 0
    else:
        row, head, at = program // (GROUP * H), program % H, program // H % GROUP
    line = (row * H + head).to(tl.int64)
    count = tl.load(rows + row * 2 + 1)
    size1, size2 = V * HIDDEN, HIDDEN * D
    v, t = tl.arange(0, BV), tl.arange(0, SPAN)
    steps = tl.minimum(count - START - at, GROUP if WALK else 1)
    for n in tl.range(steps, disable_licm=True):
        place = row * GROUP + at + n  # of the chunk in the group
        slot = row * PER_ROW + START + at + n
        mine = place * H + head
        here = (slot * H + head).to(tl.int64)
        key = mine.to(tl.int64)
        from_1, from_2, from_3 = w1 + here * size1, w2 + here * size2, w3 + here * size2
        at_1, at_2, at_3 = from_1, from_2, from_3
        if BEGUN and (START + at + n == 0) & (tl.load(tokens + place * SPAN) < 0):
            # M^(0) of a chunk that an earlier call began is not the W it starts with here.
            at_1, at_2, at_3 = m1 + line * size1, m2 + line * size2, m3 + line * size2
        ROOM: tl.constexpr = KEYS * HIDDEN
        z, u = two_rooms(rooms, 0, mine, LINES, ROOM)
        h, p2 = two_rooms(rooms, 2, mine, LINES, ROOM)
        p3 = room(rooms, 4, mine, LINES, ROOM)
        e, keys = errors + key * KEYS * V, x + key * KEYS * D
        write_, last_, ends_ = write + key * KEYS, last + key * KEYS, ends + key * 3
        # What the last chunk stored is what this one loads.
        tl.debug_barrier()
        keys_hidden(
            keys, target + key * KEYS * V, at_1, at_2, at_3, z, u, e,
            D, V, HIDDEN, KEYS, BK, BD, BV, BH, TILES, BLOCKS, L2, GATED,
        )  # fmt: skip
        tl.debug_barrier()
        if DISCOUNT:
            if WALK:
                now = tl.load(end_scale + line)
                tl.store(scales + here, now)
            else:
                now = tl.load(scales + here)
            bound = bound_of(at_1, grams + key * V * V, V, HIDDEN, BV, BH, BLOCKS)
            tangents(
                keys, e, z, u, bound, features + key * 13 * KEYS,
                D, V, HIDDEN, KEYS, BK, BD, BV, BH, TILES, BLOCKS, GATED,
            )  # fmt: skip
            tl.debug_barrier()
            strength, now = strengths_of(
                keys, z, u, features + key * 13 * KEYS, tokens + place * SPAN,
                key_tokens + place * KEYS, tl.load(filled + place), eta, theta, gamma, mass, now,
                head, H, D, HIDDEN, WINDOW, SPAN, HALO, KEYS, BK, BD, BH, TILES, BLOCKS, GATED,
                MOMENTUM,
            )  # fmt: skip
            token = tl.load(tokens + place * SPAN + t)
            tl.store(strengths + token.to(tl.int64) * H + head, strength, mask=token >= 0)
            if WALK:
                tl.store(end_scale + line, now)
                # Loaded again, as what comes of a product fails to compile for sm_100 here.
                tl.debug_barrier()
                strength = tl.load(
                    strengths + token.to(tl.int64) * H + head, mask=token >= 0, other=0.0
                )
                after = tl.load(tokens + place * SPAN + t + 1, mask=t + 1 < SPAN, other=-1)
                after = tl.load(alpha + after.to(tl.int64) * H + head, mask=after >= 0, other=1.0)
                after = tl.cumprod(after, axis=0, reverse=True)
                step = strength * after
                a = tl.load(alpha + token.to(tl.int64) * H + head, mask=token >= 0, other=1.0)
                tl.store(ends_, tl.sum(tl.where(t == 0, a * after, 0.0), 0))
                if MOMENTUM:
                    run = tl.load(thbar + key * SPAN + t)
                    tl.store(ends_ + 1, tl.sum(step * run, 0))
                for i in tl.range(KEYS // BK, disable_licm=True):
                    r = i * BK + tl.arange(0, BK)
                    c = load_block(window + key * SPAN * KEYS, t, SPAN, r, KEYS)
                    tl.store(write_ + r, tl.sum(step[:, None] * c, 0))
        factors(at_1, z, u, e, h, p2, p3, V, HIDDEN, KEYS, BK, BV, BH, BLOCKS, GATED)
        if WALK:
            past_1, past_2, past_3 = s1 + here * size1, s2 + here * size2, s3 + here * size2
            next = here + H
            to_1, to_2, to_3 = w1 + next * size1, w2 + next * size2, w3 + next * size2
            to_s1, to_s2, to_s3 = s1 + next * size1, s2 + next * size2, s3 + next * size2
            if START + n + 1 == count:
                to_1, to_2 = end_w1 + line * size1, end_w2 + line * size2
                to_3 = end_w3 + line * size2
                to_s1, to_s2 = end_s1 + line * size1, end_s2 + line * size2
                to_s3 = end_s3 + line * size2
            tl.debug_barrier()
            a, c, th = tl.load(ends_), tl.load(ends_ + 1), tl.load(ends_ + 2)
            for m in tl.range(BLOCKS, disable_licm=True):
                j = m * BH + tl.arange(0, BH)
                _write(
                    from_1, past_1, to_1, to_s1, e, h, write_, last_, a, c, th, v, V, j, HIDDEN,
                    KEYS, BK, MOMENTUM,
                )  # fmt: skip
                for i in tl.range(TILES, disable_licm=True):
                    d = i * BD + tl.arange(0, BD)
                    _write(
                        from_2, past_2, to_2, to_s2, p2, keys, write_, last_, a, c, th,
                        j, HIDDEN, d, D, KEYS, BK, MOMENTUM,
                    )  # fmt: skip
                    if GATED:
                        _write(
                            from_3, past_3, to_3, to_s3, p3, keys, write_, last_, a, c, th,
                            j, HIDDEN, d, D, KEYS, BK, MOMENTUM,
                        )  # fmt: skip


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
    q, w, s, left, scores, abar, carried, t, j,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """W_t q_t of W_2 or W_3, some hidden units."""
    found = tl.load(abar + t)[:, None] * project(q, w, t, SPAN, j, HIDDEN, D, BD, TILES)
    if MOMENTUM:
        found -= tl.load(carried + t)[:, None] * project(q, s, t, SPAN, j, HIDDEN, D, BD, TILES)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        found -= dot(load_block(scores, t, SPAN, r, KEYS), load_block(left, r, KEYS, j, HIDDEN))
    return found


@triton.jit
def read_hidden(
    q, w2, w3, s2, s3, p2, p3, scores, abar, carried, z, u,
    D: tl.constexpr, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """z_t = W2_t q_t and u_t = W3_t q_t."""
    t = tl.arange(0, SPAN)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        found = _read_one(
            q, w2, s2, p2, scores, abar, carried, t, j, D, HIDDEN, SPAN, KEYS, BK, BD, TILES,
            MOMENTUM,
        )  # fmt: skip
        store_block(z, found, t, SPAN, j, HIDDEN)
        if GATED:
            found = _read_one(
                q, w3, s3, p3, scores, abar, carried, t, j, D, HIDDEN, SPAN, KEYS, BK, BD, TILES,
                MOMENTUM,
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
def _read_forward(
    q, x, f, abar, carried, rows, w1, w2, w3, s1, s2, s3, rooms, errors, scores, y,
    START, PER_ROW, LINES, H: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
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
        at_q, w2 + here * size2, w3 + here * size2, s2 + here * size2, s3 + here * size2, p2, p3,
        scores, abar, carried, z, u, D, HIDDEN, SPAN, KEYS, BK, BD, BH, TILES, BLOCKS, GATED,
        MOMENTUM,
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


def walk(
    call: Call,
    group: Group,
    rooms: Rooms,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    end_w: list[Tensor],
    end_s: list[Tensor],
    strengths: Tensor,
    scales: Tensor,
    end_scale: Tensor,
    *,
    forward: bool,
) -> Coefficients:
    """The key factors of a group, into its rooms, and its write strengths; `forward`: with them the
    weights after each chunk, else all weights must be there. Returns the coefficients."""
    at, spans, cutter = call.at, call.spans, group.cutter
    heads, d, v, hidden = call.shape
    discount = call.mass is not None
    found = call.window(group) if discount else call.coefficients(group, call.eta)
    write = joined(found.write_own, found.write_halo)
    last = joined(found.last_own, found.last_halo)
    ends = torch.stack([found.abar[..., -1], found.carried[..., -1], found.thbar], -1)
    window = joined(found.own, found.halo)
    programs = at.batch * heads * (1 if forward else GROUP)
    # Without a gate, and where tiles do not go through registers, larger ones take fewer of them.
    widest = 64 if chip() >= 90 and len(call.w) == 2 and hidden > 64 else 32
    widest = 16 if chip() < 90 and v > 64 else widest
    settings = call.settings(widest)
    launch(
        _walk_forward, (programs,),
        cut(call.k, cutter.keys), cut(call.target, cutter.keys), cutter.tokens, cutter.keys,
        cutter.filled, at.rows, call.alpha, call.eta, call.theta, call.gamma, call.mass,
        window, found.carried, write, last, ends, *three(call.m, starts_w),
        *three(starts_w, starts_w), *three(starts_s, starts_w), *three(end_w, starts_w),
        *three(end_s, starts_w), rooms.hidden, rooms.errors, rooms.features, rooms.grams,
        strengths, scales, end_scale, group.start, at.per_row, at.batch * GROUP * heads,
        heads, d, v, hidden, **settings, WINDOW=spans.window, HALO=spans.halo, L2=call.l2,
        BEGUN=bool(call.m), DISCOUNT=discount, WALK=forward,
    )  # fmt: skip
    return call.coefficients(group, strengths) if discount else found


class Result(NamedTuple):
    """y without the residual; W, S and scale [R, H] at the end, and all three at the chunks' starts
    [slots, H, ...]."""

    y: Tensor
    w: list[Tensor]
    s: list[Tensor]
    scale: Tensor
    starts_w: list[Tensor]
    starts_s: list[Tensor]
    scales: Tensor


def forward(call: Call, scale: Tensor) -> Result:
    """All chunks of a call."""
    at, spans = call.at, call.spans
    heads, d, v, hidden = call.shape
    starts_w, starts_s = ([_starts(x, at) for x in part] for part in (call.w, call.s))
    end_w, end_s = ([x.clone() for x in part] for part in (call.w, call.s))
    scales, end_scale = scale.new_zeros(at.count, heads), scale.clone()
    strengths = torch.empty_like(call.eta)
    y = call.eta.new_zeros(*call.q.shape[:-1], v)
    rooms = Rooms.of(5, at, spans, call.w)
    lines = at.batch * GROUP * heads
    for group in groups(at, spans):
        found = walk(
            call, group, rooms, starts_w, starts_s, end_w, end_s, strengths, scales, end_scale,
            forward=True,
        )  # fmt: skip
        f = joined(found.own, found.halo)
        part = y.new_zeros(group.at.count, heads, spans.span, v)
        launch(
            _read_forward, (lines,),
            cut(call.q, group.cutter.tokens), cut(call.k, group.cutter.keys), f, found.abar,
            found.carried, at.rows, *three(starts_w, starts_w), *three(starts_s, starts_w),
            rooms.hidden, rooms.errors, torch.empty_like(f), part, group.start, at.per_row, lines,
            heads, d, v, hidden, **call.settings(),
        )  # fmt: skip
        put(y, part, group.cutter.tokens)
    return Result(y, end_w, end_s, end_scale, starts_w, starts_s, scales)


def _starts(x: Tensor, at: Layout) -> Tensor:
    """Room for a weight [B, H, ...] at every chunk's start [slots, H, ...], the first filled in."""
    found = x.new_zeros(at.batch, at.per_row, *x.shape[1:])
    found[:, 0] = x
    return found.flatten(0, 1)
