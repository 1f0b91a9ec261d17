"""The gradients of limited write strengths and online errors, of one chunk of every row.

    system    l = (I + kappa o N)^-T dE     d(kappa o N) = -l E^T, s before t
              dF[t-1] += dN[t]     d pend = dN
    e         d read = abar_{t-1} l    d along = -carried_{t-1} l
    strengths d eta^ = A o (dF C^T + d carried thbar^T), summed over t, and so d eta, m and scale
    features  d |h|^2 ... from d own, of the caps and of scale, and from d kappa

`slopes` [6, KEYS] holds gradients of a key: own, |h|^2, |L_2|^2, |L_3|^2, |x|^2, and of eta^.
`shifts` [2, SPAN]: of abar and carried of the token before.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.coefficients import decay, decay_gradient
from atlas_blocks.kernels.deep.gelu import gelu, gelu_slope
from atlas_blocks.kernels.deep.online import (
    block_of,
    caps_of,
    key_tile,
    largest_own,
    load_own,
    load_system,
    pending,
    place_of,
    running_scale,
)
from atlas_blocks.kernels.deep.rooms import place, two_rooms
from atlas_blocks.kernels.tiles import dot, load_block, store_block
from atlas_blocks.omega.memories import TINY
from atlas_blocks.omega.online import MAX_THETA

_TINY, _MAX_THETA = tl.constexpr(TINY), tl.constexpr(MAX_THETA)
# Rows of `features`.
_E, _L2, _L3, _X = (tl.constexpr(i) for i in range(1, 5))
_F2, _F3, _OWN = (tl.constexpr(i) for i in range(5, 8))


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW"])
def solve_backward(
    rows, kappa, before, inverses, de, START, OFFSET, PER_ROW, H: tl.constexpr, V: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """l in the place of dE, by backward substitution."""
    line = tl.program_id(0)
    there, mine, _ = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key = mine.to(tl.int64)
    kappa += key * KEYS * KEYS
    before += key * KEYS * KEYS
    de += key * KEYS * V
    i, v = tl.arange(0, 16), tl.arange(0, BV)
    COUNT: tl.constexpr = KEYS // 16
    for n in tl.range(COUNT, disable_licm=True):
        r = block_of(COUNT - 1 - n, SPAN, KEYS)
        found = load_block(de, r, KEYS, v, V)
        for m in tl.range(n, disable_licm=True):
            s = block_of(COUNT - 1 - m, SPAN, KEYS)
            system = load_system(kappa, before, s, r, KEYS)
            found -= dot(tl.trans(system), load_block(de, s, KEYS, v, V))
        inverse = load_block(inverses + key * KEYS * 16, r, KEYS, i, 16)
        found = dot(tl.trans(inverse), found)
        tl.debug_barrier()
        store_block(de, found, r, KEYS, v, V)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW"])
def system_backward(
    rows, key_tokens, target, anchored, masses, errors, bare, along, de, features, kappa, before,
    df, d_masses, shifts, slopes, START, OFFSET, PER_ROW, H: tl.constexpr,
    V: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr,
    WINDOW: tl.constexpr, HALO: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """Some keys s: d kappa, symmetric, in the place of N; what dF and the masses get of N; the
    gradient of own through the caps; and those of abar and carried, where the keys are own."""
    line, m = tl.program_id(0), tl.program_id(1)
    there, mine, _ = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, head = mine.to(tl.int64), line % H
    keys_at, features = key_tokens + mine // H * KEYS, features + key * 8 * KEYS
    kappa += key * KEYS * KEYS
    before += key * KEYS * KEYS
    df += key * SPAN * KEYS
    d_masses += key * KEYS * WINDOW
    shifts += key * 2 * SPAN
    de += key * KEYS * V
    v, s = tl.arange(0, BV), key_tile(m, SPAN, KEYS, BK)
    if WINDOW > 1:
        token = tl.load(keys_at + s)
        cap = caps_of(features, masses, token, s, head, H, WINDOW, KEYS)
        of_halo = tl.zeros([BK], tl.float32)
        of_cap = of_halo
    for n in tl.range(m, KEYS // BK, disable_licm=True):
        r = key_tile(n, SPAN, KEYS, BK)
        later = place_of(r, SPAN, HALO)[:, None] > place_of(s, SPAN, HALO)[None, :]
        some = load_block(errors + key * KEYS * V, s, KEYS, v, V)
        found = -dot(load_block(de, r, KEYS, v, V), tl.trans(some))
        of_n = tl.where(later, found * load_block(kappa, r, KEYS, s, KEYS), 0.0)
        found = tl.where(later, found * load_block(before, r, KEYS, s, KEYS), 0.0)
        tl.debug_barrier()
        if n == m:
            store_block(before, found + tl.trans(found), r, KEYS, s, KEYS)
        else:
            store_block(before, found, r, KEYS, s, KEYS)
            store_block(before, tl.trans(found), s, KEYS, r, KEYS)
        own = (r > 0) & (r < SPAN)
        at = df + (r - 1)[:, None] * KEYS + s[None, :]
        tl.store(at, tl.load(at, mask=own[:, None], other=0.0) + of_n, mask=own[:, None])
        if WINDOW > 1:
            pend = pending(features, masses, keys_at, r, s, head, H, WINDOW, SPAN, HALO, KEYS)
            # pend of the halo's rows is that of the first of the chunk's own.
            of_pend = tl.where((r < SPAN)[:, None], of_n, 0.0)
            of_pend += tl.where((r == 0)[:, None], of_halo[None, :], 0.0)
            of_halo += tl.sum(tl.where((r < SPAN)[:, None], 0.0, of_n), 0)
            of_cap -= tl.sum(of_pend * pend, 0)
            lag = (r + HALO)[:, None] - place_of(s, SPAN, HALO)[None, :]
            inside = (r < SPAN)[:, None] & (lag > 0) & (lag < WINDOW)
            at = d_masses + s[None, :] * WINDOW + lag
            tl.store(at, of_pend / cap[None, :], mask=inside)
    if WINDOW > 1:
        of_cap /= cap
        mass = load_own(masses, token, head * WINDOW, H * WINDOW, 0.0)
        own = tl.load(features + _OWN * KEYS + s)
        of_cap = tl.where(mass * own >= 1.0, of_cap, 0.0)
        tl.store(d_masses + s * WINDOW, of_cap * own)
        tl.store(slopes + key * 6 * KEYS + s, of_cap * mass)
    if m >= HALO // BK:
        some = load_block(de, s, KEYS, v, V)
        read = load_block(bare + key * KEYS * V, s, KEYS, v, V)
        read += load_block(target + key * KEYS * V, s, KEYS, v, V).to(tl.float32)
        if ANCHOR:
            read -= load_block(anchored + key * KEYS * V, s, KEYS, v, V)
        tl.store(shifts + s, tl.sum(some * read, 1))
        if MOMENTUM:
            read = load_block(along + key * SPAN * V, s, SPAN, v, V)
            tl.store(shifts + SPAN + s, -tl.sum(some * read, 1))


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW"])
def strengths_backward(
    rows, key_tokens, alpha, eta, theta, gamma, weight, strengths, scales, window, runs, features,
    df, d_write, d_ends, d_abar, d_carried, shifts, slopes, d_weight, d_eta, d_theta, d_scale,
    d_start, START, OFFSET, PER_ROW, H: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    MOMENTUM: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, CHUNK: tl.constexpr,
    CORRECT: tl.constexpr,
):  # fmt: skip
    """The gradients of eta, of what each window weighs, of theta through the scale, of the scale
    before the chunk, and of own; those of abar and carried with what came of the token after."""
    line = tl.program_id(0)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key, head = mine.to(tl.int64), line % H
    keys_at, features = key_tokens + mine // H * KEYS, features + key * 8 * KEYS
    slopes += key * 6 * KEYS
    t = tl.arange(0, SPAN)
    token, end = tl.load(keys_at + t), t == SPAN - 1
    at = token.to(tl.int64) * H + head
    if CORRECT:
        shifts += key * 2 * SPAN
        later = t + 1 < SPAN
        found = tl.load(d_abar + key * SPAN + t) + tl.load(shifts + t + 1, mask=later, other=0.0)
        tl.store(d_abar + key * SPAN + t, found)
    # Through F = P C and P thbar.
    step = tl.zeros([SPAN, SPAN], tl.float32)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        some = load_block(df + key * SPAN * KEYS, t, SPAN, r, KEYS)
        some += tl.where(end[:, None], tl.load(d_write + key * KEYS + r)[None, :], 0.0)
        step += dot(some, tl.trans(load_block(window + key * SPAN * KEYS, t, SPAN, r, KEYS)))
    if MOMENTUM:
        found = tl.load(d_carried + key * SPAN + t)
        if CORRECT:
            found += tl.load(shifts + SPAN + t + 1, mask=t + 1 < SPAN, other=0.0)
            tl.store(d_carried + key * SPAN + t, found)
        found += tl.where(end, tl.load(d_ends + key * 3 + 1), 0.0)
        step += found[:, None] * tl.load(runs + key * SPAN + t)[None, :]
    keep = load_own(alpha, token, head, H, 1.0)
    tl.store(slopes + 5 * KEYS + t, tl.sum(step * decay(keep, SPAN), 0))
    tl.debug_barrier()
    g = tl.load(slopes + 5 * KEYS + t)
    # Through eta / max(1, eta most).
    own, which = largest_own(
        features, gamma, token, head, H, t, KEYS // BK, WINDOW, SPAN, HALO, KEYS, BK
    )
    weighed = load_own(weight, token, head, H, 0.0)
    share = weighed * own
    most = share
    if MOMENTUM:
        before, gate = tl.load(scales + here), load_own(theta, token, head, H, 1.0)
        scale, steady = running_scale(share, gate, before, SPAN)
        handed = (1.0 + gate) * scale
        most = tl.maximum(steady, handed)
    wanted = load_own(eta, token, head, H, 0.0)
    limited = wanted * most >= 1.0
    full = tl.maximum(wanted * most, 1.0)
    tl.store(d_eta + at, tl.where(limited, 0.0, g / full), mask=token >= 0)
    strength = tl.load(strengths + at, mask=token >= 0, other=0.0)
    of_share = tl.where(limited, -g * strength / full * wanted, 0.0)
    of_before = 0.0
    if MOMENTUM:
        part = tl.where(handed > steady, 1.0, tl.where(handed == steady, 0.5, 0.0))
        of_handed, of_steady = of_share * part, of_share * (1.0 - part)
        of_scale = of_handed * (1.0 + gate)
        of_scale += tl.where(t == CHUNK - 1, tl.load(d_scale + line), 0.0)
        rest = 1.0 - tl.minimum(gate, _MAX_THETA)
        of_before = tl.sum(of_scale * tl.cumprod(gate, axis=0), 0)
        earlier = tl.load(keys_at + t - 1, mask=t > 0, other=-1)
        earlier = load_own(theta, earlier, head, H, 1.0)
        flow = of_scale[:, None] * share[None, :]
        found = decay_gradient(flow, of_scale * before, gate, earlier, SPAN)
        found += of_handed * scale + tl.where(gate <= _MAX_THETA, of_steady * steady / rest, 0.0)
        tl.store(d_theta + at, found, mask=token >= 0)
        of_share = of_steady / rest + tl.sum(of_scale[:, None] * decay(gate, SPAN), 0)
    tl.store(d_weight + at, of_share * own, mask=token >= 0)
    of_own = of_share * weighed
    if tl.load(rows + line // H * 2 + 1) == START + OFFSET + 1:
        of_before += tl.load(d_start + line)
    tl.debug_barrier()
    tl.store(d_scale + line, of_before)
    for n in tl.range(KEYS // BK, disable_licm=True):
        r = n * BK + tl.arange(0, BK)
        hit = which[:, None] == place_of(r, SPAN, HALO)[None, :]
        total = tl.sum(tl.where(hit, of_own[:, None], 0.0), 0)
        if CORRECT and WINDOW > 1:
            total += tl.load(slopes + r)
        tl.store(slopes + r, total)


@triton.jit
def _of_size(of_own, of_f, f, squares, of_x, of_e):
    """The gradients of |L|^2 and |e|^2 through f^2 = |L|^2 / |e|^2."""
    found = (of_own * of_x + of_f / (2.0 * f)) / (of_e + _TINY)
    return found, -found * (squares / (of_e + _TINY))


@triton.jit(do_not_specialize=["START", "OFFSET", "PER_ROW", "LINES"])
def bare_backward(
    rows, w1, rooms, bare, de, of_read, of_along, of_anchored, features, gram, pairs, abar, carried,
    slopes, START, OFFSET, PER_ROW, LINES, H: tl.constexpr, V: tl.constexpr, HIDDEN: tl.constexpr,
    SPAN: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
    MOMENTUM: tl.constexpr, CORRECT: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """Some keys: the gradients of the squared norms; of the bare errors, which are added to de; of
    what M^(0) and A read, and of the derivative along S. pairs: d kappa."""
    line, i = tl.program_id(0), tl.program_id(1)
    there, mine, here = place(rows, START, OFFSET, PER_ROW, line, H, GROUP)
    if there == 0:
        return
    key = mine.to(tl.int64)
    z, u = two_rooms(rooms, 0, mine, LINES, KEYS * HIDDEN)
    w1 += here * V * HIDDEN
    bare += key * KEYS * V
    de += key * KEYS * V
    v, r = tl.arange(0, BV), i * BK + tl.arange(0, BK)
    at, to = features + key * 8 * KEYS, slopes + key * 6 * KEYS + r
    of_f2 = tl.zeros([BK], tl.float32)
    of_f3 = of_f2
    if CORRECT:
        square = key * KEYS * KEYS
        for n in tl.range(KEYS // BK, disable_licm=True):
            s = n * BK + tl.arange(0, BK)
            some = load_block(pairs + square, r, KEYS, s, KEYS)
            some *= load_block(gram + square, r, KEYS, s, KEYS)
            of_f2 += tl.sum(some * tl.load(at + _F2 * KEYS + s)[None, :], 1)
            if GATED:
                of_f3 += tl.sum(some * tl.load(at + _F3 * KEYS + s)[None, :], 1)
    at += r
    of_own, of_x, of_e = tl.load(to), tl.load(at + _X * KEYS), tl.load(at + _E * KEYS)
    f2 = tl.load(at + _F2 * KEYS)
    of_2, more = _of_size(of_own, of_f2, f2, tl.load(at + _L2 * KEYS), of_x, of_e)
    of_3, sizes = 0 * of_2, f2 * f2
    if GATED:
        f3 = tl.load(at + _F3 * KEYS)
        of_3, other = _of_size(of_own, of_f3, f3, tl.load(at + _L3 * KEYS), of_x, of_e)
        more += other
        sizes += f3 * f3
    tl.store(to + KEYS, of_own)
    tl.store(to + 2 * KEYS, of_2)
    tl.store(to + 3 * KEYS, of_3)
    tl.store(to + 4 * KEYS, of_own * sizes)
    found = 2.0 * more[:, None] * load_block(bare, r, KEYS, v, V)
    for m in tl.range(BLOCKS, disable_licm=True):
        j = m * BH + tl.arange(0, BH)
        weight = load_block(w1, v, V, j, HIDDEN)
        back = dot(load_block(bare, r, KEYS, v, V), weight)
        _, _, back = lefts_backward(z, u, back, of_2, of_3, r, KEYS, j, HIDDEN, GATED)
        found += dot(back, tl.trans(weight))
    total = load_block(de, r, KEYS, v, V)
    if CORRECT:
        own = (r > 0) & (r < SPAN)
        faded = tl.load(abar + key * SPAN + r - 1, mask=own, other=1.0)
        store_block(of_read + key * KEYS * V, faded[:, None] * total + found, r, KEYS, v, V)
        if ANCHOR:
            more = (1.0 - faded)[:, None] * total
            store_block(of_anchored + key * KEYS * V, more, r, KEYS, v, V)
        if MOMENTUM:
            less = tl.load(carried + key * SPAN + r - 1, mask=own, other=0.0)
            tl.store(
                of_along + key * SPAN * V + r[:, None] * V + v[None, :], -less[:, None] * total,
                mask=(r < SPAN)[:, None] & (v < V)[None, :],
            )  # fmt: skip
    tl.debug_barrier()
    store_block(de, total + found, r, KEYS, v, V)


@triton.jit
def lefts_backward(z, u, back, of_2, of_3, r, KEYS, j, HIDDEN, GATED: tl.constexpr):
    """The gradients of the bare left factors of W_2 and W_3, given those of their squared norms,
    and of `back` = e0 W_1, of some hidden units."""
    z_ = load_block(z, r, KEYS, j, HIDDEN)
    slope, of_3rd = gelu_slope(z_), 0.0 * back
    if GATED:
        slope *= load_block(u, r, KEYS, j, HIDDEN)
        value = gelu(z_)
        of_3rd = 2.0 * of_3[:, None] * back * value
    of_2nd = 2.0 * of_2[:, None] * back * slope
    found = of_2nd * slope
    if GATED:
        found += of_3rd * value
    return of_2nd, of_3rd, found
