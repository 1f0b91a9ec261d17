"""Limited write strengths and online errors of a deep memory (specification 9b).

    features of a key: |h|^2, |e0|^2, |L_2|^2, |L_3|^2, |x|^2 at M^(0), of which come
    f_w^2 = |L_w|^2 / |e0|^2        own_i = |h|^2 + (f . f) |x|^2
    w_t = (sum_j gamma[t, j]) max own_i of the window           scale_t = theta_t scale_{t-1} + w_t
    eta^_t = eta_t / max(1, eta_t (1 + theta_t) scale_t, eta_t w_t / (1 - theta_t))
    F = A diag(eta^) C              kappa = h h^T + (f f^T) o (x x^T)
    N[t, s] = F[t-1, s] + pend(t, s)                            (I + kappa o N) E = e, s before t

In order a chunk's keys are those of the halo and then its own, in tiles of BK (its own are the
first of them in memory). Called by the programs of forward.py.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.coefficients import decay
from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.deep.rooms import place, room
from atlas_blocks.kernels.tiles import dot, load_block, store_block
from atlas_blocks.omega.memories import TINY
from atlas_blocks.omega.online import MAX_THETA

_TINY, _MAX_THETA = tl.constexpr(TINY), tl.constexpr(MAX_THETA)
# Rows of `features`, the squared norms first.
_H, _E, _L2, _L3, _X = (tl.constexpr(i) for i in range(5))
_F2, _F3, _OWN = (tl.constexpr(i) for i in range(5, 8))


@triton.jit
def gram_forward(
    x, gram, D: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, TILES
):  # fmt: skip
    """x x^T of one chunk and head, one tile of it."""
    line = tl.program_id(0).to(tl.int64)
    r, s = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BK + tl.arange(0, BK)
    found = tl.zeros([BK, BK], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        d = i * BD + tl.arange(0, BD)
        some = load_block(x + line * KEYS * D, r, KEYS, d, D)
        found += dot(some, tl.trans(load_block(x + line * KEYS * D, s, KEYS, d, D)))
    store_block(gram + line * KEYS * KEYS, found, r, KEYS, s, KEYS)


@triton.jit
def _squares(x, r, KEYS, D, BD: tl.constexpr, TILES):
    """|x|^2 of some keys."""
    found = tl.zeros([r.shape[0]], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        some = load_block(x, r, KEYS, i * BD + tl.arange(0, BD), D).to(tl.float32)
        found += tl.sum(some * some, 1)
    return found


@triton.jit
def features_of(
    x, e, w1, z, u, features, r,
    D: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr, KEYS: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    TILES, BLOCKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The features of some keys."""
    v, of_h = tl.arange(0, BV), tl.zeros([r.shape[0]], tl.float32)
    of_2, of_3 = of_h, of_h
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        back = dot(load_block(e, r, KEYS, v, V), load_block(w1, v, V, j, HIDDEN))
        z_ = load_block(z, r, KEYS, j, HIDDEN)
        h, left = gelu(z_), back * gelu_slope(z_)
        if GATED:
            of_3 += tl.sum(h * back * h * back, 1)
            u_ = load_block(u, r, KEYS, j, HIDDEN)
            h, left = h * u_, left * u_
        of_h += tl.sum(h * h, 1)
        of_2 += tl.sum(left * left, 1)
    error = load_block(e, r, KEYS, v, V)
    of_e, of_x = tl.sum(error * error, 1), _squares(x, r, KEYS, D, BD, TILES)
    at = features + r
    f2 = of_2 / (of_e + _TINY) + _TINY
    f3 = 0 * f2
    if GATED:
        f3 = of_3 / (of_e + _TINY) + _TINY
    tl.store(at + _H * KEYS, of_h)
    tl.store(at + _E * KEYS, of_e)
    tl.store(at + _L2 * KEYS, of_2)
    tl.store(at + _L3 * KEYS, of_3)
    tl.store(at + _X * KEYS, of_x)
    tl.store(at + _F2 * KEYS, tl.sqrt(f2))
    tl.store(at + _F3 * KEYS, tl.sqrt(f3))
    tl.store(at + _OWN * KEYS, of_h + (f2 + f3) * of_x)


@triton.jit
def load_own(x, token, head, H, neutral):
    """A gate of tokens that may not be there (-1)."""
    return tl.load(x + token.to(tl.int64) * H + head, mask=token >= 0, other=neutral)


@triton.jit
def key_tile(n, SPAN, KEYS, BK: tl.constexpr):
    """The n-th tile of keys in their order: where it lies."""
    return ((n + SPAN // BK) % (KEYS // BK)) * BK + tl.arange(0, BK)


@triton.jit
def place_of(r, SPAN, HALO):
    """Where keys stand in their order."""
    return tl.where(r < SPAN, r + HALO, r - SPAN)


@triton.jit
def largest_own(
    features, gamma, token, head, H, t, PARTS, WINDOW, SPAN, HALO, KEYS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The largest own_i among the keys that each of these tokens' window weighs, and the place of
    the first such key."""
    held = tl.zeros([t.shape[0]], tl.float32)
    which = tl.full([t.shape[0]], -1, tl.int32)
    for n in tl.range(PARTS, disable_licm=True):
        r = key_tile(n, SPAN, KEYS, BK)
        lag = (t + HALO)[:, None] - place_of(r, SPAN, HALO)[None, :]
        at = (token.to(tl.int64) * H + head)[:, None] * WINDOW + lag
        inside = (token >= 0)[:, None] & (lag >= 0) & (lag < WINDOW)
        weighed = tl.load(gamma + at, mask=inside, other=0.0) > 0
        own = tl.load(features + _OWN * KEYS + r)
        most, place = tl.max(tl.where(weighed, own[None, :], 0.0), 1, return_indices=True)
        which = tl.where(most > held, n * BK + place, which)
        held = tl.maximum(held, most)
    return held, which


@triton.jit
def running_scale(share, theta, before, SPAN: tl.constexpr):
    """scale_t of w_t = share, and w_t / (1 - theta_t)."""
    scale = tl.sum(decay(theta, SPAN) * share[None, :], 1) + tl.cumprod(theta, axis=0) * before
    return scale, share / (1.0 - tl.minimum(theta, _MAX_THETA))


@triton.jit
def _strengths(
    features, key_tokens, alpha, eta, theta, gamma, weight, before, window, runs,
    f, abar, carried, head, H, PARTS,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, BK: tl.constexpr, MOMENTUM: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """A chunk's write strengths and the scale of its last token; F, abar, P thbar and A are stored.

    before: the scale at the chunk's start; window: C; runs: thbar.
    """
    t = tl.arange(0, SPAN)
    token = tl.load(key_tokens + t)
    own, _ = largest_own(features, gamma, token, head, H, t, PARTS, WINDOW, SPAN, HALO, KEYS, BK)
    most = load_own(weight, token, head, H, 0.0) * own
    scale = most
    if MOMENTUM:
        m = load_own(theta, token, head, H, 1.0)
        scale, steady = running_scale(most, m, before, SPAN)
        most = tl.maximum(steady, (1.0 + m) * scale)
    strength = load_own(eta, token, head, H, 0.0)
    strength /= tl.maximum(strength * most, 1.0)
    keep = load_own(alpha, token, head, H, 1.0)
    matrix = decay(keep, SPAN)
    tl.store(abar + t, tl.cumprod(keep, axis=0))
    step = matrix * strength[None, :]
    if MOMENTUM:
        tl.store(carried + t, tl.sum(step * tl.load(runs + t)[None, :], 1))
    for n in tl.range(PARTS, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        store_block(f, dot(step, load_block(window, t, SPAN, r, KEYS)), t, SPAN, r, KEYS)
    return strength, tl.sum(tl.where(t == CHUNK - 1, scale, 0.0), 0)


@triton.jit
def caps_of(features, masses, token, s, head, H, WINDOW, KEYS):
    """max(1, m_s own_s)."""
    mass = load_own(masses, token, head * WINDOW, H * WINDOW, 0.0)
    return tl.maximum(mass * tl.load(features + _OWN * KEYS + s), 1.0)


@triton.jit
def pending(
    features, masses, key_tokens, r, s, head, H, WINDOW, SPAN, HALO, KEYS
):  # fmt: skip
    """pend(t, s): what windows begun will still write of keys s, before each of the tokens r. Those
    of the halo: before the first of the chunk's own."""
    token = tl.load(key_tokens + s)
    at = tl.where(r < SPAN, r + HALO, HALO)
    lag = at[:, None] - place_of(s, SPAN, HALO)[None, :]
    inside = (token >= 0)[None, :] & (lag > 0) & (lag < WINDOW)
    found = tl.load(
        masses + (token.to(tl.int64) * H + head)[None, :] * WINDOW + lag, mask=inside, other=0.0
    )
    return found / caps_of(features, masses, token, s, head, H, WINDOW, KEYS)[None, :]


@triton.jit
def _system(
    h, features, gram, f, masses, key_tokens, kappa, before, head, H, PARTS,
    HIDDEN: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr,
    KEYS: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """kappa and N of all pairs of keys, N zero but where s is before t."""
    for n in tl.range(PARTS, disable_licm=True):
        for m in tl.range(n + 1, disable_licm=True):
            r, s = key_tile(n, SPAN, KEYS, BK), key_tile(m, SPAN, KEYS, BK)
            found = tl.zeros([BK, BK], tl.float32)
            for b in tl.range(BLOCKS, disable_licm=True):
                j = b * BH + tl.arange(0, BH)
                some = load_block(h, r, KEYS, j, HIDDEN)
                found += dot(some, tl.trans(load_block(h, s, KEYS, j, HIDDEN)))
            found += inner(features, r, s, KEYS) * load_block(gram, r, KEYS, s, KEYS)
            store_block(kappa, found, r, KEYS, s, KEYS)
            own = (r > 0) & (r < SPAN)
            found = tl.load(f + (r - 1)[:, None] * KEYS + s[None, :], mask=own[:, None], other=0.0)
            if WINDOW > 1:
                more = pending(
                    features, masses, key_tokens, r, s, head, H, WINDOW, SPAN, HALO, KEYS
                )
                found += more
            later = place_of(r, SPAN, HALO)[:, None] > place_of(s, SPAN, HALO)[None, :]
            store_block(before, tl.where(later, found, 0.0), r, KEYS, s, KEYS)


@triton.jit
def inner(features, r, s, KEYS):
    """f_r . f_s."""
    a, b = features + r, features + s
    found = tl.load(a + _F2 * KEYS)[:, None] * tl.load(b + _F2 * KEYS)[None, :]
    return found + tl.load(a + _F3 * KEYS)[:, None] * tl.load(b + _F3 * KEYS)[None, :]


@triton.jit
def _invert_blocks(
    kappa, before, inverses, KEYS: tl.constexpr, BLOCKS16: tl.constexpr
):  # fmt: skip
    """The inverses of the system's blocks of 16 on its diagonal, row by row, all at once."""
    block, i, j = tl.arange(0, BLOCKS16), tl.arange(0, 16), tl.arange(0, 16)
    row = block[:, None, None] * 16 + i[None, :, None]
    inside = row < KEYS
    at = row * KEYS + block[:, None, None] * 16 + j[None, None, :]
    system = tl.load(kappa + at, mask=inside, other=0.0)
    system *= tl.load(before + at, mask=inside, other=0.0)
    # N is zero from the diagonal on, kappa may not be finite there.
    system = tl.where(i[None, :, None] > j[None, None, :], system, 0.0)
    found = tl.where(i[:, None] == j[None, :], 1.0, 0.0)[None, :, :] + 0 * system
    for n in tl.range(1, 16, disable_licm=True):
        here = i[None, :, None] == n
        of_row = tl.sum(tl.where(here, system, 0.0), 1)
        less = tl.sum(of_row[:, :, None] * found, 1)
        found = tl.where(here, found - less[:, None, :], found)
    tl.store(inverses + row * 16 + j[None, None, :], found, mask=inside)


@triton.jit
def block_of(n, SPAN, KEYS):
    """The n-th block of 16 keys in their order: where it lies."""
    return ((n + SPAN // 16) % (KEYS // 16)) * 16 + tl.arange(0, 16)


@triton.jit
def load_system(kappa, before, r, s, KEYS):
    return load_block(kappa, r, KEYS, s, KEYS) * load_block(before, r, KEYS, s, KEYS)


@triton.jit
def _corrected(
    bare, along, target, anchored, abar, carried, kappa, before, inverses, errors, PARTS,
    V: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """E, in blocks of 16 by forward substitution."""
    i, v = tl.arange(0, 16), tl.arange(0, BV)
    for n in tl.range(PARTS * (BK // 16), disable_licm=True):
        r = block_of(n, SPAN, KEYS)
        # What M^(0) reads is e0 + target.
        found = load_block(bare, r, KEYS, v, V)
        faded = tl.load(abar + r - 1, mask=(r > 0) & (r < SPAN), other=1.0)
        read = found + load_block(target, r, KEYS, v, V).to(tl.float32)
        if ANCHOR:
            read -= load_block(anchored, r, KEYS, v, V)
        found -= (1.0 - faded)[:, None] * read
        if MOMENTUM:
            own = (r > 0) & (r < SPAN)
            some = tl.load(
                along + r[:, None] * V + v[None, :], mask=own[:, None] & (v < V)[None, :], other=0.0
            )
            found -= tl.load(carried + r - 1, mask=own, other=0.0)[:, None] * some
        for m in tl.range(n, disable_licm=True):
            s = block_of(m, SPAN, KEYS)
            found -= dot(load_system(kappa, before, r, s, KEYS), load_block(errors, s, KEYS, v, V))
        found = dot(load_block(inverses, r, KEYS, i, 16), found)
        store_block(errors, found, r, KEYS, v, V)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES", "PARTS"])
def online_forward(
    target, anchored, rows, key_tokens, alpha, eta, theta, gamma, masses, weight, window, runs,
    f, abar, carried, rooms, errors, bare, along, features, gram, kappa, before, inverses,
    strengths, scales, end_scale, START, OFFSET, PER_ROW, LINES, PARTS, H: tl.constexpr,
    V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, BLOCKS16: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr,
    MOMENTUM: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, CHUNK: tl.constexpr,
    CORRECT: tl.constexpr, ANCHOR: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Limited write strengths and the coefficients made of them; with CORRECT the online errors.

    With WALK the scale before the chunk is end_scale, which that after it takes the place of;
    without WALK it is there. PARTS: tiles of keys.
    """
    line, n = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, OFFSET + n, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, head, t = mine.to(tl.int64), line % H, tl.arange(0, SPAN)
    if WALK:
        scale = tl.load(end_scale + line)
        tl.store(scales + here, scale)
    else:
        scale = tl.load(scales + here)
    keys_at, features = key_tokens + mine // H * KEYS, features + key * 8 * KEYS
    f += key * SPAN * KEYS
    abar += key * SPAN
    carried += key * SPAN
    strength, scale = _strengths(
        features, keys_at, alpha, eta, theta, gamma, weight, scale, window + key * SPAN * KEYS,
        runs + key * SPAN, f, abar, carried, head, H, PARTS, WINDOW, SPAN, HALO, CHUNK,
        KEYS, BK, MOMENTUM, CORRECT,
    )  # fmt: skip
    token = tl.load(keys_at + t)
    tl.store(strengths + token.to(tl.int64) * H + head, strength, mask=token >= 0)
    if WALK:
        tl.store(end_scale + line, scale)
    if CORRECT:
        kappa += key * KEYS * KEYS
        before += key * KEYS * KEYS
        inverses += key * KEYS * 16
        tl.debug_barrier()
        _system(
            room(rooms, 2, mine, LINES, KEYS * HIDDEN), features, gram + key * KEYS * KEYS, f,
            masses, keys_at, kappa, before, head, H, PARTS,
            HIDDEN, WINDOW, SPAN, HALO, KEYS, BK, BH, BLOCKS,
        )  # fmt: skip
        tl.debug_barrier()
        _invert_blocks(kappa, before, inverses, KEYS, BLOCKS16)
        tl.debug_barrier()
        _corrected(
            bare + key * KEYS * V, along + key * SPAN * V, target + key * KEYS * V,
            anchored + key * KEYS * V, abar, carried, kappa, before, inverses,
            errors + key * KEYS * V, PARTS, V, SPAN, KEYS, BK, BV, MOMENTUM, ANCHOR,
        )  # fmt: skip
