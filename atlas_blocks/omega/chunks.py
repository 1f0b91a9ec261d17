"""The part of the dual form that needs no memory, computed for all chunks of a call at once.

B batch, T tokens, H heads, G = B H; Dk, Dv key and value width, Dphi width after the feature map;
c window, b chunk, N chunks, L tokens of a chunk (b, or less at the ends), E = c - 1 + L keys that a
chunk sees, the halo's first. Per chunk: A decay matrix, C = Theta Gam window weights after
momentum, P = A diag(eta), see specification section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.derivatives import transformed
from atlas_blocks.omega import online
from atlas_blocks.omega.feature_maps import FeatureMap
from atlas_blocks.omega.record import Record
from atlas_blocks.omega.rule import Rule

# `online.scales_before`, or another form of it.
Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


class Tokens(NamedTuple):
    """All tokens of a call. Keys and values begin with the n of the history, gates with its n_g,
    n where the rule rewinds, else 0."""

    q_raw: Tensor  # [B, T, H, Dk]
    k_raw: Tensor  # [B, n + T, H, Dk]
    q: Tensor  # phi(q)  [B, T, H, Dphi]
    k: Tensor  # phi(k)  [B, n + T, H, Dphi]
    v: Tensor  # [B, n + T, H, Dv]
    alpha: Tensor  # [B, n_g + T, H]
    eta: Tensor  # [B, n_g + T, H]
    theta: Tensor | None  # [B, n_g + T, H]
    seen: Tensor  # gamma where the window has not reached back over the start [B, n_g + T, H, c]
    masses: Tensor | None  # see `online.masses`, where writes are limited  [B, n_g + T, H, c]
    weight: Tensor | None  # sum_j gamma[t, j], likewise  [B, n_g + T, H]
    initial: Tensor | None  # what M_0 reads of the keys, where errors are corrected and decay leads
    # there  [B, n + T, H, Dv]


class Piece(NamedTuple):
    """Consecutive chunks of one size."""

    first: int  # their first token
    span: int  # tokens a chunk
    count: int
    # Where they begin in their chunk: 0, unless an earlier call began it. Where the rule rewinds,
    # the chunk's tokens before them are done again.
    place: int


@dataclass(frozen=True)
class Coefficients(Record):
    """What W_t takes of every gradient and of S^(0): a row per token, or only the last one's."""

    written: Tensor  # P C  [N, G, L, E]
    carried: Tensor | None  # P thbar  [N, G, L, 1]

    def rows(self, first: int) -> Coefficients:
        """Those of the tokens from `first` on."""
        return self.map(lambda t: t[..., first:, :])


@dataclass(frozen=True)
class Write(Record):
    """What takes the memory from a chunk's start to its end."""

    k: Tensor  # phi(k)  [N, G, E, Dphi]
    target: Tensor  # what M(k) without its residual should be: v - r(k), or v  [N, G, E, Dv]
    eta: Tensor  # limited already unless `online` is there  [N, G, L]
    abar: Tensor  # product of all alpha  [N, G, 1, 1]
    thbar: Tensor | None  # running product of theta  [N, G, L, 1]
    thbar_last: Tensor | None  # [N, G, 1, 1]
    window: Tensor  # C = Theta Gam  [N, G, L, E]
    window_last: Tensor  # last row of C as a column  [N, G, E, 1]
    online: online.Chunk | None  # where limits and corrections wait for the memory
    correction: online.Correction | None  # where they are known ahead
    scale: Tensor | None  # after the chunk, likewise, with momentum  [N, G]
    last: Coefficients | None  # for gradient descent; known ahead unless `online` is there
    initial: Tensor | None  # what M_0 reads of each key, where decay leads there  [N, G, E, Dv]

    def coefficients(self, decay: Tensor, eta: Tensor) -> Coefficients:
        """Those for a write strength eta [..., L] and A [..., L, L], of one chunk or of all."""
        step = decay * eta.unsqueeze(-2)  # P
        return Coefficients(step @ self.window, None if self.thbar is None else step @ self.thbar)


@dataclass(frozen=True)
class Read(Record):
    """What reads the memory at every new token of a chunk, R of its L."""

    q: Tensor  # phi(q)  [N, G, R, Dphi]
    residual: Tensor | None  # r(q)  [N, G, R, Dv]
    dots: Tensor  # phi(q) . phi(k)  [N, G, R, E]
    abar: Tensor  # running product of alpha  [N, G, R, 1]
    decay: Tensor | None  # A, where each token has a step of U  [N, G, R, L]
    coefficients: Coefficients | None  # for gradient descent, where they are known ahead


def cut(
    rule: Rule,
    feature_map: FeatureMap | None,
    x: Tokens,
    piece: Piece,
    scale: Tensor,
    scan: Scan = online.scales_before,
) -> tuple[Write, Read]:
    """Cut a piece's chunks out of a call. scale [G]: see `online.running_scale`, before them."""
    first, span, count, place = piece
    n, n_g = (t.shape[1] - x.q.shape[1] for t in (x.k, x.alpha))
    again = place if rule.rewinds else 0
    halo = rule.window - 1

    def chunks(t: Tensor, begin: int) -> Tensor:
        """[B, T, H, ...] -> [N, B, H, L, ...], the first chunk at token `begin`."""
        parts = t[:, begin : begin + span * count].unflatten(1, (count, span))
        return parts.transpose(0, 1).transpose(2, 3)

    def with_past(t: Tensor, past: int, n: int) -> Tensor:
        """[B, n + T, H, ...] -> [N, G, past + L, ...], each chunk with the tokens before it."""
        begin = n + first - past
        if count == 1:
            return t[:, begin : begin + past + span].transpose(1, 2).flatten(0, 1).unsqueeze(0)
        # Not `unfold`: its gradient is a scatter, and Inductor's, for several threads of a CPU, may
        # write out of bounds (torch 2.13, pytorch/pytorch#191837). In eager both take as long.
        part = past % span
        parts = [chunks(t, n + first - back) for back in range(past - part, -1, -span)]
        if part:
            parts.insert(0, chunks(t, begin)[:, :, :, :part])
        # Contiguous with one head too, where `flatten` is a view: Inductor makes a number of the
        # strides of that (torch 2.13), and the graph then fails at another length.
        return torch.cat(parts, 3).flatten(1, 2).contiguous()

    q = q_raw = with_past(x.q_raw, 0, 0)
    k = k_raw = with_past(x.k_raw, halo + again, n)
    if feature_map is not None:
        q, k = with_past(x.q, 0, 0), with_past(x.k, halo + again, n)
    residual = has_residual(rule, x)
    target = with_past(x.v, halo + again, n)
    if residual and rule.criterion.reads:
        target = target - k_raw
    alpha, eta, seen = (with_past(t, again, n_g) for t in (x.alpha, x.eta, x.seen))
    theta = None if x.theta is None else with_past(x.theta, again, n_g)
    masses = None if x.masses is None else with_past(x.masses, halo + again, n_g)
    weight = None if x.weight is None else with_past(x.weight, again, n_g)
    gram = None
    if rule.corrects:
        gram = kernel(feature_map, k, k, k_raw, k_raw)
    pending = None
    if masses is not None and gram is not None and halo:
        pending = online.pending_matrix(masses)
        # What windows begun before the chunk will write of the halo; nothing has yet.
        pending = torch.cat(
            [pending[..., halo : halo + 1, :].expand(*pending.shape[:-2], halo, -1),
             pending[..., halo:, :]], -2,
        )  # fmt: skip
    initial = None if x.initial is None else with_past(x.initial, halo + again, n)
    write, decay, abar, known = write_of(
        rule,
        k,
        target,
        alpha,
        eta,
        theta,
        window_matrix(seen, halo),
        masses,
        weight,
        gram,
        pending,
        initial,
        scale,
        scan,
    )
    dots = kernel(feature_map, q, k, q_raw, k_raw)
    read = Read(
        q=q,
        residual=q_raw if residual else None,
        dots=dots,
        abar=abar[..., again:, :],
        decay=None if rule.linear else decay[..., again:, :],
        coefficients=None if known is None else known.rows(again),
    )
    return write, read


def has_residual(rule: Rule, x: Tokens) -> bool:
    """Whether M adds the un-lifted key or query."""
    return rule.structure.residual and x.q_raw.shape[-1] == x.v.shape[-1]


def kernel(
    feature_map: FeatureMap | None, a: Tensor, b: Tensor, a_raw: Tensor, b_raw: Tensor
) -> Tensor:
    """phi(a) . phi(b) of all pairs, from features or what they are features of."""
    cheaper = getattr(feature_map, "kernel", None)
    return a @ b.mT if cheaper is None else cheaper(a_raw, b_raw)


def write_of(
    rule: Rule,
    k: Tensor,
    target: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    seen: Tensor,
    masses: Tensor | None,
    weight: Tensor | None,
    gram: Tensor | None,
    pending: Tensor | None,
    initial: Tensor | None,
    scale: Tensor,
    scan: Scan,
) -> tuple[Write, Tensor, Tensor, Coefficients | None]:
    """The write of chunks from what is cut, with A, abar and the coefficients if they are known.

    k, target: of the keys; alpha, eta, theta: of the tokens [..., L]; seen: Gam [..., L, E];
    masses [..., E, c], weight [..., L], gram and pending [..., E, E]: see `online`; scale: before
    the first chunk.
    """
    decay, abar = decay_matrix(alpha)
    window, momentum, thbar = seen, None, None
    if theta is not None:
        momentum, thbar = decay_matrix(theta)
        window = momentum @ window
    write = Write(
        k=k,
        target=target,
        eta=eta,
        abar=abar[..., -1:, :],
        thbar=thbar,
        thbar_last=None if thbar is None else thbar[..., -1:, :],
        window=window,
        window_last=window[..., -1:, :].mT,
        online=None,
        correction=None,
        scale=None,
        last=None,
        initial=initial,
    )
    if masses is not None and weight is not None:
        squares = k.square().sum(-1)
        chunk = online.Chunk(
            mass=masses[..., 0],
            held=seen > 0,
            weight=weight,
            theta=theta,
            momentum=momentum,
            squares=squares,
            gram=gram,
            pending=pending,
            decay=decay,
            abar=None if gram is None else abar,
        )
        if not rule.structure.linear:
            return replace(write, online=chunk), decay, abar, None
        write, known = _known_ahead(write, chunk, scale, scan)
    elif rule.linear:
        known = write.coefficients(decay, write.eta)
    else:
        return write, decay, abar, None
    return replace(write, last=known.rows(-1)), decay, abar, known


def _known_ahead(
    write: Write, x: online.Chunk, scale: Tensor, scan: Scan
) -> tuple[Write, Coefficients]:
    """A matrix memory's kappa is phi(k) . phi(k): its limits and corrections wait for nothing."""
    window = online.window_scale(x.squares, x)
    own, after = online.chunk_scale(window, x), None
    if write.thbar is not None and write.thbar_last is not None:
        last, keep = own[..., -1], write.thbar_last[..., 0, 0]
        scale = scan(last, keep, scale)
        after = last + keep * scale
    eta = online.limited(write.eta, x, window, online.running_scale(own, write.thbar, scale))
    known = write.coefficients(x.decay, eta)
    found = None
    if x.gram is not None:
        found = online.correction(x, x.gram, x.squares, known.written, known.carried)
    return replace(write, eta=eta, correction=found, scale=after), known


def decay_matrix(gate: Tensor) -> tuple[Tensor, Tensor]:
    """A[t, s] = prod_{r = s+1..t} gate_r for s <= t, else 0, and the running product.

    gate: [..., L] -> [..., L, L], [..., L, 1]. Products, not logarithms: exact at a gate of 0, and
    in its gradient there.
    """
    decay: Tensor = _decay(gate) if transformed() else _Decay.apply(gate)  # pyright: ignore
    return decay, gate[..., :1, None] * decay[..., :1]


def _decay(gate: Tensor) -> Tensor:
    """[..., L] -> A [..., L, L]."""
    span = gate.shape[-1]
    after = torch.ones(span, span, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(after, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()


class _Decay(torch.autograd.Function):
    """The gradient of a cumulative product has a case for zeros, and takes many small steps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        decay = _decay(gate)
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """A[t, s] = A[t, r] gate_r A[r-1, s] for s < r <= t."""
        (decay,) = ctx.saved_tensors
        through = F.pad((grad @ decay.mT)[..., :-1], (1, 0))  # sum_s dA[t, s] A[r-1, s]
        return (decay * through).sum(-2)


def window_matrix(gamma: Tensor, extra: int) -> Tensor:
    """Gam[t, i] = gamma[t, j] where key i is token t - j; keys begin `extra` before the chunk.

    gamma: [..., L, c] -> [..., L, extra + L].
    """
    span, window = gamma.shape[-2:]
    # Rows one longer than the matrix, laid end to end: each starts one place further right.
    width = extra + span
    rows = F.pad(gamma.flip(-1), (extra - (window - 1), span))
    return rows.flatten(-2)[..., : span * width].unflatten(-1, (span, width))
