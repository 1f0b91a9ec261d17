"""The Omega rule for one token, its position read by no host: a graph of tensor operations alone.

The same function as `omega_rule` for T = 1, without a loop and without a branch on data, so that it
can be exported to where no Python runs. Rows may stand at different positions.

B batch, H heads, G = B H; n past tokens of the state, E = n + 1 keys; c window, b chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_blocks.functional.chunks import running_scale, window_matrix
from atlas_blocks.functional.features import features_of
from atlas_blocks.functional.memories import MEMORIES, Factor
from atlas_blocks.functional.newton_schulz import orthogonalise
from atlas_blocks.functional.rule import Arguments, OmegaState, Rule, write_mass


def one_token(a: Arguments) -> tuple[Tensor, OmegaState]:
    """`omega_rule` on validated arguments with T = 1 and a state.

    Returns y [B, 1, H, Dv] in the dtype of q, and the next state.
    """
    rule, phi, state = a.rule, a.feature_map, a.state
    assert state is not None
    batch, _, heads, _ = a.q.shape
    dtype, structure = state.keys.dtype, MEMORIES[rule.memory]

    def groups(t: Tensor) -> Tensor:
        """[B, n, H, ...] -> [G, n, ...]."""
        return t.transpose(1, 2).flatten(0, 1)

    def rows(t: Tensor) -> Tensor:
        """[G, ...] -> [B, H, ...]."""
        return t.unflatten(0, (batch, heads))

    position = state.position.to(a.q.device)[:, None].expand(batch, heads).reshape(-1, 1, 1)
    place = position % rule.chunk_size
    theta = None if a.theta is None else a.theta.to(dtype)
    # The window does not reach back over the start of the sequence.
    lags = torch.arange(rule.window, device=a.q.device)
    gamma = a.gamma.to(dtype) * (lags <= rows(position).transpose(1, 2))
    past_keys = torch.cat([state.keys, a.k.to(dtype)], 1)
    past_values = torch.cat([state.values, a.v.to(dtype)], 1)
    past_writes = state.writes
    if rule.write_discount:
        past_writes = torch.cat([past_writes, write_mass(a.eta.to(dtype), theta, gamma)], 1)

    q_raw, k_raw = groups(a.q.to(dtype)), groups(past_keys)
    q, k = features_of(phi, q_raw, k_raw)
    target = groups(past_values)
    residual = structure.residual and q_raw.shape[-1] == target.shape[-1]
    if residual and rule.objective == "l2":
        target = target - k_raw
    alpha, eta = groups(a.alpha.to(dtype)).unsqueeze(-1), groups(a.eta.to(dtype))
    thbar = None if theta is None else groups(theta).unsqueeze(-1)
    window = window_matrix(groups(gamma), rule.history)  # [G, 1, E]

    # M^(0): at a chunk's first token the memory so far.
    weights, kept, momentum = (
        [t.flatten(0, 1) for t in group]
        for group in (state.weights, state.chunk_start, state.momentum)
    )
    start = [torch.where(place == 0, m, m0) for m, m0 in zip(weights, kept, strict=True)]
    factors = structure.factors(
        start, k, lambda y: y - target if rule.objective == "l2" else -target
    )
    scale = state.scale.flatten()
    if rule.write_discount:
        similarity = (k[:, -1:] @ k.mT if phi is None else phi.kernel(k_raw[:, -1:], k_raw)).abs()
        eta, scale = _discount(
            rule,
            start,
            k,
            factors,
            similarity,
            window,
            thbar,
            place,
            groups(past_writes),
            eta,
            scale,
        )

    after, s_after = [], []
    for i, (left, right) in enumerate(factors):
        # S_t = theta_t S_{t-1} + G_t;  M_t = alpha_t M_{t-1} - eta_t U(S_t)
        s = (left * window.mT).mT @ right
        if thbar is not None:
            s = s + thbar * momentum[i]
            s_after.append(s)
        step = eta.unsqueeze(-1)
        if rule.update == "muon":
            last = place == rule.chunk_size - 1
            taken = (place % rule.ns_every == rule.ns_every - 1) | last
            s, step = orthogonalise(s, rule.ns_steps), step * taken
        after.append(alpha * weights[i] - step * s)
    y = structure.forward(lambda i, z: z @ after[i].mT, q)
    y = y + q_raw if residual else y

    whole = place == rule.chunk_size - 1
    start = [torch.where(whole, m, m0) for m, m0 in zip(after, start, strict=True)]
    return rows(y).transpose(1, 2).to(a.q.dtype), OmegaState(
        weights=tuple(rows(m) for m in after),
        momentum=tuple(rows(s) for s in s_after),
        chunk_start=tuple(rows(m) for m in start),
        keys=past_keys[:, 1:],
        values=past_values[:, 1:],
        writes=past_writes[:, 1:] if rule.write_discount else past_writes,
        scale=rows(scale),
        position=state.position + 1,
    )


def _discount(
    rule: Rule,
    start: list[Tensor],
    k: Tensor,
    factors: list[Factor],
    similarity: Tensor,
    window: Tensor,
    thbar: Tensor | None,
    place: Tensor,
    writes: Tensor,
    eta: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The token's discounted write strength [G, 1], and the scale [G] after it.

    similarity: |phi(k_t) . phi(k_i)|, window: the weight of key i, [G, 1, E]; writes: m_i [G, E].
    """
    structure, own = MEMORIES[rule.memory], similarity[..., -1]
    kappa = similarity
    if structure.tangent is not None:
        h = factors[0][1]
        f = structure.tangent(start, k, factors[0])
        squares = h.square().sum(-1) + f.square().sum(-1) * k.square().sum(-1)
        identity = None if thbar is None else torch.ones_like(thbar)
        own = running_scale(squares, window > 0, identity, thbar, scale)
        scale = own[:, -1]
        kappa = (h[:, -1:] @ h.mT).abs() + (f[:, -1:] @ f.mT) * similarity
    # The token's chunk so far: no older token has written to it.
    ages = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
    kappa = kappa * ((ages > 0) & (ages <= place))
    rho = (kappa @ writes.unsqueeze(-1)).squeeze(-1)
    return eta * torch.exp(-rho) / (writes[:, -1:] * own).clamp(min=1), scale
