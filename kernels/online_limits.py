"""What limits a matrix memory's writes (specification 9b), elementwise over a call's tokens.

    eta^_t = eta_t / max(1, eta_t (1 + theta_t) scale_t, eta_t w_t / (1 - theta_t))
    scale_t = theta_t scale_{t-1} + w_t      w_t = sum_j gamma[t, j] widest_t
    pend(t, s) = m_s(t - s) / max(1, m_s |phi(k_s)|^2)

widest_t is the largest |phi(k_i)|^2 that the window of t weighs. PyTorch under autograd: a few
numbers a token and head, nothing read by the host. Streams are [B, GATES + T, ...], of packed
documents [1, R GATES + T, ...].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.tiles import Layout
from atlas_blocks.omega.online import MAX_THETA, masses


class Limits(NamedTuple):
    """Of every token, or at the chunks' starts."""

    eta: Tensor  # eta^ [B, GATES + T, H]
    pend: Tensor | None  # by lag, with a window and for "l2" [B, GATES + T, H, c]
    scale: Tensor  # after the call's last token [R, H]
    scales: Tensor  # before each chunk's first token, 0 where there is none [slots, H]


def limits(
    k: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    seen: Tensor,
    before: Tensor,
    at: Layout,
    spans: Spans,
) -> Limits:
    """k: phi(k); seen: gamma where the window has not reached back over the sequence's start;
    before: scale [R, H] at the first chunk's start."""
    own = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).square()
    mass, window = masses(eta, theta, gamma), gamma.sum(-1) * _widest(own, seen)
    most, end, scales = window, before, before.new_zeros(at.count, before.shape[1])
    if theta is not None:
        scale = _running(window, theta, before, at, spans)
        end, scales = _at_chunks(scale, before, at, spans)
        most = torch.maximum(window / (1 - theta.clamp(max=MAX_THETA)), (1 + theta) * scale)
    eta = eta / (eta * most).clamp(min=1)
    pend = None
    if spans.window > 1:
        pend = (mass / (mass[..., 0] * own).clamp(min=1).unsqueeze(-1)).contiguous()
    return Limits(eta, pend, end, scales)


def _widest(own: Tensor, seen: Tensor) -> Tensor:
    """The largest own of the keys that each window weighs [B, tokens, H]."""
    window = seen.shape[-1]
    # What lies before a row is of the one before it, and not seen.
    near = F.pad(own, (0, 0, window - 1, 0)).unfold(1, window, 1).flip(-1)
    return torch.where(seen > 0, near, 0.0).max(-1).values


def _firsts(at: Layout, spans: Spans) -> Tensor:
    """Where each row's first chunk begins in a gate stream of one axis [R]."""
    row, first = at.slots[at.rows[:, 0].long(), :2].long().unbind(1)
    return first + (row + 1) * spans.gates


def _running(window: Tensor, theta: Tensor, before: Tensor, at: Layout, spans: Spans) -> Tensor:
    """scale of every token from its row's first chunk on."""
    shape, firsts = window.shape, _firsts(at, spans)
    window, theta = window.flatten(0, 1), theta.flatten(0, 1)
    window = window.index_copy(0, firsts, window[firsts] + theta[firsts] * before)
    # Nothing comes from the row before.
    theta = theta.index_fill(0, firsts, 0.0)
    found: Any = _Running.apply(window, theta, at.longest + spans.gates)
    return found.view(shape)


class _Running(torch.autograd.Function):
    """s_t = x_t + a_t s_{t-1} along the first axis, over at most `reach` tokens; each step of a
    scan doubles the distance it has looked back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, reach: int) -> Tensor:
        s, decay, step = x, a, 1
        while step < reach:
            s = s + decay * _earlier(s, step)
            decay = decay * _earlier(decay, step)
            step *= 2
        ctx.save_for_backward(a, s)
        ctx.reach = reach
        return s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, s = ctx.saved_tensors
        # What s_{t+1} hands back to s_t.
        total, handed, step = grads[0], _later(a, 1), 1
        while step < ctx.reach:
            total = total + handed * _later(total, step)
            handed = handed * _later(handed, step)
            step *= 2
        return total, total * _earlier(s, 1), None


def _earlier(x: Tensor, step: int) -> Tensor:
    """Row t - step in the place of row t."""
    return F.pad(x[: max(0, len(x) - step)], (0, 0, min(step, len(x)), 0))


def _later(x: Tensor, step: int) -> Tensor:
    return F.pad(x[step:], (0, 0, 0, min(step, len(x))))


def _at_chunks(scale: Tensor, before: Tensor, at: Layout, spans: Spans) -> tuple[Tensor, Tensor]:
    """The scale after each row's last token, and before each chunk."""
    row, first, low, high = at.slots.long().unbind(1)
    flat, there, shift = scale.flatten(0, 1), low < high, (row + 1) * spans.gates
    begins = (first <= low)[:, None]
    at_start = flat[torch.where(there, first + shift - 1, 0).clamp(min=0)]
    scales = torch.where(begins, before[row], at_start)
    last = (high + shift - 1)[at.rows[:, 0].long()]
    return flat[last], torch.where(there[:, None], scales, 0.0)
