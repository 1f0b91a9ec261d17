"""The Triton provider of `atlas::omega_rule` and its backward: a matrix memory, update="gd".

What is not the recurrence (feature maps, the gates' elementwise arithmetic, histories) is PyTorch
under autograd, done again in the backward; coefficients.py, discount.py and matrix.py do the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atlas_blocks.functional import rule as rules
from atlas_blocks.functional.rule import Arguments, OmegaState
from atlas_blocks.kernels import coefficients, matrix
from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.discount import DiscountSums
from atlas_blocks.kernels.tiles import INTERPRETED, Layout, layout
from atlas_blocks.ops.omega_rule import Call, Settings, unflatten
from atlas_blocks.ops.providers import DEFINITION, Provider, find

# Beyond these a chunk's matrices no longer fit one program.
LARGEST_CHUNK, LARGEST_WINDOW = 64, 64
LARGEST_VALUE, LARGEST_FEATURES = 256, 8192


class _Streams(NamedTuple):
    """What the kernels read, then what the next state holds, differentiable in the op's inputs.

    HIST tokens of history come first in k and target. s is None without momentum, m without state.
    """

    q: Tensor  # phi(q) [B, T, H, D]
    k: Tensor  # phi(k) [B, HIST + T, H, D]
    target: Tensor  # v [B, HIST + T, H, V]
    alpha: Tensor  # [B, T, H]
    eta: Tensor  # discounted [B, T, H]
    theta: Tensor | None  # [B, T, H]
    gamma: Tensor  # [B, T, H, c]
    w: Tensor  # W, S, M^(0) that the call begins with [B, H, V, D]
    s: Tensor | None
    m: Tensor | None
    keys: Tensor  # the last tokens, for the next call
    values: Tensor
    writes: Tensor
    scale: Tensor


def _supports(call: Call) -> str | None:
    rule = call.rule
    for name, value, served in (
        ("update", rule.update, ("gd",)),
        ("memory", rule.memory, ("matrix",)),
        ("dtype of q", call.dtype, (torch.bfloat16, torch.float16, torch.float32)),
        ("state dtype", call.state_dtype, (torch.float32,)),
    ):
        if value not in served:
            return f"{name} {value} has no kernel, only {' and '.join(map(str, served))}"
    for name, size, most in (
        ("chunk_size", rule.chunk_size, LARGEST_CHUNK),
        ("window", rule.window, LARGEST_WINDOW),
        ("value width", call.value_width, LARGEST_VALUE),
        ("feature width", call.feature_width, LARGEST_FEATURES),
    ):
        if size > most:
            return f"{name} {size} is beyond the kernels' {most}"
    if INTERPRETED:
        return None
    if call.device != "cuda":
        return f"it needs a CUDA device, not {call.device} (or TRITON_INTERPRET=1, to check it)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if call.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (
            "it multiplies float32 in tf32, and torch.get_float32_matmul_precision() is "
            "'highest' (torch.set_float32_matmul_precision('high') allows it)"
        )
    return None


def _layout(a: Arguments) -> tuple[Layout, Spans]:
    position = None if a.state is None else a.state.position
    history = 0 if a.state is None else a.rule.history
    batch, length = a.q.shape[:2]
    spans = Spans.of(a.rule.chunk_size, a.rule.window, history)
    return layout(batch, length, spans.chunk, position, a.q.device), spans


def _prepare(a: Arguments, at: Layout, spans: Spans) -> _Streams:
    q, k, v, alpha, eta, theta, gamma, _, phi, rule, state = a
    length, device = q.shape[1], q.device
    gamma = gamma.float()
    if rule.window > 1:
        # The window does not reach back over the start of the sequence.
        times = torch.arange(length, device=device)[:, None]
        if state is not None:
            times = times + state.position.to(device)[:, None, None]
        inside = torch.arange(rule.window, device=device) <= times
        gamma = gamma * (inside if inside.dim() == 3 else inside[None])[:, :, None]
    eta, theta = eta.float(), None if theta is None else theta.float()
    mass = rules.write_mass(eta, theta, gamma) if rule.write_discount else None

    before = state if state is not None else rules.initial_state(q, v, a.weights, rule, False)
    if state is not None:
        k = torch.cat([state.keys.to(k.dtype), k], 1)
        v = torch.cat([state.values.to(v.dtype), v], 1)
        if mass is not None:
            mass = torch.cat([state.writes, mass], 1)

    def last(t: Tensor, old: Tensor) -> Tensor:
        """The last `rule.history` tokens, from those before the call where it is too short."""
        n, t = old.shape[1], t.to(old.dtype)
        if t.shape[1] < n:
            t = torch.cat([old[:, : n - t.shape[1]], t], 1)
        return t[:, t.shape[1] - n :]

    keys, values = last(k, before.keys), last(v, before.values)
    writes = before.writes if mass is None else last(mass, before.writes)

    def lifted(x: Tensor) -> Tensor:
        x = x if phi is None else phi(x.float()).to(x.dtype)
        return x.contiguous()

    q, k = lifted(q), lifted(k)
    if mass is not None:
        rho, own = DiscountSums.apply(k, mass.contiguous(), at, spans)
        mass = mass[:, mass.shape[1] - length :]
        eta = eta * torch.exp(-rho) / (mass * own).clamp(min=1)
    w = before.weights[0].contiguous()
    s = m = None
    if theta is not None:
        theta = theta.contiguous()
        s = torch.zeros_like(w) if state is None else state.momentum[0].contiguous()
    if state is not None:
        m = state.chunk_start[0].contiguous()
    return _Streams(
        q, k, v.contiguous(), alpha.float().contiguous(), eta.contiguous(), theta,
        gamma.contiguous(), w, s, m, keys, values, writes, before.scale,
    )  # fmt: skip


def _gates(x: _Streams) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """alpha, eta, theta and gamma with one axis of tokens."""
    theta = None if x.theta is None else x.theta.flatten(0, 1)
    return x.alpha.flatten(0, 1), x.eta.flatten(0, 1), theta, x.gamma.flatten(0, 1)


def _forward(tensors: list[Tensor], settings: Settings, save: bool) -> list[Tensor]:
    a = unflatten(tensors, settings)
    if a.q.shape[0] == 0 or a.q.shape[1] == 0:
        return find("omega_rule", DEFINITION).forward(tensors, settings, save)
    with torch.no_grad():
        at, spans = _layout(a)
        x = _prepare(a, at, spans)
        found = coefficients.forward(*_gates(x), at, spans)
        y, w, s, starts_w, starts_s = matrix.forward(
            x.q, x.k, x.target, found, x.w, x.s, x.m, at, spans, l2=a.rule.objective == "l2"
        )
        length = a.q.shape[1]
        position = torch.zeros_like(at.rows[:, 0]) if a.state is None else a.state.position
        position = position.to(a.q.device, torch.int64) + length
        # M^(0) of the chunk that comes next: W after a whole chunk, else that of the last one.
        start = starts_w[(at.rows[:, 0] + at.rows[:, 1] - 1).long()]
        if x.m is not None:
            old = (at.rows[:, 1] == 1) & ((position - length) % spans.chunk > 0)
            start = torch.where(old[:, None, None, None], x.m, start)
        whole = position % spans.chunk == 0
        start = torch.where(whole[:, None, None, None], w, start)
        state = OmegaState(
            weights=(w,),
            momentum=() if s is None else (s,),
            chunk_start=(start,),
            keys=x.keys,
            values=x.values,
            writes=x.writes,
            scale=x.scale,
            position=position,
        )
        outputs = [y, *(t.clone() for t in state.tensors())]
        if save:
            groups = [starts_w] if starts_s is None else [starts_w, starts_s]
            outputs += [t.unflatten(0, (at.batch, at.per_row)) for t in groups]
            # A matrix memory's discount carries no scale.
            outputs.append(w.new_zeros(at.batch, at.per_row, w.shape[1]))
        return outputs


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], settings: Settings
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    a = unflatten(leaves, settings)
    dy, dw, *rest = grads
    ds = rest.pop(0) if a.theta is not None else None
    dm, *state = rest
    if a.q.shape[0] == 0 or a.q.shape[1] == 0:
        # No kernel for no token: the state passes through.
        return find("omega_rule", DEFINITION).backward(grads, tensors, saved, settings)
    at, spans = _layout(a)
    with torch.enable_grad():
        x = _prepare(a, at, spans)
    plain = _Streams._make(None if t is None else t.detach() for t in x)
    found = coefficients.forward(*_gates(plain), at, spans)
    starts = [t.flatten(0, 1) for t in saved[:-1]]
    dq, dk, dv, gradient, dw, ds, dm = matrix.backward(
        dy.contiguous(), dw.contiguous(), None if ds is None else ds.contiguous(),
        dm.contiguous(), plain.q, plain.k, plain.target, found, starts[0],
        starts[1] if len(starts) > 1 else None, plain.m, at, spans,
        l2=a.rule.objective == "l2",
    )  # fmt: skip
    d_gates = coefficients.backward(*_gates(plain), at, spans, gradient)
    gates = (plain.alpha, plain.eta, plain.theta, plain.gamma)
    d_gates = [
        d if g is None or d is None else d.view_as(g) for d, g in zip(d_gates, gates, strict=True)
    ]
    pairs = zip(x, (dq, dk, dv, *d_gates, dw, ds, dm, *state), strict=True)
    pairs = [(o, g) for o, g in pairs if o is not None and g is not None and o.requires_grad]
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    )


PROVIDER = Provider("triton", _supports, _forward, _backward)
