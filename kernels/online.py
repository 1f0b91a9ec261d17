"""The system of a chunk's online errors (specification 9b), for a matrix memory.

    E = (I + system)^{-1} e       system = tril(kappa o N, -1)       kappa = phi(k_t) . phi(k_s)
    N[t, s] = F[t-1, s] + pend(t, s)      own t
    N[t, s] = pend(t0, s)                 both of the halo; t0 the first own token

None of it depends on the memory, so it is made and solved for all chunks at once. Matrices are
[KEYS, KEYS], the halo's keys first; what is kept of the inverse is what it has beyond I. How many
tiles a loop has is no constant: a few would be unrolled, which takes registers.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels.coefficients import Coefficients, Spans
from atlas_blocks.kernels.tiles import (
    ALL_REGISTERS,
    Layout,
    ceil_div,
    chunk_gates,
    chunk_tokens,
    dot,
    exact_dot,
    launch,
    load_block,
    load_tile,
    padded,
)


@triton.jit
def _products(
    k, start_t, t, some_t, start_s, s, some_s, head, H: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, TILES,
):  # fmt: skip
    """phi(k_t) . phi(k_s)."""
    found = tl.zeros([t.shape[0], s.shape[0]], tl.float32)
    for j in tl.range(TILES, disable_licm=True):
        d = j * BD + tl.arange(0, BD)
        x = load_tile(k, start_t, t, some_t, head, H, d, D)
        z = load_tile(k, start_s, s, some_s, head, H, d, D)
        found += dot(x, tl.trans(z))
    return found


@triton.jit
def _pending(pend, start, s, some, head, H, lag, WINDOW: tl.constexpr):
    """[t, s] = pend of key start + s, `lag` [t, s] tokens on. (64-bit offsets would take the
    registers.)"""
    at = pend + (start.to(tl.int64) * H + head) * WINDOW + (s * (H * WINDOW))[None, :] + lag
    return tl.load(at, mask=some[None, :] & (lag > 0) & (lag < WINDOW), other=0.0)


@triton.jit
def _early(f, t, s, KEYS: tl.constexpr):
    """Row t - 1 of a matrix [SPAN, KEYS] in the place of row t, 0 in the first."""
    at = f + (t - 1)[:, None] * KEYS + s[None, :]
    return tl.load(at, mask=(t > 0)[:, None], other=0.0)


@triton.jit
def solved_block(x, here, row, column, KEYS: tl.constexpr):
    """Where rows and columns of one chunk's matrix [KEYS, KEYS] lie."""
    return x + here * KEYS * KEYS + row[:, None] * KEYS + column[None, :]


@triton.jit
def _system(
    k, pend, slots, own, halo, system,
    H: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    GATES: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr, BD: tl.constexpr, TILES,
):  # fmt: skip
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    used, _, there, _ = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    row, first, low, high, _, _ = chunk_tokens(slots, slot, SPAN, CHUNK)
    here = (slot * H + head).to(tl.int64)
    t, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    KEYS: tl.constexpr = SPAN + HALO
    start = first + (row + 1) * GATES
    kappa = _products(k, start, t, there, start, t, there, head, H, D, BD, TILES)
    n = _early(own + here * SPAN * SPAN, t, t, SPAN)
    if HALO:
        lag = t[:, None] - t[None, :]
        n += _pending(pend, start, t, there, head, H, lag, WINDOW)
    found = tl.where(t[:, None] > t[None, :], kappa * n, 0.0)
    tl.store(solved_block(system, here, HALO + t, HALO + t, KEYS), found)
    if HALO:
        past = first - HALO + i
        near = (past >= low - GATES) & (past < high) & (i > HALO - WINDOW)
        lag = t[:, None] + HALO - i[None, :]
        n = _early(halo + here * SPAN * HALO, t, i, HALO)
        n += _pending(pend, start - HALO, i, near, head, H, lag, WINDOW)
        kappa = _products(k, start, t, there, start - HALO, i, near, head, H, D, BD, TILES)
        tl.store(solved_block(system, here, HALO + t, i, KEYS), kappa * n)
        lag = (HALO - i)[None, :] + tl.zeros([HALO, HALO], tl.int32)
        n = _pending(pend, start - HALO, i, near, head, H, lag, WINDOW)
        kappa = _products(k, start - HALO, i, near, start - HALO, i, near, head, H, D, BD, TILES)
        found = tl.where(i[:, None] > i[None, :], kappa * n, 0.0)
        tl.store(solved_block(system, here, i, i, KEYS), found)


@triton.jit
def _invert(system, lines, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """(I + system)^{-1} - I in the place of the system, by forward substitution in blocks.

    Never by powers of the system: those of nearly parallel keys are huge and cancel.
    """
    here = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK)
    if tl.load(lines + tl.program_id(0)) == 0:
        return
    for row in tl.range(KEYS // BLOCK, disable_licm=True):
        at = row * BLOCK + r
        # The diagonal's block row by row.
        inner = tl.zeros([BLOCK, BLOCK], tl.float32)
        for n in tl.range(1, BLOCK, disable_licm=True):
            line = tl.load(system + here * KEYS * KEYS + (row * BLOCK + n) * KEYS + at)
            line = tl.where(r < n, line, 0.0)
            line += tl.sum(line[:, None] * inner, 0)
            inner = tl.where((r == n)[:, None], -line[None, :], inner)
        # Of X = I + Y: Y[I, J] = -X[I, I] (S[I, J] X[J, J] + sum_{J < K < I} S[I, K] Y[K, J]).
        # S[I, J] is not needed for any later J.
        for column in tl.range(row, disable_licm=True):
            to = column * BLOCK + r
            s = tl.load(solved_block(system, here, at, to, KEYS))
            total = s + exact_dot(s, tl.load(solved_block(system, here, to, to, KEYS)))
            for middle in tl.range(column + 1, row, disable_licm=True):
                by = middle * BLOCK + r
                s = tl.load(solved_block(system, here, at, by, KEYS))
                total += exact_dot(s, tl.load(solved_block(system, here, by, to, KEYS)))
            tl.debug_barrier()
            tl.store(solved_block(system, here, at, to, KEYS), -(total + exact_dot(inner, total)))
        tl.debug_barrier()
        tl.store(solved_block(system, here, at, at, KEYS), inner)
        tl.debug_barrier()


@triton.jit
def corrected(
    e, e_h, solved, here, t, i, SPAN: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """E of the chunk's own keys and the halo's from e of them, [keys, BV] each."""
    KEYS: tl.constexpr = SPAN + HALO
    found = e + dot(tl.load(solved_block(solved, here, HALO + t, HALO + t, KEYS)), e)
    if HALO:
        found += dot(tl.load(solved_block(solved, here, HALO + t, i, KEYS)), e_h)
        e_h += dot(tl.load(solved_block(solved, here, i, i, KEYS)), e_h)
    return found, e_h


@triton.jit
def corrected_backward(
    g, g_h, solved, here, t, i, SPAN: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """The gradients of e from those of E."""
    KEYS: tl.constexpr = SPAN + HALO
    if HALO:
        x = tl.load(solved_block(solved, here, i, i, KEYS))
        found_h = g_h + dot(tl.trans(x), g_h)
        x = tl.load(solved_block(solved, here, HALO + t, i, KEYS))
        g_h = found_h + dot(tl.trans(x), g)
    x = tl.load(solved_block(solved, here, HALO + t, HALO + t, KEYS))
    return g + dot(tl.trans(x), g), g_h


@triton.jit
def _outer(
    d_e, e, here, t, s, V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BV: tl.constexpr, VALUE_TILES,
):  # fmt: skip
    """The gradient of the system, -de E^T."""
    found = tl.zeros([ROWS, KEYS], tl.float32)
    for n in tl.range(VALUE_TILES, disable_licm=True):
        v = n * BV + tl.arange(0, BV)
        x = load_block(d_e + here * ROWS * V, t, ROWS, v, V)
        found -= dot(x, tl.trans(load_block(e + here * KEYS * V, s, KEYS, v, V)))
    return found


@triton.jit
def _store_pending(to, value, here, t, s, lag, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """value [t, s] to [key s, lag]."""
    at = to + here * KEYS * WINDOW + (s * WINDOW)[None, :] + lag
    tl.store(at, value, mask=(lag > 0) & (lag < WINDOW))


@triton.jit
def _store_late(to, value, t, s, SPAN: tl.constexpr, KEYS: tl.constexpr):
    """Row t in the place of row t - 1, 0 in the last."""
    late = (t + SPAN - 1) % SPAN
    tl.store(to + late[:, None] * KEYS + s[None, :], tl.where((t > 0)[:, None], value, 0.0))


@triton.jit
def _backward(
    k, pend, slots, own, halo, e_own, e_halo, de_own, de_halo,
    slope, d_own, d_halo, pend_own, pend_halo,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    GATES: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr, BD: tl.constexpr,
    TILES, BV: tl.constexpr, VALUE_TILES,
):  # fmt: skip
    """From the gradients of e and E itself to those of kappa (slope, with its transpose), F and
    pend."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    used, _, there, _ = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    row, first, low, high, _, _ = chunk_tokens(slots, slot, SPAN, CHUNK)
    here = (slot * H + head).to(tl.int64)
    t, i = tl.arange(0, SPAN), tl.arange(0, HALO if HALO else 1)
    KEYS: tl.constexpr = SPAN + HALO
    start = first + (row + 1) * GATES
    # d of N, then that of kappa: what N is made of is needed only after the products.
    g = _outer(de_own, e_own, here, t, t, V, SPAN, SPAN, BV, VALUE_TILES)
    g = tl.where(t[:, None] > t[None, :], g, 0.0)
    d = g * _products(k, start, t, there, start, t, there, head, H, D, BD, TILES)
    _store_late(d_own + here * SPAN * SPAN, d, t, t, SPAN, SPAN)
    n = _early(own + here * SPAN * SPAN, t, t, SPAN)
    if HALO:
        lag = t[:, None] - t[None, :]
        _store_pending(pend_own, d, here, t, t, lag, SPAN, WINDOW)
        n += _pending(pend, start, t, there, head, H, lag, WINDOW)
    g *= n
    tl.store(solved_block(slope, here, HALO + t, HALO + t, KEYS), g + tl.trans(g))
    if HALO:
        past = first - HALO + i
        near = (past >= low - GATES) & (past < high) & (i > HALO - WINDOW)
        g = _outer(de_halo, e_halo, here, i, i, V, HALO, HALO, BV, VALUE_TILES)
        g = tl.where(i[:, None] > i[None, :], g, 0.0)
        d = g * _products(k, start - HALO, i, near, start - HALO, i, near, head, H, D, BD, TILES)
        first_row = tl.sum(d, 0)  # of pend(t0, s), which own token t0 reads too
        lag = (HALO - i)[None, :] + tl.zeros([HALO, HALO], tl.int32)
        g *= _pending(pend, start - HALO, i, near, head, H, lag, WINDOW)
        tl.store(solved_block(slope, here, i, i, KEYS), g + tl.trans(g))

        g = _outer(de_own, e_halo, here, t, i, V, SPAN, HALO, BV, VALUE_TILES)
        d = g * _products(k, start, t, there, start - HALO, i, near, head, H, D, BD, TILES)
        _store_late(d_halo + here * SPAN * HALO, d, t, i, SPAN, HALO)
        lag = t[:, None] + HALO - i[None, :]
        p = _pending(pend, start - HALO, i, near, head, H, lag, WINDOW)
        d += tl.where((t == 0)[:, None], first_row[None, :], 0.0)
        _store_pending(pend_halo, d, here, t, i, lag, HALO, WINDOW)
        g *= _early(halo + here * SPAN * HALO, t, i, HALO) + p
        tl.store(solved_block(slope, here, HALO + t, i, KEYS), g)


class Gradients(NamedTuple):
    """What the system hands on, per slot and head."""

    slope: Tensor  # of kappa, plus its transpose; not for halo rows of own keys
    # Of pend of the chunk's keys, where there is a halo [slots, H, SPAN, c]
    pend_own: Tensor | None
    pend_halo: Tensor | None  # [slots, H, HALO, c]


def solve(k: Tensor, pend: Tensor | None, found: Coefficients, at: Layout, spans: Spans) -> Tensor:
    """(I + system)^{-1} - I of every chunk [slots, H, KEYS, KEYS].

    k: phi(k) [B, GATES + T, H, D]; pend [tokens, H, c] likewise.
    """
    heads, d = k.shape[-2:]
    keys = spans.span + spans.halo
    system = torch.empty(at.count, heads, keys, keys, dtype=torch.float32, device=k.device)
    launch(
        _system, (at.count * heads,),
        k, pend, at.slots, found.own, found.halo, system, heads, d,
        **spans.gate_settings(), **_tiles(d), num_warps=8,
    )  # fmt: skip
    used = (at.slots[:, 2] < at.slots[:, 3]).int().repeat_interleave(heads)
    invert(system.flatten(0, 1), used)
    return system


def invert(system: Tensor, used: Tensor) -> None:
    """(I + system)^{-1} - I in the place of strictly lower matrices [lines, KEYS, KEYS], KEYS a
    multiple of 16. Of blocks above the diagonal's nothing is read or written. used: int32 [lines],
    0 for those to leave."""
    lines, keys, _ = system.shape
    launch(_invert, (lines,), system, used, KEYS=keys, BLOCK=16, num_warps=1)


def backward(
    k: Tensor,
    pend: Tensor | None,
    found: Coefficients,
    errors: tuple[Tensor, Tensor, Tensor, Tensor],
    gradient: Coefficients,
    at: Layout,
    spans: Spans,
) -> Gradients:
    """errors: E of the chunk's own keys and the halo's, and the gradients of e of both. Those of F
    become gradient.own and gradient.halo."""
    heads, d = k.shape[-2:]
    v = errors[0].shape[-1]
    slots = (at.count, heads)

    def new(*shape: int) -> Tensor:
        return torch.empty(*slots, *shape, dtype=torch.float32, device=k.device)

    keys = spans.span + spans.halo
    slope, pend_own, pend_halo = new(keys, keys), None, None
    if pend is not None:
        # Windows reach beyond the chunk, where they get nothing here.
        pend_own, pend_halo = (
            torch.zeros_like(new(n, spans.window)) for n in (spans.span, spans.halo)
        )
    block_v = min(32, padded(v))
    launch(
        _backward, (at.count * heads,),
        k, pend, at.slots, found.own, found.halo, *errors,
        slope, gradient.own, gradient.halo, pend_own, pend_halo, heads, d, v,
        **spans.gate_settings(), **_tiles(d), BV=block_v, VALUE_TILES=ceil_div(v, block_v),
        num_warps=8,
    )  # fmt: skip
    return Gradients(slope, pend_own, pend_halo)


def _tiles(d: int) -> dict[str, Any]:
    block = min(32 if d % 16 else 64, padded(d))
    found = {"BD": block, "TILES": ceil_div(d, block), "num_stages": 1}
    return found | ALL_REGISTERS if d % 16 else found
