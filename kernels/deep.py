"""Deep memories with U = identity: the walk over the chunks' ends, and the reads.

    z = K W2^T   u = K W3^T   h = gelu(z)  or  gelu(z) o u       M(k) = h W1^T
    e = M^(0)(k) - v ("l2"),  -v ("dot")      b = e W1
    factors (L, R):  W1 (e, h)    W2 (gelu'(z) o b [o u], k)    W3 (gelu(z) o b, k)

Nothing of a chunk but its weights leaves a program: both kernels go over blocks of hidden units
twice, first for e, then with it. The walk also finds the discounted write strengths, which need
M^(0): `coefficients.forward` gives it C, with alpha = 0 and eta = 1, and the reads F, once all
strengths are known.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.functional.memories import BOUND_FLOOR, SECOND_FLOOR, THIRD_FLOOR
from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.coefficients import Spans, band, decay
from atlas_blocks.kernels.tiles import (
    Layout,
    ceil_div,
    chunk_tokens,
    dot,
    fits,
    inside,
    launch,
    load_block,
    load_gate,
    load_tile,
    padded,
    store_block,
    store_tile,
)

_BOUND = tl.constexpr(BOUND_FLOOR)
_SECOND = tl.constexpr(SECOND_FLOOR)
_THIRD = tl.constexpr(THIRD_FLOOR)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    return (
        0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    )


@triton.jit
def _through(
    x, w, start, row, some, head, H, D, j, HIDDEN,
    BH: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x W^T [ROWS, BH] for the hidden units j: x a stream [tokens, H, D], W [HIDDEN, D]."""
    found = tl.zeros([ROWS, BH], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        d = i * BD + tl.arange(0, BD)
        tile = load_tile(x, start, row, some, head, H, d, D)
        found += dot(tile, tl.trans(load_block(w, j, HIDDEN, d, D)))
    return found


@triton.jit
def _errors(
    k, target, w1, w2, w3, start, i, seen, head, H, D, V, HIDDEN, v,
    ROWS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """e of some keys [ROWS, BV]."""
    e = -load_tile(target, start, i, seen, head, H, v, V).to(tl.float32)
    if L2:
        for n in tl.range(BLOCKS, disable_licm=True):
            j = n * BH + tl.arange(0, BH)
            h = gelu(_through(k, w2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS))
            if GATED:
                h *= _through(k, w3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS)
            e += dot(h, tl.trans(load_block(w1, v, V, j, HIDDEN)))
    return e


@triton.jit
def _again(x, row, ROWS, column, COLUMNS):
    """A block as `load_block` loads it, but now: kept from one block of hidden units to the next,
    with the layouts that products want of it, it would take all registers."""
    at = x + row[:, None] * COLUMNS + column[None, :]
    if fits(ROWS, row.shape[0]) and fits(COLUMNS, column.shape[0]):
        return tl.load(at, volatile=True)
    else:
        return tl.load(at, mask=inside(row, ROWS, column, COLUMNS), other=0.0, volatile=True)


@triton.jit
def _factors(
    k, e, w1, w2, w3, start, i, seen, head, H, D, V, HIDDEN, v, j,
    ROWS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """h, and the left factors of W_2 and W_3, for some keys, whose errors lie at e, and one block
    of hidden units."""
    z = _through(k, w2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS)
    back = dot(_again(e, i, ROWS, v, V), load_block(w1, v, V, j, HIDDEN))
    h, p2, p3 = gelu(z), back * gelu_slope(z), back
    if GATED:
        u = _through(k, w3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS)
        p3, p2, h = h * back, p2 * u, h * u
    return h, p2, p3


@triton.jit
def _norm_bound(w1, V, HIDDEN, v, BV: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr):
    """sqrt ||W_1 W_1^T||_F, a bound on the spectral norm of W_1."""
    gram = tl.zeros([BV, BV], tl.float32)
    for n in tl.range(BLOCKS, disable_licm=True):
        w = load_block(w1, v, V, n * BH + tl.arange(0, BH), HIDDEN)
        gram += dot(w, tl.trans(w))
    return tl.sqrt(tl.sqrt(tl.sum(gram * gram)) + _BOUND)


@triton.jit
def _tangent(
    k, e, w2, w3, w, start, i, seen, head, H, D, HIDDEN,
    ROWS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """f of some keys in its up to four parts, and kappa(i, i) (see functional/memories.py)."""
    squares = tl.zeros([ROWS], tl.float32)  # |h|^2
    gate, value, upper = squares, squares, squares
    for n in tl.range(BLOCKS, disable_licm=True):
        j = n * BH + tl.arange(0, BH)
        z = _through(k, w2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS)
        h = gelu(z)
        if GATED:
            u = _through(k, w3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, ROWS)
            value = tl.maximum(value, tl.max(tl.abs(h), 1))
            gate = tl.maximum(gate, tl.max(tl.abs(gelu_slope(z) * u), 1))
            upper = tl.maximum(upper, tl.max(tl.abs(u), 1))
            h *= u
        squares += tl.sum(h * h, 1)
    norm_e, norm_h = tl.sqrt(tl.sum(e * e, 1)), tl.sqrt(squares)
    if GATED:
        pairs = norm_h * (gate * upper + value * value) * w + w * w * w * gate * value
        second = tl.sqrt(tl.sqrt(norm_e * pairs + _SECOND))
        third = tl.exp(tl.log(norm_e * norm_e * norm_h * gate * value * w * w + _THIRD) / 6)
        f1, f2 = w * gate, w * value
    else:
        second, third = tl.sqrt(tl.sqrt(norm_e * norm_h * w + _SECOND)), 0 * squares
        f1, f2 = w + 0 * squares, 0 * squares
    dots = 0 * squares
    for n in tl.range(TILES, disable_licm=True):
        x = load_tile(k, start, i, seen, head, H, n * BD + tl.arange(0, BD), D).to(tl.float32)
        dots += tl.sum(x * x, 1)
    own = squares + (f1 * f1 + f2 * f2 + second * second + third * third) * dots
    return f1, f2, second, third, own


@triton.jit
def _kappa(
    k, w2, w3, f1, f2, f3, f4, start, t, seen, head, H, D, HIDDEN,
    SPAN: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """kappa(t, s) = |h_t . h_s| + (f_t . f_s) |x_t . x_s| of a chunk's own tokens."""
    hidden = tl.zeros([SPAN, SPAN], tl.float32)
    for n in tl.range(BLOCKS, disable_licm=True):
        j = n * BH + tl.arange(0, BH)
        h = gelu(_through(k, w2, start, t, seen, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN))
        if GATED:
            h *= _through(k, w3, start, t, seen, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN)
        hidden += dot(h, tl.trans(h))
    dots = tl.zeros([SPAN, SPAN], tl.float32)
    for n in tl.range(TILES, disable_licm=True):
        x = load_tile(k, start, t, seen, head, H, n * BD + tl.arange(0, BD), D).to(tl.float32)
        dots += dot(x, tl.trans(x))
    product = f3[:, None] * f3[None, :] + f1[:, None] * f1[None, :]
    if GATED:
        product += f2[:, None] * f2[None, :] + f4[:, None] * f4[None, :]
    return tl.abs(hidden) + product * tl.abs(dots)


@triton.jit
def _held(
    own, gamma, token, mine, head, H, lag, WINDOW: tl.constexpr
):  # fmt: skip
    """The largest kappa(i, i) among the keys that the window of t weighs."""
    weighed = band(gamma, token, mine, head, H, lag, WINDOW) > 0
    return tl.max(tl.where(weighed, own[None, :], 0.0), 1)


@triton.jit
def _walk_forward(
    k, target, alpha, eta, theta, gamma, writes, scale, slots, rows,
    window_own, window_halo, thbar,
    m1, m2, m3, w1, w2, w3, s1, s2, s3, end_w1, end_w2, end_w3, end_s1, end_s2, end_s3,
    errors, errors_h, strengths, scales, end_scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, BEGUN: tl.constexpr, DISCOUNT: tl.constexpr,
):  # fmt: skip
    """From every chunk's start to its end. w, s: at the chunks' starts, the first filled in."""
    line = tl.program_id(0).to(tl.int64)
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    t, v = tl.arange(0, SPAN), tl.arange(0, BV)
    i = tl.arange(0, HALO if HALO else 1)
    size1, size2 = V * HIDDEN, HIDDEN * D
    first_slot, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    shift = (row + 1) * HISTORY
    now = tl.load(scale + line)
    for n in tl.range(count, disable_licm=True):
        slot = first_slot + n
        _, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
        here = (slot * H + head).to(tl.int64)
        from_1, from_2, from_3 = w1 + here * size1, w2 + here * size2, w3 + here * size2
        past_1, past_2, past_3 = s1 + here * size1, s2 + here * size2, s3 + here * size2
        # M^(0) of a chunk that an earlier call began is not the W it starts with here.
        at_1, at_2, at_3 = from_1, from_2, from_3
        if BEGUN and first < low:
            at_1, at_2, at_3 = m1 + line * size1, m2 + line * size2, m3 + line * size2
        if n + 1 < count:
            next = here + H
            to_1, to_2, to_3 = w1 + next * size1, w2 + next * size2, w3 + next * size2
            to_s1, to_s2, to_s3 = s1 + next * size1, s2 + next * size2, s3 + next * size2
        else:
            to_1, to_2 = end_w1 + line * size1, end_w2 + line * size2
            to_3 = end_w3 + line * size2
            to_s1, to_s2 = end_s1 + line * size1, end_s2 + line * size2
            to_s3 = end_s3 + line * size2
        seen = (token >= low - HISTORY) & (token < high) & (t < CHUNK)
        past = first - HALO + i
        near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
        # What the last chunk stored is what this one loads.
        tl.debug_barrier()
        e = _errors(
            k, target, at_1, at_2, at_3, first + shift, t, seen, head, H, D, V, HIDDEN, v,
            SPAN, BD, BH, TILES, BLOCKS, L2, GATED,
        )  # fmt: skip
        e_h = e
        if HALO:
            e_h = _errors(
                k, target, at_1, at_2, at_3, first + shift - HALO, i, near, head, H, D, V, HIDDEN,
                v, HALO, BD, BH, TILES, BLOCKS, L2, GATED,
            )  # fmt: skip
        at_e, at_e_h = errors + here * SPAN * V, errors_h + here * HALO * V
        store_block(at_e, e, t, SPAN, v, V)
        if HALO:
            store_block(at_e_h, e_h, i, HALO, v, V)
        strength = load_gate(eta, token, mine, head, H, 0.0)
        if DISCOUNT:
            # eta exp(-rho) / max(1, m scale), specification 9b.
            tl.store(scales + here, now)
            bound = _norm_bound(at_1, V, HIDDEN, v, BV, BH, BLOCKS)
            f1, f2, f3, f4, own = _tangent(
                k, e, at_2, at_3, bound, first + shift, t, seen, head, H, D, HIDDEN,
                SPAN, BD, BH, TILES, BLOCKS, GATED,
            )  # fmt: skip
            held = _held(own, gamma, token, mine, head, H, t[:, None] - t[None, :], WINDOW)
            if HALO:
                _, _, _, _, own = _tangent(
                    k, e_h, at_2, at_3, bound, first + shift - HALO, i, near, head, H, D, HIDDEN,
                    HALO, BD, BH, TILES, BLOCKS, GATED,
                )  # fmt: skip
                lag = t[:, None] + HALO - i[None, :]
                held = tl.maximum(held, _held(own, gamma, token, mine, head, H, lag, WINDOW))
            if MOMENTUM:
                m = load_gate(theta, token, mine, head, H, 1.0)
                across = tl.sum(tl.where(t[:, None] == t[None, :], held[:, None], 0.0), 0)
                held = tl.max(decay(m, SPAN) * across[None, :], 1)
                held = tl.maximum(held, tl.cumprod(m, axis=0) * now)
            mass = load_gate(writes, token + shift, seen, head, H, 0.0)
            kappa = _kappa(
                k, at_2, at_3, f1, f2, f3, f4, first + shift, t, seen, head, H, D, HIDDEN,
                SPAN, BD, BH, TILES, BLOCKS, GATED,
            )  # fmt: skip
            rho = tl.sum(tl.where(t[:, None] > t[None, :], kappa, 0.0) * mass[None, :], 1)
            strength *= tl.exp(-rho) / tl.maximum(mass * held, 1.0)
            tl.store(strengths + token.to(tl.int64) * H + head, strength, mask=mine)
            # The next chunk goes on from the newest token's.
            newest = tl.minimum(high - first, CHUNK) - 1
            now = tl.sum(tl.where(t == newest, held, 0.0), 0)
        end = t == SPAN - 1
        later = (token + 1 >= low) & (token + 1 < high) & (t + 1 < CHUNK)
        after = load_gate(alpha, token + 1, later, head, H, 1.0)
        step = strength * tl.cumprod(after, axis=0, reverse=True)
        a = load_gate(alpha, token, mine, head, H, 1.0)
        a = tl.sum(tl.where(end, tl.cumprod(a, axis=0), 0.0), 0)
        c, th = 0.0, 0.0
        if MOMENTUM:
            run = tl.load(thbar + here * SPAN + t)
            c = tl.sum(step * run, 0)
            th = tl.sum(tl.where(end, run, 0.0), 0)
        window = load_block(window_own + here * SPAN * SPAN, t, SPAN, t, SPAN)
        write = tl.sum(step[:, None] * window, 0)
        last = tl.sum(tl.where(end[:, None], window, 0.0), 0)
        write_h, last_h = write, last
        if HALO:
            window = load_block(window_halo + here * SPAN * HALO, t, SPAN, i, HALO)
            write_h = tl.sum(step[:, None] * window, 0)
            last_h = tl.sum(tl.where(end[:, None], window, 0.0), 0)
        tl.debug_barrier()
        for block in tl.range(BLOCKS, disable_licm=True):
            j = block * BH + tl.arange(0, BH)
            h, p2, p3 = _factors(
                k, at_e, at_1, at_2, at_3, first + shift, t, seen, head, H, D, V, HIDDEN, v, j,
                SPAN, BD, BH, TILES, GATED,
            )  # fmt: skip
            h_h, p2_h, p3_h = h, p2, p3
            if HALO:
                h_h, p2_h, p3_h = _factors(
                    k, at_e_h, at_1, at_2, at_3, first + shift - HALO, i, near, head, H, D, V,
                    HIDDEN, v, j, HALO, BD, BH, TILES, GATED,
                )  # fmt: skip
            e = _again(at_e, t, SPAN, v, V)
            if HALO:
                e_h = _again(at_e_h, i, HALO, v, V)
            _advance(
                from_1, past_1, to_1, to_s1, e, h, write, last, e_h, h_h, write_h, last_h,
                a, c, th, v, V, j, HIDDEN, HALO, MOMENTUM,
            )  # fmt: skip
            for m_ in tl.range(TILES, disable_licm=True):
                d = m_ * BD + tl.arange(0, BD)
                x = load_tile(k, first + shift, t, seen, head, H, d, D)
                x_h = load_tile(k, first + shift - HALO, i, near, head, H, d, D)
                _advance(
                    from_2, past_2, to_2, to_s2, p2, x, write, last, p2_h, x_h, write_h, last_h,
                    a, c, th, j, HIDDEN, d, D, HALO, MOMENTUM,
                )  # fmt: skip
                if GATED:
                    _advance(
                        from_3, past_3, to_3, to_s3, p3, x, write, last, p3_h, x_h, write_h, last_h,
                        a, c, th, j, HIDDEN, d, D, HALO, MOMENTUM,
                    )  # fmt: skip
    tl.store(end_scale + line, now)


@triton.jit
def _advance(
    w, s, to_w, to_s, left, right, write, last, left_h, right_h, write_h, last_h, a, c, th,
    row, ROWS, column, COLUMNS, HALO: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """W' = a W - c S - (write o L)^T R and S' = th S + (last o L)^T R, for one block."""
    x = a * load_block(w, row, ROWS, column, COLUMNS)
    x -= dot(tl.trans(left * write[:, None]), right)
    if HALO:
        x -= dot(tl.trans(left_h * write_h[:, None]), right_h)
    if MOMENTUM:
        y = load_block(s, row, ROWS, column, COLUMNS)
        x -= c * y
        y = th * y + dot(tl.trans(left * last[:, None]), right)
        if HALO:
            y += dot(tl.trans(left_h * last_h[:, None]), right_h)
        store_block(to_s, y, row, ROWS, column, COLUMNS)
    store_block(to_w, x, row, ROWS, column, COLUMNS)


@triton.jit
def _read_hidden(
    q, w, s, first, t, mine, head, H, D, j, HIDDEN, abar, carried,
    BH: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """abar o q W^T - carried o q S^T for one block of hidden units."""
    x = tl.load(abar + t)[:, None] * _through(
        q, w, first, t, mine, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN
    )
    if MOMENTUM:
        x -= tl.load(carried + t)[:, None] * _through(
            q, s, first, t, mine, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN
        )
    return x


@triton.jit
def _weighed_dots(
    q, k, f, first, t, mine, start, i, seen, head, H, D,
    SPAN: tl.constexpr, KEYS: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """F o Q K^T for some keys."""
    dots = tl.zeros([SPAN, KEYS], tl.float32)
    for n in tl.range(TILES, disable_licm=True):
        d = n * BD + tl.arange(0, BD)
        x = load_tile(k, start, i, seen, head, H, d, D)
        dots += dot(load_tile(q, first, t, mine, head, H, d, D), tl.trans(x))
    return dots * load_block(f, t, SPAN, i, KEYS)


@triton.jit
def _read_forward(
    q, k, errors, errors_h, slots, own, halo, abar, carried, m1, m2, m3, w1, w2, w3, s1, s2, s3, y,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """y_t = M_t(q_t) without the residual: a read of W_2 (and W_3), then one of W_1."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    t, v = tl.arange(0, SPAN), tl.arange(0, BV)
    i = tl.arange(0, HALO if HALO else 1)
    here, line = (slot * H + head).to(tl.int64), (row * H + head).to(tl.int64)
    size1, size2 = V * HIDDEN, HIDDEN * D
    from_1, from_2, from_3 = w1 + here * size1, w2 + here * size2, w3 + here * size2
    past_1, past_2, past_3 = s1 + here * size1, s2 + here * size2, s3 + here * size2
    at_1, at_2, at_3 = from_1, from_2, from_3
    if BEGUN and first < low:
        at_1, at_2, at_3 = m1 + line * size1, m2 + line * size2, m3 + line * size2
    start = first + (row + 1) * HISTORY
    seen = (token >= low - HISTORY) & (token < high) & (t < CHUNK)
    past = first - HALO + i
    near = (past >= low - HISTORY) & (past < high) & (i > HALO - WINDOW)
    abar += here * SPAN
    carried += here * SPAN
    own += here * SPAN * SPAN
    halo += here * SPAN * HALO
    e, e_h = errors + here * SPAN * V, errors_h + here * HALO * V
    dots = _weighed_dots(
        q, k, own, first, t, mine, start, t, seen, head, H, D, SPAN, SPAN, BD, TILES
    )
    inner = tl.zeros([SPAN, SPAN], tl.float32)  # h_t . h_i
    dots_h, inner_h = dots, inner
    if HALO:
        dots_h = _weighed_dots(
            q, k, halo, first, t, mine, start - HALO, i, near, head, H, D, SPAN, HALO, BD, TILES
        )
        inner_h = tl.zeros([SPAN, HALO], tl.float32)
    found = tl.zeros([SPAN, BV], tl.float32)
    for block in tl.range(BLOCKS, disable_licm=True):
        j = block * BH + tl.arange(0, BH)
        z_t = _read_hidden(
            q, from_2, past_2, first, t, mine, head, H, D, j, HIDDEN, abar, carried,
            BH, BD, TILES, SPAN, MOMENTUM,
        )  # fmt: skip
        u_t = z_t
        if GATED:
            u_t = _read_hidden(
                q, from_3, past_3, first, t, mine, head, H, D, j, HIDDEN, abar, carried,
                BH, BD, TILES, SPAN, MOMENTUM,
            )  # fmt: skip
        h, p2, p3 = _factors(
            k, e, at_1, at_2, at_3, start, t, seen, head, H, D, V, HIDDEN, v, j,
            SPAN, BD, BH, TILES, GATED,
        )  # fmt: skip
        z_t -= dot(dots, p2)
        if GATED:
            u_t -= dot(dots, p3)
        h_h = h
        if HALO:
            h_h, p2, p3 = _factors(
                k, e_h, at_1, at_2, at_3, start - HALO, i, near, head, H, D, V, HIDDEN, v, j,
                HALO, BD, BH, TILES, GATED,
            )  # fmt: skip
            z_t -= dot(dots_h, p2)
            if GATED:
                u_t -= dot(dots_h, p3)
        h_t = gelu(z_t)
        if GATED:
            h_t *= u_t
        inner += dot(h_t, tl.trans(h))
        if HALO:
            inner_h += dot(h_t, tl.trans(h_h))
        w = load_block(from_1, v, V, j, HIDDEN)
        found += dot(h_t * tl.load(abar + t)[:, None], tl.trans(w))
        if MOMENTUM:
            w = load_block(past_1, v, V, j, HIDDEN)
            found -= dot(h_t * tl.load(carried + t)[:, None], tl.trans(w))
    found -= dot(inner * load_block(own, t, SPAN, t, SPAN), load_block(e, t, SPAN, v, V))
    if HALO:
        inner_h *= load_block(halo, t, SPAN, i, HALO)
        found -= dot(inner_h, load_block(e_h, i, HALO, v, V))
    store_tile(y, found, first, t, mine, head, H, v, V)


def forward(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    writes: Tensor | None,
    scale: Tensor,
    w: list[Tensor],
    s: list[Tensor],
    m: list[Tensor],
    at: Layout,
    spans: Spans,
    *,
    l2: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor]:
    """As `matrix.forward`, with w, s and m the memory's weights in order, gates with one axis of
    tokens, and for the discount, where there is one, writes [B, HIST + T, H] and scale [B, H].
    Returns y without the residual, W, S and scale at the end, and all three at the chunks' starts.
    """
    batch, _, heads, d = q.shape
    v, hidden = w[0].shape[-2:]
    # C, and thbar where P thbar would be: with alpha = 0 and eta = 1 P is the identity.
    window = coefficients.forward(
        torch.zeros_like(alpha), torch.ones_like(eta), theta, gamma, at, spans
    )
    starts_w, starts_s = ([_starts(x, at) for x in group] for group in (w, s))
    end_w, end_s = ([torch.empty_like(x) for x in group] for group in (w, s))
    strengths = torch.empty_like(eta)
    scales = scale.new_zeros(at.count, heads)
    end_scale = torch.empty_like(scale)
    y = q.new_empty(*q.shape[:-1], v)
    errors, errors_h = (
        scale.new_empty(at.count, heads, keys, v) for keys in (spans.span, spans.halo)
    )

    def three(group: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        """Pointers for W_1..W_3; those to what is not there are never followed."""
        group = group or other
        return [*group, *(3 - len(group)) * group[-1:]]

    starts = (*three(m, starts_w), *three(starts_w, w), *three(starts_s, starts_w))
    shape = (heads, d, v, hidden, spans.history)
    settings: dict[str, Any] = {
        "CHUNK": spans.chunk, "WINDOW": spans.window, "SPAN": spans.span, "HALO": spans.halo,
        "GATED": len(w) == 3,
        "MOMENTUM": theta is not None, "BEGUN": bool(m), **tiles(d, v, hidden),
    }  # fmt: skip
    launch(
        _walk_forward, (batch * heads,),
        k, target, alpha, eta, theta, gamma, writes, scale, at.slots, at.rows,
        window.own, window.halo, window.carried, *starts, *three(end_w, w),
        *three(end_s, end_w), errors, errors_h, strengths, scales, end_scale, *shape,
        **settings, L2=l2, DISCOUNT=writes is not None,
    )  # fmt: skip
    found = coefficients.forward(
        alpha, eta if writes is None else strengths, theta, gamma, at, spans
    )
    launch(
        _read_forward, (at.count * heads,),
        q, k, errors, errors_h, at.slots, found.own, found.halo, found.abar, found.carried,
        *starts, y, *shape, **settings,
    )  # fmt: skip
    return y, end_w, end_s, end_scale, starts_w, starts_s, scales


def _starts(x: Tensor, at: Layout) -> Tensor:
    """Room for a weight [B, H, ...] at every chunk's start [slots, H, ...], the first filled in."""
    found = x.new_zeros(at.batch, at.per_row, *x.shape[1:])
    found[:, 0] = x
    return found.flatten(0, 1)


def tiles(d: int, v: int, hidden: int) -> dict[str, int]:
    """How D and the hidden units are cut; V is not."""
    block_d, block_h = min(64, padded(d)), min(32, padded(hidden))
    return {
        "BD": block_d, "BV": padded(v), "BH": block_h,
        "TILES": ceil_div(d, block_d), "BLOCKS": ceil_div(hidden, block_h),
        "num_warps": 8, "num_stages": 1,
    }  # fmt: skip
