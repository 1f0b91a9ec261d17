"""The gradient of the Omega rule from the memory at every chunk's start, a few chunks at a time.

Axes as in chunks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_blocks.autocast import no_autocast
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.chunks import Read, Write, cut
from atlas_blocks.omega.definition import pieces, prepare
from atlas_blocks.omega.groups import Group, Groups
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState
from atlas_blocks.omega.walk import ChunkMemory, StepwiseChunk, stepwise_chunk, walk_gradient

# How many chunks are recomputed together. On a CPU (2048 tokens, 4 heads of 64, c = 16, b = 64) 8
# are as fast as the whole call under autograd, 1 takes 1.3 times as long; Muon gains nothing.
TOGETHER = 8
Pairs = list[tuple[Tensor, Tensor]]


def omega_rule_backward(
    a: Arguments,
    inputs: Sequence[Tensor],
    starts: Sequence[Tensor],
    grads: Sequence[Tensor],
    stepwise: StepwiseChunk | None = None,
) -> list[Tensor]:
    """Gradients of `inputs`, leaves that require one and that the arguments `a` are made of.

    starts: the memory at every chunk's start, from `definition.run`. grads: of y, then of every
    tensor of the state but its position.

    What needs no memory is computed once, under autograd. Then chunks are taken from the last to
    the first: each is computed again from the memory at its start and differentiated there, so that
    only a few chunks' intermediates exist at a time.
    """
    pairs: Pairs = []
    with no_autocast(a.q), torch.enable_grad():
        groups, (grad_y, *of_state) = Groups.of(a), grads
        grads_y = groups.streams(grad_y)
        for i, (group, part) in enumerate(zip(groups.groups, groups.arguments(a), strict=True)):
            whole = len(groups.groups) == 1
            after = [t if whole else t[group.rows] for t in of_state]
            pairs += _one_group(part, group, starts, [grads_y[i], *after], stepwise)
        return _gradients(pairs, inputs) if pairs else [torch.zeros_like(t) for t in inputs]


def _one_group(
    a: Arguments,
    group: Group,
    starts: Sequence[Tensor],
    grads: Sequence[Tensor],
    stepwise: StepwiseChunk | None,
) -> Pairs:
    """What the rule computes before any memory and what comes of it: each with its gradient."""
    tokens, before, history = prepare(a, group.position)
    grad_y, after, grads_of_history = _split(a, grads)
    pairs = list(zip(history.values(), grads_of_history, strict=True))
    cuts, chunk, slots, scale = [], 0, group.places(a.q), before.scale
    for piece in pieces(a.q.shape[1], a.rule.place(group.position), a.rule.chunk_size):
        write, read = cut(a.rule, a.feature_map, tokens, piece, scale)
        cuts.append((piece, chunk, write, read))
        scale = scale if write.scale is None else write.scale[-1]
        chunk += piece.count
    together = TOGETHER if a.rule.linear else 1
    for piece, chunk, write, read in reversed(cuts):
        found = []
        for i in reversed(range(0, piece.count, together)):
            stop = min(i + together, piece.count)
            memory = _at(starts, slots + chunk + i, before)
            tokens_there = slice(piece.first + i * piece.span, piece.first + stop * piece.span)

            def chunks(t: Tensor, i: int = i, stop: int = stop) -> Tensor:
                return t[i:stop]

            grad = grad_y[:, tokens_there]
            gradients, after = _chunks(
                a.rule,
                write.map(chunks),
                read.map(chunks),
                memory,
                piece.place,
                grad,
                after,
                stepwise,
            )
            found.append(gradients)
        for t, parts in zip(
            write.tensors() + read.tensors(), zip(*reversed(found), strict=True), strict=True
        ):
            # What no chunk has looked at, as a step of U at phi(q) . phi(k), has no gradient.
            if any(g is not None for g in parts):
                cuts_of_t = zip(parts, t.split(together), strict=True)
                whole = [torch.zeros_like(own) if g is None else g for g, own in cuts_of_t]
                pairs.append((t, torch.cat(whole)))
    return pairs + list(zip(before.tensors(), after.tensors(), strict=True))


def _split(a: Arguments, grads: Sequence[Tensor]) -> tuple[Tensor, ChunkMemory, list[Tensor]]:
    """Gradients of y [G, T, Dv], of the memory after the call, and of the state's last tokens."""
    parts = iter(grads)
    grad_y = next(parts).transpose(1, 2).flatten(0, 1)
    groups = [
        [next(parts).flatten(0, 1) for _ in a.weights] if there else []
        for there in OmegaState.groups(a.rule, a.theta is not None).values()
    ]
    *history, scale = parts
    zero, scale = torch.zeros_like(scale).flatten(), scale.flatten()
    weights, momentum, start, momentum_start = groups
    if a.rule.linear and not start:  # the walk has them, the state has not
        start, momentum_start = ([torch.zeros_like(t) for t in ts] for ts in (weights, momentum))
    scales = (zero, scale) if a.rule.rewinds else (scale, zero)
    # M_0 comes out of the walk as it went in.
    initial = [torch.zeros_like(t) for t in weights if a.rule.decay_to == "initial"]
    after = ChunkMemory(weights, momentum, start, momentum_start, *scales, initial)
    return grad_y.to(scale.dtype), after, history


def _at(starts: Sequence[Tensor], slots: Tensor, before: ChunkMemory) -> ChunkMemory:
    """The memory at the start of one chunk of every row; M^(0) of a chunk that an earlier call
    began is `before`'s."""
    *tensors, scale = (t.flatten(0, 1).index_select(0, slots).flatten(0, 1) for t in starts)
    weights, momentum = tensors[: len(before.weights)], tensors[len(before.weights) :]
    return before._replace(weights=weights, momentum=momentum, scale=scale, scale_start=scale)


def _chunks(
    rule: Rule,
    write: Write,
    read: Read,
    memory: ChunkMemory,
    place: int,
    grad_y: Tensor,
    after: ChunkMemory,
    stepwise: StepwiseChunk | None,
) -> tuple[list[Tensor | None], ChunkMemory]:
    """Gradients of a few chunks' write and read, None of what is not used, and of the memory before
    them.

    grad_y [G, N L, Dv] and `after`: gradients of what they return.
    """
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.detach().requires_grad_(t.is_floating_point()))
        return leaves[-1]

    write, read = write.map(leaf), read.map(leaf)
    start = memory.map(leaf)
    if rule.linear:
        y, result = walk_gradient(rule, write, read, start, place, None)
    else:
        # Not `walk_stepwise`, which would compute it once more to keep less for its backward.
        (chunk,) = zip(write.unbind(), read.unbind(), strict=True)
        y, result = (stepwise or stepwise_chunk)(rule, *chunk, start, place)
    outputs = [(y, grad_y), *zip(result.tensors(), after.tensors(), strict=True)]
    floats = iter(_used(outputs, [t for t in leaves if t.requires_grad]))
    found = iter([next(floats) if t.requires_grad else None for t in leaves])
    of_cut = [next(found) for _ in write.tensors() + read.tensors()]

    def of_memory(t: Tensor) -> Tensor:
        one = next(found)
        return torch.zeros_like(t) if one is None else one

    return of_cut, memory.map(of_memory)


def _gradients(outputs: Pairs, inputs: Sequence[Tensor]) -> list[Tensor]:
    """`_used`, with zeros for what is not used."""
    found = zip(_used(outputs, inputs), inputs, strict=True)
    return [torch.zeros_like(t) if g is None else g for g, t in found]


def _used(outputs: Pairs, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `inputs` for those of the outputs, each given with its output.

    Outputs whose gradient is zero, as that of a state nobody goes on from, are left out: what led
    to them alone need not be differentiated. (On a GPU it would have to be waited for.)
    """
    outputs = [
        (t, g) for t, g in outputs if t.requires_grad and (g.device.type != "cpu" or g.any())
    ]
    if not outputs:
        return [None for _ in inputs]
    results, gradients = zip(*outputs, strict=True)
    return list(torch.autograd.grad(results, inputs, gradients, allow_unused=True))
