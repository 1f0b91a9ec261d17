"""Deep memories with U = identity: the walk over the chunks' ends, and the reads.

    z = K W2^T   u = K W3^T   h = gelu(z)  or  gelu(z) o u       M(k) = h W1^T
    e = M^(0)(k) - v ("l2"),  -v ("dot")      b = e W1
    factors (L, R):  W1 (e, h)    W2 (gelu'(z) o b [o u], k)    W3 (gelu(z) o b, k)

Nothing of a chunk but its weights leaves a program: both kernels go over blocks of hidden units
twice, first for e, then with it. The walk also finds the discounted write strengths, which need
M^(0); `coefficients.forward` with alpha = 0 and eta = 1 gives it C, and, once they are known, the
reads F. A chunk's keys are one tile: the halo's, padded, before the chunk's own.
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
    for i in range(TILES):
        d = i * BD + tl.arange(0, BD)
        tile = load_tile(x, start, row, some, head, H, d, D)
        found += dot(tile, tl.trans(load_block(w, j, HIDDEN, d, D)))
    return found


@triton.jit
def _load_keys(own, halo, here, t, i, SPAN: tl.constexpr, HALO: tl.constexpr, KEYS: tl.constexpr):
    """[SPAN, KEYS] of what is stored as [SPAN, SPAN] and [SPAN, HALO]."""
    mine = i - (KEYS - SPAN)
    at = here * SPAN * SPAN + t[:, None] * SPAN + mine[None, :]
    x = tl.load(own + at, mask=(mine >= 0)[None, :] & (t >= 0)[:, None], other=0.0)
    if HALO:
        past = i - (KEYS - SPAN - HALO)
        at = here * SPAN * HALO + t[:, None] * HALO + past[None, :]
        near = ((past >= 0) & (past < HALO))[None, :] & (t >= 0)[:, None]
        x += tl.load(halo + at, mask=near, other=0.0)
    return x


@triton.jit
def _errors(
    k, target, w1, w2, w3, start, i, seen, head, H, D, V, HIDDEN, v,
    KEYS: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """e of a chunk's keys [KEYS, BV]."""
    e = -load_tile(target, start, i, seen, head, H, v, V).to(tl.float32)
    if L2:
        for n in range(BLOCKS):
            j = n * BH + tl.arange(0, BH)
            h = gelu(_through(k, w2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS))
            if GATED:
                h *= _through(k, w3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
            e += dot(h, tl.trans(load_block(w1, v, V, j, HIDDEN)))
    return e


@triton.jit
def _discount(
    k, w1, w2, w3, e, start, seen, head, H, D, V, HIDDEN, v, before,
    eta, theta, gamma, writes, first, low, high, shift,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    HISTORY, BV: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """eta exp(-rho) / max(1, m scale) of the chunk's own tokens, and the scale at its end (9b).

    kappa(t, i) = |h_t . h_i| + (f_t . f_i) |x_t . x_i|, see functional/memories.py; before: the
    scale that the chunk begins with.
    """
    i, t = tl.arange(0, KEYS), tl.arange(0, SPAN)
    hidden = tl.zeros([SPAN, KEYS], tl.float32)  # h_t . h_i
    squares = tl.zeros([KEYS], tl.float32)  # |h_i|^2
    gram = tl.zeros([BV, BV], tl.float32)
    gate, value, upper = squares, squares, squares
    token = first + t
    mine = (token >= low) & (token < high) & (t < CHUNK)
    around = (token >= low - HISTORY) & (token < high) & (t < CHUNK)
    for n in range(BLOCKS):
        j = n * BH + tl.arange(0, BH)
        z = _through(k, w2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
        h = gelu(z)
        z_t = _through(k, w2, first + shift, t, around, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN)
        h_t = gelu(z_t)
        if GATED:
            u = _through(k, w3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
            value = tl.maximum(value, tl.max(tl.abs(h), 1))
            gate = tl.maximum(gate, tl.max(tl.abs(gelu_slope(z) * u), 1))
            upper = tl.maximum(upper, tl.max(tl.abs(u), 1))
            h *= u
            h_t *= _through(
                k, w3, first + shift, t, around, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN
            )
        hidden += dot(h_t, tl.trans(h))
        squares += tl.sum(h * h, 1)
        w = load_block(w1, v, V, j, HIDDEN)
        gram += dot(w, tl.trans(w))
    w = tl.sqrt(tl.sqrt(tl.sum(gram * gram)) + _BOUND)
    norm_e, norm_h = tl.sqrt(tl.sum(e * e, 1)), tl.sqrt(squares)
    dots = tl.zeros([SPAN, KEYS], tl.float32)
    own_dot = tl.zeros([KEYS], tl.float32)
    for n in range(TILES):
        d = n * BD + tl.arange(0, BD)
        x = load_tile(k, start, i, seen, head, H, d, D).to(tl.float32)
        x_t = load_tile(k, first + shift, t, around, head, H, d, D).to(tl.float32)
        dots += dot(x_t, tl.trans(x))
        own_dot += tl.sum(x * x, 1)
    dots = tl.abs(dots)
    # f_t is f_i of the chunk's own tokens.
    same = (i[None, :] == (KEYS - SPAN) + t[:, None]).to(tl.float32)
    if GATED:
        pairs = norm_h * (gate * upper + value * value) * w + w * w * w * gate * value
        second = tl.sqrt(tl.sqrt(norm_e * pairs + _SECOND))
        third = tl.exp(tl.log(norm_e * norm_e * norm_h * gate * value * w * w + _THIRD) / 6)
        product = w * gate * tl.sum(same * (w * gate)[None, :], 1)[:, None]
        product += w * value * tl.sum(same * (w * value)[None, :], 1)[:, None]
        product += third * tl.sum(same * third[None, :], 1)[:, None]
        square = w * w * (gate * gate + value * value) + third * third
    else:
        second = tl.sqrt(tl.sqrt(norm_e * norm_h * w + _SECOND))
        product = tl.zeros([SPAN, KEYS], tl.float32) + w * w
        square = w * w + 0 * second
    product += second[None, :] * tl.sum(same * second[None, :], 1)[:, None]
    square += second * second
    kappa = tl.abs(hidden) + product * dots
    mass = load_gate(writes, start + i, seen, head, H, 0.0)
    lag = (KEYS - SPAN) + t[:, None] - i[None, :]
    rho = tl.sum(tl.where((lag > 0) & (i >= KEYS - SPAN)[None, :], kappa, 0.0) * mass[None, :], 1)
    held = mine[:, None] & (lag >= 0) & (lag < WINDOW)
    held &= band(gamma, token, mine, head, H, lag, WINDOW) > 0
    scale = tl.max(tl.where(held, (squares + square * own_dot)[None, :], 0.0), 1)
    if MOMENTUM:
        m = load_gate(theta, token, mine, head, H, 1.0)
        scale_s = tl.sum(tl.where(t[:, None] == t[None, :], scale[:, None], 0.0), 0)
        scale = tl.max(decay(m, SPAN) * scale_s[None, :], 1)
        scale = tl.maximum(scale, tl.cumprod(m, axis=0) * before)
    strength = load_gate(eta, token, mine, head, H, 0.0) * tl.exp(-rho)
    strength = strength / tl.maximum(tl.sum(same * mass[None, :], 1) * scale, 1.0)
    # What the next chunk goes on from is the scale of the last token that is there.
    newest = tl.minimum(high - first, CHUNK) - 1
    return strength, tl.sum(tl.where(t == newest, scale, 0.0), 0)


@triton.jit
def _advance(
    w, s, to_w, to_s, left, right, write, last, a, c, th, row, ROWS, column, COLUMNS,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """W' = a W - c S - (write o L)^T R and S' = th S + (last o L)^T R, for one block."""
    x = a * load_block(w, row, ROWS, column, COLUMNS)
    x -= dot(tl.trans(left * write[:, None]), right)
    if MOMENTUM:
        y = load_block(s, row, ROWS, column, COLUMNS)
        x -= c * y
        y = th * y + dot(tl.trans(left * last[:, None]), right)
        store_block(to_s, y, row, ROWS, column, COLUMNS)
    store_block(to_w, x, row, ROWS, column, COLUMNS)


@triton.jit
def _walk_forward(
    k, target, alpha, eta, theta, gamma, writes, scale, slots, rows, own, halo, thbar,
    m1, m2, m3, w1, w2, w3, s1, s2, s3, end_w1, end_w2, end_w3, end_s1, end_s2, end_s3,
    strengths, scales, end_scale,
    H, D, V, HIDDEN, HISTORY,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    KEYS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, BEGUN: tl.constexpr, DISCOUNT: tl.constexpr,
):  # fmt: skip
    """From every chunk's start to its end. w, s: at the chunks' starts, the first filled in."""
    line = tl.program_id(0).to(tl.int64)
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    i, t, v = tl.arange(0, KEYS), tl.arange(0, SPAN), tl.arange(0, BV)
    size1, size2 = V.to(tl.int64) * HIDDEN, HIDDEN.to(tl.int64) * D
    first_slot, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    shift = (row + 1) * HISTORY
    now = tl.load(scale + line)
    for n in range(count):
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
        start = first + shift - (KEYS - SPAN)
        seen = _seen(first, low, high, i, HISTORY, CHUNK, WINDOW, SPAN, KEYS)
        # What the last chunk stored is what this one loads.
        tl.debug_barrier()
        e = _errors(
            k, target, at_1, at_2, at_3, start, i, seen, head, H, D, V, HIDDEN, v,
            KEYS, BD, BH, TILES, BLOCKS, L2, GATED,
        )  # fmt: skip
        strength = load_gate(eta, token, mine, head, H, 0.0)
        if DISCOUNT:
            tl.store(scales + here, now)
            strength, now = _discount(
                k, at_1, at_2, at_3, e, start, seen, head, H, D, V, HIDDEN, v, now,
                eta, theta, gamma, writes, first, low, high, shift,
                CHUNK, WINDOW, SPAN, KEYS, HISTORY, BV, BD, BH, TILES, BLOCKS, GATED, MOMENTUM,
            )  # fmt: skip
            tl.store(strengths + token.to(tl.int64) * H + head, strength, mask=mine)
        later = mine & (token + 1 < high) & (t + 1 < CHUNK)
        a = load_gate(alpha, token, mine, head, H, 1.0)
        step = strength * tl.cumprod(
            load_gate(alpha, token + 1, later, head, H, 1.0), axis=0, reverse=True
        )
        a = tl.sum(tl.where(t == SPAN - 1, tl.cumprod(a, axis=0), 0.0), 0)
        window = _load_keys(own, halo, here, t, i, SPAN, HALO, KEYS)
        write = tl.sum(step[:, None] * window, 0)
        last = tl.sum(tl.where((t == SPAN - 1)[:, None], window, 0.0), 0)
        c, th = 0.0, 0.0
        if MOMENTUM:
            run = tl.load(thbar + here * SPAN + t)
            c = tl.sum(step * run, 0)
            th = tl.sum(tl.where(t == SPAN - 1, run, 0.0), 0)
        for block in range(BLOCKS):
            j = block * BH + tl.arange(0, BH)
            z = _through(k, at_2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
            h, p = gelu(z), dot(e, load_block(at_1, v, V, j, HIDDEN))
            p3 = p
            if GATED:
                u = _through(k, at_3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
                p3 = h * p
                p, h = p * u, h * u
            p *= gelu_slope(z)
            _advance(from_1, past_1, to_1, to_s1, e, h, write, last, a, c, th,
                     v, V, j, HIDDEN, MOMENTUM)  # fmt: skip
            for m in range(TILES):
                d = m * BD + tl.arange(0, BD)
                x = load_tile(k, start, i, seen, head, H, d, D)
                _advance(from_2, past_2, to_2, to_s2, p, x, write, last, a, c, th,
                         j, HIDDEN, d, D, MOMENTUM)  # fmt: skip
                if GATED:
                    _advance(from_3, past_3, to_3, to_s3, p3, x, write, last, a, c, th,
                             j, HIDDEN, d, D, MOMENTUM)  # fmt: skip
    tl.store(end_scale + line, now)


@triton.jit
def _seen(
    first, low, high, i, HISTORY,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Which of a chunk's keys there are: its own, and those that a window reaches back to."""
    token = first - (KEYS - SPAN) + i
    lag = KEYS - SPAN - i
    return (token >= low - HISTORY) & (token < high) & (lag < WINDOW) & (-lag < CHUNK)


@triton.jit
def _read_hidden(
    q, w, s, first, t, mine, head, H, D, j, HIDDEN, abar, c,
    BH: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """abar o q W^T - carried o q S^T for one block of hidden units."""
    x = abar[:, None] * _through(q, w, first, t, mine, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN)
    if MOMENTUM:
        x -= c[:, None] * _through(q, s, first, t, mine, head, H, D, j, HIDDEN, BH, BD, TILES, SPAN)
    return x


@triton.jit
def _read_forward(
    q, k, target, slots, own, halo, abar, carried, m1, m2, m3, w1, w2, w3, s1, s2, s3, y,
    H, D, V, HIDDEN, HISTORY,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    KEYS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, L2: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """y_t = M_t(q_t) without the residual: a read of W_2 (and W_3), then one of W_1."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, low, high, _, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    i, t, v = tl.arange(0, KEYS), tl.arange(0, SPAN), tl.arange(0, BV)
    here = (slot * H + head).to(tl.int64)
    line = (row * H + head).to(tl.int64)
    size1, size2 = V.to(tl.int64) * HIDDEN, HIDDEN.to(tl.int64) * D
    from_1, from_2, from_3 = w1 + here * size1, w2 + here * size2, w3 + here * size2
    past_1, past_2, past_3 = s1 + here * size1, s2 + here * size2, s3 + here * size2
    at_1, at_2, at_3 = from_1, from_2, from_3
    if BEGUN and first < low:
        at_1, at_2, at_3 = m1 + line * size1, m2 + line * size2, m3 + line * size2
    start = first + (row + 1) * HISTORY - (KEYS - SPAN)
    seen = _seen(first, low, high, i, HISTORY, CHUNK, WINDOW, SPAN, KEYS)
    e = _errors(
        k, target, at_1, at_2, at_3, start, i, seen, head, H, D, V, HIDDEN, v,
        KEYS, BD, BH, TILES, BLOCKS, L2, GATED,
    )  # fmt: skip
    scale_w = tl.load(abar + here * SPAN + t)
    scale_s = scale_w
    if MOMENTUM:
        scale_s = tl.load(carried + here * SPAN + t)
    dots = tl.zeros([SPAN, KEYS], tl.float32)
    for m in range(TILES):
        d = m * BD + tl.arange(0, BD)
        x = load_tile(k, start, i, seen, head, H, d, D)
        dots += dot(load_tile(q, first, t, mine, head, H, d, D), tl.trans(x))
    dots *= _load_keys(own, halo, here, t, i, SPAN, HALO, KEYS)
    found = tl.zeros([SPAN, BV], tl.float32)
    inner = tl.zeros([SPAN, KEYS], tl.float32)  # h_t . h_i
    for block in range(BLOCKS):
        j = block * BH + tl.arange(0, BH)
        z = _through(k, at_2, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
        h, p = gelu(z), dot(e, load_block(at_1, v, V, j, HIDDEN))
        z_t = _read_hidden(q, from_2, past_2, first, t, mine, head, H, D, j, HIDDEN,
                           scale_w, scale_s, BH, BD, TILES, SPAN, MOMENTUM)  # fmt: skip
        if GATED:
            u = _through(k, at_3, start, i, seen, head, H, D, j, HIDDEN, BH, BD, TILES, KEYS)
            u_t = _read_hidden(q, from_3, past_3, first, t, mine, head, H, D, j, HIDDEN,
                               scale_w, scale_s, BH, BD, TILES, SPAN, MOMENTUM)  # fmt: skip
            h_t = gelu(z_t - dot(dots, p * u * gelu_slope(z))) * (u_t - dot(dots, p * h))
            h *= u
        else:
            h_t = gelu(z_t - dot(dots, p * gelu_slope(z)))
        inner += dot(h_t, tl.trans(h))
        found += scale_w[:, None] * dot(h_t, tl.trans(load_block(from_1, v, V, j, HIDDEN)))
        if MOMENTUM:
            found -= scale_s[:, None] * dot(h_t, tl.trans(load_block(past_1, v, V, j, HIDDEN)))
    inner *= _load_keys(own, halo, here, t, i, SPAN, HALO, KEYS)
    store_tile(y, found - dot(inner, e), first, t, mine, head, H, v, V)


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

    def three(group: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        """Pointers for W_1..W_3; those to what is not there are never followed."""
        group = group or other
        return [*group, *(3 - len(group)) * group[-1:]]

    starts = (*three(m, starts_w), *three(starts_w, w), *three(starts_s, starts_w))
    shape = (heads, d, v, hidden, spans.history)
    settings: dict[str, Any] = {
        "CHUNK": spans.chunk, "WINDOW": spans.window, "SPAN": spans.span, "HALO": spans.halo,
        "KEYS": padded(spans.span + spans.halo), "L2": l2, "GATED": len(w) == 3,
        "MOMENTUM": theta is not None, "BEGUN": bool(m), **tiles(d, v, hidden),
    }  # fmt: skip
    launch(
        _walk_forward, (batch * heads,),
        k, target, alpha, eta, theta, gamma, writes, scale, at.slots, at.rows,
        window.own, window.halo, window.carried, *starts, *three(end_w, w),
        *three(end_s, end_w), strengths, scales, end_scale, *shape,
        **settings, DISCOUNT=writes is not None,
    )  # fmt: skip
    found = coefficients.forward(
        alpha, eta if writes is None else strengths, theta, gamma, at, spans
    )
    launch(
        _read_forward, (at.count * heads,),
        q, k, target, at.slots, found.own, found.halo, found.abar, found.carried,
        *starts, y, *shape, **settings,
    )  # fmt: skip
    return y, end_w, end_s, end_scale, starts_w, starts_s, scales


def _starts(x: Tensor, at: Layout) -> Tensor:
    """Room for a weight [B, H, ...] at every chunk's start [slots, H, ...], the first filled in."""
    found = x.new_empty(at.batch, at.per_row, *x.shape[1:])
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
