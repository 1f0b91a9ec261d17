"""Deep memories with U = identity, forward: the walk over the chunks, and the reads.

    z = X W2^T   u = X W3^T   h = gelu(z)  or  gelu(z) o u
    e = h W1^T - v ("l2"),  -v ("dot"), or the online errors of online.py      b = e W1
    factors (L, R):  W1 (e, h)   W2 (p2, x), p2 = gelu'(z) o b [o u]   W3 (p3, x), p3 = gelu(z) o b
    W' = a W - c S - (write o L)^T R        S' = th S + (last o L)^T R
    reads:  W_t x_t = abar W x - carried S x - sum_i F[t, i] (R_i . x_t) L_i, of W2 and W3, then W1
    Where retention is towards anchors A, W' has (1 - a) A more and W_t x_t (1 - abar) A x.

A chunk takes three launches: keys.py, some keys a program; online.py where writes are limited, one
head a program; writes.py, some hidden units a program. They hand over through memory (`Rooms`): no
program holds more than a few tiles. Chunks are taken a few at a time (`GROUP`), so that this memory
stays small; then all of them are read at once.

keys: a chunk's own tokens and then those of the halo, KEYS in all. Tensors named here are cut by
`cutter.cut`: [slots, H, SPAN or KEYS, ...].
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks.kernels.deep.call import (
    GROUP,
    OPTIONS,
    DeepCall,
    Group,
    Rooms,
    groups,
    joined,
    three,
)
from atlas_blocks.kernels.deep.cutter import cut, put
from atlas_blocks.kernels.deep.keys import keys_forward
from atlas_blocks.kernels.deep.online import gram_forward, online_forward
from atlas_blocks.kernels.deep.reads import read_forward
from atlas_blocks.kernels.deep.writes import writes_forward
from atlas_blocks.kernels.tiles import Layout, launch, padded


class Walked(NamedTuple):
    """The coefficients of a group's chunks, of all keys [slots, H, ...]."""

    f: Tensor  # F
    window: Tensor  # C where write strengths are limited, else F again
    abar: Tensor
    carried: Tensor
    runs: Tensor  # running product of theta where write strengths are limited
    last: Tensor  # last row of C
    thbar: Tensor


def walk(
    call: DeepCall,
    group: Group,
    x: Tensor,
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
) -> Walked:
    """The key factors of a group, into its rooms, and its write strengths; `forward`: with them the
    weights after each chunk, else all weights must be there. x: the keys, cut."""
    at, spans, tokens = call.at, call.spans, group.cutter.keys
    heads, d, v, hidden = call.shape
    coefficients = call.window(group) if call.limits else call.coefficients(group)
    window = f = joined(coefficients.own, coefficients.halo)
    abar, runs = coefficients.abar, coefficients.carried
    carried, thbar = runs, coefficients.thbar
    last = joined(coefficients.last_own, coefficients.last_halo)
    if call.limits:
        f, abar, carried = (torch.empty_like(t) for t in (window, abar, carried))
    settings = call.settings()
    parts, blocks = call.keys // settings["BK"], settings["BLOCKS"]

    def some(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in (*names, *OPTIONS)}

    if call.corrects:
        launch(
            gram_forward, (call.lines, parts, parts), x, rooms.gram, d, call.keys,
            **some("BK", "BD", "TILES"),
        )  # fmt: skip
    target = cut(call.target, tokens)
    anchored = target if call.anchored is None else cut(call.anchored, tokens)
    programs = at.batch * heads
    ws, ss = three(starts_w, starts_w), three(starts_s, starts_w)
    # One chunk after the other, or where all weights are there all at once.
    together = 1 if forward else GROUP
    for n in range(min(GROUP, at.per_row - group.start) if forward else 1):
        where = (group.start, n, at.per_row, call.lines)
        launch(
            keys_forward, (programs, together, parts),
            x, target, at.rows, *ws, *ss, rooms.hidden, rooms.bare, rooms.along, rooms.features,
            *where, heads, d, v, hidden, **settings, L2=call.l2, LIMIT=call.limits,
            CORRECT=call.corrects, KEEP=not forward,
        )  # fmt: skip
        if call.limits:
            launch(
                online_forward, (programs, together),
                target, anchored, at.rows, tokens, call.alpha, call.eta, call.theta, call.gamma,
                call.masses, call.weight, window, runs, f, abar, carried, rooms.hidden,
                rooms.errors, rooms.bare, rooms.along, rooms.features, rooms.gram, rooms.kappa,
                rooms.before, rooms.inverses, strengths, scales, end_scale, *where, parts, heads, v,
                hidden, **some("SPAN", "KEYS", "GROUP", "BK", "BV", "BH", "BLOCKS", "MOMENTUM"),
                BLOCKS16=padded(call.keys) // 16, WINDOW=spans.window, HALO=spans.halo,
                CHUNK=spans.chunk, CORRECT=call.corrects, ANCHOR=bool(call.anchors), WALK=forward,
            )  # fmt: skip
        launch(
            writes_forward, (programs, together, blocks),
            x, at.rows, f, abar, carried, last, thbar, *ws, *ss, *three(call.anchors, starts_w),
            *three(end_w, starts_w), *three(end_s, starts_w), rooms.hidden, rooms.errors, *where,
            parts, heads, d, v, hidden, **settings, ANCHOR=bool(call.anchors), WALK=forward,
        )  # fmt: skip
    return Walked(f, window, abar, carried, runs, last, thbar)


class Result(NamedTuple):
    """y without the residual; W and S at the end, and scale [R, H] there if the last chunk is
    whole; all three at the chunks' starts [slots, H, ...]."""

    y: Tensor
    w: list[Tensor]
    s: list[Tensor]
    scale: Tensor
    starts_w: list[Tensor]
    starts_s: list[Tensor]
    scales: Tensor


def forward(call: DeepCall, scale: Tensor) -> Result:
    """All chunks of a call."""
    at, spans = call.at, call.spans
    heads, d, v, hidden = call.shape
    starts_w, starts_s = ([_starts(x, at) for x in part] for part in (call.w, call.s))
    end_w, end_s = ([x.clone() for x in part] for part in (call.w, call.s))
    scales, end_scale = scale.new_zeros(at.count, heads), scale.clone()
    strengths = torch.empty_like(call.eta)
    y = call.eta.new_zeros(*call.q.shape[:-1], v)
    rooms = Rooms.of(5, call)
    for group in groups(at, spans):
        x = cut(call.k, group.cutter.keys)
        found = walk(
            call, group, x, rooms, starts_w, starts_s, end_w, end_s, strengths, scales, end_scale,
            forward=True,
        )  # fmt: skip
        part = y.new_zeros(group.at.count, heads, spans.span, v)
        launch(
            read_forward, (call.lines,),
            cut(call.q, group.cutter.tokens), x, found.f, found.abar, found.carried, at.rows,
            *three(starts_w, starts_w), *three(starts_s, starts_w),
            *three(call.anchors, starts_w), rooms.hidden, rooms.errors, torch.empty_like(found.f),
            part, group.start, at.per_row, call.lines, heads, d, v, hidden,
            **call.settings(16 if v > 64 else 32), ANCHOR=bool(call.anchors),
        )  # fmt: skip
        put(y, part, group.cutter.tokens)
    return Result(y, end_w, end_s, end_scale, starts_w, starts_s, scales)


def _starts(x: Tensor, at: Layout) -> Tensor:
    """Room for a weight [B, H, ...] at every chunk's start [slots, H, ...], the first filled in."""
    found = x.new_zeros(at.batch, at.per_row, *x.shape[1:])
    found[:, 0] = x
    return found.flatten(0, 1)
