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
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.coefficients import Coefficients
from atlas_blocks.kernels.deep import reads_backward, writes_backward
from atlas_blocks.kernels.deep.call import GROUP, Call, Rooms, groups, joined, three
from atlas_blocks.kernels.deep.cutter import cut, put
from atlas_blocks.kernels.deep.forward import walk
from atlas_blocks.kernels.tiles import launch


class Gradients(NamedTuple):
    """Of the fields of `Call` of these names, and of scale."""

    q: Tensor
    k: Tensor
    target: Tensor
    gates: tuple[Tensor, Tensor, Tensor | None, Tensor]  # alpha, eta, theta, gamma
    mass: Tensor | None
    w: list[Tensor]
    s: list[Tensor]
    m: list[Tensor]
    scale: Tensor


# Rooms: z, u, h, p2, p3 of the keys, as forward.py leaves them; the reads' dh, dp2, dp3; z_t, u_t
# and their gradients, where later the whole dh, dp2, dp3 are; dz and du where dh and dp2 were.
ROOMS = 12


def backward(
    call: Call,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    scales: Tensor,
    dy: Tensor,
    dw: list[Tensor],
    ds: list[Tensor],
    dm: list[Tensor],
    d_scale: Tensor,
) -> Gradients:
    """From the gradients of y, and of W, S, M^(0) and scale after the call, to those of what the
    call had. starts_w, starts_s, scales: at the chunks' starts, as `deep.forward` returns them."""
    at, spans, settings = call.at, call.spans, call.settings(widest=16)
    heads, d, v, hidden = call.shape
    lines, keys = at.batch * GROUP * heads, spans.span + spans.halo
    discount = call.mass is not None
    whole = at.ends_whole()[:, None, None, None]
    gw = [torch.where(whole, g + m, g) for g, m in zip(dw, dm, strict=True)]
    gm = [torch.where(whole, 0.0, m) for m in dm]
    gs, d_scale = [g.clone() for g in ds], d_scale.clone()
    found_m = [torch.zeros_like(m) for m in dm]
    f32 = call.eta.new_zeros
    dq, dk, dv = (f32(*x.shape) for x in (call.q, call.k, call.target))
    d_gates = [torch.zeros_like(g) for g in (call.alpha, call.eta, call.gamma)]
    d_theta = None if call.theta is None else torch.zeros_like(call.theta)
    held_theta = torch.zeros_like(call.eta)  # of theta, through what is held
    d_eta = torch.zeros_like(call.eta)
    d_mass = None if call.mass is None else torch.zeros_like(call.mass)
    strengths, rooms = torch.empty_like(call.eta), Rooms.of(ROOMS, at, spans, call.w)
    new = call.eta.new_empty
    parts_w, parts_s = ([new(lines, *x.shape[2:]) for x in g] for g in (call.w, call.s))
    for group in reversed(groups(at, spans)):
        found = walk(
            call, group, rooms, starts_w, starts_s, starts_w, starts_s, strengths, scales, d_scale,
            forward=False,
        )  # fmt: skip
        f = joined(found.own, found.halo)
        write = joined(found.write_own, found.write_halo)
        last = joined(found.last_own, found.last_halo)
        ends = torch.stack([found.abar[..., -1], found.carried[..., -1], found.thbar], -1)
        cutter = group.cutter
        x = cut(call.k, cutter.keys)
        part_q, part_x = new(lines, spans.span, d), new(lines, keys, d)
        part_e, df = torch.empty_like(rooms.errors), torch.empty_like(f)
        scores, spread = torch.empty_like(f), torch.empty_like(f)
        blocks, tiles, keys_ = settings["BLOCKS"], settings["TILES"], keys // settings["BK"]
        d_abar, d_carried = (f32(blocks + tiles, *found.abar.shape) for _ in range(2))
        w1, w2, w3 = three(starts_w, starts_w)
        s1, s2, s3 = three(starts_s, starts_w)
        rw1, rw2, rw3 = three(parts_w, parts_w)
        rs1, rs2, rs3 = three(parts_s, parts_w)
        q, g = cut(call.q, cutter.tokens), cut(dy, cutter.tokens)
        where = (group.start, at.per_row, lines, heads, d, v, hidden)
        launch(
            reads_backward.scores_backward, (at.batch * heads, GROUP),
            q, x, g, f, found.abar, found.carried, at.rows, w2, w3, s2, s3, rooms.hidden,
            rooms.errors, scores, spread, part_e, df, *where, **settings,
        )  # fmt: skip
        launch(
            reads_backward.read_backward, (at.batch * heads, GROUP, blocks),
            g, found.abar, found.carried, at.rows, w1, s1, rooms.hidden, spread, d_abar, d_carried,
            rw1, rs1, *where, **settings,
        )  # fmt: skip
        launch(
            reads_backward.left_backward, (at.batch * heads, GROUP, keys_),
            q, x, f, at.rows, rooms.hidden, scores, spread, df, *where, **settings,
        )  # fmt: skip
        launch(
            reads_backward.query_backward, (at.batch * heads, GROUP, tiles),
            q, x, found.abar, found.carried, at.rows, w2, w3, s2, s3, rooms.hidden, spread, part_q,
            part_x, d_abar, d_carried, rw2, rw3, rs2, rs3, *where, **settings,
        )  # fmt: skip
        d_abar, d_carried = d_abar.sum(0), d_carried.sum(0)
        window = call.window(group) if discount else found
        c, thbar = joined(window.own, window.halo), window.carried
        all_x, all_e = torch.empty_like(part_x), torch.empty_like(part_e)
        d_write, d_last = torch.empty_like(write), torch.empty_like(last)
        d_ends = torch.zeros_like(ends)
        squares, slopes = new(lines, 2, spans.span, spans.span), new(lines, 6, keys)
        m1, m2, m3 = three(call.m, starts_w)
        gw1, gw2, gw3 = three(gw, gw)
        gs1, gs2, gs3 = three(gs, gw)
        gm1, gm2, gm3 = three(gm, gw)
        dm1, dm2, dm3 = three(found_m, gw)
        begun = {"BEGUN": bool(call.m)}
        for n in reversed(range(min(GROUP, at.per_row - group.start))):
            where = (group.start, n, at.per_row, lines, heads, d, v, hidden)
            launch(
                writes_backward.factors_backward, (at.batch * heads, keys_),
                x, at.rows, cutter.tokens, write, last, m1, w1, gw1, gw2, gw3, gs1, gs2, gs3,
                rooms.hidden, rooms.errors, part_e, all_e, d_write, d_last, *where, **settings,
                **begun,
            )  # fmt: skip
            launch(
                writes_backward.ends_backward, (at.batch * heads,),
                at.rows, cutter.tokens, w1, w2, w3, s1, s2, s3, gw1, gw2, gw3, gs1, gs2, gs3,
                d_ends, call.alpha, c, thbar, df, d_carried, d_write, slopes, group.start, n,
                at.per_row, heads, d, v, hidden, **settings, DISCOUNT=discount,
            )  # fmt: skip
            if discount:
                launch(
                    writes_backward.discount_backward, (at.batch * heads,),
                    x, at.rows, cutter.tokens, cutter.keys, cutter.filled, call.eta,
                    call.theta, call.gamma, call.mass, scales, strengths, rooms.hidden,
                    rooms.errors, rooms.features, rooms.grams, squares, slopes, all_e, d_eta,
                    held_theta, d_mass, d_scale, *where,
                    **settings, WINDOW=spans.window, HALO=spans.halo,
                )  # fmt: skip
            launch(
                writes_backward.outer_backward, (at.batch * heads, blocks),
                at.rows, cutter.tokens, ends, m1, w1, rooms.hidden, rooms.errors, rooms.features,
                rooms.grams, squares, slopes, all_e, gw1, gs1, gm1, dm1, rw1, rs1, *where,
                **settings, **begun, L2=call.l2, DISCOUNT=discount,
            )  # fmt: skip
            launch(
                writes_backward.key_backward, (at.batch * heads, tiles, keys_),
                x, at.rows, cutter.tokens, write, last, m2, m3, w2, w3, gw2, gw3, gs2, gs3,
                rooms.hidden, squares, slopes, part_x, all_x, *where, **settings, **begun,
                DISCOUNT=discount,
            )  # fmt: skip
            launch(
                writes_backward.inner_backward, (at.batch * heads, blocks, tiles),
                x, at.rows, cutter.tokens, ends, rooms.hidden, gw2, gw3, gs2, gs3, gm2, gm3, dm2,
                dm3, rw2, rw3, rs2, rs3, *where, **settings,
            )  # fmt: skip
        put(dq, part_q.view(-1, heads, spans.span, d), cutter.tokens)
        put(dk, all_x.view(-1, heads, keys, d), cutter.keys)
        put(dv, -all_e.view(-1, heads, keys, v), cutter.keys)
        d_abar[..., -1] += d_ends[..., 0]
        d_carried[..., -1] += d_ends[..., 1]
        own, halo = slice(None, spans.span), slice(spans.span, None)
        gradient = Coefficients(
            df[..., own], df[..., halo], d_abar, d_carried, d_write[..., own], d_write[..., halo],
            d_last[..., own], d_last[..., halo], d_ends[..., 2],
        )  # fmt: skip
        gradient = Coefficients._make(g.contiguous() for g in gradient)
        into = (d_gates[0], d_gates[1], d_theta, d_gates[2])
        eta = strengths if discount else call.eta
        coefficients.backward(
            call.alpha, eta, call.theta, call.gamma, group.at, spans, gradient, into
        )
    if discount:
        d_gates[1] = d_eta
        d_theta = None if d_theta is None else d_theta + held_theta
    gates = (d_gates[0], d_gates[1], d_theta, d_gates[2])
    return Gradients(dq, dk, dv, gates, d_mass, gw, gs, found_m, d_scale)
