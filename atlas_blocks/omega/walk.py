"""The part of the dual form that needs the memory: from one chunk to the next.

Axes as in chunks.py, which computes what needs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atlas_blocks.derivatives import transformed
from atlas_blocks.omega import online
from atlas_blocks.omega.chunks import Coefficients, Read, Write
from atlas_blocks.omega.memories import Factor, Linearised, tangent_kernel
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.updates import Direction


class ChunkMemory(NamedTuple):
    """M and S now and at the chunk's start, each a list of [G, dout, din]; no S without momentum.
    initial: M_0, where decay leads there, else empty."""

    weights: list[Tensor]
    momentum: list[Tensor]
    chunk_start: list[Tensor]
    momentum_start: list[Tensor]
    scale: Tensor  # [G], see `online.running_scale`
    scale_start: Tensor  # [G]
    initial: list[Tensor]

    @staticmethod
    def begin(
        weights: list[Tensor], momentum: list[Tensor], scale: Tensor, initial: list[Tensor]
    ) -> ChunkMemory:
        """At a chunk's first token, where M^(0) is M."""
        return ChunkMemory(weights, momentum, weights, momentum, scale, scale, initial)

    def begun(self) -> ChunkMemory:
        """The same at a chunk's first token."""
        return ChunkMemory.begin(self.weights, self.momentum, self.scale, self.initial)

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChunkMemory:
        """The same with `fn` applied to every tensor, in the order of `tensors`."""
        weights, momentum, start, momentum_start = ([fn(t) for t in ts] for ts in self[:4])
        scale, scale_start = fn(self.scale), fn(self.scale_start)
        initial = [fn(t) for t in self.initial]
        return ChunkMemory(weights, momentum, start, momentum_start, scale, scale_start, initial)

    def tensors(self) -> list[Tensor]:
        """All of them, in field order."""
        groups = [t for group in self[:4] for t in group]
        return [*groups, self.scale, self.scale_start, *self.initial]

    def start(self) -> list[Tensor]:
        """What a whole chunk starts from: there M^(0) is M."""
        return [*self.weights, *self.momentum, self.scale]


# `stepwise_chunk` with one Newton-Schulz or another, or compiled.
StepwiseChunk = Callable[[Rule, Write, Read, ChunkMemory, int], tuple[Tensor, ChunkMemory]]
# A chunk's gradient factors, its coefficients if they had to wait, and the memory at its end.
ChunkEnd = tuple[list[Factor], Coefficients | None, ChunkMemory]
Step = Callable[[Rule, Write, ChunkMemory], ChunkEnd]


class Ends(NamedTuple):
    """What `walk_ends` finds of N chunks."""

    starts: list[Tensor]  # what each starts from: W and S [N, G, dout, din], the scale [N, G]
    factors: list[Factor]  # of every weight, [N, G, E, dout] and [N, G, E, din]
    coefficients: Coefficients | None  # unless they were known before


def walk_gradient(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    kept: list[ChunkMemory] | None,
) -> tuple[Tensor, ChunkMemory]:
    """U = identity: only the weights at the chunks' ends are sequential; then all reads at once.

    memory: at the first chunk's start, wherever in it the call begins. Returns y [G, N R, Dv] and
    the memory after the chunks, whose M^(0) is the last one's unless that is whole.
    """
    ends, after = walk_ends(rule, write.unbind(), memory, kept)
    if write.eta.shape[-1] == rule.chunk_size:
        after = after.begun()
    return read_chunks(rule, read, ends, memory.initial), after


def walk_ends(
    rule: Rule,
    chunks: Iterable[Write],
    memory: ChunkMemory,
    kept: list[ChunkMemory] | None,
    step: Step | None = None,
) -> tuple[Ends, ChunkMemory]:
    """From each chunk's start to its end, and the memory there. step: `chunk_end`, or that
    compiled."""
    starts, all_factors, waited = [], [], []
    for x in chunks:
        memory = memory.begun()
        starts.append(memory)
        factors, coefficients, memory = (step or chunk_end)(rule, x, memory)
        all_factors.append(factors)
        waited.append(coefficients)
    if kept is not None:
        kept.extend(starts)

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors))

    tensors = [stacked(ts) for ts in zip(*(m.start() for m in starts), strict=True)]
    factors = [
        (stacked(left for left, _ in ends), stacked(right for _, right in ends))
        for ends in zip(*all_factors, strict=True)
    ]
    found = [c for c in waited if c is not None]
    return Ends(tensors, factors, Coefficients.stack(found) if found else None), memory


def chunk_end(rule: Rule, x: Write, memory: ChunkMemory) -> ChunkEnd:
    """One chunk of `walk_ends`."""
    factors, coefficients, scale = _gradients(rule, x, memory)
    last = x.last if coefficients is None else coefficients.rows(-1)
    assert last is not None
    written, weights = last.written.mT, []
    for i, (left, right) in enumerate(factors):
        now = x.abar * memory.weights[i]
        if memory.initial:
            now.addcmul_(1 - x.abar, memory.initial[i])
        if last.carried is not None:
            now.addcmul_(last.carried, memory.momentum[i], value=-1)
        weights.append(now.baddbmm((left * written).mT, right, alpha=-1))
    momentum = _next_momentum(x, memory, factors)
    end = memory._replace(weights=weights, momentum=momentum, scale=scale)
    return factors, coefficients, end


def _gradients(
    rule: Rule, x: Write, memory: ChunkMemory
) -> tuple[list[Factor], Coefficients | None, Tensor]:
    """A chunk's gradient factors at M^(0), its coefficients if they wait for that, and the scale
    after it."""
    at = rule.structure.linearise(memory.chunk_start, x.k)
    scale = memory.scale if x.scale is None else x.scale

    def corrected(by: online.Correction) -> list[Factor]:
        along = at.along(memory.momentum) if by.carried is not None else None
        return at.factors(online.corrected(by, at.read, along, x.initial, x.target))

    if x.correction is not None:
        return corrected(x.correction), None, scale
    errors = errors_at(rule, x, at)
    factors = at.factors(errors)
    if x.online is None:
        return factors, None, scale
    kappa, own = tangent_kernel(factors, errors, x.online.squares, x.online.gram)
    window = online.window_scale(own, x.online)
    scales = online.running_scale(online.chunk_scale(window, x.online), x.thbar, scale)
    after = scale if x.thbar is None else scales[..., -1]
    eta = online.limited(x.eta, x.online, window, scales)
    found = x.coefficients(x.online.decay, eta)
    if kappa is not None:
        by = online.correction(x.online, kappa, own, found.written, found.carried)
        factors = corrected(by)
    return factors, found, after


def errors_at(rule: Rule, x: Write, at: Linearised) -> Tensor:
    """dl/dM(k) at M^(0) for every key: M(k) - v of "l2", -v of "dot"."""
    return rule.criterion.error(at.read, x.target)


def read_chunks(rule: Rule, read: Read, ends: Ends, initial: list[Tensor]) -> Tensor:
    """y [G, N R, Dv] of all chunks at once. initial: M_0 [G, dout, din] if decay leads there."""
    count, groups, rows = read.q.shape[:3]
    starts = [t.flatten(0, 1) for t in ends.starts]
    factors = [(left.flatten(0, 1), right.flatten(0, 1)) for left, right in ends.factors]
    if ends.coefficients is not None:
        read = replace(read, coefficients=ends.coefficients.rows(-rows))
    x = read.flatten()
    assert x.coefficients is not None
    written, carried = x.coefficients.written, x.coefficients.carried

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t = abar_t W z_t - (P thbar)_t S z_t - sum_i (P C)[t, i] (R_i . z_t) L_i, and
        (1 - abar_t) M_0 z_t where decay leads there."""
        left, right = factors[i]
        y = x.abar * (z @ starts[i].mT)
        if initial:
            back = z.unflatten(0, (count, groups)) @ initial[i].mT
            y.addcmul_(1 - x.abar, back.flatten(0, 1))
        if carried is not None:
            y.addcmul_(carried, z @ starts[len(factors) + i].mT, value=-1)
        dots = x.dots if z is x.q else z @ right.mT
        return y.baddbmm(written * dots, left, alpha=-1)

    y = rule.structure.forward(linear, x.q)
    y = y if x.residual is None else y + x.residual
    return y.unflatten(0, (count, groups)).transpose(0, 1).flatten(1, 2)


def walk_stepwise(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    kept: list[ChunkMemory] | None,
    step: StepwiseChunk | None = None,
) -> tuple[Tensor, ChunkMemory]:
    """U of every token's own S_t, chunk by chunk, each by `stepwise_chunk` or another `step`. For
    the backward `stepwise_chunk` keeps nothing per token: only M and S at the chunks' starts.
    Returns y [G, N L, Dv] and the memory after the chunks."""
    outputs = []
    for chunk in zip(write.unbind(), read.unbind(), strict=True):
        if kept is not None:
            kept.append(memory)
        arguments = (rule, *chunk, memory, place)
        if step is not None:
            y, memory = step(*arguments)
        elif torch.is_grad_enabled() and not transformed():
            y, memory = checkpoint(
                stepwise_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, memory = stepwise_chunk(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), memory


def stepwise_chunk(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    direction: Direction | None = None,
) -> tuple[Tensor, ChunkMemory]:
    """One chunk of `walk_stepwise`: S_t is formed where a step is taken, and orthogonalised; W_t is
    formed for every token. direction: U, in the place of the update's own."""
    direction = direction or rule.direction
    assert direction is not None
    if place == 0:  # at a chunk's first token M^(0) is the memory so far
        memory = memory._replace(chunk_start=memory.weights)
    at = rule.structure.linearise(memory.chunk_start, write.k)
    factors = at.factors(errors_at(rule, write, at))
    assert read.decay is not None
    step = read.decay * write.eta.unsqueeze(-2)  # P
    span = step.shape[-1]
    taken = [t for t in range(span) if rule.steps_at(place + t)]
    rows = slice(None) if len(taken) == span else taken
    per_token = []  # W_t [G, L, dout, din]
    for i, (left, right) in enumerate(factors):
        weight = memory.weights[i]
        now = read.abar.unsqueeze(-1) * weight.unsqueeze(1)
        if memory.initial:
            now = now + (1 - read.abar).unsqueeze(-1) * memory.initial[i].unsqueeze(1)
        if taken:
            # S_t = thbar_t S + sum_i C[t, i] L_i R_i^T, all t in one product.
            gradients = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
            s = (write.window[:, rows] @ gradients).unflatten(-1, weight.shape[1:])
            if write.thbar is not None:
                s = s + write.thbar[:, rows].unsqueeze(-1) * memory.momentum[i].unsqueeze(1)
            u = direction(s, rule.ns_steps)
            now = torch.baddbmm(now.flatten(2), step[:, :, rows], u.flatten(2), alpha=-1)
            now = now.unflatten(2, weight.shape[1:])
        per_token.append(now)

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t."""
        return (per_token[i] @ z.unsqueeze(-1)).squeeze(-1)

    y = rule.structure.forward(linear, read.q)
    y = y if read.residual is None else y + read.residual
    # Cloned: a view would keep the weights of every token alive.
    weights = [w[:, -1].clone() for w in per_token]
    momentum = _next_momentum(write, memory, factors)
    memory = memory._replace(weights=weights, momentum=momentum)
    # The state after a whole chunk already has the next chunk's M^(0).
    whole = place + span == rule.chunk_size
    return y, memory._replace(chunk_start=weights) if whole else memory


def _next_momentum(x: Write, memory: ChunkMemory, factors: list[Factor]) -> list[Tensor]:
    """S after the chunk: thbar S + sum_i C[last, i] L_i R_i^T."""
    if x.thbar_last is None:
        return []
    return [
        (x.thbar_last * s).baddbmm((left * x.window_last).mT, right)
        for s, (left, right) in zip(memory.momentum, factors, strict=True)
    ]
