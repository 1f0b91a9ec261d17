"""Newton-Schulz as an op, forward and backward: see omega/op.py.

... any batch shape, m rows, n columns.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.derivatives import once_differentiable
from atlas_blocks.graph import providers
from atlas_blocks.graph.contract import LIBRARY, implement, own_empty, untraced
from atlas_blocks.graph.flops import Shape, count_by
from atlas_blocks.newton_schulz.definition import backward as iteration_backward
from atlas_blocks.newton_schulz.definition import backward_flops, check_iteration, forward_flops
from atlas_blocks.newton_schulz.definition import forward as iteration
from atlas_blocks.newton_schulz.definition import newton_schulz as definition

LIBRARY.define("newton_schulz(Tensor s, int steps, str coefficients, str provider) -> Tensor")
# -> the gradient of s. With 0 steps, of the normalisation alone: the straight-through gradient.
LIBRARY.define(
    "newton_schulz_backward(Tensor grad, Tensor s, int steps, str coefficients, str provider)"
    " -> Tensor"
)


@dataclass(frozen=True)
class NewtonSchulzCall:
    """What a provider's `supports` learns of a call."""

    device: str  # the device's type
    dtype: torch.dtype  # of s
    rows: int  # m
    columns: int  # n
    needs_grad: bool
    index: int | None = None  # the device's number, current while `supports` is asked


def newton_schulz(
    s: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "jordan",
    gradient: str = "exact",
    provider: str = "auto",
) -> Tensor:
    """`functional.newton_schulz` by a provider: same arguments, result and errors.

    provider: as of `ops.omega_rule`. Raises ValueError where the one asked for cannot serve. One
    graph node when compiled.
    """
    check_iteration(s, steps, coefficients, gradient)
    check.tensor("s", s, "[..., m, n]", s.ndim * [None])
    needs_grad = torch.is_grad_enabled() and s.requires_grad
    # operator.index: a graph serves one width and number of steps, where they are symbolic.
    steps = operator.index(steps)
    rows, columns = operator.index(s.shape[-2]), operator.index(s.shape[-1])
    facts = (s.device.type, s.dtype, rows, columns, needs_grad, s.device.index)
    chosen = _choose(provider, providers.context(), *facts)
    if chosen == providers.DEFINITION and not torch.compiler.is_compiling():
        return definition(s, steps=steps, coefficients=coefficients, gradient=gradient)
    if needs_grad:
        differentiated = steps if gradient == "exact" else 0
        return NewtonSchulz.apply(chosen, steps, differentiated, coefficients, s)
    return torch.ops.atlas.newton_schulz.default(s, steps, coefficients, chosen)


@untraced
def _choose(provider: str, context: str, *facts: Any) -> str:
    """Not traced: providers are imported here, may look at the device, and warn."""
    call = NewtonSchulzCall(*facts)
    return providers.choose("newton_schulz", provider, context, call.device, call)


class NewtonSchulz(torch.autograd.Function):
    """Both directions are ops, so that a pass can lower each. The gradient is that of the first
    `differentiated` steps."""

    @staticmethod
    def forward(
        ctx: Any, provider: str, steps: int, differentiated: int, coefficients: str, s: Tensor
    ) -> Tensor:
        ctx.options = (differentiated, coefficients, provider)
        ctx.save_for_backward(s)
        return torch.ops.atlas.newton_schulz.default(s, steps, coefficients, provider)

    @staticmethod
    @once_differentiable  # second derivatives are the definition's
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        found = torch.ops.atlas.newton_schulz_backward.default(grads[0], s, *ctx.options)
        return None, None, None, None, found


def _wide(t: Tensor) -> Tensor:
    """In the dtype that the definition computes in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _definition(s: Tensor, steps: int, coefficients: str) -> Tensor:
    return iteration(_wide(s), steps, coefficients).to(s.dtype).contiguous()


def _definition_backward(grad: Tensor, s: Tensor, steps: int, coefficients: str) -> Tensor:
    found = iteration_backward(_wide(grad), _wide(s), steps, coefficients)
    return found.to(s.dtype).contiguous()


def _forward(s: Tensor, steps: int, coefficients: str, provider: str) -> Tensor:
    serve = providers.find("newton_schulz", provider).forward
    with no_autocast(s):
        return serve(s, steps, coefficients)


def _backward(grad: Tensor, s: Tensor, steps: int, coefficients: str, provider: str) -> Tensor:
    serve = providers.find("newton_schulz", provider).backward
    with no_autocast(s):
        return serve(grad, s, steps, coefficients)


def _forward_fake(s: Tensor, steps: int, coefficients: str, provider: str) -> Tensor:
    return own_empty(s)


def _backward_fake(grad: Tensor, s: Tensor, steps: int, coefficients: str, provider: str) -> Tensor:
    return own_empty(s)


def _flops(s: Shape, steps: int, *rest: Any, out_shape: Any = None) -> int:
    return math.prod(s[:-2]) * forward_flops(s[-2], s[-1], steps)


def _backward_flops(grad: Shape, s: Shape, steps: int, *rest: Any, out_shape: Any = None) -> int:
    return math.prod(s[:-2]) * backward_flops(s[-2], s[-1], steps)


providers.define(
    "newton_schulz",
    _definition,
    _definition_backward,
    triton=providers.lazily("atlas_blocks.kernels.newton_schulz", automatic_on=("cuda",)),
)
implement("newton_schulz", _forward, _forward_fake)
implement("newton_schulz_backward", _backward, _backward_fake)
count_by("newton_schulz", _flops)
count_by("newton_schulz_backward", _backward_flops)
