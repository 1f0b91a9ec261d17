"""The coefficients of the dual form (specification section 6): from the gates alone, all chunks.

    A[t,s] = prod_{r=s+1..t} alpha_r     Theta likewise     Gam[t,i] = gamma[t, t-i]
    C = Theta Gam      P = A diag(eta)      F = P C

b chunk, padded to SPAN rows; keys are the chunk's own (SPAN) and the halo before it (HALO). Rows
past the end of a sequence are neutral, so row SPAN - 1 always holds the end of the chunk. eta is
what limits have left of it (specification 9b).
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels.tiles import (
    Layout,
    chunk_gates,
    dot,
    launch,
    load_gate,
    padded,
)


class Coefficients(NamedTuple):
    """Per slot and head, float32. Also the shape of their gradients."""

    own: Tensor  # F, the chunk's own keys [slots, H, SPAN, SPAN]
    halo: Tensor  # F, the halo's keys [slots, H, SPAN, HALO]
    abar: Tensor  # running product of alpha [slots, H, SPAN]
    carried: Tensor  # P thbar [slots, H, SPAN]; its last entry carries S into W at the end
    write_own: Tensor  # last row of F [slots, H, SPAN]
    write_halo: Tensor  # [slots, H, HALO]
    last_own: Tensor  # last row of C [slots, H, SPAN]
    last_halo: Tensor  # [slots, H, HALO]
    thbar: Tensor  # product of all theta [slots, H]


@dataclass(frozen=True)
class Spans:
    """Sizes of a chunk's tiles."""

    chunk: int
    window: int
    history: int  # HIST: tokens before each row in the key streams
    gates: int  # GATES: likewise in the gate streams
    span: int  # SPAN
    halo: int  # HALO, 0 for a window of 1

    @staticmethod
    def of(chunk: int, window: int, history: int, gates: int, least: int = 16) -> Spans:
        """least: of HALO, where the chunk is as long."""
        span = padded(chunk)
        halo = max(padded(window - 1), min(least, span)) if window > 1 else 0
        return Spans(chunk, window, history, gates, span, halo)

    def gate_settings(self) -> dict[str, int]:
        """The compile-time settings of every kernel that reads gates."""
        return {
            "CHUNK": self.chunk, "WINDOW": self.window, "GATES": self.gates, "SPAN": self.span,
            "HALO": self.halo,
        }  # fmt: skip


WARPS = 8


@triton.jit
def decay(gate, SPAN: tl.constexpr):
    """[t, s] = prod_{r = s+1..t} gate_r for s <= t, else 0. Products: exact at a gate of 0."""
    t = tl.arange(0, SPAN)
    factors = tl.where(t[:, None] > t[None, :], gate[:, None], 1.0)
    return tl.where(t[:, None] >= t[None, :], tl.cumprod(factors, axis=0), 0.0)


@triton.jit
def decay_transposed(gate, SPAN: tl.constexpr):
    """`decay`^T. (Transposing a tile in registers takes many of them.)"""
    t = tl.arange(0, SPAN)
    factors = tl.where(t[None, :] > t[:, None], gate[None, :], 1.0)
    return tl.where(t[None, :] >= t[:, None], tl.cumprod(factors, axis=1), 0.0)


@triton.jit
def decay_before(before, SPAN: tl.constexpr):
    """Row t - 1 of `decay` in the place of row t, 0 in the first; before: the gates one earlier."""
    t = tl.arange(0, SPAN)
    factors = tl.where(t[:, None] > t[None, :] + 1, before[:, None], 1.0)
    return tl.where(t[:, None] > t[None, :], tl.cumprod(factors, axis=0), 0.0)


@triton.jit
def decay_gradient(d_decay, d_run, gate, before, SPAN: tl.constexpr):
    """Gradient to the gates of `decay` and of their running product; before: the gates one earlier.

    d gate_r = sum_{s < r <= t} dA[t,s] A[t,r] A[r-1,s]: without a division, exact at 0. The running
    product is one more column, s = -1.
    """
    matrix = decay_transposed(gate, SPAN)
    total = tl.sum(matrix * d_run[None, :], 1) * tl.cumprod(before, axis=0)
    return total + tl.sum(dot(matrix, d_decay) * decay_before(before, SPAN), 1)


@triton.jit
def band(gamma, token, mine, head, H, lag, WINDOW: tl.constexpr):
    """Gam: gamma[t, lag] where the lag is in the window."""
    at = (token.to(tl.int64) * H + head)[:, None] * WINDOW + lag
    return tl.load(gamma + at, mask=mine[:, None] & (lag >= 0) & (lag < WINDOW), other=0.0)


@triton.jit
def band_transposed(gamma, token, mine, head, H, lag, WINDOW: tl.constexpr):
    """Gam^T; lag: [keys, tokens]."""
    at = (token.to(tl.int64) * H + head)[None, :] * WINDOW + lag
    return tl.load(gamma + at, mask=mine[None, :] & (lag >= 0) & (lag < WINDOW), other=0.0)


@triton.jit
def store_band(gamma, value, token, mine, head, H, lag, WINDOW: tl.constexpr):
    at = (token.to(tl.int64) * H + head)[:, None] * WINDOW + lag
    tl.store(gamma + at, value, mask=mine[:, None] & (lag >= 0) & (lag < WINDOW))


@triton.jit
def _forward(
    alpha, eta, theta, gamma, slots,
    own, halo, abar, carried, write_own, write_halo, last_own, last_halo, thbar,
    H: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, GATES: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0), tl.program_id(1)
    used, token, there, _ = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    here = slot.to(tl.int64) * H + head
    t = tl.arange(0, SPAN)
    a = load_gate(alpha, token, there, head, H, 1.0)
    strength = load_gate(eta, token, there, head, H, 0.0)
    step = decay(a, SPAN) * strength[None, :]
    tl.store(abar + here * SPAN + t, tl.cumprod(a, axis=0))
    if MOMENTUM:
        m = load_gate(theta, token, there, head, H, 1.0)
        momentum, run = decay(m, SPAN), tl.cumprod(m, axis=0)
        tl.store(carried + here * SPAN + t, tl.sum(step * run[None, :], 1))
        tl.store(thbar + here, tl.sum(tl.where(t == SPAN - 1, run, 0.0), 0))
    c = band(gamma, token, there, head, H, t[:, None] - t[None, :], WINDOW)
    if MOMENTUM:
        c = dot(momentum, c)
    f = dot(step, c)
    at = here * SPAN * SPAN + t[:, None] * SPAN + t[None, :]
    tl.store(own + at, f.to(own.dtype.element_ty))
    end = (t == SPAN - 1)[:, None]
    tl.store(write_own + here * SPAN + t, tl.sum(tl.where(end, f, 0.0), 0))
    tl.store(last_own + here * SPAN + t, tl.sum(tl.where(end, c, 0.0), 0))
    if HALO:
        i = tl.arange(0, HALO)
        c = band(gamma, token, there, head, H, t[:, None] + HALO - i[None, :], WINDOW)
        if MOMENTUM:
            c = dot(momentum, c)
        f = dot(step, c)
        at = here * SPAN * HALO + t[:, None] * HALO + i[None, :]
        tl.store(halo + at, f.to(halo.dtype.element_ty))
        tl.store(write_halo + here * HALO + i, tl.sum(tl.where(end, f, 0.0), 0))
        tl.store(last_halo + here * HALO + i, tl.sum(tl.where(end, c, 0.0), 0))


@triton.jit
def _load_gradient(x, x_end, here, t, i, SPAN: tl.constexpr, KEYS: tl.constexpr):
    """The gradient of F [SPAN, KEYS]: that of its last row also comes on its own."""
    df = tl.load(x + here * SPAN * KEYS + t[:, None] * KEYS + i[None, :]).to(tl.float32)
    return df + tl.where((t == SPAN - 1)[:, None], tl.load(x_end + here * KEYS + i)[None, :], 0.0)


@triton.jit
def _backward_write(
    alpha, eta, theta, gamma, slots,
    d_own, d_halo, d_abar, d_carried, d_write_own, d_write_halo, d_alpha, d_eta,
    H: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, GATES: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Through P = A diag(eta): the gradients of alpha and eta."""
    slot, head = tl.program_id(0), tl.program_id(1)
    used, token, there, earlier = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    here = slot.to(tl.int64) * H + head
    t = tl.arange(0, SPAN)
    df = _load_gradient(d_own, d_write_own, here, t, t, SPAN, SPAN)
    c = band_transposed(gamma, token, there, head, H, t[None, :] - t[:, None], WINDOW)
    d_step = dot(df, c)
    if HALO:
        i = tl.arange(0, HALO)
        df = _load_gradient(d_halo, d_write_halo, here, t, i, SPAN, HALO)
        c = band_transposed(gamma, token, there, head, H, t[None, :] + HALO - i[:, None], WINDOW)
        d_step += dot(df, c)
    if MOMENTUM:
        m = load_gate(theta, token, there, head, H, 1.0)
        run = tl.cumprod(m, axis=0)
        d_step = dot(d_step, decay_transposed(m, SPAN))
        d_step += tl.load(d_carried + here * SPAN + t)[:, None] * run[None, :]
    a = load_gate(alpha, token, there, head, H, 1.0)
    strength = load_gate(eta, token, there, head, H, 0.0)
    at = token.to(tl.int64) * H + head
    tl.store(d_eta + at, tl.sum(d_step * decay(a, SPAN), 0), mask=there)
    before = load_gate(alpha, token - 1, earlier, head, H, 1.0)
    d_run = tl.load(d_abar + here * SPAN + t)
    d_step *= strength[None, :]
    found = decay_gradient(d_step, d_run, a, before, SPAN)
    tl.store(d_alpha + at, found, mask=there)


@triton.jit
def _window_gradient(
    step, d_own, d_end, d_last, here, t, i, SPAN: tl.constexpr, KEYS: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The gradient of C: of F = P C, given P^T, and of its last row, which S keeps."""
    df = _load_gradient(d_own, d_end, here, t, i, SPAN, KEYS)
    dc = dot(step, df)
    if MOMENTUM:
        dc += tl.where((t == SPAN - 1)[:, None], tl.load(d_last + here * KEYS + i)[None, :], 0.0)
    return dc


@triton.jit
def _backward_window(
    alpha, eta, theta, slots,
    d_own, d_halo, d_write_own, d_write_halo, d_last_own, d_last_halo, d_gamma,
    H: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, GATES: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Through C = Theta Gam: the gradient of gamma."""
    slot, head = tl.program_id(0), tl.program_id(1)
    used, token, there, _ = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    here = slot.to(tl.int64) * H + head
    t = tl.arange(0, SPAN)
    strength = load_gate(eta, token, there, head, H, 0.0)
    step = decay_transposed(load_gate(alpha, token, there, head, H, 1.0), SPAN)
    step *= strength[:, None]
    dc = _window_gradient(step, d_own, d_write_own, d_last_own, here, t, t, SPAN, SPAN, MOMENTUM)
    if HALO:
        i = tl.arange(0, HALO)
        dc_h = _window_gradient(
            step, d_halo, d_write_halo, d_last_halo, here, t, i, SPAN, HALO, MOMENTUM
        )
    if MOMENTUM:
        momentum = decay_transposed(load_gate(theta, token, there, head, H, 1.0), SPAN)
        dc = dot(momentum, dc)
        if HALO:
            dc_h = dot(momentum, dc_h)
    store_band(d_gamma, dc, token, there, head, H, t[:, None] - t[None, :], WINDOW)
    if HALO:
        store_band(d_gamma, dc_h, token, there, head, H, t[:, None] + HALO - i[None, :], WINDOW)


@triton.jit
def _backward_momentum(
    alpha, eta, theta, gamma, slots,
    d_own, d_halo, d_carried, d_write_own, d_write_halo, d_last_own, d_last_halo, d_thbar, d_theta,
    H: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, GATES: tl.constexpr,
    SPAN: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Through C = Theta Gam, carried = P thbar, and thbar's own last: the gradient of theta."""
    slot, head = tl.program_id(0), tl.program_id(1)
    used, token, there, earlier = chunk_gates(slots, slot, SPAN, CHUNK, GATES)
    if not used:
        return
    here = slot.to(tl.int64) * H + head
    t = tl.arange(0, SPAN)
    # d Theta = dC Gam^T = P^T (dF Gam^T), and in its last row the last row of C.
    df = _load_gradient(d_own, d_write_own, here, t, t, SPAN, SPAN)
    c = band_transposed(gamma, token, there, head, H, t[None, :] - t[:, None], WINDOW)
    found = dot(df, c)
    last = tl.sum(c * tl.load(d_last_own + here * SPAN + t)[:, None], 0)
    if HALO:
        i = tl.arange(0, HALO)
        df = _load_gradient(d_halo, d_write_halo, here, t, i, SPAN, HALO)
        c = band_transposed(gamma, token, there, head, H, t[None, :] + HALO - i[:, None], WINDOW)
        found += dot(df, c)
        last += tl.sum(c * tl.load(d_last_halo + here * HALO + i)[:, None], 0)
    strength = load_gate(eta, token, there, head, H, 0.0)
    step = decay_transposed(load_gate(alpha, token, there, head, H, 1.0), SPAN)
    step *= strength[:, None]
    found = dot(step, found) + tl.where((t == SPAN - 1)[:, None], last[None, :], 0.0)
    d_run = tl.sum(step * tl.load(d_carried + here * SPAN + t)[None, :], 1)
    d_run += tl.where(t == SPAN - 1, tl.load(d_thbar + here), 0.0)
    m = load_gate(theta, token, there, head, H, 1.0)
    before = load_gate(theta, token - 1, earlier, head, H, 1.0)
    found = decay_gradient(found, d_run, m, before, SPAN)
    tl.store(d_theta + token.to(tl.int64) * H + head, found, mask=there)


def empty(at: Layout, heads: int, spans: Spans, parts: int = 1) -> Coefficients:
    """Uninitialised coefficients; of gradients all but F's come in `parts` to be summed."""

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=at.slots.device)

    span, halo, slots = spans.span, spans.halo, (at.count, heads)
    vectors = [new(parts, *slots, width) for width in (span, span, span, halo, span, halo)]
    return Coefficients._make(
        [new(*slots, span, span), new(*slots, span, halo), *vectors, new(parts, *slots)]
    )


def summed(gradient: Coefficients) -> Coefficients:
    """The gradient of all parts."""
    own, halo, *vectors = gradient
    vectors = [x[0] if len(x) == 1 else x.sum(0) for x in vectors]
    return Coefficients._make([own, halo, *vectors])


def forward(
    alpha: Tensor, eta: Tensor, theta: Tensor | None, gamma: Tensor, at: Layout, spans: Spans
) -> Coefficients:
    """Gates float32 [tokens, H] and [tokens, H, c], each row after GATES tokens of history -> the
    coefficients of every chunk."""
    heads = alpha.shape[-1]
    found = summed(empty(at, heads, spans))
    launch(
        _forward, (at.count, heads),
        alpha, eta, theta, gamma, at.slots, *found, heads,
        **spans.gate_settings(), MOMENTUM=theta is not None, num_warps=WARPS,
    )  # fmt: skip
    return found


def backward(
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    at: Layout,
    spans: Spans,
    gradient: Coefficients,
    into: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of alpha, eta, theta, gamma.

    into: where those of the
    slots' tokens are put; zeros where there is history, of which not all is in a chunk.
    """
    heads = alpha.shape[-1]
    if into is None:
        new = torch.zeros_like if spans.gates else torch.empty_like
        into = new(alpha), new(eta), None if theta is None else new(theta), new(gamma)
    d_alpha, d_eta, d_theta, d_gamma = into
    g = gradient
    launch(
        _backward_write, (at.count, heads),
        alpha, eta, theta, gamma, at.slots,
        g.own, g.halo, g.abar, g.carried, g.write_own, g.write_halo, d_alpha, d_eta, heads,
        **spans.gate_settings(), MOMENTUM=theta is not None,
        num_warps=WARPS,
    )  # fmt: skip
    launch(
        _backward_window, (at.count, heads),
        alpha, eta, theta, at.slots,
        g.own, g.halo, g.write_own, g.write_halo, g.last_own, g.last_halo, d_gamma, heads,
        **spans.gate_settings(), MOMENTUM=theta is not None, num_warps=WARPS,
    )  # fmt: skip
    if theta is not None:
        launch(
            _backward_momentum, (at.count, heads),
            alpha, eta, theta, gamma, at.slots,
            g.own, g.halo, g.carried, g.write_own, g.write_halo, g.last_own, g.last_halo, g.thbar,
            d_theta, heads,
            **spans.gate_settings(), num_warps=WARPS,
        )  # fmt: skip
    return d_alpha, d_eta, d_theta, d_gamma
