"""The write discount's sums over a chunk (specification 9b), for a matrix memory.

rho_t = sum_{s < t, same chunk} m_s |phi(k_s) . phi(k_t)|         own_t = |phi(k_t)|^2
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels import tiles
from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.tiles import (
    Layout,
    ceil_div,
    chunk_tokens,
    dot,
    launch,
    load_gate,
    load_tile,
    padded,
    store_tile,
)


@triton.jit
def _products(
    k, start, seen, head, H, D, SPAN: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """phi(k_t) . phi(k_s) of a chunk's tokens, and each one's square."""
    products = tl.zeros([SPAN, SPAN], tl.float32)
    squares = tl.zeros([SPAN], tl.float32)
    t = tl.arange(0, SPAN)
    for j in tl.range(TILES, disable_licm=True):
        x = load_tile(k, start, t, seen, head, H, j * BD + tl.arange(0, BD), D).to(tl.float32)
        products += dot(x, tl.trans(x))
        squares += tl.sum(x * x, 1)
    return products, squares


@triton.jit
def _forward(
    k, writes, slots, rho, own,
    H: tl.constexpr, D: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0), tl.program_id(1)
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    t = tl.arange(0, SPAN)
    shift = (row + 1) * HISTORY
    seen = (token >= low - HISTORY) & (token < high) & (t < CHUNK)
    products, squares = _products(k, first + shift, seen, head, H, D, SPAN, BD, TILES)
    mass = load_gate(writes, token + shift, seen, head, H, 0.0)
    before = tl.where(t[:, None] > t[None, :], tl.abs(products), 0.0)
    at = token.to(tl.int64) * H + head
    tl.store(rho + at, tl.sum(before * mass[None, :], 1), mask=mine)
    tl.store(own + at, squares, mask=mine)


@triton.jit
def _backward(
    k, writes, slots, d_rho, d_own, dk, d_writes,
    H: tl.constexpr, D: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0), tl.program_id(1)
    row, first, low, high, token, mine = chunk_tokens(slots, slot, SPAN, CHUNK)
    if low == high:
        return
    t = tl.arange(0, SPAN)
    shift = (row + 1) * HISTORY
    seen = (token >= low - HISTORY) & (token < high) & (t < CHUNK)
    products, _ = _products(k, first + shift, seen, head, H, D, SPAN, BD, TILES)
    mass = load_gate(writes, token + shift, seen, head, H, 0.0)
    g = load_gate(d_rho, token, mine, head, H, 0.0)
    before = t[:, None] > t[None, :]
    at = (token + shift).to(tl.int64) * H + head
    tl.store(
        d_writes + at, tl.sum(tl.where(before, tl.abs(products), 0.0) * g[:, None], 0), mask=seen
    )
    sign = tl.where(products > 0, 1.0, tl.where(products < 0, -1.0, 0.0))
    slope = tl.where(before, sign * g[:, None] * mass[None, :], 0.0)
    slope += tl.trans(slope)
    own = load_gate(d_own, token, mine, head, H, 0.0)
    for j in tl.range(TILES, disable_licm=True):
        d = j * BD + tl.arange(0, BD)
        x = load_tile(k, first + shift, t, seen, head, H, d, D).to(tl.float32)
        found = dot(slope, x) + 2 * own[:, None] * x
        store_tile(dk, found, first + shift, t, seen, head, H, d, D)


class DiscountSums(torch.autograd.Function):
    """phi(k) [B, HIST + T, H, D] and m [B, HIST + T, H] -> rho, own [B, T, H], float32.

    Of R packed documents [1, R HIST + T, ...] and [1, T, H].
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, writes: Tensor, at: Layout, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        batch, total, heads, d = k.shape
        past = at.batch // batch * spans.history
        rho = writes.new_empty(batch, total - past, heads)
        own = torch.empty_like(rho)
        ctx.save_for_backward(k, writes)
        ctx.at, ctx.spans = at, spans
        launch(
            _forward, (at.count, heads),
            k, writes, at.slots, rho, own, heads, d, spans.history,
            **_settings(d, spans), num_warps=8,
        )  # fmt: skip
        return rho, own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rho, d_own = (g.contiguous() for g in grads)
        k, writes = ctx.saved_tensors
        heads, d = k.shape[-2:]
        # History before the chunk is not looked at.
        new = torch.zeros_like if ctx.spans.history else torch.empty_like
        dk, d_writes = new(k), new(writes)
        launch(
            _backward, (ctx.at.count, heads),
            k, writes, ctx.at.slots, d_rho, d_own, dk, d_writes, heads, d, ctx.spans.history,
            **_settings(d, ctx.spans), num_warps=4,
        )  # fmt: skip
        return dk, d_writes, None, None


def _settings(d: int, spans: Spans) -> dict[str, Any]:
    block = min(32 if d % 16 else 64, padded(d))
    found = {
        "CHUNK": spans.chunk, "SPAN": spans.span, "BD": block, "TILES": ceil_div(d, block),
        "num_stages": 1,
    }  # fmt: skip
    return found | tiles.ALL_REGISTERS if d % 16 else found
