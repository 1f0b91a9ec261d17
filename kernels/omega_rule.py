"""The Triton provider of `atlas::omega_rule` and its backward.

What is not the recurrence (feature maps, the gates' elementwise arithmetic, histories) is PyTorch
under autograd, done again in the backward; coefficients.py, discount.py, matrix.py and deep/ do
the rest.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from atlas_blocks.functional import rule as rules
from atlas_blocks.functional.documents import (
    document_bounds,
    document_of,
    last_tokens,
    with_past,
)
from atlas_blocks.functional.groups import chunk_count
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.rule import Arguments, OmegaState
from atlas_blocks.functional.walk import muon_chunk
from atlas_blocks.kernels import coefficients, matrix, matrix_backward, newton_schulz
from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.deep import batches as deep
from atlas_blocks.kernels.deep import call as deep_call
from atlas_blocks.kernels.discount import DiscountSums
from atlas_blocks.kernels.tiles import Layout, layout, no_device
from atlas_blocks.ops.newton_schulz import NewtonSchulz
from atlas_blocks.ops.omega_rule import (
    Call,
    Settings,
    definition_backward,
    definition_forward,
    unflatten,
)
from atlas_blocks.ops.providers import DEFINITION, Provider, find

# Beyond these a chunk's matrices no longer fit one program.
LARGEST_CHUNK, LARGEST_WINDOW = 64, 64
LARGEST_VALUE, LARGEST_DEEP_VALUE, LARGEST_FEATURES = 256, 128, 8192


class _Streams(NamedTuple):
    """What the kernels read, differentiable in the op's inputs.

    HIST tokens of history come first in k, target and mass, before each of packed documents. eta
    is discounted where the memory is a matrix; mass is there for a deep memory's discount.
    """

    q: Tensor  # phi(q) [B, T, H, D]
    k: Tensor  # phi(k) [B, HIST + T, H, D]
    target: Tensor  # v, or v - r(k) [B, HIST + T, H, V]
    alpha: Tensor  # [B, T, H]
    eta: Tensor  # [B, T, H]
    theta: Tensor | None  # [B, T, H]
    gamma: Tensor  # [B, T, H, c]
    mass: Tensor | None  # [B, HIST + T, H]


class _Rows(NamedTuple):
    """The sequences of a call, rows of the batch or packed documents, R of them."""

    at: Layout
    spans: Spans
    bounds: Tensor  # where their tokens begin and end [R + 1]
    document: Tensor | None  # of every token, where they are packed [T]
    batches: list[deep.Batch]  # of packed documents with a deep memory

    def with_past(self, past: Tensor, x: Tensor) -> Tensor:
        """[R, n, ...] and [B, T, ...] -> [B, n + T, ...], or [1, R n + T, ...] where packed."""
        if self.document is None:
            return torch.cat([past.to(x.dtype), x], 1)
        return with_past(past, x, self.bounds, self.document)

    def last(self, stream: Tensor, past: Tensor, *, joined: bool) -> Tensor:
        """The last n tokens [R, n, ...], from those before the call where it is too short; joined:
        whether the stream is `with_past`'s."""
        n, t = past.shape[1], stream.to(past.dtype)
        if self.document is not None:
            return last_tokens(t if joined else self.with_past(past, t), n, self.bounds)
        if t.shape[1] < n:
            t = torch.cat([past[:, : n - t.shape[1]], t], 1)
        return t[:, t.shape[1] - n :]


class _Memory(NamedTuple):
    """What a call begins with: lists of [R, H, dout, din], and scale [R, H]."""

    w: list[Tensor]  # W
    s: list[Tensor]  # S, empty without momentum
    m: list[Tensor]  # M^(0), empty without a state
    scale: Tensor


class _History(NamedTuple):
    """The last tokens, for the next call."""

    keys: Tensor
    values: Tensor
    writes: Tensor


def _supports(call: Call) -> str | None:
    rule = call.rule
    for name, value, served in (
        ("dtype of q", call.dtype, (torch.bfloat16, torch.float16, torch.float32)),
        ("state dtype", call.state_dtype, (torch.float32,)),
    ):
        if value not in served:
            return f"{name} {value} has no kernel, only {' and '.join(map(str, served))}"
    if rule.update == "muon":
        refused = (newton_schulz.refused_shape(*shape) for shape in call.weight_shapes)
        return no_device(call.device, call.dtype) or next(filter(None, refused), None)
    widest = LARGEST_VALUE if rule.memory == "matrix" else LARGEST_DEEP_VALUE
    for name, size, most in (
        ("chunk_size", rule.chunk_size, LARGEST_CHUNK),
        ("window", rule.window, LARGEST_WINDOW),
        ("value width", call.value_width, widest),
        ("feature width", call.feature_width, LARGEST_FEATURES),
    ):
        if size > most:
            return f"{name} {size} is beyond the kernels' {most}"
    return no_device(call.device, call.dtype)


def _orthogonalise(s: Tensor, steps: int) -> Tensor:
    return NewtonSchulz.apply("triton", steps, steps, "jordan", s)


_muon_chunk = partial(muon_chunk, orthogonalise=_orthogonalise)


def _rows(a: Arguments) -> _Rows:
    state, chunk, matrix_memory = a.state, a.rule.chunk_size, a.rule.memory == "matrix"
    history = 0 if state is None else a.rule.history
    least = 16 if matrix_memory else deep_call.LEAST_HALO
    spans = Spans.of(chunk, a.rule.window, history, least)
    (batch, length), device, begun = a.q.shape[:2], a.q.device, state is not None
    position = None if state is None else state.position
    if a.cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=device) * length
        at = layout(bounds, length, chunk, position, per_row=chunk_count(length, chunk, begun))
        return _Rows(at, spans, bounds, None, [])
    numbers = document_bounds(a.cu_seqlens, length)
    lengths = [stop - start for start, stop in pairwise(numbers)]
    bounds = a.cu_seqlens.to(device, torch.int64)
    count = chunk_count(length, chunk, begun, a.sequences)
    at, parts = layout(bounds, max(lengths), chunk, position, count=count), []
    if not matrix_memory:
        parts = deep.batches(at, [chunk_count(n, chunk, begun) for n in lengths])
    return _Rows(at, spans, bounds, document_of(bounds, length), parts)


def _times(a: Arguments, rows: _Rows) -> Tensor:
    """Which token of its sequence each one is [B or 1, T]."""
    times = torch.arange(a.q.shape[1], device=a.q.device)[None]
    if rows.document is not None:
        times = times - rows.bounds[rows.document]
    if a.state is None:
        return times
    first = a.state.position.to(times.device)
    return times + (first[:, None] if rows.document is None else first[rows.document])


def _prepare(a: Arguments, rows: _Rows) -> tuple[_Streams, _Memory, _History]:
    q, k, v, alpha, eta, theta, gamma, _, phi, rule, state, _ = a
    gamma = gamma.float()
    if rule.window > 1:
        # The window does not reach back over the start of the sequence.
        lags = torch.arange(rule.window, device=q.device)
        gamma = gamma * (lags <= _times(a, rows)[..., None])[:, :, None]
    eta, theta = eta.float(), None if theta is None else theta.float()
    mass = own_mass = rules.write_mass(eta, theta, gamma) if rule.write_discount else None

    before = state
    if before is None:
        before = rules.initial_state(q, v, a.weights, rule, False, a.sequences)
    if state is not None:
        k, v = rows.with_past(state.keys, k), rows.with_past(state.values, v)
        mass = None if mass is None else rows.with_past(state.writes, mass)

    def last(stream: Tensor, past: Tensor) -> Tensor:
        return rows.last(stream, past, joined=state is not None)

    writes = before.writes if mass is None else last(mass, before.writes)
    history = _History(last(k, before.keys), last(v, before.values), writes)

    def lifted(x: Tensor) -> Tensor:
        x = x if phi is None else phi(x.float()).to(x.dtype)
        return x.contiguous()

    target = v.float() - k.float() if _has_residual(a) and rule.objective == "l2" else v
    q, k = lifted(q), lifted(k)
    if mass is not None and rule.memory == "matrix":
        rho, own = DiscountSums.apply(k, mass.contiguous(), rows.at, rows.spans)
        eta, mass = eta * torch.exp(-rho) / (own_mass * own).clamp(min=1), None
    streams = _Streams(
        q, k, target.contiguous(), alpha.float().contiguous(), eta.contiguous(),
        None if theta is None else theta.contiguous(), gamma.contiguous(),
        None if mass is None else mass.contiguous(),
    )  # fmt: skip
    w = [t.contiguous() for t in before.weights]
    s: list[Tensor] = []
    if theta is not None:
        s = [torch.zeros_like(t) for t in w] if state is None else list(state.momentum)
    m = [] if state is None else list(state.chunk_start)
    s, m = ([t.contiguous() for t in group] for group in (s, m))
    return streams, _Memory(w, s, m, before.scale.contiguous()), history


def _has_residual(a: Arguments) -> bool:
    return MEMORIES[a.rule.memory].residual and a.q.shape[-1] == a.v.shape[-1]


def _gates(x: _Streams) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """alpha, eta, theta and gamma with one axis of tokens."""
    theta = None if x.theta is None else x.theta.flatten(0, 1)
    return x.alpha.flatten(0, 1), x.eta.flatten(0, 1), theta, x.gamma.flatten(0, 1)


def _forward(tensors: list[Tensor], settings: Settings, save: bool) -> list[Tensor]:
    if settings.update == "muon":
        return definition_forward(tensors, settings, save, _muon_chunk)
    a = unflatten(tensors, settings)
    if a.q.shape[0] == 0 or a.q.shape[1] == 0:
        return find("omega_rule", DEFINITION).forward(tensors, settings, save)
    with torch.no_grad():
        rows = _rows(a)
        at, spans = rows.at, rows.spans
        x, memory, history = _prepare(a, rows)
        l2, gates = a.rule.objective == "l2", _gates(x)
        if a.rule.memory == "matrix":
            found = coefficients.forward(*gates, at, spans)
            one = matrix.forward(
                x.q, x.k, x.target, found, memory.w[0], _first(memory.s), _first(memory.m),
                at, spans, l2=l2,
            )  # fmt: skip
            y, w, s, starts_w, starts_s = one[0], *([] if t is None else [t] for t in one[1:])
            # A matrix memory's discount carries no scale.
            scale, scales = memory.scale, memory.scale.new_zeros(at.count, a.q.shape[2])
        else:
            call = deep_call.Call(
                x.q, x.k, x.target, *gates, x.mass, memory.w, memory.s, memory.m, at, spans, l2
            )
            y, w, s, scale, starts_w, starts_s, scales = deep.forward(
                call, memory.scale, rows.batches
            )
            if _has_residual(a):
                y = y + a.q
        first = torch.zeros_like(at.rows[:, 0]) if a.state is None else a.state.position
        first = first.to(a.q.device, torch.int64)
        position = first + rows.bounds.diff()

        def chunk_start(i: int) -> Tensor:
            """M^(0) of the token that comes next: W after a whole chunk, else the last chunk's."""
            start = starts_w[i][(at.rows[:, 0] + at.rows[:, 1] - 1).long()]
            if memory.m:
                old = (at.rows[:, 1] == 1) & (first % spans.chunk > 0)
                start = torch.where(old[:, None, None, None], memory.m[i], start)
            whole = position % spans.chunk == 0
            return torch.where(whole[:, None, None, None], w[i], start)

        state = OmegaState(
            weights=tuple(w),
            momentum=tuple(s),
            chunk_start=tuple(map(chunk_start, range(len(w)))),
            keys=history.keys,
            values=history.values,
            writes=history.writes,
            scale=scale,
            position=position,
        )
        outputs = [y.to(a.q.dtype), *(t.clone() for t in state.tensors())]
        if save:
            starts = (*starts_w, *starts_s, scales)
            shape = (at.batch, at.per_row) if at.per_row else (1, at.count)
            outputs += [t.unflatten(0, shape) for t in starts]
        return outputs


def _first(group: list[Tensor]) -> Tensor | None:
    """The one weight of a matrix memory, where there is any."""
    return group[0] if group else None


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], settings: Settings
) -> list[Tensor]:
    if settings.update == "muon":
        return definition_backward(grads, tensors, saved, settings, _muon_chunk)
    if 0 in tensors[0].shape[:2]:
        # Of no token there is nothing to do: the state passes through.
        return find("omega_rule", DEFINITION).backward(grads, tensors, saved, settings)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    a = unflatten(leaves, settings)
    dy, *rest = (g.contiguous() for g in grads)
    count = len(a.weights)
    dw, rest = rest[:count], rest[count:]
    ds, rest = (rest[:count], rest[count:]) if settings.momentum else ([], rest)
    dm, (*d_history, d_scale) = rest[:count], rest[count:]
    rows = _rows(a)
    at, spans = rows.at, rows.spans
    with torch.enable_grad():
        x, memory, history = _prepare(a, rows)
    *starts, scales = (t.flatten(0, 1) for t in saved)
    starts_w, starts_s = starts[:count], starts[count:]
    plain = _Streams._make(None if t is None else t.detach() for t in x)
    w, s, m = ([t.detach() for t in group] for group in memory[:3])
    gates, l2 = _gates(plain), a.rule.objective == "l2"
    d_mass = d_read = None
    if a.rule.memory == "matrix":
        found = coefficients.forward(*gates, at, spans)
        dq, dk, dv, gradient, *one = matrix_backward.backward(
            dy, dw[0], _first(ds), dm[0], plain.q, plain.k, plain.target, found, starts_w[0],
            _first(starts_s), _first(m), at, spans, l2=l2,
        )  # fmt: skip
        dw, ds, dm = ([] if t is None else [t] for t in one)
        d_gates = coefficients.backward(*gates, at, spans, gradient)
    else:
        call = deep_call.Call(
            plain.q, plain.k, plain.target, *gates, plain.mass, w, s, m, at, spans, l2
        )
        dq, dk, dv, d_gates, d_mass, dw, ds, dm, d_scale = deep.backward(
            call, starts_w, starts_s, scales, dy, dw, ds, dm, d_scale, rows.batches
        )
        if _has_residual(a):
            d_read = dy
    outputs = (x.q, x.k, x.target, x.alpha, x.eta, x.theta, x.gamma, x.mass, *history)
    outputs += (*memory.w, *memory.s, *memory.m, memory.scale, a.q)
    found = (dq, dk, dv, *d_gates, d_mass, *d_history, *dw, *ds, *dm, d_scale, d_read)
    if a.state is None:
        found = found[: -len(dm) - 2] + found[-2:]
    pairs = [
        (t, g.view_as(t).to(t.dtype))
        for t, g in zip(outputs, found, strict=True)
        if t is not None and g is not None and t.requires_grad
    ]
    return list(
        torch.autograd.grad(
            [t for t, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    )


PROVIDER = Provider("triton", _supports, _forward, _backward)
