"""The Omega rule in its dual form: whole chunks at a time, exactly the token-by-token rule.

Axes as in chunks.py, which computes what needs no memory; walk.py computes what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from atlas_blocks.functional.chunks import Piece, Tokens, cut
from atlas_blocks.functional.features import FeatureMap, features_of
from atlas_blocks.functional.groups import Groups
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.rule import (
    Arguments,
    OmegaState,
    Rule,
    first_state,
    state_dtype,
    validate,
    write_mass,
)
from atlas_blocks.functional.walk import ChunkMemory, MuonChunk, walk_gradient, walk_muon


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
    memory: str = "matrix",
    objective: str = "l2",
    feature_map: FeatureMap | None = None,
    update: str = "gd",
    ns_steps: int = 5,
    ns_every: int = 1,
    chunk_size: int = 64,
    write_discount: bool = False,
    state: OmegaState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, OmegaState]:
    """Optimise a memory over a sliding window at every token and read it (ATLAS Eq. 9-14, 32-33).

        G_t = sum_{j < c} gamma[t, j] grad_M l(M^(0); phi(k_{t-j}), v_{t-j})
        S_t = theta_t S_{t-1} + G_t
        M_t = alpha_t M_{t-1} - eta_t U(S_t)
        y_t = M_t(phi(q_t))

    M^(0) is the memory just before t's chunk of `chunk_size` tokens, counted from the start of the
    sequence: the chunk is part of the function, not a tuning knob.

    q, k: [B, T, H, Dk]; v: [B, T, H, Dv]; any T >= 0; float64, float32, bfloat16 or float16. State
    and arithmetic are float64 where an input is, else float32.
    alpha, eta: [B, T, H], retention in [0, 1] and write strength >= 0. theta: [B, T, H] momentum
    decay in [0, 1], or None for none. gamma: [B, T, H, c] in [0, 1], gamma[..., t, j] weighs token
    t - j; c is the window. Gates are not range-checked.
    weights: M_0, a list of [H, dout, din]: matrix [W]; mlp [W1, W2]; gated_mlp [W1, W2, W3].
    memory: "matrix" W x; "mlp" r(x) + W1 gelu(W2 x); "gated_mlp" r(x) + W1 (gelu(W2 x) * W3 x);
    r(x) is the key itself where Dk = Dv, else absent.
    objective: "l2" 1/2 |M(x) - v|^2, or "dot" -<M(x), v>.
    feature_map: phi, a PolynomialMap or SketchMap; None is the identity.
    update: "gd" U(S) = S, or "muon" U(S) = Newton-Schulz of `ns_steps` steps; taken only at every
    `ns_every`-th token of the chunk and at its last.
    write_discount: weaken each write by what its chunk has written in its direction already,
    against divergence on repetitive input (specification 9b). Measured, not proven: |M| stays
    below 2 with "gd" over 100,000 tokens at extreme gates.
    state: what an earlier call returned, to go on from there; None begins a sequence.
    cu_seqlens: int [N + 1], bounds 0 = c_0 < ... < c_N = T of documents packed along T, with B = 1:
    each runs as if alone, and the state, in and out, has a batch of N.

    Returns y [B, T, H, Dv] in the dtype of q, and the state after T tokens, still in the autograd
    graph. Differentiable in every tensor argument. Raises ValueError naming a bad argument.
    """
    window = gamma.shape[-1] if isinstance(gamma, Tensor) and gamma.ndim == 4 else 1
    rule = Rule(memory, objective, update, ns_steps, ns_every, chunk_size, write_discount, window)
    a = Arguments(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state, cu_seqlens)
    validate(*a)
    return run(a)


def run(
    a: Arguments,
    starts: Sequence[Tensor] | None = None,
    muon: MuonChunk | None = None,
) -> tuple[Tensor, OmegaState]:
    """`omega_rule` on validated arguments; muon: who does a chunk where the update is that.

    starts: zeros to write the memory at every chunk's start to (for a chunk that an earlier call
    began: at this call's): each weight [B, N, H, dout, din], each momentum likewise, then the
    discount's scale [B, N, H]; N from `chunk_count`. Those of packed documents follow each other
    without a gap.
    """
    if a.cu_seqlens is None and 0 in a.q.shape[:2]:
        return a.q.new_zeros(a.v.shape), a.state or first_state(a)
    groups, outputs, states = Groups.of(a), [], []
    with torch.autocast(a.q.device.type, enabled=False):
        for group, part in zip(groups.groups, groups.arguments(a), strict=True):
            kept: list[ChunkMemory] | None = None if starts is None else []
            at = group.position
            y, state = run_at(part, at, at % a.rule.chunk_size, kept, muon)
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
    muon: MuonChunk | None = None,
) -> tuple[Tensor, OmegaState]:
    """`run` for rows that are all at this place of their chunk; chunk starts to `kept`.

    position: of the first token, for all rows or [B, 1].
    """
    tokens, memory, history = prepare(a, position)
    walk = walk_gradient if a.rule.update == "gd" else partial(walk_muon, step=muon)
    outputs = []
    for piece in pieces(a.q.shape[1], place, a.rule.chunk_size):
        write, read = cut(a.rule, a.feature_map, tokens, piece)
        y, memory = walk(a.rule, write, read, memory, piece.place, kept)
        outputs.append(y)

    def rows(t: Tensor) -> Tensor:
        """[G, ...] -> [B, H, ...]."""
        return t.unflatten(0, (a.q.shape[0], a.q.shape[2]))

    y = rows(torch.cat(outputs, 1)).transpose(1, 2).to(a.q.dtype)
    *groups, scale = memory
    weights, momentum, start = (tuple(rows(w) for w in group) for group in groups)
    assert a.state is not None
    keys, values, writes = history
    after = a.state.position + a.q.shape[1]
    return y, OmegaState(weights, momentum, start, keys, values, writes, rows(scale).clone(), after)


def prepare(a: Arguments, position: int | Tensor) -> tuple[Tokens, ChunkMemory, list[Tensor]]:
    """What the chunks are cut from, the memory before them, and the next state's last tokens.

    position: of the first token, for all rows or [B, 1].
    """
    q, k, v, alpha, eta, theta, gamma, _, feature_map, rule, state, _ = a
    assert state is not None
    dtype = state_dtype(q, v, *state.weights)
    # The window does not reach back over the start of the sequence.
    lags = torch.arange(rule.window, device=q.device)
    times = position + torch.arange(q.shape[1], device=q.device)
    gamma = gamma.to(dtype) * (lags <= times[..., None])[..., None, :]
    eta, theta = eta.to(dtype), None if theta is None else theta.to(dtype)
    writes = state.writes
    if rule.write_discount:
        writes = torch.cat([writes, write_mass(eta, theta, gamma)], 1)
    q, k = q.to(dtype), torch.cat([state.keys, k.to(dtype)], 1)
    phi_q, phi_k = features_of(feature_map, q, k)
    tokens = Tokens(
        q_raw=q,
        k_raw=k,
        q=phi_q,
        k=phi_k,
        v=torch.cat([state.values, v.to(dtype)], 1),
        alpha=alpha.to(dtype),
        eta=eta,
        theta=theta,
        gamma=gamma,
        writes=writes if rule.write_discount else None,
    )
    groups = (state.weights, state.momentum, state.chunk_start)
    weights, momentum, start = ([w.flatten(0, 1) for w in group] for group in groups)
    memory = ChunkMemory(weights, momentum, start, state.scale.flatten())

    def last(t: Tensor) -> Tensor:
        # Cloned: a view would keep the whole call's tokens alive.
        return t[:, t.shape[1] - rule.history :].clone()

    history = [last(k), last(tokens.v), last(writes) if rule.write_discount else writes]
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
    """Read one fixed memory without writing: y = M(phi(q)).

    q: [B, T, H, Dk]; weights: as `OmegaState.weights`, [B, H, dout, din] each. Returns
    [B, T, H, Dv] in the dtype of q.
    """
    structure = MEMORIES[memory]
    x = q.transpose(1, 2).to(weights[0].dtype)
    with torch.autocast(q.device.type, enabled=False):
        phi = x if feature_map is None else feature_map(x)
        y = structure.forward(lambda i, z: z @ weights[i].mT, phi)
        if structure.residual and x.shape[-1] == y.shape[-1]:
            y = y + x
    return y.transpose(1, 2).to(q.dtype)
