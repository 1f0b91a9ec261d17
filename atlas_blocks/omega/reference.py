"""The rule token by token, inner gradients by autograd: slow, obvious, the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.newton_schulz.definition import COEFFICIENTS, EPS
from atlas_blocks.omega.arguments import validate
from atlas_blocks.omega.feature_maps import FeatureMap
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, initial_state, state_dtype

WRITTEN_OUT = ("matrix", "mlp", "gated_mlp")  # here once more; others by their `forward`
TINY = 1e-12  # under the roots of sizes


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
    rule: Rule,
    feature_map: FeatureMap | None = None,
    state: OmegaState | None = None,
) -> tuple[Tensor, OmegaState]:
    """`omega_rule` computed as its definition reads; the same arguments (but for cu_seqlens),
    results and errors."""
    validate(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state)
    start = state or initial_state(q, v, weights, rule, theta is not None)
    rows = []
    for i in range(q.shape[0]):
        decay = None if theta is None else theta[i]
        gates = alpha[i], eta[i], decay, gamma[i]
        row = _Sequence(rule, feature_map, weights, start[[i]], k[i], v[i], *gates)
        rows.append(row.run(q[i]))
    if not rows:
        return q.new_zeros(v.shape), start
    return torch.stack([y for y, _ in rows]).to(q.dtype), OmegaState.cat([s for _, s in rows])


class _Sequence:
    """One sequence. Token t of the call is token `past + t` of every list; a key's window reaches
    back to the tokens of the state's history."""

    def __init__(
        self,
        rule: Rule,
        feature_map: FeatureMap | None,
        weights: Sequence[Tensor],
        state: OmegaState,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        eta: Tensor,
        theta: Tensor | None,
        gamma: Tensor,
    ) -> None:
        self.rule, self.state, self.momentum = rule, state, theta is not None
        dtype = state_dtype(k, v, *state.weights)
        # What decay leads to.
        scale = 1 if rule.decay_to == "initial" else 0
        self.initial = [scale * w.to(dtype) for w in weights]
        self.phi = feature_map if feature_map is not None else (lambda x: x)
        self.residual = rule.structure.residual and k.shape[-1] == v.shape[-1]
        theta = torch.zeros_like(alpha) if theta is None else theta

        def tokens(history: Tensor, t: Tensor) -> list[Tensor]:
            missing = t.new_zeros(rule.history - history.shape[1], *t.shape[1:])
            return list(torch.cat([history[0], missing.to(dtype), t.to(dtype)]))

        self.keys, self.values = tokens(state.keys, k), tokens(state.values, v)
        self.alpha, self.eta = tokens(state.alpha, alpha), tokens(state.eta, eta)
        self.theta, self.gamma = tokens(state.theta, theta), tokens(state.gamma, gamma)
        self.past, self.nothing = rule.history, v.shape

    def run(self, q: Tensor) -> tuple[Tensor, OmegaState]:
        rule, state, position = self.rule, self.state, int(self.state.position)
        q = q.to(self.state.scale.dtype)
        again = position % rule.chunk_size if rule.rewinds else 0
        if rule.rewinds:
            self.w, self.s = [w[0] for w in state.chunk_start], [s[0] for s in state.momentum_start]
        else:
            self.w, self.s = [w[0] for w in state.weights], [s[0] for s in state.momentum]
        self.s = self.s or [torch.zeros_like(w) for w in self.w]
        self.scale = state.scale[0]
        self.m0 = [w[0] for w in state.chunk_start] or list(self.w)
        self.s0, self.scale0 = list(self.s), self.scale
        if not rule.linear:  # inside a chunk it goes on
            self._open(0)
        outputs = []
        for t in range(-again, q.shape[0]):
            place = (position + t) % rule.chunk_size if rule.keeps_start else t % rule.chunk_size
            if place == 0:
                self._begin_chunk(t)
            self._token(t, place, first=-position)
            if t >= 0:
                outputs.append(self._read(self.w, self.phi(q[t]), q[t]))
            if place == rule.chunk_size - 1:
                self.m0, self.s0, self.scale0 = list(self.w), list(self.s), self.scale
        y = torch.stack(outputs) if outputs else q.new_zeros(self.nothing)
        return y, self._state(position + q.shape[0])

    def _state(self, position: int) -> OmegaState:
        rule, n = self.rule, self.past

        def last(tokens: list[Tensor], like: Tensor) -> Tensor:
            kept = tokens[len(tokens) - n :] if like.shape[1] else []
            return torch.stack(kept)[None] if kept else like

        def batch(group: list[Tensor], there: bool) -> tuple[Tensor, ...]:
            return tuple(x[None] for x in group) if there else ()

        there = OmegaState.groups(rule, self.momentum)
        groups = (self.w, self.s, self.m0, self.s0)
        return OmegaState(
            **{n: batch(g, there[n]) for n, g in zip(there, groups, strict=True)},
            keys=last(self.keys, self.state.keys),
            values=last(self.values, self.state.values),
            alpha=last(self.alpha, self.state.alpha),
            eta=last(self.eta, self.state.eta),
            theta=last(self.theta, self.state.theta),
            gamma=last(self.gamma, self.state.gamma),
            scale=(self.scale0 if rule.rewinds else self.scale)[None],
            position=torch.tensor([position]),
        )

    # --- the memory -----------------------------------------------------------------------------

    def _read(
        self, w: Sequence[Tensor], f: Tensor, x: Tensor, offsets: Sequence[Tensor] = ()
    ) -> Tensor:
        """M(x) [H, Dv] for one key and its features f; offsets are added to W_i f, i > 1."""
        y = self._weights_part(w, f, offsets)
        return y + x if self.residual else y

    def _weights_part(
        self, w: Sequence[Tensor], f: Tensor, offsets: Sequence[Tensor] = ()
    ) -> Tensor:
        def apply(i: int, z: Tensor) -> Tensor:
            y = torch.einsum("hoi,hi->ho", w[i], z)
            return y + offsets[i - 1] if i and offsets else y

        if self.rule.memory in WRITTEN_OUT:
            return apply(0, f if self.rule.memory == "matrix" else self._hidden(apply, f))
        return self.rule.structure.forward(apply, f)

    def _hidden(self, apply: Callable[[int, Tensor], Tensor], f: Tensor) -> Tensor:
        if self.rule.memory == "mlp":
            return F.gelu(apply(1, f))
        if self.rule.memory == "gated_mlp":
            return F.gelu(apply(1, f)) * apply(2, f)
        found = []  # of a memory of somebody's, what its outermost weight is applied to
        self.rule.structure.forward(lambda i, z: apply(i, z) if i else found.append(z) or z, f)
        return found[0]

    def _direction(self, s: Tensor) -> Tensor:
        """U(S)."""
        if self.rule.update == "muon":
            return _orthogonal(s, self.rule.ns_steps)
        assert self.rule.direction is not None
        return self.rule.direction(s, self.rule.ns_steps)

    # --- one chunk ------------------------------------------------------------------------------

    def _begin_chunk(self, t: int) -> None:
        """M^(0) and S^(0), the chunk's first token being t."""
        self.m0, self.s0, self.scale0 = list(self.w), list(self.s), self.scale
        self._open(t)

    def _open(self, t: int) -> None:
        """What is known of the halo's keys before token t."""
        one = torch.ones_like(self.scale)
        self.abar, self.thbar, self.carried = one, one, 0 * one
        # By number of the key: its features, hidden units, sizes c, kappa(i, i); its error E; B and
        # C of the last row.
        self.f, self.h, self.c, self.own, self.error = {}, {}, {}, {}, {}
        self.written, self.window = {}, {}
        for i in range(t - self.rule.window + 1, t):
            self._see(i)
            bare = self._bare_error(i)
            if self.rule.corrects:
                for s in list(self.error):
                    bare = bare - (self._kappa(s, i) * self._pending(t, s))[:, None] * self.error[s]
            self.error[i] = bare

    def _see(self, i: int) -> None:
        """What a key brings to kappa, and no write of it yet."""
        key = self.keys[self.past + i]
        f = self.f[i] = self.phi(key)
        self.written[i] = self.window[i] = torch.zeros_like(self.scale)
        if self.rule.structure.linear:
            self.own[i] = (f * f).sum(-1)
            return
        self.h[i] = self._hidden(lambda j, z: torch.einsum("hoi,hi->ho", self.m0[j], z), f)
        bare = self._bare_error(i)
        with torch.enable_grad():
            zero = torch.zeros_like(self.h[i]).requires_grad_()
            offsets = [zero * 1 for _ in self.m0[1:]]
            loss = (self._read(self.m0, f, key, offsets) * bare).sum()
            lefts = []
            if offsets:
                lefts = torch.autograd.grad(loss, offsets, create_graph=torch.is_grad_enabled())
        size = ((bare * bare).sum(-1, keepdim=True) + TINY) ** 0.5
        sizes = [((x / size).square().sum(-1) + TINY).sqrt() for x in lefts]
        self.c[i] = torch.stack(sizes) if sizes else size[None, :, 0] * 0
        self.own[i] = self._kappa(i, i)

    def _kappa(self, s: int, t: int) -> Tensor:
        dot = (self.f[s] * self.f[t]).sum(-1)
        if self.rule.structure.linear:
            return dot
        return (self.h[s] * self.h[t]).sum(-1) + (self.c[s] * self.c[t]).sum(0) * dot

    def _bare_error(self, i: int) -> Tensor:
        """dl/dM(k_i) at M^(0)."""
        key, value = self.keys[self.past + i], self.values[self.past + i]
        y = self._read(self.m0, self.phi(key), key)
        wanted = torch.is_grad_enabled() and (y.requires_grad or value.requires_grad)
        with torch.enable_grad():
            at = y if y.requires_grad else y.detach().requires_grad_()
            loss = self.rule.criterion.loss(at, value).sum()
            (error,) = torch.autograd.grad(loss, at, create_graph=wanted)
        return error

    def _mass(self, i: int, lag: int = 0) -> Tensor:
        """m_i(lag)."""
        n = self.past + i
        left = sum((self.gamma[n][:, j] for j in range(lag, self.rule.window)), 0 * self.eta[n])
        return self.eta[n] * left / (1 - self.theta[n].clamp(max=0.999))

    def _pending(self, t: int, s: int) -> Tensor:
        """pend(t, s)."""
        if not 1 <= t - s <= self.rule.window - 1:
            return torch.zeros_like(self.scale)
        return self._mass(s, t - s) / (self._mass(s) * self.own[s]).clamp(min=1)

    def _along(self, t: int) -> Tensor:
        """The derivative of M^(0)(k_t) along S^(0), by differentiating its gradient."""
        f = self.f[t]
        with torch.enable_grad():
            at = [x if x.requires_grad else x.detach().requires_grad_() for x in self.m0]
            y = self._weights_part(at, f)
            v = torch.zeros_like(y).requires_grad_()
            gradient = torch.autograd.grad((y * v).sum(), at, create_graph=True)
            dot = torch.stack([(g * s).sum() for g, s in zip(gradient, self.s0, strict=True)]).sum()
            return torch.autograd.grad(dot, v, create_graph=torch.is_grad_enabled())[0]

    def _online_error(self, t: int) -> Tensor:
        """E_t: what k_t reads at the newest memory and at the writes begun, taken from M^(0)."""
        key, value = self.keys[self.past + t], self.values[self.past + t]
        e = self.abar[:, None] * self._weights_part(self.m0, self.f[t]) - value
        e = e + (1 - self.abar)[:, None] * self._weights_part(self.initial, self.f[t])
        e = e + key if self.residual else e
        if self.momentum:
            e = e - self.carried[:, None] * self._along(t)
        for s, error in self.error.items():
            weight = self.written[s] + self._pending(t, s)
            e = e - (self._kappa(s, t) * weight)[:, None] * error
        return e

    def _token(self, t: int, place: int, first: int) -> None:
        """Token t of the call; the sequence began at token `first`."""
        rule, n = self.rule, self.past + t
        alpha, eta, theta, gamma = (x[n] for x in (self.alpha, self.eta, self.theta, self.gamma))
        lags = [j for j in range(rule.window) if t - j >= first]
        self._see(t)
        if rule.limits:
            held = [torch.where(gamma[:, j] > 0, self.own[t - j], 0) for j in lags]
            window = gamma.sum(-1) * torch.stack(held).amax(0)
            share = theta * self.scale + window
            if self.momentum:
                self.scale = share
            most = torch.maximum((1 + theta) * share, window / (1 - theta.clamp(max=0.999)))
            eta = eta / (eta * most).clamp(min=1)
        self.error[t] = self._online_error(t) if rule.corrects else self._bare_error(t)

        # G_t: the gradient of the window's weighed losses at M^(0), for these errors.
        with torch.enable_grad():
            # Another name of each weight: the errors depend on M^(0) too.
            at = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in self.m0]
            loss = torch.zeros_like(self.scale)
            for j in lags:
                y = self._weights_part(at, self.f[t - j])
                loss = loss + gamma[:, j] * (y * self.error[t - j]).sum(-1)
            gradient = torch.autograd.grad(loss.sum(), at, create_graph=torch.is_grad_enabled())
        self.s = [theta[:, None, None] * x + g for x, g in zip(self.s, gradient, strict=True)]
        if rule.linear:
            steps = self.s
        elif rule.steps_at(place):
            steps = [self._direction(x) for x in self.s]
        else:
            steps = [torch.zeros_like(x) for x in self.s]
        self.w = [
            alpha[:, None, None] * (x - x0) + x0 - eta[:, None, None] * u
            for x, x0, u in zip(self.w, self.initial, steps, strict=True)
        ]

        # What is written of every key now.
        self.thbar, self.abar = theta * self.thbar, alpha * self.abar
        self.carried = alpha * self.carried + eta * self.thbar
        for s in self.f:
            weighed = gamma[:, t - s] if t - s in lags else 0
            self.window[s] = theta * self.window[s] + weighed
            self.written[s] = alpha * self.written[s] + eta * self.window[s]


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
