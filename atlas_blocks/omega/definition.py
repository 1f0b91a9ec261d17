"""The Omega rule in its dual form: whole chunks at a time, exactly the token-by-token rule.

Axes as in chunks.py, which computes what needs no memory; walk.py computes what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.omega import online
from atlas_blocks.omega.arguments import Arguments, checked, first_state
from atlas_blocks.omega.chunks import Piece, Tokens, cut
from atlas_blocks.omega.feature_maps import FeatureMap, features_of
from atlas_blocks.omega.groups import Groups
from atlas_blocks.omega.memories import MEMORIES
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, state_dtype
from atlas_blocks.omega.walk import ChunkMemory, StepwiseChunk, walk_gradient, walk_stepwise


def omega_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    weights: Sequence[Tensor],
    rule: Rule,
    feature_map: FeatureMap | None = None,
    state: OmegaState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, OmegaState]:
    """Optimise a memory over a sliding window at every token and read it (ATLAS Eq. 9-14, 32-33).

        G_t = sum_{j < c} gamma[t, j] grad_M l(M^(0); phi(k_{t-j}), v_{t-j})
        S_t = theta_t S_{t-1} + G_t
        M_t = alpha_t M_{t-1} - eta_t U(S_t)
        y_t = M_t(phi(q_t))

    q, k: [B, T, H, Dk]; v: [B, T, H, Dv]; any T >= 0; float64, float32, bfloat16 or float16. State
    and arithmetic are float64 where an input is, else float32.
    alpha, eta: [B, T, H], retention in [0, 1] and write strength >= 0. theta: [B, T, H] momentum
    decay in [0, 1], or None for none. gamma: [B, T, H, c] in [0, 1], gamma[..., t, j] weighs token
    t - j; c is the window. Gates are not range-checked.
    weights: M_0, a list of [H, dout, din], the outermost first: matrix [W]; mlp [W1, W2];
    gated_mlp [W1, W2, W3].
    rule: M, l, U, the chunk that M^(0) is the start of, and the window c: see `Rule`.
    feature_map: phi, such as PolynomialMap or SketchMap; None is the identity.
    state: what an earlier call returned, to go on from there; None begins a sequence.
    cu_seqlens: int [N + 1], bounds 0 = c_0 < ... < c_N = T of documents packed along T, with B = 1:
    each runs as if alone, and the state, in and out, has a batch of N.

    Returns y [B, T, H, Dv] in the dtype of q, and the state after T tokens, still in the autograd
    graph. Differentiable in every tensor argument. Raises ValueError naming a bad argument.
    """
    a = Arguments(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state, cu_seqlens)
    return run(checked(a))


def run(
    a: Arguments,
    starts: Sequence[Tensor] | None = None,
    stepwise: StepwiseChunk | None = None,
) -> tuple[Tensor, OmegaState]:
    """`omega_rule` on validated arguments; stepwise: who does a chunk of an update that is not
    linear.

    starts: zeros to write the memory at every chunk's start to (with such an update, for a chunk
    that an earlier call began: at this call's): each weight [B, N, H, dout, din], each momentum
    likewise, then the scale [B, N, H]; N from `chunk_count`. Those of packed documents follow each
    other without a gap.
    """
    if a.cu_seqlens is None and 0 in a.q.shape[:2]:
        return a.q.new_zeros(a.v.shape), a.state or first_state(a)
    groups, outputs, states = Groups.of(a), [], []
    with no_autocast(a.q):
        for group, part in zip(groups.groups, groups.arguments(a), strict=True):
            kept: list[ChunkMemory] | None = None if starts is None else []
            at = group.position
            y, state = run_at(part, at, a.rule.place(at), kept, stepwise)
            outputs.append(y)
            states.append(state)
            for n, memory in enumerate(kept or ()):
                for out, t in zip(starts or (), memory.start(), strict=True):
                    found = t.detach().unflatten(0, (len(group.rows), -1))
                    out.flatten(0, 1).index_copy_(0, group.places(out) + n, found)
    return groups.joined(outputs, a.v), groups.state(states)


def run_at(
    a: Arguments,
    position: int | Tensor,
    place: int,
    kept: list[ChunkMemory] | None = None,
    stepwise: StepwiseChunk | None = None,
) -> tuple[Tensor, OmegaState]:
    """`run` for rows that are all at this place of their chunk; chunk starts to `kept`.

    position: of the first token, for all rows or [B, 1]. place: see `Rule.place`.
    """
    tokens, memory, history = prepare(a, position)
    walk = walk_gradient if a.rule.linear else partial(walk_stepwise, step=stepwise)
    outputs = []
    for piece in pieces(a.q.shape[1], place, a.rule.chunk_size):
        write, read = cut(a.rule, a.feature_map, tokens, piece, memory.scale)
        y, memory = walk(a.rule, write, read, memory, piece.place, kept)
        outputs.append(y)

    y = torch.cat(outputs, 1).unflatten(0, (a.q.shape[0], a.q.shape[2]))
    y = y.transpose(1, 2).to(a.q.dtype)
    return y, next_state(a, memory, history)


def next_state(a: Arguments, memory: ChunkMemory, history: dict[str, Tensor]) -> OmegaState:
    """The state that this memory and these last tokens make, after the call's."""
    rule, state, size = a.rule, a.state, (a.q.shape[0], a.q.shape[2])
    assert state is not None
    there = OmegaState.groups(rule, a.theta is not None)

    def own(group: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        # After a whole chunk the next one's start is the memory itself.
        return [t.clone() if t is now else t for t, now in zip(group, other, strict=True)]

    if there["chunk_start"]:
        memory = memory._replace(chunk_start=own(memory.chunk_start, memory.weights))
    if there["momentum_start"]:
        memory = memory._replace(momentum_start=own(memory.momentum_start, memory.momentum))
    groups = {
        name: tuple(w.unflatten(0, size) for w in group) if there[name] else ()
        for name, group in zip(there, memory[:4], strict=True)
    }
    scale = memory.scale_start if rule.rewinds else memory.scale
    # Cloned: a view of the gates would keep the whole call's tokens alive.
    scale = scale.unflatten(0, size).clone()
    position = state.position + a.q.shape[1]
    fields: dict[str, Any] = {**groups, **history}
    return OmegaState(**fields, scale=scale, position=position)


def prepare(a: Arguments, position: int | Tensor) -> tuple[Tokens, ChunkMemory, dict[str, Tensor]]:
    """What the chunks are cut from, the memory before them, and the next state's last tokens.

    position: of the first token, for all rows or [B, 1].
    """
    q, k, v, alpha, eta, theta, gamma, first, feature_map, rule, state, _ = a
    assert state is not None
    dtype = state_dtype(q, v, *state.weights)
    n = state.alpha.shape[1]

    def with_past(past: Tensor, t: Tensor) -> Tensor:
        return torch.cat([past, t.to(dtype)], 1)

    gamma = with_past(state.gamma, gamma)
    # The window does not reach back over the start of the sequence.
    lags = torch.arange(rule.window, device=q.device)
    times = position - n + torch.arange(n + q.shape[1], device=q.device)
    seen = gamma * (lags <= times[..., None])[..., None, :]
    q, k = q.to(dtype), with_past(state.keys, k)
    phi_q, phi_k = features_of(feature_map, q, k)
    eta = with_past(state.eta, eta)
    theta = None if theta is None else with_past(state.theta, theta)
    tokens = Tokens(
        q_raw=q,
        k_raw=k,
        q=phi_q,
        k=phi_k,
        v=with_past(state.values, v),
        alpha=with_past(state.alpha, alpha),
        eta=eta,
        theta=theta,
        seen=seen,
        masses=online.masses(eta, theta, gamma) if rule.limits else None,
        weight=gamma.sum(-1) if rule.limits else None,
        initial=None,
    )
    initial = []
    if rule.decay_to == "initial":
        first = [w.to(dtype) for w in first]
        initial = [w.expand(q.shape[0], *w.shape).flatten(0, 1) for w in first]
        if rule.corrects:
            read = rule.structure.forward(lambda i, z: z @ first[i].mT, phi_k.transpose(1, 2))
            tokens = tokens._replace(initial=read.transpose(1, 2))
    groups = (state.weights, state.momentum, state.chunk_start)
    weights, momentum, start = ([w.flatten(0, 1) for w in group] for group in groups)
    scale = state.scale.flatten()
    if rule.rewinds:
        momentum = [w.flatten(0, 1) for w in state.momentum_start]
        memory = ChunkMemory.begin(start, momentum, scale, initial)
    elif rule.linear:
        memory = ChunkMemory.begin(weights, momentum, scale, initial)
    else:
        memory = ChunkMemory(weights, momentum, start, [], scale, scale, initial)

    def last(t: Tensor, count: int) -> Tensor:
        # Cloned: a view would keep the whole call's tokens alive.
        return t[:, t.shape[1] - count :].clone()

    history = {
        "keys": last(k, rule.history),
        "values": last(tokens.v, rule.history),
        "alpha": last(tokens.alpha, n),
        "eta": last(tokens.eta, n),
        "theta": state.theta if tokens.theta is None else last(tokens.theta, n),
        "gamma": last(gamma, n),
    }
    return tokens, memory, history


def pieces(length: int, place: int, chunk: int) -> list[Piece]:
    """The rest of a begun chunk, whole chunks, a begun one; place: of the first token in its."""
    head = min(length, -place % chunk)
    whole, tail = divmod(length - head, chunk)
    found = [
        Piece(0, head, 1, place),
        Piece(head, chunk, whole, 0),
        Piece(length - tail, tail, 1, 0),
    ]
    return [p for p in found if p.span * p.count > 0]


def read_memory(
    q: Tensor,
    weights: Sequence[Tensor],
    *,
    memory: str = "matrix",
    feature_map: FeatureMap | None = None,
) -> Tensor:
    """Read fixed memories without writing: y = M(phi(q)).

    q: [B, T, H, Dk]; weights: as `OmegaState.weights`, [B, H, dout, din] each. Returns
    [B, T, H, Dv] in the dtype of q. Of N memories that the same queries read, weights
    [B, N, H, dout, din], it is [B, N, T, H, Dv].
    """
    check.choice("memory", memory, MEMORIES)
    structure = MEMORIES[memory]
    x = q.transpose(1, 2).to(weights[0].dtype)
    with no_autocast(q):
        phi = x if feature_map is None else feature_map(x)
        if weights[0].ndim == 5:
            x, phi = x[:, None], phi[:, None]
        y = structure.forward(lambda i, z: z @ weights[i].mT, phi)
        if structure.residual and x.shape[-1] == y.shape[-1]:
            y = y + x
    return y.transpose(-3, -2).to(q.dtype)
