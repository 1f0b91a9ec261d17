"""Exact phi* as one node of a compiled graph, forward and backward.

Uncompiled, no op is called: the definition runs under its own autograd. In a graph its loop over
blocks would be unrolled. Axes as in definition.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.graph import op_pair
from atlas_blocks.graph.contract import own_empty
from atlas_blocks.kernel_attention.definition import (
    Gates,
    KernelState,
    check_kernel_arguments,
    complete,
    is_softmax,
    run_kernel,
    settings,
    softmax_attention,
)
from atlas_blocks.kernel_attention.walk import KernelSettings


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
    """`functional.kernel_attention`: same arguments, results and errors; one node when compiled."""
    s = settings(q, gamma, objective, scale, normalise, chunk_size, errors)
    check_kernel_arguments(s, q, k, v, alpha, eta, gamma, state)
    if is_softmax(s, alpha, eta, gamma, state):
        return softmax_attention(s, q, k, v)
    gates, state = complete(s, q, v, alpha, eta, gamma, state)
    if not torch.compiler.is_compiling():
        return run_kernel(s, q, k, v, gates, state)
    # Cloned: the chunk's start may be the coefficients themselves, and one tensor may not stand for
    # two inputs.
    state = state.replace(chunk_start=tuple(t.clone() for t in state.chunk_start))
    tensors = [q, k, v, *gates, *state.tensors()]
    y, *after = _node(tensors, *s)
    return y, _state(after)


def _state(tensors: Sequence[Tensor]) -> KernelState:
    keys, coefficients, *start, values, pending, errors, position = tensors
    return KernelState(keys, coefficients, tuple(start), values, pending, errors, position)


def _run(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    q, k, v, alpha, eta, gamma, *state = tensors
    gates: Gates = (alpha, eta, gamma)
    y, after = run_kernel(KernelSettings(*rest), q, k, v, gates, _state(state))
    return [y, *after.tensors()]


def _fake(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    q, _, v, _, _, _, *state = tensors
    T = q.shape[1]
    s = _state(state)

    def grown(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, 0, T, 0))

    after = s.replace(
        keys=grown(s.keys),
        coefficients=grown(s.coefficients),
        chunk_start=tuple(grown(t) for t in s.chunk_start),
    )
    y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    return [y, *(own_empty(t) for t in after.tensors())]


# tensors: q, k, v, alpha, eta, gamma, the state's. -> y, the state's after T tokens.
_node = op_pair.define_pair(
    "kernel_attention",
    "str objective, float scale, bool normalise, int chunk_size, int window, str errors",
    _run,
    _fake,
)
