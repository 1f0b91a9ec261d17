"""One token of the Omega rule: a graph of tensor operations alone.

The same function as `omega_rule` for T = 1, without a loop and without a branch on data, so that it
can be exported to where no Python runs. Rows may stand at different positions.

B batch, H heads, G = B H; n past tokens of the state, E = n + 1 keys; c window, b chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_blocks.omega import online
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.chunks import (
    Piece,
    Tokens,
    Write,
    cut,
    has_residual,
    kernel,
    window_matrix,
    write_of,
)
from atlas_blocks.omega.definition import next_state, prepare, run_at
from atlas_blocks.omega.feature_maps import FeatureMap
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState
from atlas_blocks.omega.walk import ChunkMemory, chunk_end, errors_at


def one_token(a: Arguments) -> tuple[Tensor, OmegaState]:
    """`omega_rule` on validated arguments with T = 1 and a state.

    Returns y [B, 1, H, Dv] in the dtype of q, and the next state.
    """
    rule, state, size = a.rule, a.state, (a.q.shape[0], a.q.shape[2])
    assert state is not None
    position = state.position.to(a.q.device)[:, None]
    if not rule.keeps_start:  # a chunk may begin at any token
        return run_at(a, position, 0)
    tokens, memory, history = prepare(a, position)
    place = (position % rule.chunk_size).expand(size).reshape(-1, 1)
    if rule.linear:
        after = chunk_end(rule, _chunk_so_far(a, tokens, memory, place), memory)[-1]
    else:
        after = _stepwise_token(rule, a.feature_map, tokens, memory, place)
    q = tokens.q.transpose(1, 2).flatten(0, 1)
    y = rule.structure.forward(lambda i, z: z @ after.weights[i].mT, q)
    y = y.unflatten(0, size).transpose(1, 2)
    if has_residual(rule, tokens):
        y = y + tokens.q_raw
    after = _left(rule, after, place)
    return y.to(a.q.dtype), next_state(a, after, history)


def _left(rule: Rule, memory: ChunkMemory, place: Tensor) -> ChunkMemory:
    """After a whole chunk the next one's start is where the memory is now."""
    whole = place == rule.chunk_size - 1
    each = whole.unsqueeze(-1)
    weights, momentum, start, momentum_start, scale, scale_start, initial = memory
    start = [torch.where(each, new, old) for new, old in zip(weights, start, strict=True)]
    if momentum_start:
        both = zip(momentum, momentum_start, strict=True)
        momentum_start = [torch.where(each, new, old) for new, old in both]
    scale_start = torch.where(whole.squeeze(-1), scale, scale_start)
    return ChunkMemory(weights, momentum, start, momentum_start, scale, scale_start, initial)


def _chunk_so_far(a: Arguments, x: Tokens, memory: ChunkMemory, place: Tensor) -> Write:
    """The begun chunk [G, ...] as a whole one, b tokens after its halo, of which those before it
    change nothing.

    place [G, 1]: of the newest token in it.
    """

    def groups(t: Tensor) -> Tensor:
        """[B, n, H, ...] -> [G, n, ...]."""
        return t.transpose(1, 2).flatten(0, 1)

    rule, feature_map, k_raw = a.rule, a.feature_map, groups(x.k_raw)
    k = k_raw if feature_map is None else groups(x.k)
    target = groups(x.v)
    if has_residual(rule, x) and rule.criterion.reads:
        target = target - k_raw
    keys, halo = k.shape[1], rule.window - 1
    age = torch.arange(keys - 1, -1, -1, device=k.device)
    own = age <= place  # [G, E]
    here = own[:, halo:]

    def gates(t: Tensor, nothing: float) -> Tensor:
        """Of the chunk's tokens [G, b, ...]."""
        t = groups(t[:, halo:])
        return torch.where(here.unsqueeze(-1) if t.ndim == 3 else here, t, nothing)

    masses = None if x.masses is None else groups(x.masses)
    gram = pending = None
    if rule.corrects:
        gram = kernel(feature_map, k, k, k_raw, k_raw)
    if masses is not None and gram is not None and halo:
        # In the rows of tokens before the chunk that of its first token, as in `chunks.cut`.
        rows = torch.where(own, torch.arange(keys, device=k.device), keys - 1 - place)
        pending = online.pending_matrix(masses)
        pending = pending.gather(-2, rows.unsqueeze(-1).expand_as(pending))
    write, *_ = write_of(
        rule,
        k,
        target,
        gates(x.alpha, 1.0),
        gates(x.eta, 0.0),
        None if x.theta is None else gates(x.theta, 1.0),
        window_matrix(gates(x.seen, 0.0), halo),
        masses,
        None if x.weight is None else gates(x.weight, 0.0),
        gram,
        pending,
        None if x.initial is None else groups(x.initial),
        memory.scale,
        lambda _last, _keep, before: before,
    )
    return write


def _stepwise_token(
    rule: Rule,
    feature_map: FeatureMap | None,
    x: Tokens,
    memory: ChunkMemory,
    place: Tensor,
) -> ChunkMemory:
    """S_t = theta_t S_{t-1} + G_t;  M_t = alpha_t M_{t-1} - eta_t U(S_t), where a step is due."""
    (write,) = cut(rule, feature_map, x, Piece(0, 1, 1, 0), memory.scale)[0].unbind()
    place = place.unsqueeze(-1)
    both = zip(memory.weights, memory.chunk_start, strict=True)
    start = [torch.where(place == 0, m, m0) for m, m0 in both]
    at = rule.structure.linearise(start, write.k)
    taken = (place % rule.ns_every == rule.ns_every - 1) | (place == rule.chunk_size - 1)
    step = write.eta.unsqueeze(-1) * taken
    direction = rule.direction
    assert direction is not None
    weights, momentum = [], []
    for i, (left, right) in enumerate(at.factors(errors_at(rule, write, at))):
        s = (left * write.window.mT).mT @ right
        if write.thbar is not None:
            s = s + write.thbar * memory.momentum[i]
            momentum.append(s)
        faded = write.abar * memory.weights[i]
        if memory.initial:
            faded = faded + (1 - write.abar) * memory.initial[i]
        weights.append(faded - step * direction(s, rule.ns_steps))
    return memory._replace(weights=weights, momentum=momentum, chunk_start=start)
