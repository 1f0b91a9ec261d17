"""The rule with phi* exact, block by block: memory in proportion to the length, both directions.

The memory is never formed. It is M = sum_i a_i phi(k_i)^T over all keys so far, so a_i, one row a
key, is all that there is, and a read is M(phi(x)) = sum_i a_i exp(scale x . k_i).

G = B H; T tokens, S keys so far (S0 at the call's start), D key width, Dv value width, W columns of
a row a_i (values, then what the normaliser needs); c window, b chunk. A block is one chunk or
several: L tokens, e keys before them that it sees again, E pairs (chunk, key that it sees).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.autocast import no_autocast
from atlas_blocks.data import remembered
from atlas_blocks.omega.chunks import decay_matrix, window_matrix
from atlas_blocks.omega.online import pending_matrix

# Pairs that one block solves for, and tokens of a block where chunks do not matter.
BLOCK = 64
# The normaliser's smallest share of the sum of its terms' sizes.
FLOOR = 1 / 16
# Exponents above this belong to terms whose factor makes them vanish.
CEILING = 80.0


class KernelSettings(NamedTuple):
    """What defines the function besides tensors. See `kernel_attention`."""

    objective: str
    scale: float
    normalise: bool
    chunk_size: int
    window: int
    errors: str

    @property
    def online(self) -> bool:
        """Whether errors are corrected and writes limited: those of "dot" see no memory."""
        return self.objective == "l2" and self.errors == "online"

    @property
    def from_start(self) -> bool:
        """Whether errors are taken at the chunk's start, which the state then holds."""
        return self.objective == "l2" and self.errors == "chunk"

    @property
    def chunked(self) -> bool:
        """Whether chunks are part of the function: online errors with c = 1 are exact without."""
        return self.from_start or (self.online and self.window > 1)

    @property
    def chunk(self) -> int:
        """b, or any length where chunks are not part of the function."""
        return self.chunk_size if self.chunked else BLOCK

    @property
    def tail(self) -> int:
        """n, of how many past tokens the online errors of a begun chunk need gates and errors."""
        return self.window - 1 if self.online else 0


class KernelTokens(NamedTuple):
    """A call's tensors, all of one dtype."""

    q: Tensor  # [G, T, D]
    keys: Tensor  # [G, S0 + T, D], S0 >= c - 1
    values: Tensor  # with a last column of ones to normalise  [G, c - 1 + T, Dv | Dv + 1]
    alpha: Tensor  # [G, T]
    eta: Tensor  # as it acts: limited where errors are online  [G, T]
    gamma: Tensor  # [G, T, c]
    pending: Tensor  # what windows yet to end will write of a key  [G, n + T, c], or [G, 0, c]
    rows: Tensor  # a_i  [G, S0, W]
    start: Tensor  # a_i at the start of the begun chunk  [G, S0, W], or [G, 0, W]
    errors: Tensor  # v - M(k) of the last n keys as the begun chunk sees it  [G, n, Dv | Dv + 1]


class QueryBlock(NamedTuple):
    """Where a block lies."""

    first: int  # its first token
    length: int
    place: int  # of that token in its chunk: 0, unless an earlier call began the chunk


def blocks(s: KernelSettings, length: int, position: int) -> list[QueryBlock]:
    """The rest of a begun chunk, whole chunks by the group, a begun one."""
    group = max(1, BLOCK // (s.chunk + s.window - 1)) * s.chunk
    place = position % s.chunk if s.chunked else 0
    found, first = [], 0
    while first < length:
        rest = length - first
        step = min(rest, s.chunk - place)
        if place == 0 and rest > s.chunk:
            step = min(group, rest - rest % s.chunk)
        found.append(QueryBlock(first, step, place))
        first, place = first + step, 0
    return found


class BlockPairs(NamedTuple):
    """Every (chunk, key that it sees) of a block, chunk by chunk.

    Tokens count from the block's first, keys from the first that it sees.
    """

    key: Tensor  # which key  [E]
    when: Tensor  # the token before which the pair's error is taken  [E]
    own: Tensor  # whether a token belongs to the pair's chunk  [L, E]
    together: Tensor  # whether two pairs belong to one chunk  [E, E]
    behind: Tensor  # whether what is written of pair j is part of what pair i reads  [E, E]


def _pairs(s: KernelSettings, block: QueryBlock, device: torch.device) -> BlockPairs:
    # No further into its chunk than a window is any place like another.
    return _pairs_at(s, block.length, min(block.place, s.window), device)


@remembered
def _pairs_at(s: KernelSettings, length: int, place: int, device: torch.device) -> BlockPairs:
    halo = s.window - 1
    starts = [-place] if place else list(range(0, length, s.chunk))
    ends = [*starts[1:], length]
    lists = [torch.arange(max(i, 0), j + halo) for i, j in zip(starts, ends, strict=True)]

    def each(numbers: Sequence[int]) -> Tensor:
        parts = [torch.full((len(x),), i) for x, i in zip(lists, numbers, strict=True)]
        return torch.cat(parts)

    key, begin, chunk = torch.cat(lists), each(starts), each(range(len(starts)))
    token = torch.arange(length)[:, None]
    together = chunk[:, None] == chunk
    when, behind = begin.clamp(min=0), chunk[:, None] > chunk
    if s.online:
        when = torch.maximum(key - halo, when)
        behind = torch.ones_like(together).tril(-1)
        if place:  # what an earlier call has found already
            behind &= (key >= halo)[:, None]
    found = BlockPairs(
        key=key,
        when=when,
        own=(token >= begin) & (token < each(ends)),
        together=together,
        behind=behind,
    )
    return BlockPairs(*(t.to(device) for t in found))


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
    keys: Tensor  # [G, c - 1 + L, D]
    values: Tensor  # [G, c - 1 + L, Dv | Dv + 1]
    alpha: Tensor  # [G, L]
    eta: Tensor  # [G, L]
    gamma: Tensor  # [G, L, c]
    pending: Tensor  # [G, n + L, c], or [G, 0, c]
    errors: Tensor  # v - M(k) of the n keys before a begun block  [G, n, Dv | Dv + 1]
    past: Tensor  # all earlier keys  [G, S, D]


def block_step(
    s: KernelSettings, block: QueryBlock, x: Part, rows: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [G, L, Dv]; what the block's pairs add to the rows a_i [G, E, W]; how the old fade [G];
    v - M(k) of the last n keys.

    rows: a_i of all earlier keys [G, S, W]; start: those that errors are taken at, the same unless
    they are those of the start of a begun chunk.
    """
    q, past, n = x.q, x.past, s.tail
    pairs = _pairs(s, block, q.device)
    decay, abar = decay_matrix(x.alpha)
    seen = window_matrix(x.gamma, s.window - 1)[..., pairs.key] * pairs.own
    written = (decay * x.eta.unsqueeze(-2)) @ seen  # P C  [G, L, E]
    u = x.values[:, pairs.key]
    if s.objective == "l2":
        u = _errors(s, block, x, pairs, abar, written, start)
    u_last = u[:, u.shape[1] - n :]
    if s.normalise:
        u = torch.cat([u, u[..., -1:].abs()], -1)
    total, shift = kernel_sum(
        (s.scale * (q @ past.mT), abar, rows),
        (s.scale * (q @ x.keys[:, pairs.key].mT), written, u),
    )
    y = normalised(total) if s.normalise else shift.exp() * total
    return y, written[:, -1].unsqueeze(-1) * u, abar[:, -1, 0], u_last


def _errors(
    s: KernelSettings,
    block: QueryBlock,
    x: Part,
    pairs: BlockPairs,
    abar: Tensor,
    written: Tensor,
    start: Tensor,
) -> Tensor:
    """u_i = v_i - M(k_i) of every pair [G, E, Dv | Dv + 1].

    M is M^(0) of the pair's chunk or, online, the memory just before the pair's token with what
    windows begun will still write of the keys before it (specification 9b).
    """
    k, u = x.keys[:, pairs.key], x.values[:, pairs.key]
    known = s.tail if block.place else 0  # of a begun chunk some have been found already
    if x.past.shape[1]:
        # What is left of the memory before the block,
        scores = s.scale * (k[:, known:] @ x.past.mT)
        read, shift = kernel_sum((scores, k.new_ones(1, 1, 1), start[..., : u.shape[-1]]))
        faded = _before(abar, 1.0)[:, pairs.when[known:]]
        u = torch.cat([x.errors[:, :known], u[:, known:] - faded * (shift.exp() * read)], 1)
    if s.from_start and block.length <= s.chunk:
        return u
    # and what the block has written before, whose u are unknowns too.
    so_far = _before(written, 0.0)[:, pairs.when]
    if s.tail:
        until = s.tail + pairs.when
        pending = pending_matrix(x.pending)[:, until][..., pairs.key]
        so_far = so_far + pairs.together * pending
    scores = (s.scale * (k @ k.mT)).masked_fill(~pairs.behind, 0.0)
    system = (so_far * pairs.behind) * scores.exp()
    return torch.linalg.solve_triangular(system, u, upper=False, unitriangular=True)


def _before(x: Tensor, first: float) -> Tensor:
    """Row t - 1 in the place of row t, `first` in the first: [G, L, E]."""
    return F.pad(x[:, :-1], (0, 0, 1, 0), value=first)


def _cut(s: KernelSettings, x: KernelTokens, block: QueryBlock) -> Part:
    first, stop = block.first, block.first + block.length
    halo, before = s.window - 1, x.keys.shape[1] - x.q.shape[1]
    return Part(
        q=x.q[:, first:stop],
        keys=x.keys[:, before + first - halo : before + stop],
        values=x.values[:, first : halo + stop],
        alpha=x.alpha[:, first:stop],
        eta=x.eta[:, first:stop],
        gamma=x.gamma[:, first:stop],
        pending=x.pending[:, first : s.tail + stop],
        errors=x.errors,
        past=x.keys[:, : before + first],
    )


def _targets(s: KernelSettings, x: KernelTokens, block: QueryBlock) -> Tensor:
    """The key that each pair of the block adds to, counted from the first of all."""
    pairs = _pairs(s, block, x.q.device)
    return pairs.key + (x.keys.shape[1] - x.q.shape[1] + block.first - (s.window - 1))


def walk(
    s: KernelSettings,
    position: int,
    x: KernelTokens,
    kept: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outside autograd: y [G, T, Dv]; the rows after T tokens, those at the chunk's start where
    errors are taken there, and v - M(k) of the last n keys.

    kept: gets what every block adds, and how it lets the old rows fade, for the backward.
    """
    groups, tokens = x.q.shape[:2]
    before = x.rows.shape[1]

    def grown(t: Tensor) -> Tensor:
        # Of q: under vmap the tokens may have rows where the state has none.
        return torch.cat([t, x.q.new_zeros(groups, tokens, t.shape[2], dtype=t.dtype)], 1)

    rows, outputs, errors = grown(x.rows), [], x.errors
    start = grown(x.start) if s.from_start else x.start
    plan = blocks(s, tokens, position)
    begun = _begun(s, position, tokens)
    for n, block in enumerate(plan):
        at = start if _resumes(s, block) else rows
        past = slice(0, before + block.first)
        y, added, fade, errors = block_step(s, block, _cut(s, x, block), rows[:, past], at[:, past])
        if begun and n == len(plan) - 1 and at is rows:
            start, rows = rows, rows.clone()  # in place from here: what the chunk began with stays
        rows[:, past] *= fade[:, None, None]
        rows.index_add_(1, _targets(s, x, block), added)
        outputs.append(y)
        if kept is not None:
            kept.append((added, fade))
    if s.from_start and not begun:
        start = rows
    return torch.cat(outputs, 1), rows, start, errors


def _begun(s: KernelSettings, position: int, tokens: int) -> bool:
    """Whether a call ends inside a chunk whose start is kept."""
    return s.from_start and (position + tokens) % s.chunk != 0


def _resumes(s: KernelSettings, block: QueryBlock) -> bool:
    """Whether a block's errors are taken at the start of a chunk that an earlier call began."""
    return s.from_start and block.place > 0


class Rebuilt:
    """The rows at the start of any block, from what all blocks added: no copy a block is kept."""

    def __init__(
        self, s: KernelSettings, x: KernelTokens, plan: list[QueryBlock], kept: list[Tensor]
    ) -> None:
        count = len(plan)
        added, fades = kept[:count], kept[count:]
        self.rows, self.added, self.fades = x.rows, torch.cat(added, 1), torch.stack(fades, 1)
        self.target = torch.cat([_targets(s, x, block) for block in plan])
        sizes = [t.shape[1] for t in added]
        blocks = [torch.full((size,), n, device=x.q.device) for n, size in enumerate(sizes)]
        self.block, self.ends = torch.cat(blocks), [0, *itertools.accumulate(sizes)]

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
    def forward(ctx: Any, s: KernelSettings, position: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        kept: list[tuple[Tensor, Tensor]] = []
        x = KernelTokens(*tensors)
        y, rows, start, errors = walk(s, position, x, kept)
        ctx.settings, ctx.position = s, position
        ctx.save_for_backward(*tensors, *(t for t, _ in kept), *(t for _, t in kept))
        # Two results may not be one tensor, and none an argument.
        shared = start is rows or start is x.start
        return y, rows, start.clone() if shared else start, errors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(KernelTokens._fields)
        saved = ctx.saved_tensors  # a checkpoint hands them out once
        x, kept = KernelTokens(*saved[:count]), list(saved[count:])
        with no_autocast(x.q):
            if torch.is_grad_enabled():  # a second derivative may be asked for
                found = _differentiable(ctx.settings, ctx.position, x, grads)
                return None, None, *found
            return None, None, *_backward(ctx.settings, ctx.position, x, kept, grads)


def _differentiable(
    s: KernelSettings, position: int, x: KernelTokens, grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same gradients by plain autograd, itself in the graph."""
    wanted = [t for t in x if t.requires_grad]
    # A result may be an argument as it came; in the graph it is another tensor.
    results = [t.view_as(t) for t in walk(s, position, x)]
    pairs = [(t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [t for t, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if t.requires_grad else None for t in x]


def _backward(
    s: KernelSettings, position: int, x: KernelTokens, kept: list[Tensor], grads: Sequence[Tensor]
) -> KernelTokens:
    """Gradients of the tokens. grads: of y, of both results' rows and of the last errors."""
    dy, drows, dstart, derrors = grads
    plan = blocks(s, x.q.shape[1], position)
    rebuilt = Rebuilt(s, x, plan, kept)
    total = KernelTokens(*(torch.zeros_like(t) for t in x))
    begun = _begun(s, position, x.q.shape[1])
    drows = drows + dstart if s.from_start and not begun else drows.clone()
    before = x.rows.shape[1]
    for n in reversed(range(len(plan))):
        block, last = plan[n], n == len(plan) - 1
        known = before + block.first
        rows = rebuilt.at(n, known)
        resumes = _resumes(s, block)
        with torch.enable_grad():
            parts = Part(*(t.detach().requires_grad_() for t in _cut(s, x, block)))
            leaf = rows.detach().requires_grad_()
            start = x.start.detach().requires_grad_() if resumes else leaf
            results = block_step(s, block, parts, leaf, start)
        dout = dy[:, block.first : block.first + block.length]
        dadded = drows[:, _targets(s, x, block)]
        dfade = (drows[:, :known] * rows).sum((1, 2))
        dlast = derrors if last else torch.zeros_like(derrors)
        wanted = [*parts, leaf, *([start] if resumes else [])]
        found = torch.autograd.grad(
            results,
            wanted,
            (dout, dadded, dfade, dlast),
            allow_unused=True,
            materialize_grads=True,
        )
        for into, g in zip(_cut(s, total, block), found, strict=False):
            into += g
        drows = drows[:, :known] * kept[len(plan) + n][:, None, None] + found[len(parts)]
        if resumes:
            total.start.add_(found[-1])
        if begun and last:
            if resumes:
                total.start.add_(dstart[:, :before])
            else:
                drows = drows + dstart[:, :known]
    total.rows.copy_(drows)
    return total
