"""Exact phi*: the rule whose features are those of the exponential kernel, never materialised.

B batch, T tokens, S keys so far, H heads, D key width, Dv value width, W columns of a coefficient,
c window, b chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.data import numbers, there
from atlas_blocks.derivatives import transformed
from atlas_blocks.kernel_attention.walk import KernelSettings, KernelTokens, KernelWalk, walk
from atlas_blocks.omega.online import masses
from atlas_blocks.omega.state import state_dtype
from atlas_blocks.state import State


class KernelState(State):
    """Every key so far and its coefficient: a cache that grows, as that of a Transformer.

    keys: [B, S, H, D], S tokens seen and, before them, zeros that stand for the tokens before the
    sequence. coefficients: a_i [B, S, H, W], W = Dv and, to normalise, two more columns.
    chunk_start: the coefficients at the start of the begun chunk where the errors of "l2" are taken
    there, else (). values: the last c - 1 [B, c - 1, H, Dv].
    pending, errors: of the last n = c - 1 tokens where errors are online, else n = 0: what windows
    yet to end will write of each (pend of specification 9b) [B, n, H, c], and v - M(k) as the begun
    chunk sees it [B, n, H, Dv], with one more column to normalise. position: int64 [B], tokens
    seen; rows may differ.
    """

    EXACT = ("keys", "coefficients", "chunk_start", "values", "pending", "errors")

    keys: Tensor
    coefficients: Tensor
    chunk_start: tuple[Tensor, ...]
    values: Tensor
    pending: Tensor
    errors: Tensor
    position: Tensor

    @classmethod
    def aligned(cls, states: Sequence[KernelState]) -> list[KernelState]:
        """Caches of unequal length padded in front with keys whose coefficient is zero."""
        longest = max(s.keys.shape[1] for s in states)
        device = states[0].position.device

        def padded(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, 0, longest - t.shape[1], 0))

        return [
            s.replace(
                keys=padded(s.keys),
                coefficients=padded(s.coefficients),
                chunk_start=tuple(padded(t) for t in s.chunk_start),
                position=s.position.to(device),
            )
            for s in states
        ]


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None = None,
    eta: Tensor | None = None,
    gamma: Tensor | None = None,
    objective: str = "dot",
    scale: float | None = None,
    normalise: bool = True,
    chunk_size: int = 64,
    errors: str = "chunk",
    state: KernelState | None = None,
) -> tuple[Tensor, KernelState]:
    """The rule with a matrix memory and phi* exact (ATLAS section 4: DeepTransformer, SWDT, Dot).

        phi(x) . phi(y) = exp(scale x . y),   M_0 = 0,   no momentum
        M_t = alpha_t M_{t-1} - eta_t sum_{j < c} gamma[t, j] grad_M l(M^(0); phi(k_{t-j}), v_{t-j})
        y_t = M_t(phi(q_t)) / max(z_t, p_t / 16)

    M is sum_i a_i phi(k_i)^T over all keys so far and never formed: time grows with T^2, memory
    with T, forward and backward. M^(0) is the memory before t's chunk, as in `omega_rule`.
    errors: "chunk", or "online" as there: for "l2" each error is corrected for what its chunk has
    written, and a key is written at most whole; with c = 1 chunks then make no difference. Those
    of "dot" see no memory, and are the same.

    normalise: z_t is the same rule run on values of 1, so that constant values are read back as
    they are; False reads M_t(phi(q_t)) alone. p_t adds up the sizes of what z_t adds up (the same
    gates, on |1 - z(k_i)|, taken where the errors are). For "dot" they are one positive sum, and
    y_t a weighted mean; for "l2" z_t has terms of both signs and could come near 0, and the bound
    keeps y_t within 16 times the errors that it is made of. Where nothing is stored, y_t = 0.
    Exponentials are taken relative to the largest term of their row, coefficients included, and
    with "dot" a normalised read overflows for no score. What is not normalised, and every error of
    "l2", is as large as exp(scale q . k) makes it: FloatingPointError where that overflows.
    Coefficients that gates let decay below the dtype's smallest number are lost.

    q, k: [B, T, H, D]; v: [B, T, H, Dv]; any T >= 0; float64 to float16. alpha, eta: [B, T, H],
    gamma: [B, T, H, c], as in `omega_rule`; None is 1 (gamma: c = 1). Arithmetic and state are
    float64 where q or v is, else float32. objective: "dot" or "l2". scale: None is D ** -0.5, as in
    attention.
    state: what an earlier call returned, to go on from there; None begins a sequence.

    "dot", normalised, without gates and state, is causal softmax attention, and
    F.scaled_dot_product_attention computes it. Returns y [B, T, H, Dv] in the dtype of q and the
    state after T tokens, still in the graph. Raises ValueError naming a bad argument.
    """
    s = settings(q, gamma, objective, scale, normalise, chunk_size, errors)
    check_kernel_arguments(s, q, k, v, alpha, eta, gamma, state)
    if is_softmax(s, alpha, eta, gamma, state):
        return softmax_attention(s, q, k, v)
    gates, state = complete(s, q, v, alpha, eta, gamma, state)
    return run_kernel(s, q, k, v, gates, state)


Gates = tuple[Tensor, Tensor, Tensor]


def settings(
    q: Tensor,
    gamma: Tensor | None,
    objective: str,
    scale: float | None,
    normalise: bool,
    chunk_size: int,
    errors: str,
) -> KernelSettings:
    """What defines the function, with what the arguments' shapes say of it."""
    D = q.shape[-1] if isinstance(q, Tensor) and q.ndim == 4 else 1
    c = gamma.shape[-1] if isinstance(gamma, Tensor) and gamma.ndim == 4 else 1
    sharpness = D**-0.5 if scale is None else scale
    return KernelSettings(objective, sharpness, normalise, chunk_size, c, errors)


def complete(
    s: KernelSettings,
    q: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    gamma: Tensor | None,
    state: KernelState | None,
) -> tuple[Gates, KernelState]:
    """Gates and state, those that were not given included."""
    like = q[..., 0]
    gates = (
        torch.ones_like(like) if alpha is None else alpha,
        torch.ones_like(like) if eta is None else eta,
        torch.ones_like(like[..., None]) if gamma is None else gamma,
    )
    return gates, initial_kernel_state(s, q, v) if state is None else state.fitted(q, v)


def run_kernel(
    s: KernelSettings, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: KernelState
) -> tuple[Tensor, KernelState]:
    """`kernel_attention` on validated and complete arguments."""
    if q.shape[0] == 0 or q.shape[1] == 0:
        return v.to(q.dtype) * 1, state
    with no_autocast(q):
        y, state = _by_place(s, q, k, v, gates, state)
    safe = s.normalise and s.objective == "dot"
    looked_at = there(y) and not transformed()
    if not safe and looked_at and not _finite(y, state.coefficients):
        if not _finite(q, k, v, *gates):
            raise FloatingPointError("kernel_attention: an argument is not finite")
        top = s.scale * k.detach().float().square().sum(-1).max().item()
        raise FloatingPointError(
            f"kernel_attention: the exponential kernel overflows {y.dtype} (the largest "
            f"scale * |k|^2 is {top:.3g}); shorten q and k or lower scale"
        )
    return y, state


def _finite(*tensors: Tensor) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def is_softmax(
    s: KernelSettings,
    alpha: Tensor | None,
    eta: Tensor | None,
    gamma: Tensor | None,
    state: KernelState | None,
) -> bool:
    """Whether the call is softmax attention over its own tokens."""
    bare = alpha is None and eta is None and gamma is None and state is None
    return bare and s.normalise and s.objective == "dot"


def softmax_attention(
    s: KernelSettings, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, KernelState]:
    """The same by SDPA, with the state that the rule would leave."""
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype)))
    y = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=s.scale).transpose(1, 2)
    empty = initial_kernel_state(s, q, v)
    dtype = empty.keys.dtype
    ones = v.new_ones(*v.shape[:-1], 2, dtype=dtype)
    coefficients = torch.cat([v.to(dtype), ones], -1)
    return y, empty.replace(
        keys=k.to(dtype),
        coefficients=coefficients,
        position=empty.position + q.shape[1],
    )


def _by_place(
    s: KernelSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: KernelState,
) -> tuple[Tensor, KernelState]:
    """Rows that stand at one place of their chunk share a call."""
    groups: dict[int, list[int]] = {}
    if s.chunked:
        for row, position in enumerate(numbers(state.position)):
            groups.setdefault(position % s.chunk, []).append(row)
    if len(groups) <= 1:
        return _run(s, next(iter(groups), 0), q, k, v, gates, state)
    parts, order = [], []
    for place, rows in groups.items():
        chosen = gates[0][rows], gates[1][rows], gates[2][rows]
        parts.append(_run(s, place, q[rows], k[rows], v[rows], chosen, state[rows]))
        order += rows
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat([y for y, _ in parts])[back], KernelState.cat([x for _, x in parts])[back]


def _run(
    s: KernelSettings,
    place: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: KernelState,
) -> tuple[Tensor, KernelState]:
    B, T, H, _ = q.shape
    dtype = state_dtype(q, v, state.keys)
    alpha, eta, gamma = (t.to(dtype) for t in gates)
    # The window does not reach back over the start of the sequence.
    times = state.position.to(q.device)[:, None] + torch.arange(T, device=q.device)
    lags = torch.arange(s.window, device=q.device)
    seen = gamma * (lags <= times[..., None])[:, :, None]

    def with_past(past: Tensor, t: Tensor) -> Tensor:
        return torch.cat([past.to(dtype), t.to(dtype)], 1)

    keys, values = with_past(state.keys, k), with_past(state.values, v)
    pending = gamma[:, :0]
    if s.online:
        eta, pending = limited_strength(s, keys, eta, gamma, seen)
        pending = with_past(state.pending, pending)

    def groups(t: Tensor) -> Tensor:
        """[B, T, H, ...] -> [G, T, ...]."""
        return t.transpose(1, 2).flatten(0, 1).contiguous()

    def batch(t: Tensor) -> Tensor:
        return t.unflatten(0, (B, H)).transpose(1, 2)

    known = state.coefficients.to(dtype)
    start = state.chunk_start[0].to(dtype) if s.from_start else known[:, :0]
    tokens = KernelTokens(
        q=groups(q.to(dtype)),
        keys=groups(keys),
        values=groups(F.pad(values, (0, 1), value=1.0) if s.normalise else values),
        alpha=groups(alpha),
        eta=groups(eta),
        gamma=groups(seen),
        pending=groups(pending),
        rows=groups(known),
        start=groups(start),
        errors=groups(state.errors.to(dtype)),
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tokens) and not transformed():
        y, rows, start, errors = KernelWalk.apply(s, place, *tokens)
    else:
        y, rows, start, errors = walk(s, place, tokens)

    def last(t: Tensor, n: int) -> Tensor:
        # Cloned: a view would keep the whole call's tokens alive.
        return t[:, t.shape[1] - n :].clone()

    after = KernelState(
        keys=keys,
        coefficients=batch(rows).contiguous(),
        chunk_start=(batch(start).contiguous(),) if s.from_start else (),
        values=last(values, s.window - 1),
        pending=last(pending, s.tail),
        errors=batch(errors).clone(memory_format=torch.contiguous_format),
        position=state.position + T,
    )
    return batch(y).to(q.dtype), after


def limited_strength(
    s: KernelSettings, keys: Tensor, eta: Tensor, gamma: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """eta^ [B, T, H] and pend [B, T, H, c] of specification 9b, kappa(i, i) = exp(scale |k_i|^2).

    keys: [B, S0 + T, H, D]; gamma: as given; seen: without what lies before the sequence.
    """
    T = eta.shape[1]
    own = (s.scale * keys[:, keys.shape[1] - T - s.tail :].square().sum(-1)).exp()
    lags = [own[:, s.tail - j : s.tail - j + T] for j in range(s.window)]
    weighed = torch.where(seen > 0, torch.stack(lags, -1), 0.0)
    left = masses(eta, None, gamma)
    # A window's writes count by the largest kappa among them, those yet to come by the key's own.
    mass = left[..., 0]
    eta = eta / (mass * weighed.max(-1).values).clamp(min=1)
    return eta, left / (mass * lags[0]).clamp(min=1)[..., None]


def initial_kernel_state(s: KernelSettings, q: Tensor, v: Tensor) -> KernelState:
    """Nothing stored."""
    B, _, H, D = q.shape
    dtype, Dv, c = state_dtype(q, v), v.shape[-1], s.window
    W = Dv + 2 * s.normalise

    def zeros(n: int, *width: int) -> Tensor:
        return q.new_zeros(B, n, H, *width, dtype=dtype)

    return KernelState(
        keys=zeros(c - 1, D),
        coefficients=zeros(c - 1, W),
        chunk_start=(zeros(c - 1, W),) if s.from_start else (),
        values=zeros(c - 1, Dv),
        pending=zeros(s.tail, c),
        errors=zeros(s.tail, Dv + s.normalise),
        position=torch.zeros(B, dtype=torch.int64, device=q.device),
    )


def check_kernel_arguments(
    s: KernelSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    gamma: Tensor | None,
    state: KernelState | None,
) -> None:
    check.choice("objective", s.objective, ("dot", "l2"))
    check.between("scale", s.scale, 0.0, 1e6)
    check.boolean("normalise", s.normalise)
    check.choice("errors", s.errors, ("chunk", "online"))
    check.at_least("chunk_size", s.chunk_size, 1)
    check.tensor("q", q, "[B, T, H, D]", (None, None, None, None))
    B, T, H, D = q.shape
    check.tensor("k", k, "[B, T, H, D]", q.shape, device=q.device)
    check.tensor("v", v, "[B, T, H, Dv]", (B, T, H, None), device=q.device)
    for name, gate in (("alpha", alpha), ("eta", eta)):
        if gate is not None:
            check.tensor(name, gate, "[B, T, H]", (B, T, H), device=q.device)
    if gamma is not None:
        check.tensor("gamma", gamma, "[B, T, H, c]", (B, T, H, None), device=q.device)
    if state is None:
        return
    if not isinstance(state, KernelState):
        check.fail("state", "a KernelState or None", type(state).__name__)
    Dv, S, n, c = v.shape[-1], state.keys.shape[1], s.tail, s.window
    W = Dv + 2 * s.normalise
    check.tensor("state.keys", state.keys, "[B, S, H, D]", (B, None, H, D))
    if c - 1 > S:
        check.fail("state.keys", f"at least {c - 1} keys", S)
    check.tensor("state.coefficients", state.coefficients, "[B, S, H, W]", (B, S, H, W))
    wanted = [(B, S, H, W)] if s.from_start else []
    if [tuple(t.shape) for t in state.chunk_start] != wanted:
        got = [list(t.shape) for t in state.chunk_start]
        check.fail("state.chunk_start", f"shapes {wanted}", got)
    check.tensor("state.values", state.values, "[B, c - 1, H, Dv]", (B, c - 1, H, Dv))
    check.tensor("state.pending", state.pending, "[B, n, H, c]", (B, n, H, c))
    width = Dv + s.normalise
    check.tensor("state.errors", state.errors, "[B, n, H, Dv (+ 1)]", (B, n, H, width))
    check.tensor("state.position", state.position, "[B]", (B,), (torch.int64,))
