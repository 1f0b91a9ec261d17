"""What the kernels of the Omega rule read, made of the op's arguments.

Feature maps, the gates' elementwise arithmetic, limits and histories: PyTorch under autograd, done
again in the backward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from atlas_blocks.documents.definition import document_bounds, document_of, last_tokens, with_past
from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.deep import batches as deep
from atlas_blocks.kernels.deep import call as deep_call
from atlas_blocks.kernels.online_limits import limits
from atlas_blocks.kernels.tiles import Layout, layout
from atlas_blocks.omega.arguments import Arguments, first_state
from atlas_blocks.omega.groups import chunk_count
from atlas_blocks.omega.memories import MEMORIES
from atlas_blocks.omega.online import masses


class Streams(NamedTuple):
    """What the kernels read, differentiable in the op's inputs.

    HIST tokens of history come first in k and target, GATES of them in the gates, before each of
    packed documents. eta is limited already where the memory is a matrix.
    """

    q: Tensor  # phi(q) [B, T, H, D]
    k: Tensor  # phi(k) [B, HIST + T, H, D]
    target: Tensor  # v, or v - r(k) [B, HIST + T, H, V]
    alpha: Tensor  # [B, GATES + T, H]
    eta: Tensor  # [B, GATES + T, H]
    theta: Tensor | None  # [B, GATES + T, H]
    gamma: Tensor  # 0 before the sequence's start [B, GATES + T, H, c]
    # What windows will still write of a key, by lag: `online_limits.Limits.pend`, or of a deep
    # memory `omega.online.masses` [B, GATES + T, H, c]
    pend: Tensor | None
    weight: Tensor | None  # of a deep memory: sum_j gamma[t, j], as if all lay within it [as eta]


class Rows(NamedTuple):
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


class Memory(NamedTuple):
    """The memory at the first chunks' starts: lists of [R, H, dout, din]; a matrix memory's scale
    after the call [R, H] and before each chunk [slots, H], a deep one's before the call alone."""

    w: list[Tensor]
    s: list[Tensor]  # empty without momentum
    scale: Tensor
    scales: Tensor | None


def rows_of(a: Arguments) -> Rows:
    rule, state, matrix_memory = a.rule, a.state, a.rule.memory == "matrix"
    chunk, history = rule.chunk_size, 0 if state is None else rule.history
    least = 16 if matrix_memory else deep_call.LEAST_HALO
    spans = Spans.of(chunk, rule.window, history, history if rule.rewinds else 0, least)
    (batch, length), device, begun = a.q.shape[:2], a.q.device, state is not None
    # Where the rule does not depend on where chunks lie, one begins here.
    position = None if state is None or not rule.rewinds else state.position
    if a.cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=device) * length
        at = layout(bounds, length, chunk, position, per_row=chunk_count(length, chunk, begun))
        return Rows(at, spans, bounds, None, [])
    numbers = document_bounds(a.cu_seqlens, length)
    lengths = [stop - start for start, stop in pairwise(numbers)]
    bounds = a.cu_seqlens.to(device, torch.int64)
    count = chunk_count(length, chunk, begun, a.sequences)
    at, parts = layout(bounds, max(lengths), chunk, position, count=count), []
    if not matrix_memory:
        parts = deep.batches(at, [chunk_count(n, chunk, begun) for n in lengths])
    return Rows(at, spans, bounds, document_of(bounds, length), parts)


def _times(a: Arguments, rows: Rows) -> Tensor:
    """Which token of its sequence each one is [B or 1, T]."""
    times = torch.arange(a.q.shape[1], device=a.q.device)[None]
    if rows.document is not None:
        times = times - rows.bounds[rows.document]
    if a.state is None:
        return times
    first = a.state.position.to(times.device)
    return times + (first[:, None] if rows.document is None else first[rows.document])


class Prepared(NamedTuple):
    """All that a call's kernels need."""

    x: Streams
    memory: Memory
    history: dict[str, Tensor]  # the last tokens, for the next call
    read: Tensor | None  # what is added to the kernels' y: r(q), or M_0 phi(q)
    # M_0 [1, H, V, D] where a matrix memory decays to it: the kernels' memory is what it has beyond
    offset: Tensor | None
    anchors: list[Tensor]  # M_0, each [H, dout, din], where a deep memory decays to it
    anchored: (
        Tensor | None
    )  # what it reads of every key, where errors are corrected [B, HIST + T, H, V]


def prepare(a: Arguments, rows: Rows) -> Prepared:
    phi, rule, before = a.feature_map, a.rule, a.state or first_state(a)
    given = {n: getattr(a, n) for n in ("alpha", "eta", "theta", "gamma")}
    streams = {"keys": a.k, "values": a.v}
    streams |= {n: x.float() for n, x in given.items() if x is not None}
    # Only a state has tokens to put in front.
    joined = a.state is not None
    if joined:
        streams = {n: rows.with_past(getattr(before, n), x) for n, x in streams.items()}
    last = {n: rows.last(x, getattr(before, n), joined=joined) for n, x in streams.items()}
    history = {"theta": before.theta} | last

    def lifted(x: Tensor) -> Tensor:
        x = x if phi is None else phi(x.float()).to(x.dtype)
        return x.contiguous()

    k, v, alpha, eta, gamma = (streams[n] for n in ("keys", "values", "alpha", "eta", "gamma"))
    theta, seen, pend, weight = streams.get("theta"), _seen(a, rows), None, None
    residual = MEMORIES[rule.memory].residual and a.q.shape[-1] == a.v.shape[-1]
    target = v.float() - k.float() if residual and rule.objective == "l2" else v
    q, k = lifted(a.q), lifted(k)
    scale, scales = before.scale.contiguous(), None
    if rule.limits and rule.memory == "matrix":
        eta, pend, scale, scales = limits(k, eta, theta, gamma, seen, scale, rows.at, rows.spans)
    elif rule.limits:
        pend, weight = masses(eta, theta, gamma), gamma.sum(-1)
    w, s = before.weights, before.momentum
    if rule.rewinds:
        w, s = before.chunk_start, before.momentum_start
    read, offset = a.q if residual else None, None
    if rule.memory == "matrix" and rule.decay_to == "initial":
        # W x - v = (W - M_0) x - (v - M_0 x), and W - M_0 decays to zero.
        first = a.weights[0].float()
        w, offset, read = (w[0] - first,), first[None], _read(first, q)
        target = target - _read(first, k) if rule.objective == "l2" else target
    anchors: list[Tensor] = []
    anchored = None
    if rule.memory != "matrix" and rule.decay_to == "initial":
        anchors = [t.float().contiguous() for t in a.weights]
        if rule.corrects:
            structure = MEMORIES[rule.memory]
            anchored = structure.forward(lambda i, z: _read(anchors[i], z), k).contiguous()
    w, s = ([t.contiguous() for t in group] for group in (w, s))
    x = Streams(q, k, target, alpha, eta, theta, seen, pend, weight)
    x = Streams._make(None if t is None else t.contiguous() for t in x)
    memory = Memory(w, s, scale, scales)
    return Prepared(x, memory, history, read, offset, anchors, anchored)


def _read(w: Tensor, x: Tensor) -> Tensor:
    """w [H, V, D] of x [B, T, H, D]."""
    return (x.float().transpose(1, 2) @ w.mT).transpose(1, 2)


def _seen(a: Arguments, rows: Rows) -> Tensor:
    """gamma where the window does not reach back over the sequence's start [B, GATES + T, H, c]."""
    lags, gates = torch.arange(a.rule.window, device=a.q.device), rows.spans.gates
    seen = a.gamma.float() * (lags <= _times(a, rows)[..., None])[:, :, None]
    if not gates:
        return seen
    assert a.state is not None
    ages = torch.arange(gates, 0, -1, device=a.q.device)
    times = a.state.position.to(a.q.device)[:, None] - ages
    past = a.state.gamma * (lags <= times[..., None])[:, :, None]
    return rows.with_past(past, seen)
