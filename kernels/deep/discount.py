"""The write discount of a deep memory (specification 9b), and its gradient.

    kappa(t, s) = |h_t . h_s| + (f_t . f_s) |x_t . x_s|            own_i = kappa(i, i)
    held_t = max(own_i of the window, theta_t held_{t-1})        rho_t = sum_{s < t} m_s kappa(t, s)
    strength_t = eta_t exp(-rho_t) / max(1, m_t held_t)

f is `Memory.tangent` of functional/memories.py: four numbers a key (two are 0 of an mlp), made of
w, a bound on the norm of W_1, of |e| and |h|, and where gated of the largest |gelu'(z) o u|,
|gelu(z)| and |u|. Called by the programs of forward.py; `features` [13, KEYS] is theirs.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.functional.memories import BOUND_FLOOR, SECOND_FLOOR, THIRD_FLOOR
from atlas_blocks.kernels.coefficients import decay, decay_gradient
from atlas_blocks.kernels.deep.gelu import gelu, gelu_bend, gelu_slope
from atlas_blocks.kernels.tiles import dot, load_block, store_block

_BOUND = tl.constexpr(BOUND_FLOOR)
_SECOND = tl.constexpr(SECOND_FLOOR)
_THIRD = tl.constexpr(THIRD_FLOOR)
_TINY = tl.constexpr(1e-30)  # in place of a divisor of 0, whose dividend is 0
# Rows of `features`.
_OWN, _NORM_E, _NORM_H = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_GATE, _VALUE, _UPPER = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)  # and 3 on, of which unit
FEATURES = 13


@triton.jit
def bound_of(w1, gram, V, HIDDEN, BV: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr):
    """w = sqrt ||W_1 W_1^T||_F, a bound on the spectral norm of W_1; W_1 W_1^T goes to gram."""
    found = tl.zeros([BV, BV], tl.float32)
    v = tl.arange(0, BV)
    for n in tl.range(BLOCKS, disable_licm=True):
        w = load_block(w1, v, V, n * BH + tl.arange(0, BH), HIDDEN)
        found += dot(w, tl.trans(w))
    store_block(gram, found, v, V, v, V)
    tl.debug_barrier()
    found = load_block(gram, v, V, v, V)  # (a sum of a product itself fails to compile for sm_100)
    return tl.sqrt(tl.sqrt(tl.sum(found * found)) + _BOUND)


@triton.jit
def _roots(norm_e, norm_h, gate, value, upper, w, GATED: tl.constexpr):
    """The higher orders of f: their second and third root, the latter 0 of an mlp."""
    if GATED:
        pairs = norm_h * (gate * upper + value * value) * w + w * w * w * gate * value
        second = tl.sqrt(tl.sqrt(norm_e * pairs + _SECOND))
        third = tl.exp(tl.log(norm_e * norm_e * norm_h * gate * value * w * w + _THIRD) / 6)
    else:
        second, third = tl.sqrt(tl.sqrt(norm_e * norm_h * w + _SECOND)), 0 * norm_h
    return second, third


@triton.jit
def _squares(x, r, KEYS, D, BD: tl.constexpr, TILES):
    """|x|^2 of some keys."""
    found = tl.zeros([r.shape[0]], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        some = load_block(x, r, KEYS, i * BD + tl.arange(0, BD), D).to(tl.float32)
        found += tl.sum(some * some, 1)
    return found


@triton.jit
def _larger(most, which, x, first):
    """The largest |x| of a row, and the hidden unit that it is of, with one more block of them."""
    found, at = tl.max(tl.abs(x), 1, return_indices=True)
    return tl.maximum(most, found), tl.where(found > most, (first + at).to(tl.float32), which)


@triton.jit
def tangents(
    x, e, z, u, w, features,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The features of all keys."""
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        at = features + r
        squares = tl.zeros([BK], tl.float32)  # |h|^2
        gate, value, upper = squares, squares, squares
        of_gate, of_value, of_upper = squares, squares, squares  # which hidden unit
        for m in tl.range(BLOCKS, disable_licm=True):
            j = m * BH + tl.arange(0, BH)
            z_ = load_block(z, r, KEYS, j, HIDDEN)
            h = gelu(z_)
            if GATED:
                u_ = load_block(u, r, KEYS, j, HIDDEN)
                value, of_value = _larger(value, of_value, h, m * BH)
                gate, of_gate = _larger(gate, of_gate, gelu_slope(z_) * u_, m * BH)
                upper, of_upper = _larger(upper, of_upper, u_, m * BH)
                h *= u_
            squares += tl.sum(h * h, 1)
        errors = load_block(e, r, KEYS, tl.arange(0, BV), V)
        norm_e, norm_h = tl.sqrt(tl.sum(errors * errors, 1)), tl.sqrt(squares)
        second, third = _roots(norm_e, norm_h, gate, value, upper, w, GATED)
        f1, f2 = w + 0 * squares, 0 * squares
        if GATED:
            f1, f2 = w * gate, w * value
        dots = _squares(x, r, KEYS, D, BD, TILES)
        own = squares + (f1 * f1 + f2 * f2 + second * second + third * third) * dots
        tl.store(at, f1)
        tl.store(at + KEYS, f2)
        tl.store(at + 2 * KEYS, second)
        tl.store(at + 3 * KEYS, third)
        tl.store(at + _OWN * KEYS, own)
        tl.store(at + _NORM_E * KEYS, norm_e)
        tl.store(at + _NORM_H * KEYS, norm_h)
        tl.store(at + _GATE * KEYS, gate)
        tl.store(at + _VALUE * KEYS, value)
        tl.store(at + _UPPER * KEYS, upper)
        if GATED:
            tl.store(at + (_GATE + 3) * KEYS, of_gate)
            tl.store(at + (_VALUE + 3) * KEYS, of_value)
            tl.store(at + (_UPPER + 3) * KEYS, of_upper)


@triton.jit
def _weighed(gamma, token, head, H, t, r, WINDOW, SPAN, HALO):
    """Whether the window of a token weighs a key [SPAN, keys]."""
    lag = tl.where(r < SPAN, t[:, None] - r[None, :], t[:, None] + HALO + SPAN - r[None, :])
    at = (token.to(tl.int64) * H + head)[:, None] * WINDOW + lag
    mask = (token >= 0)[:, None] & (lag >= 0) & (lag < WINDOW)
    return tl.load(gamma + at, mask=mask, other=0.0) > 0


@triton.jit
def _gate(x, token, head, H, neutral):
    return tl.load(x + token.to(tl.int64) * H + head, mask=token >= 0, other=neutral)


@triton.jit
def _held_own(
    features, gamma, token, head, H, t, WINDOW, SPAN, HALO, KEYS: tl.constexpr, BK: tl.constexpr
):
    """The largest own_i among the keys that each of these tokens' window weighs."""
    held = tl.zeros([t.shape[0]], tl.float32)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        own = tl.load(features + _OWN * KEYS + r)
        weighed = _weighed(gamma, token, head, H, t, r, WINDOW, SPAN, HALO)
        held = tl.maximum(held, tl.max(tl.where(weighed, own[None, :], 0.0), 1))
    return held


@triton.jit
def _products(
    x, z, u, D, HIDDEN, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, TILES, BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """h_t . h_s and x_t . x_s of a chunk's own tokens."""
    t = tl.arange(0, SPAN)
    hidden = tl.zeros([SPAN, SPAN], tl.float32)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        h = gelu(load_block(z, t, KEYS, j, HIDDEN))
        if GATED:
            h *= load_block(u, t, KEYS, j, HIDDEN)
        hidden += dot(h, tl.trans(h))
    dots = tl.zeros([SPAN, SPAN], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        some = load_block(x, t, KEYS, i * BD + tl.arange(0, BD), D).to(tl.float32)
        dots += dot(some, tl.trans(some))
    return hidden, dots


@triton.jit
def _inner(features, t, KEYS, GATED: tl.constexpr):
    """f_t . f_s of a chunk's own tokens."""
    f1, third = tl.load(features + t), tl.load(features + 2 * KEYS + t)
    found = f1[:, None] * f1[None, :] + third[:, None] * third[None, :]
    if GATED:
        f2, f4 = tl.load(features + KEYS + t), tl.load(features + 3 * KEYS + t)
        found += f2[:, None] * f2[None, :] + f4[:, None] * f4[None, :]
    return found


@triton.jit
def strengths_of(
    x, z, u, features, tokens, key_tokens, filled, eta, theta, gamma, mass, before, head, H,
    D: tl.constexpr, HIDDEN: tl.constexpr, WINDOW: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, TILES,
    BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """A chunk's write strengths, and held of its newest token. before: held, of the last chunk."""
    t = tl.arange(0, SPAN)
    token = tl.load(tokens + t)
    if MOMENTUM:
        m = _gate(theta, token, head, H, 1.0)
        held = tl.cumprod(m, axis=0) * before
        for n in tl.range(SPAN // BK, disable_licm=True):
            s = n * BK + tl.arange(0, BK)
            past = tl.load(tokens + s)
            own = _held_own(features, gamma, past, head, H, s, WINDOW, SPAN, HALO, KEYS, BK)
            aged = tl.cumprod(tl.where(t[None, :] > s[:, None], m[None, :], 1.0), axis=1)
            aged = tl.where(t[None, :] >= s[:, None], aged, 0.0) * own[:, None]
            held = tl.maximum(held, tl.max(aged, 0))
    else:
        held = _held_own(features, gamma, token, head, H, t, WINDOW, SPAN, HALO, KEYS, BK)
    hidden, dots = _products(x, z, u, D, HIDDEN, SPAN, KEYS, BD, BH, TILES, BLOCKS, GATED)
    kappa = tl.abs(hidden) + _inner(features, t, KEYS, GATED) * tl.abs(dots)
    m = _gate(mass, tl.load(key_tokens + t), head, H, 0.0)
    rho = tl.sum(tl.where(t[:, None] > t[None, :], kappa, 0.0) * m[None, :], 1)
    strength = _gate(eta, token, head, H, 0.0) * tl.exp(-rho) / tl.maximum(m * held, 1.0)
    return strength, tl.sum(tl.where(t == filled - 1, held, 0.0), 0)


@triton.jit
def strength_gradient(
    df, d_write, d_carried, dc, window, thbar, alpha, tokens, slopes, head, H,
    SPAN: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """That of the write strengths, to the first of slopes: from the coefficients F = P C and
    carried = P thbar, P = A diag(strength)."""
    t = tl.arange(0, SPAN)
    end = t == SPAN - 1
    step = tl.zeros([SPAN, SPAN], tl.float32)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        g = load_block(df, t, SPAN, r, KEYS)
        g += tl.where(end[:, None], tl.load(d_write + r)[None, :], 0.0)
        step += dot(g, tl.trans(load_block(window, t, SPAN, r, KEYS)))
    if MOMENTUM:
        g = tl.load(d_carried + t) + tl.where(end, dc, 0.0)
        step += g[:, None] * tl.load(thbar + t)[None, :]
    keep = _gate(alpha, tl.load(tokens + t), head, H, 1.0)
    tl.store(slopes + t, tl.sum(step * decay(keep, SPAN), 0))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def gradient_of_strengths(
    x, e, z, u, features, squares, slopes, gram, de, tokens, key_tokens, filled,
    eta, theta, gamma, mass, strengths, before, after, d_eta, d_theta, d_mass, head, H,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, WINDOW: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, TILES,
    BLOCKS: tl.constexpr, GATED: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The gradients of eta and m, of theta through what is held, and of e, which is added to de.

    The first of slopes holds that of the strengths. before: held, of the last chunk; after: the
    gradient of held of this chunk's newest token. Those of h, x, z and u come of `squares`
    [2, SPAN, SPAN] and `slopes` [6, KEYS], which are written here, by the functions below. Returns
    the gradient of before, and what W_1 W_1^T is to be multiplied by for that of W_1.
    """
    t = tl.arange(0, SPAN)
    token, own_token = tl.load(tokens + t), tl.load(key_tokens + t)
    at = token.to(tl.int64) * H + head
    g = tl.load(slopes + t)
    strength = tl.load(strengths + at, mask=token >= 0, other=0.0)
    m = _gate(mass, own_token, head, H, 0.0)
    held_own = _held_own(features, gamma, token, head, H, t, WINDOW, SPAN, HALO, KEYS, BK)
    held = held_own
    if MOMENTUM:
        gate = _gate(theta, token, head, H, 1.0)
        ages, run = decay(gate, SPAN), tl.cumprod(gate, axis=0)
        aged = ages * held_own[None, :]
        young, old = tl.max(aged, 1), run * before
        held = tl.maximum(young, old)
    d_rho = -g * strength
    d_full = tl.where(m * held >= 1.0, d_rho / tl.maximum(m * held, 1.0), 0.0)
    d_held = d_full * m + tl.where(t == filled - 1, after, 0.0)
    d_before = 0.0
    if MOMENTUM:
        share = tl.where(young > old, 1.0, tl.where(young == old, 0.5, 0.0))
        d_old = d_held * (1.0 - share)
        d_before = tl.sum(d_old * run, 0)
        largest = aged == young[:, None]
        each = d_held * share / tl.sum(largest.to(tl.float32), 1)
        flow = tl.where(largest, each[:, None], 0.0)
        d_held = tl.sum(flow * ages, 0)
        flow *= held_own[None, :]
        tl.debug_barrier()
        earlier = tl.load(tokens + t - 1, mask=t > 0, other=-1)
        earlier = _gate(theta, earlier, head, H, 1.0)
        found = decay_gradient(flow, d_old * before, gate, earlier, SPAN)
        tl.store(d_theta + at, found, mask=token >= 0)

    tl.debug_barrier()
    hidden, dots = _products(x, z, u, D, HIDDEN, SPAN, KEYS, BD, BH, TILES, BLOCKS, GATED)
    inner = _inner(features, t, KEYS, GATED)
    kappa = tl.abs(hidden) + inner * tl.abs(dots)
    later = t[:, None] > t[None, :]
    rho = tl.sum(tl.where(later, kappa, 0.0) * m[None, :], 1)
    factor = tl.exp(-rho) / tl.maximum(m * held, 1.0)
    tl.store(d_eta + at, g * factor, mask=token >= 0)
    of_mass = d_full * held + tl.sum(tl.where(later, kappa, 0.0) * d_rho[:, None], 0)
    tl.store(d_mass + own_token.to(tl.int64) * H + head, of_mass, mask=own_token >= 0)
    # Of kappa(t, s) and kappa(s, t), which are one.
    d_kappa = tl.where(later, d_rho[:, None] * m[None, :], 0.0)
    d_kappa += tl.where(t[:, None] < t[None, :], m[:, None] * d_rho[None, :], 0.0)
    store_block(squares, d_kappa * _sign(hidden), t, SPAN, t, SPAN)
    store_block(squares + SPAN * SPAN, d_kappa * inner * _sign(dots), t, SPAN, t, SPAN)
    d_kappa *= tl.abs(dots)
    tl.debug_barrier()
    for i in tl.range(4, disable_licm=True):
        f = tl.load(features + i * KEYS + t)
        tl.store(slopes + i * KEYS + t, tl.sum(d_kappa * f[None, :], 1))
    ties = tl.zeros([SPAN], tl.float32)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        weighed = _weighed(gamma, token, head, H, t, r, WINDOW, SPAN, HALO)
        own = tl.load(features + _OWN * KEYS + r)
        ties += tl.sum((weighed & (own[None, :] == held_own[:, None])).to(tl.float32), 1)
    each = d_held / tl.maximum(ties, 1.0)
    some = load_block(gram, tl.arange(0, BV), V, tl.arange(0, BV), V)
    norm = tl.sqrt(tl.sum(some * some))
    w, dw = tl.sqrt(norm + _BOUND), 0.0
    tl.debug_barrier()
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        weighed = _weighed(gamma, token, head, H, t, r, WINDOW, SPAN, HALO)
        own = tl.load(features + _OWN * KEYS + r)
        chosen = weighed & (own[None, :] == held_own[:, None])
        d_own = tl.sum(tl.where(chosen, each[:, None], 0.0), 0)
        dw += _tangent_backward(x, e, de, features, slopes, d_own, w, r, D, V, SPAN, KEYS, BD, BV,
                                TILES, GATED)  # fmt: skip
    return d_before, tl.where(norm > 0, dw, 0.0) / (w * tl.maximum(norm, _TINY))


@triton.jit
def _tangent_backward(
    x, e, de, features, slopes, d_own, w, r,
    D: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES, GATED: tl.constexpr,
):  # fmt: skip
    """From the gradient of own and, in slopes, those of f through kappa, to de and the slopes: what
    h, x and the largest |gelu'(z) o u|, |gelu(z)| and |u| are to be multiplied by. Returns dw."""
    at, to, mine = features + r, slopes + r, r < SPAN
    f1, f2 = tl.load(at), tl.load(at + KEYS)
    second, third = tl.load(at + 2 * KEYS), tl.load(at + 3 * KEYS)
    norm_e, norm_h = tl.load(at + _NORM_E * KEYS), tl.load(at + _NORM_H * KEYS)
    dots = 2.0 * d_own * _squares(x, r, KEYS, D, BD, TILES)
    d1 = tl.load(to, mask=mine, other=0.0) + f1 * dots
    d2 = tl.load(to + KEYS, mask=mine, other=0.0) + f2 * dots
    d3 = tl.load(to + 2 * KEYS, mask=mine, other=0.0) + second * dots
    d4 = tl.load(to + 3 * KEYS, mask=mine, other=0.0) + third * dots
    tl.debug_barrier()
    d3 /= 4.0 * second * second * second
    if GATED:
        gate, value = tl.load(at + _GATE * KEYS), tl.load(at + _VALUE * KEYS)
        upper = tl.load(at + _UPPER * KEYS)
        pair = gate * upper + value * value
        pairs = norm_h * pair * w + w * w * w * gate * value
        dw = d1 * gate + d2 * value
        d_gate, d_value, d_norm_e = d1 * w, d2 * w, d3 * pairs
        d3 *= norm_e
        d_norm_h = d3 * pair * w
        d_gate += d3 * (norm_h * upper * w + w * w * w * value)
        d_value += d3 * (2.0 * norm_h * value * w + w * w * w * gate)
        d_upper = d3 * norm_h * gate * w
        dw += d3 * (norm_h * pair + 3.0 * w * w * gate * value)
        d4 /= 6.0 * third * third * third * third * third
        d_norm_e += d4 * 2.0 * norm_e * norm_h * gate * value * w * w
        d4 *= norm_e * norm_e
        d_norm_h += d4 * gate * value * w * w
        d_gate += d4 * norm_h * value * w * w
        d_value += d4 * norm_h * gate * w * w
        dw += d4 * norm_h * gate * value * 2.0 * w
        tl.store(to + 3 * KEYS, d_gate)
        tl.store(to + 4 * KEYS, d_value)
        tl.store(to + 5 * KEYS, d_upper)
    else:
        d_norm_e, d_norm_h = d3 * norm_h * w, d3 * norm_e * w
        dw = d1 + d3 * norm_e * norm_h
    d_norm_h = tl.where(norm_h > 0, d_norm_h, 0.0)
    tl.store(to + KEYS, 2.0 * d_own + d_norm_h / tl.maximum(norm_h, _TINY))
    f1 = f1 * f1 + f2 * f2 + second * second + third * third
    tl.store(to + 2 * KEYS, 2.0 * d_own * f1)
    each, v = tl.where(norm_e > 0, d_norm_e, 0.0) / tl.maximum(norm_e, _TINY), tl.arange(0, BV)
    found = load_block(de, r, KEYS, v, V) + each[:, None] * load_block(e, r, KEYS, v, V)
    tl.debug_barrier()
    store_block(de, found, r, KEYS, v, V)
    return tl.sum(dw, 0)


@triton.jit
def hidden_discounted(
    h, squares, slopes, i, j, HIDDEN: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What the discount adds to dh, of one tile of keys."""
    r = i * BK + tl.arange(0, BK)
    found = tl.load(slopes + KEYS + r)[:, None] * load_block(h, r, KEYS, j, HIDDEN)
    for n in tl.range(tl.where(i * BK < SPAN, SPAN // BK, 0), disable_licm=True):
        s = n * BK + tl.arange(0, BK)
        found += dot(load_block(squares, r, SPAN, s, SPAN), load_block(h, s, KEYS, j, HIDDEN))
    return found


@triton.jit
def inputs_discounted(
    x, squares, slopes, i, d, D: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What the discount adds to dx, of one tile of keys."""
    r = i * BK + tl.arange(0, BK)
    some = load_block(x, r, KEYS, d, D).to(tl.float32)
    found = tl.load(slopes + 2 * KEYS + r)[:, None] * some
    for n in tl.range(tl.where(i * BK < SPAN, SPAN // BK, 0), disable_licm=True):
        s = n * BK + tl.arange(0, BK)
        kappa = load_block(squares + SPAN * SPAN, r, SPAN, s, SPAN)
        found += dot(kappa, load_block(x, s, KEYS, d, D).to(tl.float32))
    return found


@triton.jit
def units_discounted(z, u, features, slopes, r, j, KEYS: tl.constexpr):
    """What the discount adds to dz and du through the largest of a gated memory's hidden units."""
    at, of = features + r + 3 * KEYS, slopes + r
    unit = j[None, :].to(tl.float32)
    gate = tl.where(
        tl.load(at + _GATE * KEYS)[:, None] == unit, tl.load(of + 3 * KEYS)[:, None], 0.0
    )
    value = tl.where(
        tl.load(at + _VALUE * KEYS)[:, None] == unit, tl.load(of + 4 * KEYS)[:, None], 0.0
    )
    upper = tl.where(
        tl.load(at + _UPPER * KEYS)[:, None] == unit, tl.load(of + 5 * KEYS)[:, None], 0.0
    )
    slope = gelu_slope(z)
    gate *= _sign(slope * u)
    return (
        gate * gelu_bend(z) * u + value * _sign(gelu(z)) * slope,
        gate * slope + upper * _sign(u),
    )
