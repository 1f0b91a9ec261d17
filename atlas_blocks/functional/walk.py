"""The part of the dual form that needs the memory: from one chunk to the next.

Axes as in chunks.py, which computes what needs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atlas_blocks.functional.chunks import Read, Write, discounted, running_scale
from atlas_blocks.functional.memories import MEMORIES, Factor
from atlas_blocks.functional.newton_schulz import orthogonalise
from atlas_blocks.functional.rule import Rule

# S [..., m, n] and the number of steps -> U(S), differentiable in S.
Orthogonalise = Callable[[Tensor, int], Tensor]


class ChunkMemory(NamedTuple):
    """M, S and M^(0), each a list of [G, dout, din]; S is empty without momentum."""

    weights: list[Tensor]
    momentum: list[Tensor]
    chunk_start: list[Tensor]
    scale: Tensor  # [G], see `running_scale`

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChunkMemory:
        """The same with `fn` applied to every tensor, in the order of `tensors`."""
        weights, momentum, start = ([fn(t) for t in group] for group in self[:3])
        return ChunkMemory(weights, momentum, start, fn(self.scale))

    def tensors(self) -> list[Tensor]:
        """All of them, in field order."""
        return [*self.weights, *self.momentum, *self.chunk_start, self.scale]

    def start(self) -> list[Tensor]:
        """What a whole chunk starts from: there M^(0) is M."""
        return [*self.weights, *self.momentum, self.scale]


# `muon_chunk` with one Newton-Schulz or another, or compiled.
MuonChunk = Callable[[Rule, Write, Read, ChunkMemory, int], tuple[Tensor, ChunkMemory]]
Step = Callable[[Rule, Write, ChunkMemory], tuple[list[Factor], Tensor, Tensor, ChunkMemory]]


class Ends(NamedTuple):
    """What `walk_ends` finds of N chunks."""

    starts: list[Tensor]  # what each starts from: W and S [N, G, dout, din], the scale [N, G]
    factors: list[Factor]  # of every weight, [N, G, E, dout] and [N, G, E, din]
    eta: Tensor  # write strengths  [N, G, L]
    scales: Tensor  # the discount's scale after every token  [N, G, L]


def walk_gradient(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    kept: list[ChunkMemory] | None,
) -> tuple[Tensor, ChunkMemory]:
    """U = identity: only the weights at the chunks' ends are sequential; then all reads at once.

    Returns y [G, N L, Dv] and the memory after the chunks.
    """
    ends, after = walk_ends(rule, write.unbind(), memory, place, kept)
    return read_chunks(rule, write, read, ends), _leave(rule, after, place, write.eta.shape[-1])


def walk_ends(
    rule: Rule,
    chunks: Iterable[Write],
    memory: ChunkMemory,
    place: int,
    kept: list[ChunkMemory] | None,
    step: Step | None = None,
) -> tuple[Ends, ChunkMemory]:
    """From each chunk's start to its end, and the memory there. step: `chunk_end`, or that
    compiled."""
    starts, all_factors, strengths, scales = [], [], [], []
    for x in chunks:
        memory = _enter(memory, place)
        starts.append(memory)
        factors, eta, scale, memory = (step or chunk_end)(rule, x, memory)
        all_factors.append(factors)
        strengths.append(eta)
        scales.append(scale)
    if kept is not None:
        kept.extend(starts)

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors))

    tensors = [stacked(ts) for ts in zip(*(m.start() for m in starts), strict=True)]
    factors = [
        (stacked(left for left, _ in ends), stacked(right for _, right in ends))
        for ends in zip(*all_factors, strict=True)
    ]
    return Ends(tensors, factors, stacked(strengths), stacked(scales)), memory


def chunk_end(
    rule: Rule, x: Write, memory: ChunkMemory
) -> tuple[list[Factor], Tensor, Tensor, ChunkMemory]:
    """One chunk's gradient factors, write strengths, scales, and the memory at its end."""
    factors, eta, scale = _gradients(rule, x, memory)
    last = x.last or x.last_coefficients(eta)
    weights = []
    for i, (left, right) in enumerate(factors):
        now = x.abar * memory.weights[i]
        if last.carried is not None:
            now.addcmul_(last.carried, memory.momentum[i], value=-1)
        weights.append(now.baddbmm((left * last.written).mT, right, alpha=-1))
    momentum = _next_momentum(x, memory, factors)
    return factors, eta, scale, ChunkMemory(weights, momentum, memory.chunk_start, scale[:, -1])


def read_chunks(rule: Rule, write: Write, read: Read, ends: Ends) -> Tensor:
    """y [G, N L, Dv] of all chunks at once."""
    count, groups = ends.eta.shape[:2]
    starts = [t.flatten(0, 1) for t in ends.starts]
    factors = [(left.flatten(0, 1), right.flatten(0, 1)) for left, right in ends.factors]
    x = read.flatten()
    step = x.decay * ends.eta.flatten(0, 1).unsqueeze(-2)  # P
    written = step @ write.window.flatten(0, 1)  # P C
    carried = None if write.thbar is None else step @ write.thbar.flatten(0, 1)  # P thbar

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t = abar_t W z_t - (P thbar)_t S z_t - sum_i (P C)[t, i] (R_i . z_t) L_i."""
        left, right = factors[i]
        y = x.abar * (z @ starts[i].mT)
        if carried is not None:
            y.addcmul_(carried, z @ starts[len(factors) + i].mT, value=-1)
        dots = x.dots if z is x.q else z @ right.mT
        return y.baddbmm(written * dots, left, alpha=-1)

    y = MEMORIES[rule.memory].forward(linear, x.q)
    y = y if x.residual is None else y + x.residual
    return y.unflatten(0, (count, groups)).transpose(0, 1).flatten(1, 2)


def walk_muon(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    kept: list[ChunkMemory] | None,
    step: MuonChunk | None = None,
) -> tuple[Tensor, ChunkMemory]:
    """U = Newton-Schulz, chunk by chunk, each by `muon_chunk` or another `step`. For the backward
    `muon_chunk` keeps nothing per token: only M and S at the chunks' starts. Returns y [G, N L, Dv]
    and the memory after the chunks."""
    outputs = []
    for chunk in zip(write.unbind(), read.unbind(), strict=True):
        if kept is not None:
            kept.append(memory)
        arguments = (rule, *chunk, memory, place)
        if step is not None:
            y, memory = step(*arguments)
        elif torch.is_grad_enabled():
            y, memory = checkpoint(
                muon_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, memory = muon_chunk(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), memory


def muon_chunk(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    orthogonalise: Orthogonalise = orthogonalise,
) -> tuple[Tensor, ChunkMemory]:
    """One chunk of `walk_muon`: S_t is formed where a step is taken, and orthogonalised; W_t is
    formed for every token."""
    memory = _enter(memory, place)
    factors, eta, scale = _gradients(rule, write, memory)
    step = read.decay * eta.unsqueeze(-2)  # P
    span = step.shape[-1]
    taken = [t for t in range(span) if rule.steps_at(place + t)]
    rows = slice(None) if len(taken) == span else taken
    per_token = []  # W_t [G, L, dout, din]
    for i, (left, right) in enumerate(factors):
        weight = memory.weights[i]
        now = read.abar.unsqueeze(-1) * weight.unsqueeze(1)
        if taken:
            # S_t = thbar_t S + sum_i C[t, i] L_i R_i^T, all t in one product.
            gradients = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
            s = (write.window[:, rows] @ gradients).unflatten(-1, weight.shape[1:])
            if write.thbar is not None:
                s = s + write.thbar[:, rows].unsqueeze(-1) * memory.momentum[i].unsqueeze(1)
            u = orthogonalise(s, rule.ns_steps)
            now = torch.baddbmm(now.flatten(2), step[:, :, rows], u.flatten(2), alpha=-1)
            now = now.unflatten(2, weight.shape[1:])
        per_token.append(now)

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t."""
        return (per_token[i] @ z.unsqueeze(-1)).squeeze(-1)

    y = MEMORIES[rule.memory].forward(linear, read.q)
    y = y if read.residual is None else y + read.residual
    # Cloned: a view would keep the weights of every token alive.
    weights = [w[:, -1].clone() for w in per_token]
    momentum = _next_momentum(write, memory, factors)
    memory = ChunkMemory(weights, momentum, memory.chunk_start, scale[:, -1])
    return y, _leave(rule, memory, place, span)


def _enter(memory: ChunkMemory, place: int) -> ChunkMemory:
    """At a chunk's first token M^(0) is the memory so far."""
    return memory._replace(chunk_start=memory.weights) if place == 0 else memory


def _leave(rule: Rule, memory: ChunkMemory, place: int, span: int) -> ChunkMemory:
    """The state after a whole chunk already has the next chunk's M^(0)."""
    whole = place + span == rule.chunk_size
    return memory._replace(chunk_start=memory.weights) if whole else memory


def _gradients(rule: Rule, x: Write, memory: ChunkMemory) -> tuple[list[Factor], Tensor, Tensor]:
    """The chunk's gradient factors at M^(0), its write strengths eta and scales [G, L]."""
    structure = MEMORIES[rule.memory]

    def error(y: Tensor) -> Tensor:
        """dl/dM(k) for every key: M(k) - v, or -v."""
        return y - x.target if rule.objective == "l2" else -x.target

    factors = structure.factors(memory.chunk_start, x.k, error)
    if x.discount is None or structure.tangent is None:
        return factors, x.eta, memory.scale.unsqueeze(-1).expand_as(x.eta)
    similarity, squares, held, writes, momentum = vars(x.discount).values()
    h = factors[0][1]
    f = structure.tangent(memory.chunk_start, x.k, factors[0])
    own = h.square().sum(-1) + f.square().sum(-1) * squares
    scale = running_scale(own, held, momentum, x.thbar, memory.scale)
    h, f = (t[:, -writes.shape[-1] :] for t in (h, f))
    kappa = (h @ h.mT).abs() + (f @ f.mT) * similarity
    return factors, discounted(x.eta, writes, kappa, scale), scale


def _next_momentum(x: Write, memory: ChunkMemory, factors: list[Factor]) -> list[Tensor]:
    """S after the chunk: thbar S + sum_i C[last, i] L_i R_i^T."""
    if x.thbar_last is None:
        return []
    return [
        (x.thbar_last * s).baddbmm((left * x.window_last).mT, right)
        for s, (left, right) in zip(memory.momentum, factors, strict=True)
    ]
