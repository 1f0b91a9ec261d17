"""The Triton provider of `atlas::omega_rule` and its backward.

What is not the recurrence is PyTorch (prelude.py); coefficients.py, online.py, matrix.py and deep/
do the rest. A call that begins inside a chunk of a rule that rewinds does that chunk again from its
start: its first tokens come from the state, and only the others' y is stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks.graph.providers import DEFINITION, Provider, find
from atlas_blocks.kernels import coefficients, matrix, matrix_backward, newton_schulz, online
from atlas_blocks.kernels.coefficients import Coefficients
from atlas_blocks.kernels.deep import batches as deep
from atlas_blocks.kernels.deep import call as deep_call
from atlas_blocks.kernels.prelude import Memory, Rows, Streams, prepare, rows_of
from atlas_blocks.kernels.tiles import no_device, unknown
from atlas_blocks.newton_schulz.op import NewtonSchulz
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import (
    OmegaCall,
    Settings,
    definition_backward,
    definition_forward,
    unflatten,
)
from atlas_blocks.omega.state import OmegaState
from atlas_blocks.omega.walk import stepwise_chunk

# Beyond these a chunk's matrices no longer fit one program.
LARGEST_CHUNK, LARGEST_WINDOW = 64, 64
LARGEST_VALUE, LARGEST_DEEP_VALUE, LARGEST_FEATURES = 256, 128, 8192


def _supports(call: OmegaCall) -> str | None:
    rule = call.rule
    reason = unknown(rule, call.feature_map)
    if reason is not None:
        return reason
    for name, value, served in (
        ("dtype of q", call.dtype, (torch.bfloat16, torch.float16, torch.float32)),
        ("state dtype", call.state_dtype, (torch.float32,)),
    ):
        if value not in served:
            return f"{name} {value} has no kernel, only {' and '.join(map(str, served))}"
    if not rule.linear:
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


_stepwise_chunk = partial(stepwise_chunk, direction=_orthogonalise)


def _gates(x: Streams) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """alpha, eta, theta and gamma with one axis of tokens."""
    theta = None if x.theta is None else x.theta.flatten(0, 1)
    return x.alpha.flatten(0, 1), x.eta.flatten(0, 1), theta, x.gamma.flatten(0, 1)


def _deep_call(
    a: Arguments,
    x: Streams,
    memory: Memory,
    rows: Rows,
    anchors: list[Tensor],
    anchored: Tensor | None,
) -> deep_call.DeepCall:
    left, weight = (None if t is None else t.flatten(0, 1) for t in (x.pend, x.weight))
    rule, (w, s) = a.rule, memory[:2]
    return deep_call.DeepCall(
        x.q, x.k, x.target, *_gates(x), left, weight, w, s, rows.at, rows.spans,
        rule.objective == "l2", rule.limits, rule.corrects, anchors, anchored,
    )  # fmt: skip


def _system(
    a: Arguments, x: Streams, found: Coefficients, rows: Rows
) -> tuple[Tensor | None, Tensor | None]:
    """pend as `online.solve` reads it, and what it returns where errors are online."""
    pend = None if x.pend is None else x.pend.flatten(0, 1)
    if not a.rule.corrects:
        return pend, None
    return pend, online.solve(x.k, pend, found, rows.at, rows.spans)


class _Ends(NamedTuple):
    """What the next call begins with, from the memory at the call's end or at its last chunk's
    start."""

    whole: Tensor  # whether the last chunk is [R]
    slots: Tensor  # the last chunks' [R]

    @staticmethod
    def of(position: Tensor, rows: Rows) -> _Ends:
        """position: of the next token [R]."""
        at = rows.at
        return _Ends(position % at.chunk == 0, (at.rows[:, 0] + at.rows[:, 1] - 1).long())

    def next(self, end: Tensor, starts: Tensor) -> Tensor:
        """The memory at the start of the next token's chunk [R, H, ...]."""
        return torch.where(self._like(end), end, starts[self.slots])

    def split(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """A gradient of `next`: the end's and the last chunk's start's."""
        return torch.where(self._like(d), d, 0.0), torch.where(self._like(d), 0.0, d)

    def _like(self, t: Tensor) -> Tensor:
        return self.whole.view(-1, *(t.dim() - 1) * (1,))


def _position(a: Arguments, rows: Rows) -> Tensor:
    """Of the token after the call's [R]."""
    first = torch.zeros_like(rows.bounds[:-1])
    if a.state is not None:
        first = a.state.position.to(a.q.device, torch.int64)
    return first + rows.bounds.diff()


def _scale(a: Arguments, memory: Memory, ends: _Ends) -> Tensor:
    """The next call's, of a matrix memory."""
    if memory.scales is None or a.theta is None or not a.rule.rewinds:
        return memory.scale
    return ends.next(memory.scale, memory.scales)


def _forward(tensors: list[Tensor], settings: Settings, save: bool) -> list[Tensor]:
    if not settings.rule.linear:
        return definition_forward(tensors, settings, save, _stepwise_chunk)
    a = unflatten(tensors, settings)
    if a.q.shape[0] == 0 or a.q.shape[1] == 0:
        return find("omega_rule", DEFINITION).forward(tensors, settings, save)
    with torch.no_grad():
        rows = rows_of(a)
        at, spans, position = rows.at, rows.spans, _position(a, rows)
        ends = _Ends.of(position, rows)
        x, memory, history, read, offset, anchors, anchored = prepare(a, rows)
        if a.rule.memory == "matrix":
            found = coefficients.forward(*_gates(x), at, spans)
            solved = _system(a, x, found, rows)[1]
            one = matrix.forward(
                x.q, x.k, x.target, found, solved, memory.w[0], _first(memory.s), at, spans,
                l2=a.rule.objective == "l2", full=a.state is None and a.cu_seqlens is None,
            )  # fmt: skip
            y, w, s, starts_w, starts_s = one[0], *([] if t is None else [t] for t in one[1:])
            scale, scales = _scale(a, memory, ends), memory.scales
            if scales is None:
                scales = scale.new_zeros(at.count, a.q.shape[2])
            if offset is not None:
                there = (at.slots[:, 2] < at.slots[:, 3]).view(-1, 1, 1, 1)
                w, starts_w = [w[0] + offset], [starts_w[0] + offset * there]
        else:
            call = _deep_call(a, x, memory, rows, anchors, anchored)
            y, w, s, scale, starts_w, starts_s, scales = deep.forward(
                call, memory.scale, rows.batches
            )
            # Without momentum nothing is carried.
            scale = memory.scale if a.theta is None else ends.next(scale, scales)
        y = y if read is None else y + read
        groups: dict[str, list[Tensor]] = {"weights": w, "momentum": s}
        groups["chunk_start"] = list(map(ends.next, w, starts_w))
        groups["momentum_start"] = list(map(ends.next, s, starts_s))
        there = OmegaState.groups(a.rule, a.theta is not None)
        groups = {n: groups[n] if there[n] else [] for n in groups}
        fields: dict[str, Any] = {n: tuple(group) for n, group in groups.items()}
        state = OmegaState(
            **{**fields, **history},
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


class _Grads(NamedTuple):
    """Of y and of what the next call begins with."""

    y: Tensor
    w: list[Tensor]  # at the end, of what the next call takes from there
    s: list[Tensor]
    last_w: list[Tensor]  # at the last chunk's start likewise, empty where it takes nothing there
    last_s: list[Tensor]
    rest: dict[str, Tensor]  # of the state's other tensors

    @staticmethod
    def of(grads: list[Tensor], a: Arguments, ends: _Ends) -> _Grads:
        parts, count = (g.contiguous() for g in grads), len(a.weights)
        y, groups = next(parts), {}
        for n, there in OmegaState.groups(a.rule, a.theta is not None).items():
            groups[n] = [next(parts) for _ in range(count if there else 0)]
        rest = dict(zip(OmegaState.REST[:-1], parts, strict=True))
        w, s = groups["weights"], groups["momentum"]
        last_w, last_s = [], []
        if a.rule.rewinds:
            to_w, last_w = zip(*map(ends.split, groups["chunk_start"]), strict=True)
            w = [g + h for g, h in zip(w, to_w, strict=True)]
        if a.rule.rewinds and s:
            to_s, last_s = zip(*map(ends.split, groups["momentum_start"]), strict=True)
            s = [g + h for g, h in zip(s, to_s, strict=True)]
        return _Grads(y, w, s, list(last_w), list(last_s), rest)


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], settings: Settings
) -> list[Tensor]:
    if not settings.rule.linear:
        return definition_backward(grads, tensors, saved, settings, _stepwise_chunk)
    if 0 in tensors[0].shape[:2]:
        # Of no token there is nothing to do: the state passes through.
        return find("omega_rule", DEFINITION).backward(grads, tensors, saved, settings)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    a = unflatten(leaves, settings)
    rows = rows_of(a)
    ends = _Ends.of(_position(a, rows), rows)
    d = _Grads.of(grads, a, ends)
    with torch.enable_grad():
        x, memory, history, read, offset, anchors, anchored = prepare(a, rows)
        scale = _scale(a, memory, ends) if a.rule.memory == "matrix" else memory.scale
    starts = [t.flatten(0, 1) for t in saved]
    d_offset = None
    if offset is not None:
        starts[0] = starts[0] - offset.detach()
        d_offset = sum(d.last_w, d.w[0]).sum(0, keepdim=True)
    plain = Streams._make(None if t is None else t.detach() for t in x)
    if a.rule.memory == "matrix":
        found = _matrix_backward(a, plain, memory, starts, d, ends, rows)
    else:
        detached = [t.detach() for t in anchors]
        kept = None if anchored is None else anchored.detach()
        found = _deep_backward(a, plain, memory, starts, d, ends, rows, detached, kept)
    outputs = (*x, *memory.w, *memory.s, scale, *anchors)
    if a.rule.memory != "matrix":
        outputs += (anchored,)
    outputs += (read, offset, *history.values())
    gradients = (*found, d.y, d_offset, *(d.rest[n] for n in history))
    pairs = [
        (t, g.view_as(t).to(t.dtype))
        for t, g in zip(outputs, gradients, strict=True)
        if t is not None and g is not None and t.requires_grad
    ]
    return list(
        torch.autograd.grad(
            [t for t, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    )


# Of `Streams`, W, S and scale, then of a deep memory's anchors and what they read.
_Found = tuple[Tensor | None, ...]


def _matrix_backward(
    a: Arguments,
    x: Streams,
    memory: Memory,
    starts: list[Tensor],
    d: _Grads,
    ends: _Ends,
    rows: Rows,
) -> _Found:
    at, spans, gates = rows.at, rows.spans, _gates(x)
    coefficient = coefficients.forward(*gates, at, spans)
    pend, solved = _system(a, x, coefficient, rows)
    last = (d.last_w[0], _first(d.last_s)) if d.last_w else None
    found = matrix_backward.backward(
        d.y, d.w[0], _first(d.s), last, x.q, x.k, x.target, pend, coefficient, solved,
        starts[0], starts[1] if d.s else None, at, spans, l2=a.rule.objective == "l2",
    )  # fmt: skip
    d_gates = coefficients.backward(*gates, at, spans, found.coefficients)
    w = (found.w,) if found.s is None else (found.w, found.s)
    return found.q, found.k, found.target, *d_gates, found.pend, None, *w, d.rest["scale"]


def _deep_backward(
    a: Arguments,
    x: Streams,
    memory: Memory,
    starts: list[Tensor],
    d: _Grads,
    ends: _Ends,
    rows: Rows,
    anchors: list[Tensor],
    anchored: Tensor | None,
) -> _Found:
    w, s = ([t.detach() for t in group] for group in memory[:2])
    call = _deep_call(a, x, Memory(w, s, memory.scale, None), rows, anchors, anchored)
    *starts, scales = starts
    count = len(a.weights)
    # Without momentum the scale that was there is what is left: no chunk has a part in it.
    scale = d.rest["scale"]
    carried = a.theta is not None
    found = deep.backward(
        call, starts[:count], starts[count:], scales, d.y, d.w, d.s, d.last_w, d.last_s,
        *ends.split(scale if carried else torch.zeros_like(scale)), rows.batches,
    )  # fmt: skip
    streams = (found.q, found.k, found.target, *found.gates, found.masses, found.weight)
    d_scale = found.scale if carried else scale
    return *streams, *found.w, *found.s, d_scale, *found.anchors, found.anchored


PROVIDER = Provider("triton", _supports, _forward, _backward)
