"""The Omega rule in its dual form: whole chunks at a time, exactly the token-by-token rule.

Axes as in chunks.py, which computes what needs no memory; here is what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atlas_blocks.functional.chunks import Read, Tokens, Write, cut, discounted, running_scale
from atlas_blocks.functional.features import FeatureMap
from atlas_blocks.functional.memories import MEMORIES, Factor
from atlas_blocks.functional.newton_schulz import orthogonalise
from atlas_blocks.functional.rule import (
    Arguments,
    OmegaState,
    Rule,
    initial_state,
    state_dtype,
    validate,
    write_mass,
)


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

    Returns y [B, T, H, Dv] in the dtype of q, and the state after T tokens, still in the autograd
    graph. Differentiable in every tensor argument. Raises ValueError naming a bad argument.
    """
    window = gamma.shape[-1] if isinstance(gamma, Tensor) and gamma.ndim == 4 else 1
    rule = Rule(memory, objective, update, ns_steps, ns_every, chunk_size, write_discount, window)
    a = Arguments(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state)
    validate(*a)
    return run(a)


def chunk_count(length: int, chunk: int, begun: bool) -> int:
    """N: the most chunks that `length` tokens touch; `begun` where they may start inside one."""
    return (length + chunk - 1 + (chunk - 1 if begun else 0)) // chunk


def run(a: Arguments, starts: Sequence[Tensor] | None = None) -> tuple[Tensor, OmegaState]:
    """`omega_rule` on validated arguments.

    starts: zeros to write the memory at every chunk's start to (for a chunk that an earlier call
    began: at this call's): each weight [B, N, H, dout, din], each momentum likewise, then the
    discount's scale [B, N, H]; N from `chunk_count`.
    """
    positions = None if a.state is None else a.state.position.tolist()
    a = a._replace(state=a.state or initial_state(a.q, a.v, a.weights, a.rule, a.theta is not None))
    if a.q.shape[0] == 0 or a.q.shape[1] == 0:
        return a.q.new_zeros(a.v.shape), a.state
    # Rows at different places of their chunks: those at the same place go together.
    groups: dict[int, list[int]] = {}
    for row, position in enumerate(positions or [0] * len(a.q)):
        groups.setdefault(position, []).append(row)
    parts = []
    with torch.autocast(a.q.device.type, enabled=False):
        for position, rows in groups.items():
            kept: list[_Memory] | None = None if starts is None else []
            parts.append(_run(a if len(groups) == 1 else a.rows(rows), position, kept))
            for n, memory in enumerate(kept or ()):
                for out, t in zip(starts or (), memory.start(), strict=True):
                    out[rows, n] = t.unflatten(0, (len(rows), -1))
    if len(parts) == 1:
        return parts[0]
    order = [i for rows in groups.values() for i in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat([y for y, _ in parts])[back], OmegaState.cat([s for _, s in parts])[back]


class _Memory(NamedTuple):
    """M, S and M^(0), each a list of [G, dout, din]; S is empty without momentum."""

    weights: list[Tensor]
    momentum: list[Tensor]
    chunk_start: list[Tensor]
    scale: Tensor  # [G], see `running_scale`

    def start(self) -> list[Tensor]:
        """What a whole chunk starts from: there M^(0) is M."""
        return [*self.weights, *self.momentum, self.scale]


def _run(a: Arguments, position: int, kept: list[_Memory] | None) -> tuple[Tensor, OmegaState]:
    """`run` for rows that are all at this position of their sequence; chunk starts to `kept`."""
    q, k, v, alpha, eta, theta, gamma, _, feature_map, rule, state = a
    assert state is not None
    batch, length, heads, _ = q.shape
    dtype = state_dtype(q, v, *state.weights)
    # The window does not reach back over the start of the sequence.
    lags = torch.arange(rule.window, device=q.device)
    times = position + torch.arange(length, device=q.device)
    gamma = gamma.to(dtype) * (lags <= times[:, None])[:, None]
    eta, theta = eta.to(dtype), None if theta is None else theta.to(dtype)
    writes = state.writes
    if rule.write_discount:
        writes = torch.cat([writes, write_mass(eta, theta, gamma)], 1)
    tokens = Tokens(
        q=q.to(dtype),
        k=torch.cat([state.keys, k.to(dtype)], 1),
        v=torch.cat([state.values, v.to(dtype)], 1),
        alpha=alpha.to(dtype),
        eta=eta,
        theta=theta,
        gamma=gamma,
        writes=writes if rule.write_discount else None,
    )
    groups = (state.weights, state.momentum, state.chunk_start)
    weights, momenta, starts = ([w.flatten(0, 1) for w in group] for group in groups)
    memory = _Memory(weights, momenta, starts, state.scale.flatten())
    outputs = []
    for first, span, count in _pieces(length, position, rule.chunk_size):
        place = (position + first) % rule.chunk_size
        write, read = cut(rule, feature_map, tokens, first, span, count, place)
        walk = _walk_gradient if rule.update == "gd" else _walk_muon
        y, memory = walk(rule, write, read, memory, place, kept)
        outputs.append(y)
    y = torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)

    def last(t: Tensor) -> Tensor:
        # Cloned: a view would keep the whole call's tokens alive.
        return t[:, t.shape[1] - rule.history :].clone()

    *groups, scale = memory
    return y.to(q.dtype), OmegaState(
        *(tuple(w.unflatten(0, (batch, heads)) for w in group) for group in groups),
        keys=last(tokens.k),
        values=last(tokens.v),
        writes=last(writes) if rule.write_discount else writes,
        scale=scale.unflatten(0, (batch, heads)).clone(),
        position=state.position + length,
    )


def _pieces(length: int, position: int, chunk: int) -> list[tuple[int, int, int]]:
    """(first token, tokens a chunk, chunks): rest of a begun chunk, whole chunks, a begun one."""
    head = min(length, -position % chunk)
    whole, tail = divmod(length - head, chunk)
    pieces = [(0, head, 1), (head, chunk, whole), (length - tail, tail, 1)]
    return [p for p in pieces if p[1] * p[2] > 0]


def _walk_gradient(
    rule: Rule,
    write: Write,
    read: Read,
    memory: _Memory,
    place: int,
    kept: list[_Memory] | None,
) -> tuple[Tensor, _Memory]:
    """U = identity: only the weights at the chunks' ends are sequential; then all reads at once.

    Returns y [G, N L, Dv] and the memory after the chunks.
    """
    groups = len(memory.weights[0])
    starts, all_factors, strengths = [], [], []
    for x in write.unbind():
        memory = _enter(memory, place)
        factors, eta, scale = _gradients(rule, x, memory)
        starts.append(memory)
        all_factors.append(factors)
        strengths.append(eta)
        last = x.last or x.last_coefficients(eta)
        weights = []
        for i, (left, right) in enumerate(factors):
            now = x.abar * memory.weights[i]
            if last.carried is not None:
                now.addcmul_(last.carried, memory.momentum[i], value=-1)
            weights.append(now.baddbmm_((left * last.written).mT, right, alpha=-1))
        momentum = _next_momentum(x, memory, factors)
        memory = _Memory(weights, momentum, memory.chunk_start, scale)
    if kept is not None:
        kept.extend(starts)

    x = read.flatten()
    step = x.decay * torch.cat(strengths).unsqueeze(-2)  # P
    written = step @ write.window.flatten(0, 1)  # P C
    carried = None if write.thbar is None else step @ write.thbar.flatten(0, 1)  # P thbar

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t = abar_t W z_t - (P thbar)_t S z_t - sum_i (P C)[t, i] (R_i . z_t) L_i."""
        left, right = ([f[i][side] for f in all_factors] for side in (0, 1))
        y = x.abar * (z @ torch.cat([m.weights[i] for m in starts]).mT)
        if carried is not None:
            momentum = torch.cat([m.momentum[i] for m in starts])
            y.addcmul_(carried, z @ momentum.mT, value=-1)
        dots = x.dots if z is x.q else z @ torch.cat(right).mT
        return y.baddbmm_(written * dots, torch.cat(left), alpha=-1)

    y = MEMORIES[rule.memory].forward(linear, x.q)
    y = y if x.residual is None else y + x.residual
    span = y.shape[1]
    y = y.unflatten(0, (-1, groups)).transpose(0, 1).flatten(1, 2)
    return y, _leave(rule, memory, place, span)


def _walk_muon(
    rule: Rule,
    write: Write,
    read: Read,
    memory: _Memory,
    place: int,
    kept: list[_Memory] | None,
) -> tuple[Tensor, _Memory]:
    """U = Newton-Schulz, chunk by chunk. For the backward nothing is kept per token: only M and S
    at the chunks' starts. Returns y [G, N L, Dv] and the memory after the chunks."""
    outputs = []
    for chunk in zip(write.unbind(), read.unbind(), strict=True):
        memory = _enter(memory, place)
        if kept is not None:
            kept.append(memory)
        arguments = (rule, *chunk, memory, place)
        if torch.is_grad_enabled():
            y, memory = checkpoint(
                _muon_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, memory = _muon_chunk(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), _leave(rule, memory, place, outputs[-1].shape[1])


def _muon_chunk(
    rule: Rule, write: Write, read: Read, memory: _Memory, place: int
) -> tuple[Tensor, _Memory]:
    """S_t is formed where a step is taken, and orthogonalised; W_t is formed for every token."""
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
    return y, _Memory(weights, momentum, memory.chunk_start, scale)


def _enter(memory: _Memory, place: int) -> _Memory:
    """At a chunk's first token M^(0) is the memory so far."""
    return memory._replace(chunk_start=memory.weights) if place == 0 else memory


def _leave(rule: Rule, memory: _Memory, place: int, span: int) -> _Memory:
    """The state after a whole chunk already has the next chunk's M^(0)."""
    whole = place + span == rule.chunk_size
    return memory._replace(chunk_start=memory.weights) if whole else memory


def _gradients(rule: Rule, x: Write, memory: _Memory) -> tuple[list[Factor], Tensor, Tensor]:
    """The chunk's gradient factors at M^(0), its write strengths eta [G, L], the last scale [G]."""
    structure = MEMORIES[rule.memory]

    def error(y: Tensor) -> Tensor:
        """dl/dM(k) for every key: M(k) - v, or -v."""
        return y - x.target if rule.objective == "l2" else -x.target

    factors = structure.factors(memory.chunk_start, x.k, error)
    if x.discount is None or structure.tangent is None:
        return factors, x.eta, memory.scale
    similarity, squares, held, writes, momentum = vars(x.discount).values()
    h = factors[0][1]
    f = structure.tangent(memory.chunk_start, x.k, factors[0])
    own = h.square().sum(-1) + f.square().sum(-1) * squares
    scale = running_scale(own, held, momentum, x.thbar, memory.scale)
    h, f = (t[:, -writes.shape[-1] :] for t in (h, f))
    kappa = (h @ h.mT).abs() + (f @ f.mT) * similarity
    return factors, discounted(x.eta, writes, kappa, scale), scale[:, -1]


def _next_momentum(x: Write, memory: _Memory, factors: list[Factor]) -> list[Tensor]:
    """S after the chunk: thbar S + sum_i C[last, i] L_i R_i^T."""
    if x.thbar_last is None:
        return []
    return [
        (x.thbar_last * s).baddbmm_((left * x.window_last).mT, right)
        for s, (left, right) in zip(memory.momentum, factors, strict=True)
    ]


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
