"""The rule token by token, inner gradients by autograd: slow, obvious, the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.functional.features import FeatureMap
from atlas_blocks.functional.memories import BOUND_FLOOR, SECOND_FLOOR, THIRD_FLOOR
from atlas_blocks.functional.newton_schulz import COEFFICIENTS, EPS
from atlas_blocks.functional.rule import (
    OmegaState,
    Rule,
    initial_state,
    state_dtype,
    validate,
    write_mass,
)


def omega_rule_reference(
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
    """`omega_rule` computed as its definition reads; same arguments, results and errors."""
    rule = Rule(
        memory, objective, update, ns_steps, ns_every, chunk_size, write_discount, gamma.shape[-1]
    )
    validate(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state)
    start = state or initial_state(q, v, weights, rule, theta is not None)
    rows = [
        _one_sequence(rule, feature_map, start[[i]], q[i], k[i], v[i], alpha[i], eta[i],
                      None if theta is None else theta[i], gamma[i])
        for i in range(q.shape[0])
    ]  # fmt: skip
    if not rows:
        return q.new_zeros(v.shape), start
    return torch.stack([y for y, _ in rows]).to(q.dtype), OmegaState.cat([s for _, s in rows])


def _one_sequence(
    rule: Rule,
    feature_map: FeatureMap | None,
    state: OmegaState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
) -> tuple[Tensor, OmegaState]:
    dtype = state_dtype(q, v, *state.weights)
    q, k, v, alpha, eta, gamma = (x.to(dtype) for x in (q, k, v, alpha, eta, gamma))
    phi = feature_map if feature_map is not None else (lambda x: x)
    residual = rule.memory != "matrix" and k.shape[-1] == v.shape[-1]

    def read(w: Sequence[Tensor], x: Tensor) -> Tensor:
        """M(phi(x)) for one token x [H, Dk]."""

        def apply(i: int, z: Tensor) -> Tensor:
            return torch.einsum("hoi,hi->ho", w[i], z)

        f = phi(x)
        if rule.memory == "matrix":
            y = apply(0, f)
        elif rule.memory == "mlp":
            y = apply(0, F.gelu(apply(1, f)))
        else:
            y = apply(0, F.gelu(apply(1, f)) * apply(2, f))
        return y + x if residual else y

    n = rule.history
    keys = list(state.keys[0]) + list(k)  # token s is keys[n + s]
    values = list(state.values[0]) + list(v)
    writes = list(state.writes[0])
    w = [x[0] for x in state.weights]
    s = [x[0] for x in state.momentum] or [torch.zeros_like(x) for x in w]
    m0 = [x[0] for x in state.chunk_start]
    scale = state.scale[0]
    position = int(state.position)
    outputs = []
    for t in range(q.shape[0]):
        place = position % rule.chunk_size
        if place == 0:
            m0 = list(w)
        lags = [j for j in range(rule.window) if j <= position]

        # G_t: the gradient of the window's weighed losses at M^(0).
        with torch.enable_grad():
            at = [x if x.requires_grad else x.detach().requires_grad_() for x in m0]
            loss = q.new_zeros(())
            for j in lags:
                y = read(at, keys[n + t - j])
                x = values[n + t - j]
                per_head = (
                    0.5 * (y - x).square().sum(-1) if rule.objective == "l2" else -(y * x).sum(-1)
                )
                loss = loss + (gamma[t, :, j] * per_head).sum()
            gradient = torch.autograd.grad(loss, at, create_graph=torch.is_grad_enabled())

        strength = eta[t]
        if rule.write_discount:
            mass = write_mass(eta[t], None if theta is None else theta[t], gamma[t, :, : len(lags)])
            here = _probe(rule, m0, phi, keys[n + t], values[n + t], residual)
            rho = torch.zeros_like(mass)
            for back in range(1, place + 1):
                there = _probe(rule, m0, phi, keys[n + t - back], values[n + t - back], residual)
                rho = rho + writes[len(writes) - back] * _kappa(here, there)
            own = _kappa(here, here)
            if rule.memory != "matrix":
                # The largest kappa that S_t holds: of the window, and of what momentum keeps.
                own = torch.zeros_like(mass)
                for j in lags:
                    there = _probe(rule, m0, phi, keys[n + t - j], values[n + t - j], residual)
                    weighed = torch.where(gamma[t, :, j] > 0, _kappa(there, there), 0)
                    own = torch.maximum(own, weighed)
                if theta is not None:
                    own = torch.maximum(own, theta[t].to(dtype) * scale)
                scale = own
            strength = strength * torch.exp(-rho) / (mass * own).clamp(min=1)
            writes.append(mass)

        decay = torch.zeros_like(strength) if theta is None else theta[t].to(dtype)
        s = [decay[:, None, None] * x + g for x, g in zip(s, gradient, strict=True)]
        w = [alpha[t][:, None, None] * x for x in w]
        if rule.update == "gd":
            steps = s
        elif rule.steps_at(place):
            steps = [_orthogonal(x, rule.ns_steps) for x in s]
        else:
            steps = [torch.zeros_like(x) for x in s]
        w = [x - strength[:, None, None] * u for x, u in zip(w, steps, strict=True)]
        outputs.append(read(w, q[t]))
        position += 1
        if position % rule.chunk_size == 0:
            m0 = list(w)
    y = torch.stack(outputs) if outputs else v

    def last(items: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(items[len(items) - n :])[None] if n else like

    return y, OmegaState(
        weights=tuple(x[None] for x in w),
        momentum=() if theta is None else tuple(x[None] for x in s),
        chunk_start=tuple(x[None] for x in m0),
        keys=last(keys, state.keys),
        values=last(values, state.values),
        writes=last(writes, state.writes) if rule.write_discount else state.writes,
        scale=scale[None],
        position=torch.tensor([position]),
    )


class _Probe(NamedTuple):
    """What one token [H, ...] brings to kappa: parts whose products with another's are summed."""

    features: Tensor  # phi(x)
    hidden: Tensor | None  # h; None for a matrix memory
    inner: list[Tensor]  # factors [H] of the terms that multiply |phi(x) . phi(y)|


def _probe(
    rule: Rule, m0: Sequence[Tensor], phi: Any, key: Tensor, value: Tensor, residual: bool
) -> _Probe:
    f = phi(key)
    if rule.memory == "matrix":
        return _Probe(f, None, [torch.ones_like(f[:, 0])])
    gram = m0[0] @ m0[0].mT
    w = (torch.linalg.vector_norm(gram, dim=(-2, -1)) + BOUND_FLOOR).sqrt()  # >= ||W1||
    z = torch.einsum("hoi,hi->ho", m0[1], f)
    s = F.gelu(z)
    if rule.memory == "mlp":
        h = s
    else:
        u = torch.einsum("hoi,hi->ho", m0[2], f)
        h = s * u
    y = torch.einsum("hoi,hi->ho", m0[0], h)
    e = (y + key if residual else y) - value if rule.objective == "l2" else -value
    e_norm, h_norm = (torch.linalg.vector_norm(t, dim=-1) for t in (e, h))
    if rule.memory == "mlp":
        return _Probe(f, h, [w, (e_norm * h_norm * w + SECOND_FLOOR) ** (1 / 4)])
    normal = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
    slope = normal.cdf(z) + z * normal.log_prob(z).exp()
    gate, level, upper = (t.abs().amax(-1) for t in (u * slope, s, u))
    pairs = h_norm * (gate * upper + level**2) * w + w**3 * gate * level
    second = (e_norm * pairs + SECOND_FLOOR) ** (1 / 4)
    third = (e_norm**2 * h_norm * gate * level * w**2 + THIRD_FLOOR) ** (1 / 6)
    return _Probe(f, h, [w * gate, w * level, second, third])


def _kappa(x: _Probe, y: _Probe) -> Tensor:
    """kappa(x, y) of section 9b for two tokens -> [H]; for deep memories with higher orders."""
    dot = (x.features * y.features).sum(-1).abs()
    inner = sum(a * b for a, b in zip(x.inner, y.inner, strict=True)) * dot
    if x.hidden is None or y.hidden is None:
        return inner
    return (x.hidden * y.hidden).sum(-1).abs() + inner


def _orthogonal(s: Tensor, steps: int) -> Tensor:
    """Newton-Schulz, written out (section 7)."""
    a, b, c = COEFFICIENTS["jordan"][0]
    tall = s.shape[-2] > s.shape[-1]
    x = s.mT if tall else s
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x * torch.where(norm > 0, 1 / (norm + EPS), 0)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
