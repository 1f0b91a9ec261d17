"""Exact phi* as one node of a compiled graph, forward and backward.

Uncompiled, no op is called: the definition runs under its own autograd. In a graph its loop over
blocks would be unrolled. Axes as in functional/kernel_attention.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_blocks.functional import kernel_attention as definition
from atlas_blocks.functional.kernel_attention import (
    Gates,
    KernelState,
    complete,
    is_softmax,
    run,
    settings,
    softmax_attention,
    validate,
)
from atlas_blocks.functional.kernel_walk import Settings
from atlas_blocks.ops.contract import own, own_empty, recording

_SETTINGS = (
    "str objective, float scale, bool normalise, int chunk_size, int window, bool write_discount"
)
_LIBRARY = torch.library.Library("atlas", "FRAGMENT")
# tensors: q, k, v, alpha, eta, gamma, the state's. -> y, the state's after T tokens.
_LIBRARY.define(f"kernel_attention(Tensor[] tensors, {_SETTINGS}) -> Tensor[]")
# grads: of y and of the state's tensors but its position. -> those of all floating tensors.
_LIBRARY.define(
    f"kernel_attention_backward(Tensor[] grads, Tensor[] tensors, {_SETTINGS}) -> Tensor[]"
)


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
    write_discount: bool = False,
    state: KernelState | None = None,
) -> tuple[Tensor, KernelState]:
    """`functional.kernel_attention`: same arguments, results and errors; one node when compiled."""
    if not torch.compiler.is_compiling():
        return definition(
            q,
            k,
            v,
            alpha=alpha,
            eta=eta,
            gamma=gamma,
            objective=objective,
            scale=scale,
            normalise=normalise,
            chunk_size=chunk_size,
            write_discount=write_discount,
            state=state,
        )
    s = settings(q, gamma, objective, scale, normalise, chunk_size, write_discount)
    validate(s, q, k, v, alpha, eta, gamma, state)
    if is_softmax(s, alpha, eta, gamma, state):
        return softmax_attention(s, q, k, v)
    gates, state = complete(s, q, v, alpha, eta, gamma, state)
    # Cloned: the chunk's start may be the coefficients themselves, and one tensor may not stand for
    # two inputs.
    state = dataclasses.replace(state, chunk_start=tuple(t.clone() for t in state.chunk_start))
    tensors = [q, k, v, *gates, *state.tensors()]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, *after = _KernelAttention.apply(s, *tensors)
    else:
        y, *after = torch.ops.atlas.kernel_attention.default(tensors, *s)
    return y, _state(after)


def _state(tensors: Sequence[Tensor]) -> KernelState:
    keys, coefficients, *start, values, writes, position = tensors
    return KernelState(keys, coefficients, tuple(start), values, writes, position)


class _KernelAttention(torch.autograd.Function):
    """Both directions are ops. The backward begins with a forward of its own: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, s: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = torch.ops.atlas.kernel_attention.default(list(tensors), *s)
        ctx.settings = s
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(outputs[-1])  # the position
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.atlas.kernel_attention_backward.default(
            list(grads[:-1]), list(ctx.saved_tensors), *ctx.settings
        )
        return None, *found, None


def _run(s: Settings, tensors: Sequence[Tensor]) -> list[Tensor]:
    q, k, v, alpha, eta, gamma, *state = tensors
    gates: Gates = (alpha, eta, gamma)
    y, after = run(s, q, k, v, gates, _state(state))
    return [y, *after.tensors()]


def _forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    with torch.no_grad():
        return [own(t) for t in _run(Settings(*rest), tensors)]


def _backward(grads: list[Tensor], tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    with torch.autocast(tensors[0].device.type, enabled=False), recording(), torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = _run(Settings(*rest), leaves)[:-1]
        found = torch.autograd.grad(
            outputs, leaves[:-1], grads, allow_unused=True, materialize_grads=True
        )
    return [own(g) for g in found]


def _forward_fake(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    q, _, v, _, _, _, *state = tensors
    T = q.shape[1]
    s = _state(state)

    def grown(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, 0, T, 0))

    after = dataclasses.replace(
        s,
        keys=grown(s.keys),
        coefficients=grown(s.coefficients),
        chunk_start=tuple(grown(t) for t in s.chunk_start),
    )
    y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    return [y, *(own_empty(t) for t in after.tensors())]


def _backward_fake(grads: list[Tensor], tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    return [own_empty(t) for t in tensors[:-1]]


for _name, _implementation, _fake in (
    ("kernel_attention", _forward, _forward_fake),
    ("kernel_attention_backward", _backward, _backward_fake),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atlas::{_name}", _fake, lib=_LIBRARY)
