"""The Omega rule in its dual form: whole chunks at a time, exactly the token-by-token rule.

B batch, T tokens, H heads, G = B H; Dk, Dv key and value width, Dphi width after the feature map;
c window, b chunk, N chunks, L tokens of a chunk (b, or less at the ends), E = e + L keys of a
chunk, e of them before it. Per chunk: A decay matrix, C = Theta Gam window weights after momentum,
P = A diag(eta), see specification section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atlas_blocks.functional.features import FeatureMap
from atlas_blocks.functional.memories import MEMORIES, Factor
from atlas_blocks.functional.newton_schulz import orthogonalise
from atlas_blocks.functional.rule import (
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
    write_discount: weaken each write by what its chunk has written in its direction already, which
    keeps repetitive input bounded (specification 9b).
    state: what an earlier call returned, to go on from there; None begins a sequence.

    Returns y [B, T, H, Dv] in the dtype of q, and the state after T tokens, still in the autograd
    graph. Differentiable in every tensor argument. Raises ValueError naming a bad argument.
    """
    window = gamma.shape[-1] if isinstance(gamma, Tensor) and gamma.ndim == 4 else 1
    rule = Rule(
        memory, objective, update, ns_steps, ns_every, chunk_size, write_discount, window
    )  # fmt: skip
    validate(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state)
    state = state or initial_state(q, v, weights, rule, theta is not None)
    gates = _Gates(alpha, eta, theta, gamma)
    with torch.autocast(q.device.type, enabled=False):
        positions = state.position.tolist()
        if len(set(positions)) <= 1:
            return _one_position(rule, feature_map, state, q, k, v, gates)
        # Rows at different places of their chunks: those at the same place go together.
        groups = {
            p: [i for i, x in enumerate(positions) if x == p] for p in dict.fromkeys(positions)
        }
        parts = [
            _one_position(
                rule, feature_map, state[r], q[r], k[r], v[r], gates.map(lambda g, r=r: g[r])
            )
            for r in groups.values()
        ]
        order = [i for rows in groups.values() for i in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat([y for y, _ in parts])[back], OmegaState.cat([s for _, s in parts])[back]


class _Gates(NamedTuple):
    """alpha, eta, theta [B, T, H] or, heads first, [G, T]; gamma [B, T, H, c] or [G, T, c]."""

    alpha: Tensor
    eta: Tensor
    theta: Tensor | None
    gamma: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> _Gates:
        return _Gates(*(None if g is None else fn(g) for g in self))


class _Tokens(NamedTuple):
    """All tokens of a call, heads first. Keys and values begin with the n of the history."""

    q: Tensor  # [G, T, Dphi]
    k: Tensor  # [G, n + T, Dphi]
    v: Tensor  # [G, n + T, Dv]
    q_raw: Tensor  # [G, T, Dk], before the feature map
    k_raw: Tensor  # [G, n + T, Dk]
    gates: _Gates
    writes: Tensor | None  # m_s [G, n + T] where writes are discounted


class _Memory(NamedTuple):
    """M, S and M^(0), each a list of [G, dout, din]; S is empty without momentum."""

    weights: list[Tensor]
    momentum: list[Tensor]
    chunk_start: list[Tensor]


def _one_position(
    rule: Rule,
    feature_map: FeatureMap | None,
    state: OmegaState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: _Gates,
) -> tuple[Tensor, OmegaState]:
    """All rows are at the same position of their sequence."""
    batch, length, heads, _ = q.shape
    if batch == 0 or length == 0:
        return q.new_zeros(v.shape), state
    dtype = state_dtype(q, v, *state.weights)
    position = int(state.position[0])
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    gates = gates.map(lambda g: g.to(dtype))
    # The window does not reach back over the start of the sequence.
    lags = torch.arange(rule.window, device=q.device)
    times = position + torch.arange(length, device=q.device)
    gates = gates._replace(gamma=gates.gamma * (lags <= times[:, None])[:, None])

    keys, values = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
    writes = state.writes
    if rule.write_discount:
        writes = torch.cat([writes, write_mass(gates.eta, gates.theta, gates.gamma)], 1)
    phi = feature_map or (lambda x: x)
    q_raw, k_raw = _heads_first(q), _heads_first(keys)
    tokens = _Tokens(
        phi(q_raw),
        phi(k_raw),
        _heads_first(values),
        q_raw,
        k_raw,
        gates.map(_heads_first),
        _heads_first(writes) if rule.write_discount else None,
    )
    memory = _Memory(
        *(
            [w.flatten(0, 1) for w in group]
            for group in (state.weights, state.momentum, state.chunk_start)
        )
    )
    outputs = []
    for start, span, count in _pieces(length, position, rule.chunk_size):
        place = (position + start) % rule.chunk_size
        chunks = _cut(rule, feature_map, tokens, start, span, count, place)
        y, memory = _run_chunks(rule, chunks, memory, place)
        outputs.append(y)
    y = torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)
    n = rule.history
    unflatten = [tuple(w.unflatten(0, (batch, heads)) for w in group) for group in memory]
    return y.to(q.dtype), OmegaState(
        *unflatten,
        # Cloned: a view would keep the whole call's tokens alive.
        keys=keys[:, keys.shape[1] - n :].clone(),
        values=values[:, values.shape[1] - n :].clone(),
        writes=writes[:, writes.shape[1] - n :].clone() if rule.write_discount else writes,
        position=state.position + length,
    )


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B H, T, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _pieces(length: int, position: int, chunk: int) -> list[tuple[int, int, int]]:
    """(first token, tokens a chunk, chunks): rest of a begun chunk, whole chunks, a begun one."""
    head = min(length, -position % chunk)
    whole, tail = divmod(length - head, chunk)
    pieces = [(0, head, 1), (head, chunk, whole), (length - tail, tail, 1)]
    return [p for p in pieces if p[1] * p[2] > 0]


# --- what needs no memory: for all chunks at once -----------------------------------------------


@dataclass(frozen=True)
class _Chunks:
    """N chunks; the chunk axis first, so that one chunk is a contiguous slice."""

    q: Tensor  # [N, G, L, Dphi]
    k: Tensor  # [N, G, E, Dphi]
    v: Tensor  # [N, G, E, Dv]
    q_raw: Tensor | None  # [N, G, L, Dk] where the memory has a residual
    k_raw: Tensor | None  # [N, G, E, Dk]
    scores: Tensor  # phi(q) . phi(k)  [N, G, L, E]
    abar: Tensor  # running product of alpha  [N, G, L, 1]
    decay: Tensor  # A  [N, G, L, L]
    strength: Tensor  # eta, discounted unless `similarity` is there  [N, G, L]
    thbar: Tensor | None  # running product of theta  [N, G, L, 1]
    window: Tensor  # C = Theta Gam  [N, G, L, E]
    similarity: Tensor | None  # phi(k_s) . phi(k_t) for a discount that needs M^(0)  [N, G, L', L']
    writes: Tensor | None  # m_s of the chunk so far  [N, G, L']

    def __len__(self) -> int:
        return self.q.shape[0]

    def __getitem__(self, n: int) -> _Chunks:
        return _Chunks(*(None if x is None else x[n] for x in vars(self).values()))


def _cut(
    rule: Rule,
    feature_map: FeatureMap | None,
    x: _Tokens,
    start: int,
    span: int,
    count: int,
    place: int,
) -> _Chunks:
    """Cut `count` chunks of `span` tokens out of a call; the first token stands at `place`."""
    n = rule.history
    stop = start + span * count
    # Keys before the chunk: the window's halo, and the begun chunk where writes are discounted.
    extra = max(rule.window - 1, place if rule.write_discount else 0)

    def tokens(t: Tensor) -> Tensor:
        """[G, T, ...] -> [N, G, L, ...]."""
        return t[:, start:stop].unflatten(1, (count, span)).transpose(0, 1).contiguous()

    def with_past(t: Tensor, past: int) -> Tensor:
        """[G, n + T, ...] -> [N, G, past + L, ...], each chunk with the tokens before it."""
        reach = t[:, n + start - past : n + stop].unfold(1, past + span, span)
        return reach.movedim(-1, 2).transpose(0, 1).contiguous()

    gates = x.gates.map(tokens)
    decay, abar = _decay_matrix(gates.alpha)
    band = _window_matrix(gates.gamma, extra)
    thbar = None
    if gates.theta is not None:
        momentum, thbar = _decay_matrix(gates.theta)
        band = momentum @ band
    q, k = tokens(x.q), with_past(x.k, extra)
    q_raw, k_raw = tokens(x.q_raw), with_past(x.k_raw, extra)

    def kernel(a: Tensor, b: Tensor, a_raw: Tensor, b_raw: Tensor) -> Tensor:
        return a @ b.mT if feature_map is None else feature_map.kernel(a_raw, b_raw)

    strength, similarity, writes = gates.eta, None, None
    if x.writes is not None:
        so_far = slice(extra - place, None)
        writes = with_past(x.writes, place)
        rows, raw = k[..., so_far, :], k_raw[..., so_far, :]
        similarity = kernel(rows, rows, raw, raw)
        if rule.memory == "matrix":
            strength = _discounted(strength, writes, similarity.abs())
            similarity = writes = None
    residual = MEMORIES[rule.memory].residual and q_raw.shape[-1] == x.v.shape[-1]
    return _Chunks(
        q=q,
        k=k,
        v=with_past(x.v, extra),
        q_raw=q_raw if residual else None,
        k_raw=k_raw if residual else None,
        scores=kernel(q, k, q_raw, k_raw),
        abar=abar,
        decay=decay,
        strength=strength,
        thbar=thbar,
        window=band,
        similarity=similarity,
        writes=writes,
    )


def _decay_matrix(gate: Tensor) -> tuple[Tensor, Tensor]:
    """A[t, s] = prod_{r = s+1..t} gate_r for s <= t, else 0, and the running product abar.

    gate: [..., L] -> [..., L, L], [..., L, 1]. Products, not logarithms: exact at a gate of 0, and
    in its gradient there.
    """
    span = gate.shape[-1]
    after = torch.ones(span, span, dtype=torch.bool, device=gate.device).tril(-1)
    factors = torch.where(after, gate.unsqueeze(-1), 1.0)
    return factors.cumprod(-2).tril(), gate.cumprod(-1).unsqueeze(-1)


def _window_matrix(gamma: Tensor, extra: int) -> Tensor:
    """Gam[t, i] = gamma[t, j] where key i is token t - j; keys begin `extra` before the chunk.

    gamma: [..., L, c] -> [..., L, extra + L].
    """
    span, window = gamma.shape[-2:]
    # Each row one place further right: rows one longer than the matrix, laid end to end.
    width = extra + span
    rows = F.pad(gamma.flip(-1), (extra - (window - 1), span))
    return rows.flatten(-2)[..., : span * width].unflatten(-1, (span, width))


def _discounted(eta: Tensor, writes: Tensor, kappa: Tensor) -> Tensor:
    """eta_t exp(-rho_t) / max(1, m_t kappa(t, t)), rho_t = sum_{s < t} m_s kappa(s, t)  (9b).

    eta: [..., L] of the last L of the chunk's L' tokens so far; writes: [..., L'];
    kappa: [..., L', L'].
    """
    span = eta.shape[-1]
    rho = (kappa.tril(-1) @ writes.unsqueeze(-1)).squeeze(-1)
    own = writes * kappa.diagonal(dim1=-2, dim2=-1)
    return eta * torch.exp(-rho[..., -span:]) / own[..., -span:].clamp(min=1)


# --- what needs the memory: chunk after chunk ---------------------------------------------------


def _run_chunks(rule: Rule, chunks: _Chunks, memory: _Memory, place: int) -> tuple[Tensor, _Memory]:
    """Walk the chunks. Returns y [G, N L, Dv] and the memory after them."""
    outputs = []
    for n in range(len(chunks)):
        if place == 0:
            memory = memory._replace(chunk_start=memory.weights)
        step = _gradient_step if rule.update == "gd" else _checkpointed_muon_step
        y, memory = step(rule, chunks[n], memory, place)
        outputs.append(y)
        if place + y.shape[-2] == rule.chunk_size:
            memory = memory._replace(chunk_start=memory.weights)
    return torch.cat(outputs, 1), memory


def _factors(rule: Rule, x: _Chunks, memory: _Memory) -> tuple[list[Factor], Tensor]:
    """The chunk's gradient factors at M^(0), and P = A diag(eta) [G, L, L], eta discounted."""
    structure = MEMORIES[rule.memory]

    def error(y: Tensor) -> Tensor:
        """dl/dM(k) for every key: M(k) - v, or -v."""
        if rule.objective == "dot":
            return -x.v
        return y - x.v if x.k_raw is None else y + x.k_raw - x.v

    factors = structure.factors(memory.chunk_start, x.k, error)
    strength = x.strength
    if x.writes is not None and x.similarity is not None:
        rows = x.k[:, -x.writes.shape[-1] :]
        kappa = structure.tangent(memory.chunk_start, rows, x.similarity)
        strength = _discounted(strength, x.writes, kappa)
    return factors, x.decay * strength.unsqueeze(-2)


def _read(rule: Rule, x: _Chunks, linear: Callable[[int, Tensor], Tensor]) -> Tensor:
    """y_t = M_t(phi(q_t)): the memory's own forward with every weight the t-th."""
    y = MEMORIES[rule.memory].forward(linear, x.q)
    return y if x.q_raw is None else y + x.q_raw


def _gradient_step(rule: Rule, x: _Chunks, memory: _Memory, place: int) -> tuple[Tensor, _Memory]:
    """One chunk with U = identity: no weight is formed per token (section 6)."""
    factors, p = _factors(rule, x, memory)
    written = p @ x.window  # P C
    carried = None if x.thbar is None else p @ x.thbar  # P thbar

    def linear(i: int, z: Tensor) -> Tensor:
        """W_t z_t = abar_t W z_t - (P thbar)_t S z_t - sum_i (P C)[t, i] (R_i . z_t) L_i."""
        left, right = factors[i]
        y = x.abar * (z @ memory.weights[i].mT)
        if carried is not None:
            y = y - carried * (z @ memory.momentum[i].mT)
        scores = x.scores if right is x.k else z @ right.mT
        return torch.baddbmm(y, written * scores, left, alpha=-1)

    y = _read(rule, x, linear)
    # The same at the last token, for the weights themselves.
    weights = [
        torch.baddbmm(x.abar[:, -1:] * w, (left * written[:, -1].unsqueeze(-1)).mT, right, alpha=-1)
        for w, (left, right) in zip(memory.weights, factors, strict=True)
    ]
    if carried is not None:
        weights = [w - carried[:, -1:] * s for w, s in zip(weights, memory.momentum, strict=True)]
    return y, _Memory(weights, _last_momentum(x, memory, factors), memory.chunk_start)


def _last_momentum(x: _Chunks, memory: _Memory, factors: list[Factor]) -> list[Tensor]:
    """S after the chunk: thbar S + sum_i C[last, i] L_i R_i^T."""
    if x.thbar is None:
        return []
    last = x.window[:, -1].unsqueeze(-1)
    return [
        torch.baddbmm(x.thbar[:, -1:] * s, (left * last).mT, right)
        for s, (left, right) in zip(memory.momentum, factors, strict=True)
    ]


def _muon_step(rule: Rule, x: _Chunks, memory: _Memory, place: int) -> tuple[Tensor, _Memory]:
    """One chunk with U = Newton-Schulz: S_t is formed where a step is taken, and orthogonalised."""
    factors, p = _factors(rule, x, memory)
    span = x.q.shape[-2]
    taken = [t for t in range(span) if rule.steps_at(place + t)]
    per_token = []  # W_t [G, L, dout, din]
    for i, (left, right) in enumerate(factors):
        weight = memory.weights[i]
        now = x.abar.unsqueeze(-1) * weight.unsqueeze(1)
        if taken:
            # S_t = thbar_t S + sum_i C[t, i] L_i R_i^T, all t in one product.
            lefts = x.window[:, taken].unsqueeze(-2) * left.mT.unsqueeze(1)
            s = (lefts.flatten(1, 2) @ right).unflatten(1, lefts.shape[1:3])
            if x.thbar is not None:
                s = s + x.thbar[:, taken].unsqueeze(-1) * memory.momentum[i].unsqueeze(1)
            steps = orthogonalise(s, rule.ns_steps)
            now = torch.baddbmm(now.flatten(2), p[:, :, taken], steps.flatten(2), alpha=-1)
            now = now.unflatten(2, weight.shape[1:])
        per_token.append(now)

    def linear(i: int, z: Tensor) -> Tensor:
        return (per_token[i] @ z.unsqueeze(-1)).squeeze(-1)

    y = _read(rule, x, linear)
    # Cloned: a view would keep the weights of every token alive.
    weights = [w[:, -1].clone() for w in per_token]
    return y, _Memory(weights, _last_momentum(x, memory, factors), memory.chunk_start)


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


def _checkpointed_muon_step(
    rule: Rule, x: _Chunks, memory: _Memory, place: int
) -> tuple[Tensor, _Memory]:
    """`_muon_step` that keeps nothing per token for the backward: M and S of the chunk's start."""
    if not torch.is_grad_enabled():
        return _muon_step(rule, x, memory, place)
    return checkpoint(
        _muon_step, rule, x, memory, place, use_reentrant=False, preserve_rng_state=False
    )
