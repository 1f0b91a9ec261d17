"""The rule with phi* exact, block by block: memory in proportion to the length, both directions.

The memory is never formed. It is M = sum_i a_i phi(k_i)^T over all keys so far, so a_i, one row a
key, is all that there is, and a read is M(phi(x)) = sum_i a_i exp(scale x . k_i).

G = B H; T tokens, S keys so far (S0 at the call's start), D key width, Dv value width, W columns of
a row a_i (values, then what the normaliser needs); c window, b chunk. A block is one chunk or
several: L tokens, e keys before them that it sees again, E pairs (chunk, key that it sees).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_blocks.functional.chunks import decay_matrix, discounted, window_matrix
from atlas_blocks.functional.omega_rule import pieces

# Pairs that one block solves for, and tokens of a block where chunks do not matter.
BLOCK = 64
# The normaliser's smallest share of the sum of its terms' sizes.
FLOOR = 1 / 16
# Exponents above this belong to terms whose factor makes them vanish.
CEILING = 80.0


class Settings(NamedTuple):
    """What defines the function besides tensors. See `kernel_attention`."""

    objective: str
    scale: float
    normalise: bool
    chunk_size: int
    window: int
    write_discount: bool

    @property
    def chunk(self) -> int:
        """b, or any length where the memory at a chunk's start is never looked at."""
        return self.chunk_size if self.chunked else BLOCK

    @property
    def chunked(self) -> bool:
        """Whether chunks are part of the function."""
        return self.objective == "l2" or self.write_discount

    @property
    def history(self) -> int:
        """How many past tokens are looked at again: the window's halo, the discount's chunk."""
        return max(self.window - 1, self.chunk_size - 1 if self.write_discount else 0)


class Tokens(NamedTuple):
    """A call's tensors, all of one dtype."""

    q: Tensor  # [G, T, D]
    keys: Tensor  # [G, S0 + T, D], S0 >= the history
    values: Tensor  # with a last column of ones to normalise  [G, c - 1 + T, Dv | Dv + 1]
    alpha: Tensor  # [G, T]
    eta: Tensor  # [G, T]
    gamma: Tensor  # [G, T, c]
    writes: Tensor  # m_s of the chunk so far and of the tokens  [G, n + T], n = 0 or b - 1
    rows: Tensor  # a_i  [G, S0, W]
    start: Tensor  # a_i at the start of the begun chunk  [G, S0, W]


class Block(NamedTuple):
    """Where a block lies."""

    first: int  # its first token
    length: int
    place: int  # of that token in its chunk: 0, unless an earlier call began the chunk


def blocks(s: Settings, length: int, position: int) -> list[Block]:
    """The rest of a begun chunk, whole chunks by the group, a begun one."""
    group = max(1, BLOCK // (s.chunk + s.window - 1)) * s.chunk
    found = []
    for first, span, count, place in pieces(length, position if s.chunked else 0, s.chunk):
        stop = first + span * count
        step = group if span == s.chunk else span
        found += [Block(i, min(step, stop - i), place) for i in range(first, stop, step)]
    return found


class Pairs(NamedTuple):
    """Every (chunk, key that it sees) of a block, chunk by chunk."""

    key: Tensor  # which of the e + L keys  [E]
    begin: Tensor  # the first token of the chunk  [E]
    own: Tensor  # whether a token belongs to the pair's chunk  [L, E]
    earlier: Tensor  # whether pair j belongs to an earlier chunk than pair i  [E, E]
    chunks: int


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # or what inference has left here could not be differentiated with
def _pairs(length: int, chunk: int, window: int, extra: int, device: torch.device) -> Pairs:
    starts = range(0, length, chunk)
    ends = [min(i + chunk, length) for i in starts]
    lists = [
        torch.arange(extra + i - window + 1, extra + j) for i, j in zip(starts, ends, strict=True)
    ]
    begin = torch.cat([torch.full((len(x),), i) for x, i in zip(lists, starts, strict=True)])
    token = torch.arange(length)[:, None] // chunk
    return Pairs(
        key=torch.cat(lists).to(device),
        begin=begin.to(device),
        own=(token == begin // chunk).to(device),
        earlier=(begin < begin[:, None]).to(device),
        chunks=len(lists),
    )


def kernel_sum(*terms: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """sum of (factors * exp(scores)) @ values over the terms, as (sum, shift): exp(shift) sum.

    scores: [G, L, S]; factors: >= 0, the same or [G, L, 1]; values: [G, S, W]. No exponential
    overflows: each is taken relative to the largest term of its row, the sizes of factors and
    values included. shift: [G, L, 1], outside the graph; the product does not depend on it.
    """
    terms = tuple(t for t in terms if t[0].shape[-1])
    with torch.no_grad():
        sizes = [values.abs().amax(-1).log().unsqueeze(-2) for _, _, values in terms]
        tops = [
            (scores + factors.log() + size).amax(-1, keepdim=True)
            for (scores, factors, _), size in zip(terms, sizes, strict=True)
        ]
        shift = functools.reduce(torch.maximum, tops)
        shift = torch.where(shift == -torch.inf, 0.0, shift)
        # Of a value that is not quite zero the inverse must not overflow either.
        sizes = [torch.where(size == -torch.inf, 0.0, size.clamp(min=-CEILING)) for size in sizes]
    total: Tensor | None = None
    for (scores, factors, values), size in zip(terms, sizes, strict=True):
        weights = factors * (scores + (size - shift)).clamp(max=CEILING).exp()
        part = weights @ (values * (-size).exp().mT)
        total = part if total is None else total + part
    assert total is not None
    return total, shift


def normalised(total: Tensor) -> Tensor:
    """y = sum / max(z, FLOOR p): columns [values, z, p], p the sizes of the terms of z added up."""
    z, p = total[..., -2:-1], total[..., -1:]
    below = torch.maximum(z, FLOOR * p)
    stored = below != 0  # never negative; NaN goes on
    return torch.where(stored, total[..., :-2] / torch.where(stored, below, 1.0), 0.0)


class Part(NamedTuple):
    """A block's share of the tokens."""

    q: Tensor  # [G, L, D]
    keys: Tensor  # [G, e + L, D]
    values: Tensor  # [G, c - 1 + L, Dv | Dv + 1]
    alpha: Tensor  # [G, L]
    eta: Tensor  # [G, L]
    gamma: Tensor  # [G, L, c]
    writes: Tensor  # of the chunk so far and the tokens  [G, place + L], or [G, 0]
    past: Tensor  # all earlier keys  [G, S, D]


def block_step(
    s: Settings, place: int, x: Part, rows: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y [G, L, Dv]; what the block's pairs add to the rows a_i [G, E, W]; how the old fade [G].

    rows: a_i of all earlier keys [G, S, W]; start: those at the start of the begun chunk, the same
    where place is 0.
    """
    q, keys, values, alpha, eta, gamma, writes, past = x
    length, extra = q.shape[1], keys.shape[1] - q.shape[1]
    pairs = _pairs(length, length if place else s.chunk, s.window, extra, q.device)
    decay, abar = decay_matrix(alpha)
    if s.write_discount:
        eta = _discount(s, place, keys, eta, writes)
    seen = window_matrix(gamma, extra)[..., pairs.key] * pairs.own
    written = (decay * eta.unsqueeze(-2)) @ seen  # P C  [G, L, E]
    k, u = keys[:, pairs.key], values[:, pairs.key - (extra - s.window + 1)]
    if s.objective == "l2":
        width = values.shape[-1]
        # u_i = v_i - M^(0)(k_i), M^(0) being what the past has become at the pair's chunk start,
        if past.shape[1]:
            one = k.new_ones(1, 1, 1)
            read, shift = kernel_sum((s.scale * (k @ past.mT), one, start[..., :width]))
            faded = torch.cat([torch.ones_like(abar[:, :1]), abar], 1)[:, pairs.begin]
            u = u - faded * (shift.exp() * read)
        if pairs.chunks > 1:
            # and what earlier chunks of the block have written, whose u are unknowns too.
            so_far = torch.cat([torch.zeros_like(written[:, :1]), written], 1)[:, pairs.begin]
            scores = (s.scale * (k @ k.mT)).masked_fill(~pairs.earlier, 0.0)
            system = so_far * scores.exp()
            u = torch.linalg.solve_triangular(system, u, upper=False, unitriangular=True)
    if s.normalise:
        u = torch.cat([u, u[..., -1:].abs()], -1)
    total, shift = kernel_sum(
        (s.scale * (q @ past.mT), abar, rows), (s.scale * (q @ k.mT), written, u)
    )
    y = normalised(total) if s.normalise else shift.exp() * total
    return y, written[:, -1].unsqueeze(-1) * u, abar[:, -1, 0]


def _discount(s: Settings, place: int, keys: Tensor, eta: Tensor, writes: Tensor) -> Tensor:
    """eta after the discount of specification section 9b."""
    length = eta.shape[1]
    k = keys[:, keys.shape[1] - place - length :]
    kappa = (s.scale * (k @ k.mT)).exp()
    own = kappa.diagonal(dim1=-2, dim2=-1)[:, place:]
    chunk = torch.arange(place + length, device=k.device) // s.chunk
    return discounted(eta, writes, kappa * (chunk == chunk[:, None]), own)


def _cut(s: Settings, x: Tokens, block: Block) -> Part:
    first, length, place = block
    stop = first + length
    before = x.keys.shape[1] - x.q.shape[1]
    extra = max(s.window - 1, place if s.write_discount else 0)
    n = x.writes.shape[1] - x.q.shape[1]
    writes = x.writes[:, n + first - place : n + stop] if s.write_discount else x.writes
    return Part(
        q=x.q[:, first:stop],
        keys=x.keys[:, before + first - extra : before + stop],
        values=x.values[:, first : s.window - 1 + stop],
        alpha=x.alpha[:, first:stop],
        eta=x.eta[:, first:stop],
        gamma=x.gamma[:, first:stop],
        writes=writes,
        past=x.keys[:, : before + first],
    )


def _targets(s: Settings, x: Tokens, block: Block) -> Tensor:
    """The key that each pair of the block adds to, counted from the first of all."""
    first, length, place = block
    extra = max(s.window - 1, place if s.write_discount else 0)
    pairs = _pairs(length, length if place else s.chunk, s.window, extra, x.q.device)
    return pairs.key + (x.keys.shape[1] - x.q.shape[1] + first - extra)


def walk(
    s: Settings, position: int, x: Tokens, kept: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outside autograd: y [G, T, Dv], the rows after T tokens and those at the chunk's start.

    kept: gets what every block adds, and how it lets the old rows fade, for the backward.
    """
    groups, tokens = x.q.shape[:2]
    before = x.rows.shape[1]

    def grown(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(groups, tokens, t.shape[2])], 1)

    rows, start, outputs = grown(x.rows), grown(x.start), []
    plan = blocks(s, tokens, position)
    begun = _begun(s, position, tokens)
    for n, block in enumerate(plan):
        start = rows if block.place == 0 else start
        past = slice(0, before + block.first)
        y, added, fade = block_step(
            s, block.place, _cut(s, x, block), rows[:, past], start[:, past]
        )
        if begun and n == len(plan) - 1 and start is rows:
            rows = rows.clone()  # in place from here, and what the chunk began with is kept
        rows[:, past] *= fade[:, None, None]
        rows.index_add_(1, _targets(s, x, block), added)
        outputs.append(y)
        if kept is not None:
            kept.append((added, fade))
    return torch.cat(outputs, 1), rows, start if begun else rows


def _begun(s: Settings, position: int, tokens: int) -> bool:
    """Whether a call ends inside a chunk."""
    return s.chunked and (position + tokens) % s.chunk != 0


class Rebuilt:
    """The rows at the start of any block, from what all blocks added: no copy a block is kept."""

    def __init__(self, s: Settings, x: Tokens, plan: list[Block], kept: list[Tensor]) -> None:
        count = len(plan)
        added, fades = kept[:count], kept[count:]
        self.rows, self.added, self.fades = x.rows, torch.cat(added, 1), torch.stack(fades, 1)
        self.target = torch.cat([_targets(s, x, block) for block in plan])
        sizes = torch.tensor([t.shape[1] for t in added], device=x.q.device)
        self.block = torch.arange(count, device=x.q.device).repeat_interleave(sizes)
        self.ends = [0, *sizes.cumsum(0).tolist()]

    def at(self, n: int, known: int) -> Tensor:
        """The rows of the first `known` keys before block n, [G, known, W]."""
        # How a row of before block m has faded: the product of all fades from m to n - 1.
        ones = torch.ones_like(self.fades[:, :1])
        faded = torch.cat([ones, self.fades[:, :n].flip(1).cumprod(1)], 1).flip(1)
        rows = self.rows.new_zeros(self.rows.shape[0], known, self.rows.shape[2])
        rows[:, : self.rows.shape[1]] = self.rows * faded[:, :1, None]
        end = self.ends[n]
        added = self.added[:, :end] * faded[:, 1:][:, self.block[:end], None]
        return rows.index_add_(1, self.target[:end], added)


class KernelWalk(torch.autograd.Function):
    """`walk`; its backward takes the blocks in reverse and computes each again."""

    @staticmethod
    def forward(ctx: Any, s: Settings, position: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        kept: list[tuple[Tensor, Tensor]] = []
        y, rows, start = walk(s, position, Tokens(*tensors), kept)
        ctx.settings, ctx.position = s, position
        ctx.save_for_backward(*tensors, *(t for t, _ in kept), *(t for _, t in kept))
        # Two results may not be one tensor.
        return y, rows, start.clone() if start is rows else start

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(Tokens._fields)
        x, kept = Tokens(*ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        with torch.autocast(x.q.device.type, enabled=False):
            return None, None, *_backward(ctx.settings, ctx.position, x, kept, grads)


def _backward(
    s: Settings, position: int, x: Tokens, kept: list[Tensor], grads: Sequence[Tensor]
) -> Tokens:
    """Gradients of the tokens. grads: of y and of both results' rows."""
    dy, drows, dstart = grads
    plan = blocks(s, x.q.shape[1], position)
    rebuilt = Rebuilt(s, x, plan, kept)
    total = Tokens(*(torch.zeros_like(t) for t in x))
    begun = _begun(s, position, x.q.shape[1])
    drows = drows.clone() if begun else drows + dstart
    before = x.rows.shape[1]
    for n in reversed(range(len(plan))):
        block = plan[n]
        known = before + block.first
        rows = rebuilt.at(n, known)
        start = rows if block.place == 0 else x.start
        with torch.enable_grad():
            parts = Part(*(t.detach().requires_grad_() for t in _cut(s, x, block)))
            leaf = rows.detach().requires_grad_()
            begin = leaf if start is rows else start.detach().requires_grad_()
            results = block_step(s, block.place, parts, leaf, begin)
        dout = dy[:, block.first : block.first + block.length]
        dadded = drows[:, _targets(s, x, block)]
        dfade = (drows[:, :known] * rows).sum((1, 2))
        wanted = [*parts, leaf, *([] if begin is leaf else [begin])]
        found = torch.autograd.grad(
            results, wanted, (dout, dadded, dfade), allow_unused=True, materialize_grads=True
        )
        for into, g in zip(_cut(s, total, block), found, strict=False):
            into += g
        drows = drows[:, :known] * kept[len(plan) + n][:, None, None] + found[len(parts)]
        last = begun and n == len(plan) - 1
        if begin is not leaf:
            total.start.add_(found[-1])
            if last:
                total.start.add_(dstart[:, :before])
        elif last:
            drows = drows + dstart[:, :known]
    total.rows.copy_(drows)
    return total
