"""The gradients of forward.py, whose names these are, from the memory at every chunk's start.

A group's chunks are computed again, then their reads are differentiated all at once, and last the
writes, from the last chunk to the first. d of a name is its gradient:

    reads    G = dy e^T   N = h_t h^T   P = dz_t p2^T + du_t p3^T   Q = q x^T
             dF = -N o G - Q o P        de = -(F o N)^T dy     dh = -(F o G)^T h_t
             dp2 = -(F o Q)^T dz_t      dx = -(F o P)^T q
    writes   d left = -write o (R dW'^T) + last o (R dS'^T)         and so d right
             dW = a dW' + (abar o dy)^T h_t + dM^(0)                dS = th dS' - c dW' - ...
    factors  db = gelu'(z) o dp2 [o u] + gelu(z) o dp3      de += db W1^T      dh += de W1
             dM_1 = e^T db + de^T h     dM_2 = dz^T x
    limits and online errors: online_backward.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.coefficients import Coefficients
from atlas_blocks.kernels.deep import online_backward, reads_backward, writes_backward
from atlas_blocks.kernels.deep.call import GROUP, OPTIONS, DeepCall, Group, Rooms, groups, three
from atlas_blocks.kernels.deep.cutter import cut, put
from atlas_blocks.kernels.deep.forward import Walked, walk
from atlas_blocks.kernels.tiles import launch


class Gradients(NamedTuple):
    """Of the fields of `DeepCall` of these names, and of scale."""

    q: Tensor
    k: Tensor
    target: Tensor
    gates: tuple[Tensor, Tensor, Tensor | None, Tensor]  # alpha, eta, theta, gamma
    masses: Tensor | None
    weight: Tensor | None
    anchored: Tensor | None
    w: list[Tensor]
    s: list[Tensor]
    scale: Tensor
    anchors: list[Tensor]


# Rooms: z, u, h, p2, p3 of the keys, as forward.py leaves them; the reads' dh, dp2, dp3; z_t, u_t
# and their gradients, where later the whole dh, dp2, dp3 are; dz and du where dh and dp2 were; what
# X S2^T and X S3^T are, and then their gradients, where errors are corrected along S.
ROOMS, ALONG = 12, 2


class _Streams(NamedTuple):
    """Gradients of all tokens, zero where none has been found yet."""

    q: Tensor
    k: Tensor
    target: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor | None
    gamma: Tensor
    masses: Tensor | None
    weight: Tensor | None
    anchored: Tensor | None
    limited: Tensor  # of eta where it is limited
    held: Tensor  # of theta through the scale, likewise

    @staticmethod
    def of(call: DeepCall) -> _Streams:
        new = call.eta.new_zeros
        q, k, target = (new(t.shape) for t in (call.q, call.k, call.target))
        gates = (call.alpha, call.eta, call.theta, call.gamma, call.masses, call.weight)
        zeros: list[Any] = [
            None if t is None else torch.zeros_like(t) for t in (*gates, call.anchored)
        ]
        return _Streams._make([q, k, target, *zeros, new(call.eta.shape), new(call.eta.shape)])

    def total(self, call: DeepCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Of alpha, eta, theta and gamma."""
        if not call.limits:
            return self.alpha, self.eta, self.theta, self.gamma
        theta = None if self.theta is None else self.theta + self.held
        return self.alpha, self.limited, theta, self.gamma


class _Ends(NamedTuple):
    """Gradients of the memory after a chunk, which become those before it; those of the memory at
    the start of the last one."""

    w: list[Tensor]
    s: list[Tensor]
    scale: Tensor
    start_w: list[Tensor]
    start_s: list[Tensor]
    start_scale: Tensor
    anchors: list[Tensor]  # of A, of the chunks so far [B, H, dout, din]


class _Reads(NamedTuple):
    """What the reads of a group add to gradients."""

    x: Tensor  # [lines, KEYS, D]
    e: Tensor  # [lines, KEYS, V]
    f: Tensor  # [slots, H, SPAN, KEYS]
    abar: Tensor
    carried: Tensor
    w: list[Tensor]  # [lines, dout, din]
    s: list[Tensor]
    anchors: list[Tensor]


def backward(
    call: DeepCall,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    scales: Tensor,
    dy: Tensor,
    dw: list[Tensor],
    ds: list[Tensor],
    dm: list[Tensor],
    dn: list[Tensor],
    d_scale: Tensor,
    d_start: Tensor,
) -> Gradients:
    """From the gradients of y, of W, S and scale after the call (dw, ds, d_scale) and at the start
    of its last chunk (dm, dn, d_start), to those of what the call had.

    starts_w, starts_s, scales: at the chunks' starts, as `deep.forward` returns them.
    """
    anchors = [torch.zeros_like(g) for g in dw] if call.anchors else []
    gw, gs = ([g.clone() for g in group] for group in (dw, ds))
    ends = _Ends(gw, gs, d_scale.clone(), dm, dn, d_start, anchors)
    streams, strengths = _Streams.of(call), torch.empty_like(call.eta)
    rooms = Rooms.of(ROOMS + (ALONG if call.corrects and call.theta is not None else 0), call)
    for group in reversed(groups(call.at, call.spans)):
        x = cut(call.k, group.cutter.keys)
        found = walk(
            call, group, x, rooms, starts_w, starts_s, starts_w, starts_s, strengths, scales,
            ends.scale, forward=False,
        )  # fmt: skip
        reads = _reads(call, group, x, rooms, found, starts_w, starts_s, dy, streams.q)
        _writes(call, group, x, rooms, found, reads, starts_w, starts_s, strengths, scales, ends,
                streams)  # fmt: skip
    return Gradients(
        streams.q, streams.k, streams.target, streams.total(call), streams.masses,
        streams.weight, streams.anchored, ends.w, ends.s, ends.scale, [g.sum(0) for g in anchors],
    )  # fmt: skip


def _reads(
    call: DeepCall,
    group: Group,
    x: Tensor,
    rooms: Rooms,
    found: Walked,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    dy: Tensor,
    dq: Tensor,
) -> _Reads:
    at, settings, tokens = call.at, call.settings(widest=16), group.cutter.tokens
    heads, d, v, hidden = call.shape
    lines, span, keys = call.lines, call.spans.span, call.keys
    new, f = call.eta.new_empty, found.f
    part_q, part_x = new(lines, span, d), new(lines, keys, d)
    part_e, df = torch.empty_like(rooms.errors), torch.empty_like(f)
    scores, spread = torch.empty_like(f), torch.empty_like(f)
    blocks, tiles = settings["BLOCKS"], settings["TILES"]
    # Where there is no momentum nothing is written to the latter.
    d_abar, d_carried = (call.eta.new_zeros(blocks + tiles, *f.shape[:3]) for _ in range(2))
    parts_w, parts_s = ([new(lines, *t.shape[2:]) for t in g] for g in (call.w, call.s))
    parts_a = [new(lines, *t.shape[1:]) for t in call.anchors]
    anchor = {"ANCHOR": bool(call.anchors)}
    w1, w2, w3 = three(starts_w, starts_w)
    s1, s2, s3 = three(starts_s, starts_w)
    rw1, rw2, rw3 = three(parts_w, parts_w)
    rs1, rs2, rs3 = three(parts_s, parts_w)
    a1, a2, a3 = three(call.anchors, starts_w)
    ra1, ra2, ra3 = three(parts_a, parts_w)
    q, g = cut(call.q, tokens), cut(dy, tokens)
    where = (group.start, at.per_row, lines, heads, d, v, hidden)
    launch(
        reads_backward.scores_backward, (at.batch * heads, GROUP),
        q, x, g, f, found.abar, found.carried, at.rows, w2, w3, s2, s3, a2, a3, rooms.hidden,
        rooms.errors, scores, spread, part_e, df, *where, **settings, **anchor,
    )  # fmt: skip
    launch(
        reads_backward.read_backward, (at.batch * heads, GROUP, blocks),
        g, found.abar, found.carried, at.rows, w1, s1, a1, rooms.hidden, spread, d_abar, d_carried,
        rw1, rs1, ra1, *where, **settings, **anchor,
    )  # fmt: skip
    launch(
        reads_backward.left_backward, (at.batch * heads, GROUP, keys // settings["BK"]),
        q, x, f, at.rows, rooms.hidden, scores, spread, df, *where, **settings,
    )  # fmt: skip
    launch(
        reads_backward.query_backward, (at.batch * heads, GROUP, tiles),
        q, x, found.abar, found.carried, at.rows, w2, w3, s2, s3, a2, a3, rooms.hidden, spread,
        part_q, part_x, d_abar, d_carried, rw2, rw3, rs2, rs3, ra2, ra3, *where, **settings,
        **anchor,
    )  # fmt: skip
    put(dq, part_q.view(-1, heads, span, d), tokens)
    return _Reads(part_x, part_e, df, d_abar.sum(0), d_carried.sum(0), parts_w, parts_s, parts_a)


def _writes(
    call: DeepCall,
    group: Group,
    x: Tensor,
    rooms: Rooms,
    found: Walked,
    reads: _Reads,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    strengths: Tensor,
    scales: Tensor,
    ends: _Ends,
    streams: _Streams,
) -> None:
    """The writes of a group, from its last chunk to its first: to `ends` and `streams`."""
    at, spans, settings, rows = call.at, call.spans, call.settings(widest=16), call.at.rows
    heads, d, v, hidden = call.shape
    lines, span, keys, tokens = call.lines, spans.span, call.keys, group.cutter.keys
    new, zeros, programs = call.eta.new_empty, call.eta.new_zeros, at.batch * heads
    blocks, tiles, some_keys = settings["BLOCKS"], settings["TILES"], keys // settings["BK"]
    factors = torch.stack([found.abar[..., -1], found.carried[..., -1], found.thbar], -1)
    d_factors = torch.zeros_like(factors)
    all_x, all_e = torch.empty_like(reads.x), torch.empty_like(reads.e)
    of_read = torch.empty_like(all_e) if call.corrects else all_e
    of_along = torch.empty_like(rooms.along)
    d_write, d_last = torch.empty_like(found.last), torch.zeros_like(found.last)
    d_masses = zeros(lines if call.limits else 0, keys, spans.window)
    shifts = new(lines, 2, span)
    slopes = new(lines, 6, keys)
    w1, w2, w3 = three(starts_w, starts_w)
    s1, s2, s3 = three(starts_s, starts_w)
    gw1, gw2, gw3 = three(ends.w, ends.w)
    gs1, gs2, gs3 = three(ends.s, ends.w)
    gm1, gm2, gm3 = three(ends.start_w, ends.w)
    gn1, gn2, gn3 = three(ends.start_s, ends.w)
    rw1, rw2, rw3 = three(reads.w, reads.w)
    rs1, rs2, rs3 = three(reads.s, reads.w)
    a1, a2, a3 = three(call.anchors, starts_w)
    ga1, ga2, ga3 = three(ends.anchors, ends.w)
    ra1, ra2, ra3 = three(reads.anchors, reads.w)
    target = cut(call.target, tokens) if call.corrects else all_e
    anchored = target if call.anchored is None else cut(call.anchored, tokens)
    of_anchored = all_e if call.anchored is None else torch.empty_like(all_e)
    anchor = {"ANCHOR": bool(call.anchors)}
    kinds = {"LIMIT": call.limits, "CORRECT": call.corrects}
    reach = {"WINDOW": spans.window, "HALO": spans.halo}

    def some(*names: str) -> dict[str, Any]:
        return {n: settings[n] for n in (*names, "SPAN", "KEYS", "GROUP", *OPTIONS)}

    for n in reversed(range(min(GROUP, at.per_row - group.start))):
        here = (group.start, n, at.per_row)
        where = (*here, lines, heads, d, v, hidden)
        launch(
            writes_backward.factors_backward, (programs, some_keys),
            x, rows, found.f, found.last, w1, gw1, gw2, gw3, gs1, gs2, gs3, rooms.hidden,
            rooms.errors, reads.e, all_e, d_write, d_last, *where, **settings,
        )  # fmt: skip
        launch(
            writes_backward.ends_backward, (programs,),
            rows, w1, w2, w3, s1, s2, s3, a1, a2, a3, gw1, gw2, gw3, gs1, gs2, gs3, d_factors,
            *here, heads, d, v, hidden, **settings, **anchor,
        )  # fmt: skip
        if call.corrects:
            launch(
                online_backward.solve_backward, (programs,),
                rows, rooms.kappa, rooms.before, rooms.inverses, all_e, *here, heads, v,
                **some("BV"),
            )  # fmt: skip
            launch(
                online_backward.system_backward, (programs, some_keys),
                rows, tokens, target, anchored, call.masses, rooms.errors, rooms.bare, rooms.along,
                all_e,
                rooms.features, rooms.kappa, rooms.before, reads.f,
                d_masses, shifts, slopes, *here, heads, v, **some("BK", "BV", "MOMENTUM"),
                **reach, **anchor,
            )  # fmt: skip
        if call.limits:
            launch(
                online_backward.strengths_backward, (programs,),
                rows, tokens, call.alpha, call.eta, call.theta, call.gamma, call.weight, strengths,
                scales, found.window, found.runs, rooms.features, reads.f, d_write, d_factors,
                reads.abar, reads.carried, shifts, slopes, streams.weight, streams.limited,
                streams.held, ends.scale, ends.start_scale, *here, heads,
                **some("BK", "MOMENTUM"), **reach, CHUNK=spans.chunk, CORRECT=call.corrects,
            )  # fmt: skip
            launch(
                online_backward.bare_backward, (programs, some_keys),
                rows, w1, rooms.hidden, rooms.bare, all_e, of_read, of_along, of_anchored,
                rooms.features,
                rooms.gram, rooms.before, found.abar, found.carried, slopes, *here, lines, heads,
                v, hidden, **some("BK", "BV", "BH", "BLOCKS", "GATED", "MOMENTUM"),
                CORRECT=call.corrects, **anchor,
            )  # fmt: skip
        launch(
            writes_backward.outer_backward, (programs, blocks),
            rows, factors, w1, rooms.hidden, rooms.errors, rooms.bare, of_read, rooms.before,
            slopes, gw1, gs1, ga1, gm1, gn1, rw1, rs1, ra1, *here, lines, some_keys, heads, d, v,
            hidden, **settings, L2=call.l2, **kinds, **anchor,
        )  # fmt: skip
        if call.corrects and call.theta is not None:
            launch(
                writes_backward.along_backward, (programs, blocks),
                rows, w1, s1, rooms.hidden, of_along, gw1, gs1, *here, lines, heads, v, hidden,
                **some("BK", "BV", "BH", "GATED"),
            )  # fmt: skip
        launch(
            writes_backward.key_backward, (programs, tiles, some_keys),
            x, rows, found.f, found.last, w2, w3, s2, s3, gw2, gw3, gs2, gs3, rooms.hidden,
            rooms.features, rooms.before, slopes, reads.x, all_x, *where, **settings, **kinds,
        )  # fmt: skip
        launch(
            writes_backward.inner_backward, (programs, blocks, tiles),
            x, rows, factors, rooms.hidden, gw2, gw3, gs2, gs3, ga2, ga3, gm2, gm3, gn2, gn3, rw2,
            rw3, rs2, rs3, ra2, ra3, *where, **settings, CORRECT=call.corrects, **anchor,
        )  # fmt: skip
    put(streams.k, all_x.view(-1, heads, keys, d), tokens)
    put(streams.target, -all_e.view(-1, heads, keys, v), tokens)
    if streams.anchored is not None:
        put(streams.anchored, of_anchored.view(-1, heads, keys, v), tokens)
    if streams.masses is not None:
        put(streams.masses[None], d_masses.view(-1, heads, keys, spans.window), tokens)
    reads.abar[..., -1] += d_factors[..., 0]
    reads.carried[..., -1] += d_factors[..., 1]
    own, halo = slice(None, span), slice(span, None)
    gradient = Coefficients(
        reads.f[..., own], reads.f[..., halo], reads.abar, reads.carried, d_write[..., own],
        d_write[..., halo], d_last[..., own], d_last[..., halo], d_factors[..., 2],
    )  # fmt: skip
    coefficients.backward(
        call.alpha, strengths if call.limits else call.eta, call.theta, call.gamma, group.at,
        spans, Coefficients._make(g.contiguous() for g in gradient),
        (streams.alpha, streams.eta, streams.theta, streams.gamma),
    )  # fmt: skip
